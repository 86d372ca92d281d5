"""python -m palm_haiku.kernels.aot TARGET MODULE:FUNCTION [SHAPES] [NAME=VALUE]"""

import argparse
import ast
import re
import sys

import numpy as np

from ..core import chips
from . import AotError, Steps, report

_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64",
           "s8": "int8", "i8": "int8", "s32": "int32", "i32": "int32", "s64": "int64",
           "u8": "uint8", "u32": "uint32", "pred": "bool", "bool": "bool"}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
      prog="python -m palm_haiku.kernels.aot",
      description="Compile a function for a chip that is not here, and report on its kernels.",
      formatter_class=argparse.RawDescriptionHelpFormatter,
      epilog="examples:\n"
      "  python -m palm_haiku.kernels.aot h200 palm_haiku.kernels:flash_attention \\\n"
      "      'bf16[1,1920,16,128]' 'bf16[1,1920,1,128]' 'bf16[1,1920,1,128]' --square 1920,1920\n"
      "  python -m palm_haiku.kernels.aot v6e lab.py:splash seq=2048 --active 0.75 --edge 0.5\n\n"
      "Exit status: 0 clean, 3 something is wrong with a kernel (spills, serialized wgmma, a\n"
      "T x S buffer), 1 no report.")
  parser.add_argument("target", help=f"{', '.join(chips.ALL)}, or a pod such as v4:12x16x16*2")
  parser.add_argument("function", help="MODULE:NAME or FILE.py:NAME")
  parser.add_argument("rest", nargs="*", metavar="SHAPE|NAME=VALUE", help="arrays as in "
                      "bf16[2,1024,128], and static keyword arguments; without any array the "
                      "function is called and returns (a function, its arguments)")
  parser.add_argument("--backward", action="store_true", help="the function and its gradient")
  parser.add_argument("--square", metavar="T,S", help="name buffers as large as T x S")
  parser.add_argument("--flops", type=float, help="useful FLOPs of one call")
  parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS")
  tpu = parser.add_argument_group("TPU: how often parts of a kernel run, where it does not say")
  tpu.add_argument("--grid", type=int, help="steps of the grid on one core")
  tpu.add_argument("--active", type=_numbers, default=1.0, metavar="F[,F]",
                   help="fraction of the steps that have a block to do")
  tpu.add_argument("--edge", type=float, default=1.0, metavar="F",
                   help="fraction of the steps that begin or end an output block")
  tpu.add_argument("--inner", type=_numbers, metavar="N[,N]",
                   help="trips of the loops inside the grid's that are not known")
  args = parser.parse_args(argv)
  try:
    arrays = [_shape(text) for text in args.rest if "=" not in text]
    keywords = dict(_keyword(text) for text in args.rest if "=" in text)
    rows, columns = map(int, args.square.split(",")) if args.square else (None, None)
    print(result := report(
        args.function, *arrays, target=args.target, backward=args.backward,
        square=None if rows is None or columns is None else (rows, columns),
        flops=args.flops, timeout=args.timeout,
        steps=Steps(args.grid, args.active, args.edge, args.inner), **keywords))
  except (AotError, ValueError) as error:
    print(f"aot: error: {error}", file=sys.stderr)
    return 1
  return 3 if result.problems else 0


def _shape(text):
  import jax

  found = re.fullmatch(r"(\w+)\[([\d,]*)\]", text)
  if not found or found[1] not in _DTYPES:
    raise ValueError(f"an array is written as in bf16[2,1024,128] ({', '.join(_DTYPES)}); "
                     f"got {text!r}")
  shape = tuple(int(n) for n in found[2].split(",") if n)
  name = _DTYPES[found[1]]
  return jax.ShapeDtypeStruct(shape, jax.numpy.bfloat16 if name == "bfloat16" else np.dtype(name))


def _keyword(text):
  name, _, value = text.partition("=")
  try:
    return name, ast.literal_eval(value)
  except (ValueError, SyntaxError):
    return name, value


def _numbers(text):
  values = tuple(float(n) if "." in n else int(n) for n in text.split(","))
  return values[0] if len(values) == 1 else values


if __name__ == "__main__":
  sys.exit(main())
