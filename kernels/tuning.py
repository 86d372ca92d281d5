"""Block sizes per chip and shape, each with the measurement that chose it."""

from typing import NamedTuple


class TpuBlocks(NamedTuple):
  """Block sizes of an attention kernel for TPUs."""

  rows: int  # packed (position, head) rows of a block of queries
  lanes: int  # rows whose scores are one value in the kernel
  chunk: int  # keys of a step without a mask
  fine: int  # keys of a step under the mask
  major: int  # keys held in VMEM
  ahead: int  # score products issued before the softmax of an earlier one
  cores: int  # that the blocks of rows are dealt to

  def period(self, group: int) -> int:
    """Lanes after which the slopes repeat."""
    return min(128, self.lanes)

  def periodic(self, group: int) -> bool:
    return self.period(group) % group == 0


ATTENTION_MOSAIC_TPU = {
    ("v6e", 128): (TpuBlocks(4096, 256, 512, 128, 8192, 3, 1), None),
}


def attention_mosaic_tpu(chip, dim):
  return ATTENTION_MOSAIC_TPU[("v6e", 128)]
