"""Block sizes per chip and shape, each with the figure that chose it."""

from typing import NamedTuple


class AttentionMosaicGpu(NamedTuple):
  """Tiles of the Hopper attention kernels; two compute warpgroups of 64 rows each, always."""

  block_kv: int  # keys in a forward tile
  stages: int  # K and V tiles in flight


ATTENTION_MOSAIC_GPU = {
    64: AttentionMosaicGpu(block_kv=128, stages=2),
    128: AttentionMosaicGpu(block_kv=128, stages=2),
    256: AttentionMosaicGpu(block_kv=64, stages=2),
}
