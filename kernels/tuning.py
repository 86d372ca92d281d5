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


class TritonBlocks(NamedTuple):
  """Tile sizes and launch of one Triton attention kernel."""

  rows: int  # of queries: (position, head of the group) pairs
  keys: int
  warps: int
  stages: int
  apart: bool = False  # of dkv: one launch for dk and one for dv, each with half the accumulators


# By chip, head_dim: forward, dq, dkv.
_AMPERE = {
    64: (TritonBlocks(128, 64, 4, 3), TritonBlocks(64, 64, 4, 2), TritonBlocks(64, 64, 4, 2)),
    128: (TritonBlocks(128, 64, 8, 3), TritonBlocks(64, 64, 4, 2), TritonBlocks(64, 64, 4, 2)),
    256: (TritonBlocks(64, 32, 4, 2), TritonBlocks(64, 32, 8, 1), TritonBlocks(32, 64, 8, 1)),
}
ATTENTION_TRITON = {"a100": _AMPERE, "rtx4090": _AMPERE, "h100": _AMPERE, "h200": _AMPERE,
                    "b200": _AMPERE}
