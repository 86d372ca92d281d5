"""Block sizes of the attention kernels, per chip and head_dim, with the figures that chose them."""

from typing import NamedTuple

from ..core import chips

LEAST = 128  # queries, for `auto`
NEEDS = f"{LEAST} queries or more"


def unasked(chip: str, query=None) -> str | None:
  """The reason why `auto` passes over a kernel that could run: a shape of which nothing is known.

  Args:
    chip: its name.
    query: an array or its type; None for what any would be kept by.
  """
  if query is not None and query.shape[1] < LEAST:  # As when decoding: most rows would be empty.
    return f"{LEAST} queries or more to be chosen unasked; got {query.shape[1]}"
  return None


class TritonConfig(NamedTuple):
  """Tile sizes and launch of one Triton attention kernel."""

  rows: int  # of queries: (position, head of the group) pairs
  keys: int
  warps: int
  stages: int
  apart: bool = False  # of dkv: one launch for dk and one for dv, each with half the accumulators


# By chip and head_dim: forward, dq, dkv. No two kernels of them could be timed, so static figures
# chose: of the tiles that do not spill, those with the fewest instructions that a warp issues per
# (row, key) pair in the main loop (beside each, x 1000), and of two alike the one that lets two
# blocks share a multiprocessor. From triton 3.9 and ptxas 13.0 with bfloat16, ALiBi, causal,
# 16 query heads on one key head; `python -m palm_haiku.kernels.aot` gives them again.
_HOPPER = {
    64: (TritonConfig(128, 64, 4, 3),  # 295; (128, 128, 8, 3) 278, one block; (128, 64, 8, 3) 347
         TritonConfig(64, 128, 4, 2),  # 280; (128, 64, 4, 2) spills 184 bytes, (64, 64, 4, 3) 315
         TritonConfig(64, 64, 4, 2)),  # 361; (64, 128, 8, 2) 376, (32, 64, 4, 3) 477
    128: (TritonConfig(128, 64, 8, 3),  # 409; (128, 128, 8, 2) 354 but spills 16 in triton 3.6
          TritonConfig(128, 64, 8, 2),  # 384; (64, 64, 4, 2) 402, (128, 128, 8, 1) spills 36
          TritonConfig(32, 128, 8, 2)),  # 584; (64, 128, 8, 2) spills 172, apart it takes 671
    256: (TritonConfig(128, 64, 8, 2),  # 585, 64 bytes spilled; (128, 32, 8, 2) 844 and none
          TritonConfig(128, 32, 8, 2),  # 855; (64, 32, 4, 2) spills 20, (64, 64, 8, 2) 56
          TritonConfig(32, 128, 8, 2, True)),  # 883 + 486; together (64, 64, 8, 1) spills 788
}
_AMPERE = {
    64: (TritonConfig(128, 64, 8, 3),  # 402; (64, 64, 4, 3) 417, (128, 64, 4, 3) spills 56
         TritonConfig(128, 64, 8, 2),  # 375; (128, 32, 4, 2) spills 12
         TritonConfig(32, 128, 8, 2)),  # 492; (64, 128, 8, 2) spills 16, (32, 64, 4, 2) 520
    128: (TritonConfig(128, 32, 8, 3),  # 689; (128, 64, 8, 3) spills 24, (64, 64, 4, 3) 20
          TritonConfig(64, 64, 4, 2),  # 584; (128, 32, 8, 2) 590
          TritonConfig(64, 64, 8, 2)),  # 816; (32, 64, 4, 2) spills 8
    256: (TritonConfig(64, 64, 8, 2),  # 1387; (64, 32, 8, 2) 2262
          TritonConfig(32, 32, 4, 2),  # 1324; (64, 32, 8, 2) 1855
          TritonConfig(32, 64, 8, 2)),  # 2555; apart 1895 + 1363
}
_ADA = _AMPERE | {  # 99 KiB of shared memory
    256: (TritonConfig(64, 32, 8, 2),  # 2262
          TritonConfig(32, 32, 4, 2),  # 1324
          TritonConfig(32, 32, 8, 2)),  # 2562
}
_BLACKWELL = {
    64: (TritonConfig(128, 128, 8, 2),  # 259; (128, 64, 4, 3) spills 36
         TritonConfig(128, 64, 4, 2),  # 273; (128, 128, 8, 2) 284
         TritonConfig(64, 128, 8, 2)),  # 479; (64, 64, 4, 2) 490, but triton 3.6 spills 64
    128: (TritonConfig(128, 64, 8, 3),  # 413; (128, 128, 8, 2) spills 132
          TritonConfig(128, 64, 8, 2),  # 406; (64, 64, 4, 2) 428
          TritonConfig(64, 64, 4, 2)),  # 552; (64, 128, 8, 2) 516 but spills 8 in triton 3.6
    256: (TritonConfig(128, 32, 8, 2),  # 826; (64, 64, 8, 2) 789, but 64 rows halve tcgen05's rate
          TritonConfig(128, 32, 8, 1),  # 828; (64, 64, 8, 2) 889
          TritonConfig(32, 128, 8, 2, True)),  # 883 + 576; together (64, 64, 8, 1) 1334, 64 rows
}
TRITON = {"a100": _AMPERE, "rtx4090": _ADA, "h100": _HOPPER, "h200": _HOPPER, "b200": _BLACKWELL}


def triton(chip: str | None, dim_head: int) -> tuple[TritonConfig, TritonConfig, TritonConfig]:
  """Tiles of the forward, dq and dkv kernels for a chip; for None, those that any has room for."""
  return chips.gpu(chip).entry(TRITON)[max(dim_head, 64)]


class HopperConfig(NamedTuple):
  """Tiles of the Hopper attention kernels; two compute warpgroups of 64 rows each, always."""

  block_kv: int  # keys in a tile of the forward kernel: 64, 128 or 256
  stages: int  # its K and V tiles in flight
  rows: int | None  # in a tile of the backward kernel; None where it is one for dq, one for dk, dv:
  dq_block_kv: int = 64  # keys in a tile of the dq kernel
  dq_k_stages: int = 2
  dq_v_stages: int = 1
  dkv_block_q: int = 64  # rows in a tile of the dk, dv kernel
  dkv_stages: int = 2  # its Q and dO tiles in flight


# By head_dim: the largest tiles that neither spill nor have their products serialized, with two
# slots for each operand where shared memory has room. Beside each the instructions of the loop
# without a mask, with ALiBi, of the forward and the backward (ptxas 13.0). No time has been
# measured: `tune` on a Hopper GPU will know better.
_MOSAIC_HOPPER = {
    # One kernel of 128 rows and 128 keys is a register short of its 240 with segments.
    64: HopperConfig(128, 2, None, 128, 2, 2, 64, 2),  # 493; dq 454, dkv 394
    128: HopperConfig(128, 2, 64),  # 536; 528
    # 128 keys in the forward would take 224 registers for tiles alone.
    256: HopperConfig(64, 2, None, 64, 2, 1, 64, 2),  # 458; dq 401, dkv 406 + 283
}
MOSAIC_GPU = {
    (chip, dim_head): blocks
    for chip in ("h100", "h200") for dim_head, blocks in _MOSAIC_HOPPER.items()}


def mosaic_gpu(chip: str | None, dim_head: int) -> HopperConfig:
  """Tiles for a chip; those of an h200 where it is not known."""
  return chips.hopper(chip).entry(MOSAIC_GPU, dim_head)


class TpuConfig(NamedTuple):
  """Block sizes of an attention kernel for TPUs, before they are fitted to a problem."""

  area: int  # scores of a diagonal step: (query heads of a key/value head) * keys * keys
  rows: int  # (position, head) rows of a step without a mask, at most
  lanes: int  # rows of one score tile
  chunk: int  # keys of a step without a mask
  fine: int  # keys of a step under a mask
  major: int  # keys held in VMEM
  ahead: int  # score tiles computed before the softmax of an earlier one
  cores: int  # that the blocks of rows are dealt to


# Figures: useful share of the matrix units' peak, in %, at T 8192 / 2048; causal MQA, 16 heads,
# ALiBi, bfloat16; static cycles of libtpu 0.0.52. What chose a value, on a v6e unless said:
#   lanes 256: 128 gives 25, 256 gives 30, 512 gives 28 (forward, dim_head 128, rows 2048).
#   chunk 512: 256 gives 19, 512 gives 25, 1024 gives 28, in twice the code (the same, ahead 1).
#   ahead 0 / 1 / 2 / 3 gives 16 / 25 / 29 / 30 (the same); 4 gives 42.8 and 5 gives 39.2 (final).
#   rows 4096: 38.0 against 33.6 for 2048; on a v5e the matrix unit is the limit at 2048 already.
#   area 2**22, 512 keys for 16 heads: on a v5e 16 documents of 512 cost 1.22 times their share,
#   with 2**20 1.40 times; the backward pass is as good with 2**20, in a quarter of the code.
_FORWARD = TpuConfig(
    area=2**22, rows=2048, lanes=256, chunk=512, fine=128, major=8192, ahead=3, cores=1)
_BACKWARD = _FORWARD._replace(ahead=2)
_SMALL = dict(area=2**18, major=2048, cores=2)  # 16 MiB of VMEM

# On a v4, major 2048 gives 89.4 and 1024 gives 85.5 (backward, dim_head 128). Forward at 128, area
# 2**20 with rows 4096 and major 4096 gives 67.6 and documents of 512 cost 1.48 times their share;
# rows 2048 gives 64.8, area 2**18 with major 2048 gives 63.5 and 1.97 times. Backward at 256, chunk
# 512 does not fit beside major 2048, which gives 87.9 in place of 85.7.
# On a tpu7x, backward at 256, area 2**22 and major 2048: documents cost 1.25 times their share;
# 2**20 and 8192, 1.67 times, for 88.2 / 76.5 in place of 84.9 / 80.4. 2**22 and 8192 do not fit.
# (chip, dim_head up to): forward, backward.
MOSAIC_TPU = {
    ("v4", 128): (_FORWARD._replace(area=2**20, rows=4096, major=4096, ahead=4, cores=2),
                  _BACKWARD._replace(**_SMALL)),
    ("v4", 256): (_FORWARD._replace(**_SMALL),
                  _BACKWARD._replace(area=2**16, rows=1024, chunk=256, major=2048, cores=2)),
    ("v5e", 128): (_FORWARD, _BACKWARD._replace(area=2**20)),
    ("v5e", 256): (_FORWARD, _BACKWARD._replace(area=2**20)),
    ("v5p", 128): (_FORWARD._replace(cores=2), _BACKWARD._replace(area=2**20, cores=2)),
    ("v5p", 256): (_FORWARD._replace(cores=2), _BACKWARD._replace(area=2**20, cores=2)),
    ("v6e", 128): (_FORWARD._replace(rows=4096, ahead=4), _BACKWARD),
    ("v6e", 256): (_FORWARD._replace(rows=4096), _BACKWARD),
    ("tpu7x", 128): (_FORWARD._replace(rows=4096, ahead=4), _BACKWARD),
    ("tpu7x", 256): (_FORWARD._replace(rows=4096), _BACKWARD._replace(major=2048)),
}


def mosaic_tpu(chip: str | None, dim_head: int) -> tuple[TpuConfig, TpuConfig]:
  """Block sizes of the forward and the backward kernel; those of a v4, the smallest, for None."""
  return chips.tpu(chip).entry(MOSAIC_TPU, 128 if dim_head <= 128 else 256)
