"""Ask what a kernel costs on a chip that is not here, and get the answer on a laptop.

    pip install '.[aot]'
    python examples/judge_a_kernel.py h200 --dim-head 128
    python examples/judge_a_kernel.py v6e --seq-len 8192

Compiles the attention kernel of the chip, with ALiBi, by the chip's own compiler, and prints what
came out: registers, spills and the main loop's instructions on a GPU, the loops' cycles and the
use of the matrix units on a TPU. Nothing runs, so nothing here is a time.
"""

import argparse

import jax

from palm_haiku import kernels
from palm_haiku.kernels import aot
from palm_haiku.kernels.core import chips


def attention(implementation, num_queries, dim_head, heads):
  """The function to compile, and the types of its arguments; runs in a process of its own."""
  slopes = kernels.alibi_slopes(heads)
  query, key = (jax.ShapeDtypeStruct((1, num_queries, n, dim_head), "bfloat16")
                for n in (heads, 1))
  return (lambda query, key, value: kernels.flash_attention(
      query, key, value, alibi_slopes=slopes, implementation=implementation)), (query, key, key)


def main(argv=None) -> aot.Report:
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("chip", choices=sorted(chips.ALL))
  parser.add_argument("--implementation", default="auto", help="of the attention (default auto)")
  parser.add_argument("--seq-len", type=int, default=2048)
  parser.add_argument("--dim-head", type=int, default=128)
  parser.add_argument("--heads", type=int, default=16, help="query heads, on one key/value head")
  args = parser.parse_args(argv)
  report = aot.report(
      f"{__file__}:attention", target=args.chip, implementation=args.implementation,
      num_queries=args.seq_len, dim_head=args.dim_head, heads=args.heads)
  print(report)
  for problem in report.problems:
    print("problem:", problem)
  return report


if __name__ == "__main__":
  main()
