"""Block sizes of the decode kernels, per chip, each with the figure that chose it."""

from typing import NamedTuple

from ..core import chips

NEEDS = "any number of queries"


def unasked(chip: str, query=None) -> str | None:
  """The reason why `auto` passes over a kernel that could run: there is none."""


class TritonConfig(NamedTuple):
  """Tile sizes and launch of the Triton decode kernel."""

  rows: int  # (query, head of the group) pairs
  keys: int  # positions of the cache
  warps: int
  stages: int


# Rows of a tile at dim_head 256 in 16 bits, at most, and stages: see `triton`.
TRITON = {"a100": (64, 3), "rtx4090": (32, 2), "h100": (128, 3), "h200": (128, 3),
          "b200": (128, 3)}


def triton(chip: str | None, dim_head: int, rows: int, dtype) -> TritonConfig:
  """Tiles for a chip; for None, those that any has room for.

  A tile of 16 KiB of keys in 16 bits, three stages of them and of the values: two programs of 16
  rows share a multiprocessor (72 KiB of shared memory, 128 registers), each with 64 KiB in flight.
  A warp issues 259 instructions a tile at dim_head 128 on Hopper (64 positions, 16 heads); with
  twice the positions 404, but one program then takes 136 KiB. Memory takes 1,770 clocks for it. Of
  int8 it takes 883 clocks and the instructions are 763, of which 370 convert and 101 gather bytes.
  At dim_head 256, 128 rows spill 560 bytes on an A100 and 32 of float32 1684; at 64, 128
  positions for 64 rows 8 bytes in triton 3.6. (triton 3.9 and ptxas 13.0; nothing was timed.)

  Args:
    rows: that there are.
    dtype: of the queries.
  """
  most, (widest, stages) = 128 if dtype.itemsize == 2 else 32, chips.gpu(chip).entry(TRITON)
  if dim_head == 256:
    most = 16 if dtype.itemsize == 4 else widest
  rows = min(max(16, 1 << (rows - 1).bit_length()), most)
  keys = 16_384 // dtype.itemsize // max(dim_head, 128 if rows > 32 else 64)
  return TritonConfig(
      rows, keys, 4 if rows < 128 else 8, stages)


class HopperConfig(NamedTuple):
  """Tiles in flight in the Hopper decode kernel, which are of 64 rows and 64 positions, always."""

  stages: int  # tiles of keys and values
  programs: int  # that share a multiprocessor


# By dim_head and itemsize of the cache: as many stages as let two programs share a multiprocessor
# (113 KiB of shared memory each); at dim_head 256 queries and two stages take more, and one program
# has it. Beside each its shared memory in KiB, and the instructions of a tile without a mask, with
# ALiBi (ptxas 13.0), against the clocks that memory takes for it at 4.3 TB/s. Nothing was timed.
_HOPPER = {
    (64, 2): HopperConfig(6, 2),  # 106; 477, 882
    (64, 1): HopperConfig(8, 2),  # 94; 729, 469
    (128, 2): HopperConfig(2, 2),  # 82; 485, 1765. 3 stages take 114
    (128, 1): HopperConfig(3, 2),  # 100; 1034, 910
    (256, 2): HopperConfig(3, 1),  # 226; 602, 3530
}
MOSAIC_GPU = {(chip, *key): value
                     for chip in ("h100", "h200") for key, value in _HOPPER.items()}


def mosaic_gpu(chip: str | None, dim_head: int, itemsize: int) -> HopperConfig:
  """For a chip and an itemsize of the cache; that of an h200 where the chip is not known."""
  return chips.hopper(chip).entry(MOSAIC_GPU, dim_head, itemsize)


class TpuConfig(NamedTuple):
  """Block sizes of the decode kernel for TPUs, before they are fitted to a problem."""

  size: int  # positions of a block
  slots: int  # blocks in VMEM
  chunk: int  # positions of a product
  cores: int  # that the blocks are dealt to


TPU_LEAST = 1024  # positions, where there are few in all; below, a turn costs the same

# By chip: positions of a block at dim_head 128, bfloat16 and int8. Figures: cycles of a turn over
# cycles of its copies, from the bundles of libtpu 0.0.52 and the published bandwidth; below 1 the
# copies are what binds (`python -m benchmarks static decode`). What chose a value:
#   bfloat16, 2048 / 4096 / 8192 gives 0.82 / 0.59 / 0.47 (v6e, 16 heads), in as much more code.
#   int8, 4096 / 8192 / 16384 gives 1.23 / 0.95 / 0.81 (v6e, 16 heads), 1.24 / 0.96 / 0.82 (v6e, 48
#   heads), 1.24 / 1.07 / 0.97 (v5p, 48 heads), 0.85 / 0.73 (v5e, 48 heads).
#   chunk 256 / 512 / 1024 gives 2197 / 2186 / 2184 cycles (v6e, int8, 48 heads, 8192).
#   slots: two are computed on, so four let copies of two blocks be under way.
_TPU_SIZES = {"v4": (4096, 4096), "v5e": (4096, 8192), "v5p": (4096, 16384),
                 "v6e": (4096, 16384), "tpu7x": (8192, 16384)}


def mosaic_tpu(chip: str | None, itemsize: int, dim_head: int) -> TpuConfig:
  """Block sizes for a chip, those of a v4 for None; itemsize is that of the cache."""
  tpu = chips.tpu(chip)
  bfloat16, int8 = tpu.entry(_TPU_SIZES)
  size = (int8 if itemsize == 1 else bfloat16 * 2 // itemsize) * 128 // max(dim_head, 128)
  return TpuConfig(max(size // 1024 * 1024, 1024), slots=4, chunk=512,
                   cores=tpu.cores // tpu.devices)
