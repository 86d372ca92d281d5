"""Block sizes of the kernels, per chip and shape, each with the figure that chose it."""

from typing import NamedTuple


def unknown(chip: str | None, query, key, value) -> str | None:
  """What keeps `auto` from a kernel that could run: a shape of which nothing is known."""
  del key, value
  if chip is None:
    return "a chip of known block sizes"
  if query.shape[1] < 128:  # As when decoding: most rows of a tile would be empty.
    return f"128 queries or more to be chosen unasked; got {query.shape[1]}"
  return None


class AttentionMosaicGpu(NamedTuple):
  """Tiles of the Hopper attention kernels; two compute warpgroups of 64 rows each, always."""

  block_kv: int  # keys in a tile of the forward kernel
  stages: int  # its K and V tiles in flight
  dq_block_kv: int  # keys in a tile of the dq kernel
  dq_k_stages: int
  dq_v_stages: int
  dkv_block_q: int  # rows in a tile of the dk, dv kernel
  dkv_stages: int  # its Q and dO tiles in flight


ATTENTION_MOSAIC_GPU = {
    64: AttentionMosaicGpu(128, 2, 128, 2, 2, 64, 2),
    128: AttentionMosaicGpu(128, 2, 64, 2, 2, 64, 2),
    256: AttentionMosaicGpu(64, 2, 64, 2, 1, 64, 2),
}


def attention_mosaic_gpu(chip, dim_head) -> AttentionMosaicGpu:
  del chip
  return ATTENTION_MOSAIC_GPU[dim_head]


def splits(blocks: int, group: int) -> int:
  """Into how many parts the rows of each block of keys are dealt, so that the chip is full.

  A power of two up to the group's size: at that size the float32 parts of dk and dv take
  8 bytes an element of `query`.
  """
  parts = 1
  while parts * 2 <= group and blocks * parts < 2 * 132:
    parts *= 2
  return parts
