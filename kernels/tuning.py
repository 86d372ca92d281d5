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


class TpuBlocks(NamedTuple):
  """Block sizes of an attention kernel for TPUs, before they are fitted to a problem."""

  area: int  # scores of a diagonal step: (query heads of a key/value head) * keys * keys
  rows: int  # (position, head) rows of a step without a mask, at most
  lanes: int  # rows of one score tile
  chunk: int  # keys of a step without a mask
  fine: int  # keys of a step under a mask
  major: int  # keys held in VMEM
  ahead: int  # score tiles computed before the softmax of an earlier one
  cores: int  # that the blocks of rows are dealt to


ATTENTION_MOSAIC_TPU = {
    ("v6e", 128): (TpuBlocks(2**22, 4096, 256, 512, 128, 8192, 3, 1),
                   TpuBlocks(2**22, 2048, 256, 512, 128, 8192, 1, 1)),
}


def attention_mosaic_tpu(chip, dim):
  return ATTENTION_MOSAIC_TPU[("v6e", 128)]
