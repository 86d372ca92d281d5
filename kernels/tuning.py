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


VMEM = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "tpu7x": 64}  # MiB of one core

_TPU_BASE = TpuBlocks(
    area=2**22, rows=2048, lanes=256, chunk=512, fine=128, major=8192, ahead=3, cores=1)
_TPU_BACKWARD = _TPU_BASE._replace(ahead=2)


# (chip, dim_head up to) -> forward, backward.
ATTENTION_MOSAIC_TPU = {
    ("v4", 128): (_TPU_BASE._replace(area=2**18, major=2048, cores=2),
                  _TPU_BACKWARD._replace(area=2**18, major=1024, cores=2)),
    ("v4", 256): (_TPU_BASE._replace(area=2**18, major=1024, cores=2),
                  _TPU_BACKWARD._replace(area=2**16, rows=1024, major=1024, cores=2)),
    ("v5e", 128): (_TPU_BASE, _TPU_BACKWARD._replace(area=2**20)),
    ("v5e", 256): (_TPU_BASE, _TPU_BACKWARD._replace(area=2**20)),
    ("v5p", 128): (_TPU_BASE._replace(cores=2),
                   _TPU_BACKWARD._replace(area=2**20, cores=2)),
    ("v5p", 256): (_TPU_BASE._replace(cores=2),
                   _TPU_BACKWARD._replace(area=2**20, cores=2)),
    ("v6e", 128): (_TPU_BASE._replace(rows=4096, ahead=4), _TPU_BACKWARD),
    ("v6e", 256): (_TPU_BASE._replace(rows=4096), _TPU_BACKWARD),
    ("tpu7x", 128): (_TPU_BASE._replace(rows=4096, ahead=4), _TPU_BACKWARD),
    ("tpu7x", 256): (_TPU_BASE._replace(rows=4096), _TPU_BACKWARD._replace(area=2**20)),
}


def attention_mosaic_tpu(chip: str | None, dim_head: int) -> tuple[TpuBlocks, TpuBlocks]:
  """Block sizes of the forward and the backward kernel; those of a v4, the smallest, for None."""
  return ATTENTION_MOSAIC_TPU[chip or "v4", 128 if dim_head <= 128 else 256]
