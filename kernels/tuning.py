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

# Figures: useful share of the matrix units' peak, in %, at T 8192 / 2048; causal MQA, 16 heads,
# ALiBi, bfloat16; static cycles of libtpu 0.0.52. What chose a value, on a v6e unless said:
#   lanes 256: 128 gives 25, 256 gives 30, 512 gives 28 (forward, dim_head 128, rows 2048).
#   chunk 512: 256 gives 19, 512 gives 25, 1024 gives 28, in twice the code (the same, ahead 1).
#   ahead 0 / 1 / 2 / 3 gives 16 / 25 / 29 / 30 (the same); 4 gives 42.8 and 5 gives 39.2 (final).
#   rows 4096: 38.0 against 33.6 for 2048; on a v5e the matrix unit is the limit at 2048 already.
#   area 2**22, 512 keys for 16 heads: on a v5e 16 documents of 512 cost 1.22 times their share,
#   with 2**20 1.40 times; the backward pass is as good with 2**20, in a quarter of the code.
_FORWARD = TpuBlocks(
    area=2**22, rows=2048, lanes=256, chunk=512, fine=128, major=8192, ahead=3, cores=1)
_BACKWARD = _FORWARD._replace(ahead=2)
_SMALL = dict(area=2**18, cores=2)  # 16 MiB of VMEM

# (chip, dim_head up to): forward, backward.
ATTENTION_MOSAIC_TPU = {
    ("v4", 128): (_FORWARD._replace(**_SMALL, major=2048),
                  _BACKWARD._replace(**_SMALL, major=1024)),
    ("v4", 256): (_FORWARD._replace(**_SMALL, major=1024),
                  _BACKWARD._replace(area=2**16, rows=1024, major=1024, cores=2)),
    ("v5e", 128): (_FORWARD, _BACKWARD._replace(area=2**20)),
    ("v5e", 256): (_FORWARD, _BACKWARD._replace(area=2**20)),
    ("v5p", 128): (_FORWARD._replace(cores=2), _BACKWARD._replace(area=2**20, cores=2)),
    ("v5p", 256): (_FORWARD._replace(cores=2), _BACKWARD._replace(area=2**20, cores=2)),
    ("v6e", 128): (_FORWARD._replace(rows=4096, ahead=4), _BACKWARD),
    ("v6e", 256): (_FORWARD._replace(rows=4096), _BACKWARD),
    ("tpu7x", 128): (_FORWARD._replace(rows=4096, ahead=4), _BACKWARD),
    ("tpu7x", 256): (_FORWARD._replace(rows=4096), _BACKWARD._replace(area=2**20)),
}


def attention_mosaic_tpu(chip: str | None, dim_head: int) -> tuple[TpuBlocks, TpuBlocks]:
  """Block sizes of the forward and the backward kernel; those of a v4, the smallest, for None."""
  return ATTENTION_MOSAIC_TPU[chip or "v4", 128 if dim_head <= 128 else 256]
