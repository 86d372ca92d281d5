"""The most that fusing a layer's passes over memory can gain.

XLA's form makes each product at the chip's peak and each pass between products at its bandwidth;
in a fused form the passes are gone. So the gain is at most their time beside that of the products
(published figures of the chips, bfloat16, M tokens, attention left out of both).
"""

import argparse

from palm_haiku.kernels import aot

from .. import table
from ..block import Shape

DIMS = {512: (8, 64), 2048: (16, 128), 4096: (16, 256), 8192: (32, 256)}
TOKENS = (2048, 8192, 16384)
CHIPS = ("h200", "v5p")
COLUMNS = {"dim": "dim", "tokens": "tokens", "step": "step", "tflop": "TFLOP",
           "weights": "weights MiB", "arrays": "arrays MiB",
           **{name: name for name in ("norm", "rotary", "swiglu", "sums")},
           **{chip: f"{chip} at most" for chip in CHIPS}}


def steps(shape: Shape) -> dict[str, dict]:
  """By step: numbers in its weights and arrays, FLOPs, and numbers that fusing saves, by fusion."""
  m, d, f = shape.batch * shape.length, shape.dim, shape.hidden
  q, k = shape.heads * shape.dim_head, shape.dim_head
  into, out = d * (q + 2 * k + 2 * f), d * (q + f)
  return {
      "1 forward": dict(
          weights=into, arrays=m * (d + q + 2 * k + f), flops=2 * m * into,
          # norm(x) written and read again; query and key read and written; gate and up written
          # and read.
          norm=m * 2 * d, rotary=m * 2 * (q + k), swiglu=m * 4 * f),
      "3 forward": dict(
          weights=out, arrays=m * (2 * d + q + f), flops=2 * m * out,
          # One product written, which the other one's adds to x.
          sums=m * 2 * d),
      "1 backward": dict(
          weights=2 * into, arrays=m * (3 * d + 2 * (q + 2 * k + 2 * f)), flops=4 * m * into,
          # norm(x) again; gradients turned back; four sums of gradients written and read.
          norm=m * 2 * d, rotary=m * 2 * (q + k), sums=m * 4 * 2 * d),
      "3 backward": dict(
          weights=2 * out, arrays=m * (2 * d + 2 * q + 5 * f), flops=4 * m * out,
          # The gradient of act written and read.
          swiglu=m * 2 * f)}


def rows() -> list[dict]:
  found = []
  for dim, (heads, dim_head) in DIMS.items():
    for tokens in TOKENS:
      for step, about in steps(Shape(1, tokens, dim, heads, dim_head, 4)).items():
        saved = {name: about.get(name, 0) for name in ("norm", "rotary", "swiglu", "sums")}
        mib = lambda numbers: round(numbers * 2 / 2**20)
        row = dict(dim=dim, tokens=tokens, step=step, tflop=float(f"{about['flops'] / 1e12:.3g}"),
                   weights=mib(about["weights"]), arrays=mib(about["arrays"]),
                   **{name: mib(n) or "" for name, n in saved.items()})
        for chip in CHIPS:
          chip_ = aot.chip(chip)
          seconds = about["flops"] / (chip_.tflops * 1e12)
          row[chip] = f"{1 + 2 * sum(saved.values()) / chip_.bandwidth / seconds:.2f}x"
        found.append(row)
  return found


def main(argv: list[str] | None = None) -> int:
  argparse.ArgumentParser(prog="python -m benchmarks static arithmetic", description=__doc__,
                          formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
  print(table.text(COLUMNS, rows()))
  return 0
