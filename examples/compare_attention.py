"""Swap the attention of a whole model by one argument, and compare what it does to gradients.

  python examples/compare_attention.py                          # xla against auto
  python examples/compare_attention.py mosaic_gpu --dtype bfloat16
  python examples/compare_attention.py triton --interpret --length 64   # on a laptop
"""

import argparse
import contextlib

import haiku as hk
import jax
import jax.numpy as jnp

from palm_haiku import PaLM, kernels


def gradients(implementation, dtype, tokens):
  """Gradients of the mean squared logit, with every op of the model run by `implementation`."""
  model = hk.without_apply_rng(hk.transform(lambda tokens: PaLM(
      num_tokens=256, dim=256, depth=2, heads=4, dim_head=64, position="alibi", norm="rms",
      shared_kv=True, dtype=dtype, implementation=implementation)(tokens)))
  params = jax.jit(model.init)(jax.random.key(0), tokens)
  return jax.jit(jax.grad(lambda p: jnp.square(model.apply(p, tokens)).mean()))(params)


def main(argv=None) -> float:
  """Returns the largest difference over all parameters, relative to the gradient's size."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("implementation", nargs="?", default="auto")
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--length", type=int, default=512)
  parser.add_argument("--interpret", action="store_true",
                      help="run the kernels in their interpreters, on a CPU")
  args = parser.parse_args(argv)
  query, key = (jax.ShapeDtypeStruct((2, args.length, heads, 64), args.dtype) for heads in (4, 1))
  print(kernels.explain("flash_attention", query, key, implementation=args.implementation))
  for chip in ("a100", "h100", "v5e"):
    print(f"on {chip}:", kernels.explain("flash_attention", query, key, chip=chip).reason)
  tokens = jax.random.randint(jax.random.key(1), (2, args.length), 0, 256)
  want = gradients("xla", args.dtype, tokens)
  with kernels.interpret() if args.interpret else contextlib.nullcontext():
    got = gradients(args.implementation, args.dtype, tokens)
  worst = 0.0
  for module, weights in want.items():
    for name, x in weights.items():
      error = float(jnp.linalg.norm(got[module][name] - x) / jnp.linalg.norm(x))
      print(f"{module}/{name:12} {error:.2e}")
      worst = max(worst, error)
  return worst


if __name__ == "__main__":
  main()
