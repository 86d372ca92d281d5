"""Block sizes of the cross-entropy kernels, per chip, each with the figure that chose it."""

from typing import NamedTuple

from ..core import chips

LEAST = 128  # tokens, for `auto`
NEEDS = f"{LEAST} tokens or more"


def unasked(chip: str, x=None) -> str | None:
  """The reason why `auto` passes over a kernel that could run: a shape of which nothing is known.

  Args:
    chip: its name.
    x: an array or its type; None for what any would be kept by.
  """
  if x is not None and x.shape[0] < LEAST:  # Most rows of a tile would be empty.
    return f"{LEAST} tokens or more to be chosen unasked; got {x.shape[0]}"
  return None


class TritonConfig(NamedTuple):
  """Tile sizes and launch of the Triton cross-entropy kernels."""

  tokens: int
  columns: int  # rows of the embedding in a tile
  depth: int  # of the contraction in one step
  warps: int
  stages: int


# Of the tiles in which neither kernel spills, those with the fewest instructions in the main loop
# for what they multiply; beside each, those that a warp issues there for 64 tokens, 64 columns and
# 64 of the contraction, forward / gradient, and of the next best (triton 3.9, ptxas 13.0,
# bfloat16). Nothing was timed. Triton 3.6 does not spill in these either. Since the forward kernel
# picks the target's logit, it spills two registers around the main loop on an a100 and an rtx4090.
_WGMMA = TritonConfig(128, 256, 64, 8, 4)  # 12 / 12; (128, 128, 64, 8, 4) 21 / 21
_HMMA = TritonConfig(128, 256, 32, 8, 4)  # 37 / 32; 64 deep 28 gradient, forward spills 100
TRITON = {
    "a100": _HMMA, "rtx4090": _HMMA,  # 72 KiB of shared memory
    "h100": _WGMMA, "h200": _WGMMA,
    "b200": _WGMMA,  # 15 / 15; (256, 128, 64, 8, 4) 18 / 18, forward spills 52
}


def triton(chip: str | None, itemsize: int) -> TritonConfig:
  """Tiles for a chip, or the smallest ones; a step is as many bytes deep in every dtype."""
  blocks = chips.gpu(chip).entry(TRITON)
  return blocks if itemsize == 2 else blocks._replace(columns=64, depth=32)


class HopperConfig(NamedTuple):
  """Tiles of the Hopper cross-entropy kernels: 128 tokens, 64 to a compute warpgroup, always."""

  columns: int  # rows of the embedding in a tile
  stages: int  # slots of 64 of the contraction in flight


# The largest tile that fits: 256 columns take 128 of 240 registers, and 4 slots leave 3 KiB of
# shared memory to barriers. 59 instructions, 4 of them HGMMA, in the main loop, where 128 columns
# have 56 for half the product (ptxas 13.0). No time has been measured.
_HOPPER = HopperConfig(columns=256, stages=4)
MOSAIC_GPU = {chip: _HOPPER for chip in ("h100", "h200")}


def mosaic_gpu(chip: str | None) -> HopperConfig:
  """Tiles for a chip; those of an h200 where it is not known."""
  return chips.hopper(chip).entry(MOSAIC_GPU)


class TpuConfig(NamedTuple):
  """Block sizes of a cross-entropy kernel for TPUs, before they are fitted to a problem."""

  tokens: int  # held in VMEM while the embedding passes
  rows: int  # of the embedding in a step
  tile: int  # tokens in a tile of logits
  chunk: int  # rows in a tile of logits
  together: int  # tiles in straight-line code


# Figures: useful share of the matrix units' peak, in %, at dim 4096; cycles of libtpu 0.0.52.
# The figure behind each value:
#   together 2 gives 95.9 and 1 gives 92.8 (v5p, forward), 96.9 and 94.4 (v5p, gradient);
#   together 8 / 4 / 2 gives 93.0 / 88.7 / 79.7 (v6e, forward); 16 gives 95.2 in 17,000 bundles.
#   chunk 512, together 4 gives 90.1; 256, 8 gives 88.8, as much code (v6e, gradient).
#   tokens 2048: as many as fit, for each is one FLOP more for a byte of the embedding.
_LOSS = TpuConfig(tokens=2048, rows=1024, tile=256, chunk=256, together=2)
_LOSS_V6E = (_LOSS._replace(together=8), _LOSS._replace(chunk=512, together=4))

# Forward, gradient.
MOSAIC_TPU = {
    "v4": (_LOSS, _LOSS), "v5e": (_LOSS, _LOSS), "v5p": (_LOSS, _LOSS), "v6e": _LOSS_V6E,
    "tpu7x": _LOSS_V6E}


def mosaic_tpu(chip: str | None) -> tuple[TpuConfig, TpuConfig]:
  """Block sizes of the forward and the gradient kernel; those of a v4 for None."""
  return chips.tpu(chip).entry(MOSAIC_TPU)
