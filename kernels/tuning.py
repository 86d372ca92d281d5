"""Block sizes of the kernels, per chip and shape, each with the figure that chose it."""

import json
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

  block_kv: int  # keys in a tile of the forward kernel: 64, 128 or 256
  stages: int  # its K and V tiles in flight
  dq_block_kv: int  # keys in a tile of the dq kernel
  dq_k_stages: int
  dq_v_stages: int
  dkv_block_q: int  # rows in a tile of the dk, dv kernel
  dkv_stages: int  # its Q and dO tiles in flight


# By head_dim. Static figures only (instructions of the unmasked loop with ALiBi, ptxas 13.0; no
# time was measured): the largest tiles that neither spill nor serialize, then the stages that
# shared memory has room for. TABLE
_HOPPER = {
    64: AttentionMosaicGpu(128, 2, 128, 2, 2, 64, 2),
    128: AttentionMosaicGpu(128, 2, 64, 2, 2, 64, 2),
    256: AttentionMosaicGpu(64, 2, 64, 2, 1, 64, 2),
}
ATTENTION_MOSAIC_GPU = {
    (chip, dim_head): blocks for chip in ("h100", "h200") for dim_head, blocks in _HOPPER.items()}


def attention_mosaic_gpu(chip: str | None, dim_head: int) -> AttentionMosaicGpu:
  """Tiles for a chip; those of an h200 where it is not known."""
  return ATTENTION_MOSAIC_GPU[chip or "h200", dim_head]


def load(path: str) -> None:
  """Makes the block sizes of a table that `tune` wrote take effect in this process.

  Programs that are compiled already keep theirs.

  Raises:
    ValueError: the file is no such table.
  """
  try:
    with open(path) as file:
      table = json.load(file)
    if table["backend"] != "mosaic_gpu":
      raise KeyError(table["backend"])
    entries = {(table["chip"], int(dim_head)): AttentionMosaicGpu(**blocks)
               for dim_head, blocks in table["blocks"].items()}
  except (OSError, KeyError, TypeError, json.JSONDecodeError) as e:
    raise ValueError(f"{path} is no table of tune(): {type(e).__name__} {e}") from None
  ATTENTION_MOSAIC_GPU.update(entries)


def splits(blocks: int, group: int) -> int:
  """Into how many parts the rows of each block of keys are dealt, so that the chip is full.

  A power of two up to the group's size: at that size the float32 parts of dk and dv take
  8 bytes an element of `query`.
  """
  parts = 1
  while parts * 2 <= group and blocks * parts < 2 * 132:  # two blocks for each multiprocessor
    parts *= 2
  return parts
