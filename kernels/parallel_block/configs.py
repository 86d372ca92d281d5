"""Block sizes of the parallel block's kernels, per chip, each with the figure that chose it."""

from typing import NamedTuple

from ..core import chips

LEAST = 128  # tokens, for `auto`
NEEDS = f"{LEAST} tokens or more, dim 1024 or more and bfloat16"

# From which dim on `auto` takes the kernels: where their static cycles together are fewer than
# XLA's for the same steps (`python -m benchmarks static block`, `static layer`). GPUs were not
# timed. At 1024, 16 heads of 64, 16,384 tokens, ms of a layer forward, and with its gradients,
# XLA's second: 3.64, 3.74 and 11.1, 11.3 (v5e), 1.59, 1.62 and 4.84, 5.04 (v5p), 1.09, 1.24 and
# 3.46, 3.90 (v6e). In float32 it takes XLA's, which multiply in one pass of bfloat16 unless asked
# for more, the kernels in six: 74 and 395 thousand cycles (v5e, SwiGLU's gradient, 1,024 tokens of
# dim 1024).
AUTO = {"v5e": 1024, "v5p": 1024, "v6e": 1024}


def unasked(chip: str, x=None) -> str | None:
  """The reason why `auto` passes over a kernel that could run: a shape of which nothing is known.

  Args:
    chip: its name.
    x: an array or its type; None for what any would be kept by.
  """
  better = f"figures better than XLA's products have, to be chosen unasked, on a {chip}"
  least = AUTO.get(chip, AUTO.get(chips.ALL[chip].like or chip))
  if least is None:
    return better
  if x is None:
    return None
  if x.dtype.name != "bfloat16":
    return f"bfloat16 to be chosen unasked; got {x.dtype.name}"
  if x.shape[1] < least:
    return better
  if x.shape[0] < LEAST:  # Most rows of a tile would be empty.
    return f"{LEAST} tokens or more to be chosen unasked; got {x.shape[0]}"
  return None


class TritonConfig(NamedTuple):
  """Tile sizes and launch of one Triton kernel of the parallel block."""

  tokens: int
  columns: int
  depth: int  # of the contraction in one step
  warps: int
  stages: int


# Of the tiles in which no kernel spills, for sums of any length and for short ones. Beside each the
# instructions that all warps issue in the main loop of `in_projection` for 64 tokens, 64 columns
# and 64 of the contraction, and of the next best (triton 3.9, ptxas 13.0, bfloat16). Nothing was
# timed. Triton 3.6 does not spill in these either.
_BLOCK_WGMMA = (
    TritonConfig(128, 256, 64, 8, 4),  # 103; (256, 128, 64, 8, 4) 108, twice the HGMMA
    TritonConfig(128, 128, 64, 4, 3))  # 150; (128, 128, 64, 8, 3) 198
_BLOCK_HMMA = (
    TritonConfig(128, 256, 64, 8, 4),  # 231; 32 deep 280
    TritonConfig(128, 128, 32, 4, 4))  # 290; 64 deep 257, but 8 bytes spilled at dim 512
TRITON = {
    "a100": _BLOCK_HMMA,
    "rtx4090": (_BLOCK_HMMA[0]._replace(stages=3), _BLOCK_HMMA[1]),  # 96 KiB of shared memory
    "h100": _BLOCK_WGMMA, "h200": _BLOCK_WGMMA,
    "b200": _BLOCK_WGMMA,  # 118, 157; (128, 256, 64, 4, 4) spills 1168 in `swiglu_gradient`
}

# Up to here two programs share a multiprocessor, for one's epilogue to run under the other's
# products. Outside of its main loop a warp of `swiglu_gradient` issues some 3,300 instructions:
# with two warps to a scheduler 6,600 clocks, as long as 6 steps of 64 take on Hopper, while no
# other program runs. Tiles of 128 columns read a quarter more of shared memory than it delivers in
# that time (128 bytes a clock), so they take 1,280 clocks where those of 256 take 1,024: with
# nothing else counted, the two are level at 26 steps for `swiglu_gradient` and, with some 1,300
# instructions, at 10 for `in_projection`.
SHORT = 1024
NORM = 4096  # numbers of x in a program of the norm: 32 a thread in 71 registers


def triton(chip: str | None, itemsize: int, contraction: int) -> TritonConfig:
  """Tiles for a chip, or the smallest ones; contraction is how long all products of a sum are."""
  long, short = chips.gpu(chip).entry(TRITON)
  if itemsize == 4:
    return long._replace(columns=64, depth=32)
  return short if contraction <= SHORT else long


class HopperConfig(NamedTuple):
  """Tiles of the Hopper kernels of the parallel block: 128 tokens, 64 to a compute warpgroup."""

  columns: int  # of a tile
  stages: int  # slots of 64 of the contraction in flight
  together: bool  # two tiles of tokens share the copies of the weights


# The largest tile that fits, and the next one for where that leaves the chip empty. 256 columns
# take 128 of 232 registers, and 4 slots with the stores' 32 KiB leave 3 KiB of shared memory. In
# the main loops: 57 to 59 instructions for 4 HGMMA of 256 columns, 70 for 8 of 128 (in_projection);
# with 128 columns and 6 slots 72 to 76 and 91, for half the product (ptxas 13.0). A tile's step
# takes 48 KiB from the L2 cache in the 1024 cycles of its product; two that share the weights 32
# KiB each, for two or three instructions more. No time has been measured.
_HOPPER = (HopperConfig(columns=256, stages=4, together=True),
                          HopperConfig(columns=128, stages=6, together=True))
MOSAIC_GPU = {chip: _HOPPER for chip in ("h100", "h200")}


def mosaic_gpu(chip: str | None) -> tuple[HopperConfig, ...]:
  """Tiles to choose from for a chip; those of an h200 where it is not known."""
  return chips.hopper(chip).entry(MOSAIC_GPU)


class ProductConfig(NamedTuple):
  """Block sizes of a product in the parallel block on TPUs, before they are fitted to a problem."""

  rows: int  # tokens in a block, at most
  columns: int  # of the result in a step, at most
  work: int  # multiply-adds of a step, at most
  code: int  # multiply-adds in straight-line code, at most
  part: int  # tokens of one product, the next of which overlaps with what is done to its result
  doubled: bool = False  # twice the rows, and so the work, where they fit with as many columns


class TpuConfig(NamedTuple):
  """Block sizes of the parallel block's kernels."""

  in_projection: ProductConfig
  out_projection: ProductConfig
  swiglu_gradient: ProductConfig
  input_gradient: ProductConfig


# Figures: useful share of the matrix units' peak, in %, at dim 4096, 16 heads of 256, hidden width
# 16,384, 8,192 tokens, bfloat16; static cycles of libtpu 0.0.52. What chose a value:
#   code 2**29 on a v5 and 2**31 on a v6e are some 8,000 bundles in straight line. Of the sums 4,000
#   give 92.0 and 8,000 give 94.1 (v5e), 80.5 and 86.2 (v6e, half the rows).
#   work: in-projection, 1024 rows of a v6e with 256 columns give 86.6, 2048 with 512 give 91.9;
#   sums, 2**30 gives 94.5 / 94.4, 2**31 gives 95.6 / 95.1 (v5p, out / gradient of norm(x)).
#   rows: FLOPs for a byte of weights; a v6e needs 560.
#   part: 128 / 256 / 512 gives 86.7 / 86.6 / 86.9 (in-projection, v6e, 1024 rows). SwiGLU's
#   gradient on a v6e, 512 columns: 62.3 / 86.8 / 85.1; with 1024 columns 256 gives 91.3.
_BLOCK_V5 = TpuConfig(  # v5e 96.0, 95.5, 96.8, 95.8; v5p 96.1, 96.1, 96.6, 95.9
    in_projection=ProductConfig(rows=1024, columns=1024, work=2**31, code=2**29, part=128),
    out_projection=ProductConfig(rows=1024, columns=1024, work=2**31, code=2**29, part=256),
    swiglu_gradient=ProductConfig(rows=1024, columns=1024, work=2**30, code=2**29, part=256),
    input_gradient=ProductConfig(rows=1024, columns=1024, work=2**31, code=2**29, part=256))
# 128 MiB of VMEM have room for twice the rows: half as many steps, and copies of weights.
_BLOCK_V5E = _BLOCK_V5._replace(  # in-projection 96.6
    in_projection=_BLOCK_V5.in_projection._replace(doubled=True))
_BLOCK_V6E = TpuConfig(  # 92.3, 93.0, 91.6, 91.8
    in_projection=ProductConfig(rows=2048, columns=2048, work=2**33, code=2**31, part=256),
    out_projection=ProductConfig(rows=2048, columns=2048, work=2**32, code=2**31, part=1024),
    swiglu_gradient=ProductConfig(rows=2048, columns=2048, work=2**33, code=2**31, part=256),
    input_gradient=ProductConfig(rows=2048, columns=2048, work=2**32, code=2**31, part=1024))
# 16 MiB of VMEM: 65.9, 89.8, 84.5, 84.8. With 1024 rows 79.7 (out); with 512 rows 78.1 (SwiGLU).
_BLOCK_V4 = TpuConfig(
    in_projection=_BLOCK_V5.in_projection,
    out_projection=ProductConfig(rows=512, columns=512, work=2**30, code=2**29, part=512),
    swiglu_gradient=_BLOCK_V5.swiglu_gradient._replace(rows=256),
    input_gradient=ProductConfig(rows=512, columns=512, work=2**30, code=2**29, part=512))
# 64 MiB: 87.1, 92.7, 87.9, 88.6. With a v6e's blocks, cut until they fit: 88.0, 84.8, 84.9, 80.6.
_BLOCK_7X = TpuConfig(
    in_projection=_BLOCK_V6E.in_projection._replace(rows=1024),
    out_projection=_BLOCK_V6E.out_projection._replace(rows=1024, columns=1024),
    swiglu_gradient=_BLOCK_V6E.swiglu_gradient._replace(rows=1024),
    input_gradient=_BLOCK_V6E.input_gradient._replace(rows=1024, columns=1024))
# In-projection, out-projection, SwiGLU's gradient, gradient of the norm's result.
MOSAIC_TPU = {
    "v4": _BLOCK_V4, "v5e": _BLOCK_V5E, "v5p": _BLOCK_V5, "v6e": _BLOCK_V6E, "tpu7x": _BLOCK_7X}


def mosaic_tpu(chip: str | None) -> TpuConfig:
  """Block sizes of the kernels of the parallel block; those of a v4 for None."""
  return chips.tpu(chip).entry(MOSAIC_TPU)
