"""Block sizes of the kernels, per chip and shape, each with the figure that chose it."""

import json
from typing import NamedTuple

from .core import chips


# What `unknown` asks of arrays, in words.
LEAST = {"flash_attention": "128 queries or more", "linear_cross_entropy": "128 tokens or more",
         "parallel_attention_ffn": "128 tokens or more, dim 1024 or more and bfloat16",
         "decode_attention": "any number of queries"}


def unknown(chip: str | None, op: str, array=None) -> str | None:
  """What keeps `auto` from a kernel that could run: a shape of which nothing is known.

  Args:
    array: the op's first, or its type; None for what any would be kept by.
  """
  if chip not in chips.ALL:
    return f"a chip of known block sizes; got {chip or 'one of no known name'}"
  chip = chips.ALL[chip].configs
  better = f"figures better than XLA's products have, to be chosen unasked, on a {chip}"
  if op == "parallel_attention_ffn" and chip not in PARALLEL_BLOCK_AUTO:
    return better
  if op == "decode_attention" or array is None:
    return None
  if op == "parallel_attention_ffn" and array.dtype.name != "bfloat16":
    return f"bfloat16 to be chosen unasked; got {array.dtype.name}"
  if op == "parallel_attention_ffn" and array.shape[1] < PARALLEL_BLOCK_AUTO[chip]:
    return better
  number, rows = {"flash_attention": (array.shape[1:2], "queries"),
                  "linear_cross_entropy": (array.shape[:1], "tokens"),
                  "parallel_attention_ffn": (array.shape[:1], "tokens")}[op]
  if number[0] < 128:  # As when decoding: most rows of a tile would be empty.
    return f"128 {rows} or more to be chosen unasked; got {number[0]}"
  return None


class TritonBlocks(NamedTuple):
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
    64: (TritonBlocks(128, 64, 4, 3),  # 295; (128, 128, 8, 3) 278, one block; (128, 64, 8, 3) 347
         TritonBlocks(64, 128, 4, 2),  # 280; (128, 64, 4, 2) spills 184 bytes, (64, 64, 4, 3) 315
         TritonBlocks(64, 64, 4, 2)),  # 361; (64, 128, 8, 2) 376, (32, 64, 4, 3) 477
    128: (TritonBlocks(128, 64, 8, 3),  # 409; (128, 128, 8, 2) 354 but spills 16 in triton 3.6
          TritonBlocks(128, 64, 8, 2),  # 384; (64, 64, 4, 2) 402, (128, 128, 8, 1) spills 36
          TritonBlocks(32, 128, 8, 2)),  # 584; (64, 128, 8, 2) spills 172, apart it takes 671
    256: (TritonBlocks(128, 64, 8, 2),  # 585, 64 bytes spilled; (128, 32, 8, 2) 844 and none
          TritonBlocks(128, 32, 8, 2),  # 855; (64, 32, 4, 2) spills 20, (64, 64, 8, 2) 56
          TritonBlocks(32, 128, 8, 2, True)),  # 883 + 486; together (64, 64, 8, 1) spills 788
}
_AMPERE = {
    64: (TritonBlocks(128, 64, 8, 3),  # 402; (64, 64, 4, 3) 417, (128, 64, 4, 3) spills 56
         TritonBlocks(128, 64, 8, 2),  # 375; (128, 32, 4, 2) spills 12
         TritonBlocks(32, 128, 8, 2)),  # 492; (64, 128, 8, 2) spills 16, (32, 64, 4, 2) 520
    128: (TritonBlocks(128, 32, 8, 3),  # 689; (128, 64, 8, 3) spills 24, (64, 64, 4, 3) 20
          TritonBlocks(64, 64, 4, 2),  # 584; (128, 32, 8, 2) 590
          TritonBlocks(64, 64, 8, 2)),  # 816; (32, 64, 4, 2) spills 8
    256: (TritonBlocks(64, 64, 8, 2),  # 1387; (64, 32, 8, 2) 2262
          TritonBlocks(32, 32, 4, 2),  # 1324; (64, 32, 8, 2) 1855
          TritonBlocks(32, 64, 8, 2)),  # 2555; apart 1895 + 1363
}
_ADA = _AMPERE | {  # 99 KiB of shared memory
    256: (TritonBlocks(64, 32, 8, 2),  # 2262
          TritonBlocks(32, 32, 4, 2),  # 1324
          TritonBlocks(32, 32, 8, 2)),  # 2562
}
_BLACKWELL = {
    64: (TritonBlocks(128, 128, 8, 2),  # 259; (128, 64, 4, 3) spills 36
         TritonBlocks(128, 64, 4, 2),  # 273; (128, 128, 8, 2) 284
         TritonBlocks(64, 128, 8, 2)),  # 479; (64, 64, 4, 2) 490, but triton 3.6 spills 64
    128: (TritonBlocks(128, 64, 8, 3),  # 413; (128, 128, 8, 2) spills 132
          TritonBlocks(128, 64, 8, 2),  # 406; (64, 64, 4, 2) 428
          TritonBlocks(64, 64, 4, 2)),  # 552; (64, 128, 8, 2) 516 but spills 8 in triton 3.6
    256: (TritonBlocks(128, 32, 8, 2),  # 826; (64, 64, 8, 2) 789, but 64 rows halve tcgen05's rate
          TritonBlocks(128, 32, 8, 1),  # 828; (64, 64, 8, 2) 889
          TritonBlocks(32, 128, 8, 2, True)),  # 883 + 576; together (64, 64, 8, 1) 1334, 64 rows
}
ATTENTION_TRITON = {"a100": _AMPERE, "rtx4090": _ADA, "h100": _HOPPER, "h200": _HOPPER,
                    "b200": _BLACKWELL}


class AttentionMosaicGpu(NamedTuple):
  """Tiles of the Hopper attention kernels; two compute warpgroups of 64 rows each, always."""

  block_kv: int  # keys in a tile of the forward kernel: 64, 128 or 256
  stages: int  # its K and V tiles in flight
  dq_block_kv: int  # keys in a tile of the dq kernel
  dq_k_stages: int
  dq_v_stages: int
  dkv_block_q: int  # rows in a tile of the dk, dv kernel
  dkv_stages: int  # its Q and dO tiles in flight


# By head_dim: the largest tiles that neither spill nor have their products serialized, with two
# slots for each operand where shared memory has room. Beside each the instructions of the loop
# without a mask, with ALiBi, of the forward, dq and dk/dv kernels (ptxas 13.0). No time has been
# measured: `tune` on a Hopper GPU will know better.
_MOSAIC_HOPPER = {
    64: AttentionMosaicGpu(128, 2, 128, 2, 2, 64, 2),  # 493, 454, 394
    128: AttentionMosaicGpu(128, 2, 64, 2, 2, 64, 2),  # 536, 299, 428
    # 458, 401, 406 + 283; 128 keys in the forward would take 224 registers for tiles alone.
    256: AttentionMosaicGpu(64, 2, 64, 2, 1, 64, 2),
}
ATTENTION_MOSAIC_GPU = {
    (chip, dim_head): blocks
    for chip in ("h100", "h200") for dim_head, blocks in _MOSAIC_HOPPER.items()}


def attention_mosaic_gpu(chip: str | None, dim_head: int) -> AttentionMosaicGpu:
  """Tiles for a chip; those of an h200 where it is not known."""
  return ATTENTION_MOSAIC_GPU[chips.hopper(chip).configs, dim_head]


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
  except (OSError, KeyError, TypeError, ValueError) as e:
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


class CrossEntropyMosaicGpu(NamedTuple):
  """Tiles of the Hopper cross-entropy kernels: 128 tokens, 64 to a compute warpgroup, always."""

  columns: int  # rows of the embedding in a tile
  stages: int  # slots of 64 of the contraction in flight


# The largest tile that fits: 256 columns take 128 of 240 registers, and 4 slots leave 3 KiB of
# shared memory to barriers. 59 instructions, 4 of them HGMMA, in the main loop, where 128 columns
# have 56 for half the product (ptxas 13.0). No time has been measured.
_CROSS_ENTROPY_HOPPER = CrossEntropyMosaicGpu(columns=256, stages=4)
CROSS_ENTROPY_MOSAIC_GPU = {chip: _CROSS_ENTROPY_HOPPER for chip in ("h100", "h200")}


def cross_entropy_mosaic_gpu(chip: str | None) -> CrossEntropyMosaicGpu:
  """Tiles for a chip; those of an h200 where it is not known."""
  return CROSS_ENTROPY_MOSAIC_GPU[chips.hopper(chip).configs]


class ParallelBlockMosaicGpu(NamedTuple):
  """Tiles of the Hopper kernels of the parallel block: 128 tokens, 64 to a compute warpgroup."""

  columns: int  # of a tile
  stages: int  # slots of 64 of the contraction in flight
  together: bool  # two tiles of tokens share the copies of the weights


# The largest tile that fits, and the next one for where that leaves the chip empty. 256 columns
# take 128 of 232 registers, and 4 slots with the stores' 32 KiB leave 3 KiB of shared memory. In
# the main loops: 57 to 59 instructions for 4 HGMMA of 256 columns, 70 for 8 of 128 (in_projection);
# with 128 columns and 6 slots 72 to 76 and 91, for half the product (ptxas 13.0). A tile's step
# takes 48 KiB from the L2 cache in the 1024 cycles of its product; two that share the weights 32
# KiB each, for two or three instructions more. No time has been measured.
_PARALLEL_BLOCK_HOPPER = (ParallelBlockMosaicGpu(columns=256, stages=4, together=True),
                          ParallelBlockMosaicGpu(columns=128, stages=6, together=True))
PARALLEL_BLOCK_MOSAIC_GPU = {chip: _PARALLEL_BLOCK_HOPPER for chip in ("h100", "h200")}


def parallel_block_mosaic_gpu(chip: str | None, rows: int, across) -> ParallelBlockMosaicGpu:
  """Tiles for a chip, those of an h200 where it is not known, and a result.

  Args:
    rows: tiles of 128 tokens.
    across: across(columns) is how many tiles wide the result is, 0 if tiles can't be so narrow.
  """
  def time(config):  # in bytes from the L2 cache for each step of the contraction
    waves = -(-rows * across(config.columns) // chips.hopper(chip).multiprocessors)
    return waves * (128 + config.columns // 2)

  return min((config for config in PARALLEL_BLOCK_MOSAIC_GPU[chips.hopper(chip).configs]
              if across(config.columns)), key=time)


class CrossEntropyTriton(NamedTuple):
  """Tile sizes and launch of the Triton cross-entropy kernels."""

  tokens: int
  columns: int  # rows of the embedding in a tile
  depth: int  # of the contraction in one step
  warps: int
  stages: int


# Of the tiles in which neither kernel spills, those with the fewest instructions in the main loop
# for what they multiply; beside each, those that a warp issues there for 64 tokens, 64 columns and
# 64 of the contraction, forward / gradient, and of the next best (triton 3.9, ptxas 13.0,
# bfloat16). Nothing was timed. Triton 3.6 does not spill in these either.
_WGMMA = CrossEntropyTriton(128, 256, 64, 8, 4)  # 12 / 12; (128, 128, 64, 8, 4) 21 / 21
_HMMA = CrossEntropyTriton(128, 256, 32, 8, 4)  # 37 / 32; 64 deep 28 gradient, forward spills 100
CROSS_ENTROPY_TRITON = {
    "a100": _HMMA, "rtx4090": _HMMA,  # 72 KiB of shared memory
    "h100": _WGMMA, "h200": _WGMMA,
    "b200": _WGMMA,  # 15 / 15; (256, 128, 64, 8, 4) 18 / 18, forward spills 52
}


def cross_entropy_triton(chip: str | None, itemsize: int) -> CrossEntropyTriton:
  """Tiles for a chip, or the smallest ones; a step is as many bytes deep in every dtype."""
  blocks = CROSS_ENTROPY_TRITON[chips.gpu(chip).configs]
  return blocks if itemsize == 2 else blocks._replace(columns=64, depth=32)


# Tiles of tokens that go through all parts of the vocabulary before the next ones do. What is read
# at one time then fits in the L2 cache: for 128 x 256 tiles of 16 bits at dim 4096, 16 MiB of
# tokens, and 9 blocks of 2 MiB of the embedding on the 132 multiprocessors of a Hopper GPU.
TOGETHER = 16


def walk(tiles: int, blocks: int, depth: int, start: int, processors: int = 132) -> int:
  """Blocks of the vocabulary that one block of the grid walks: such that the last wave is full.

  Args:
    tiles: of tokens.
    blocks: of the vocabulary.
    depth: steps of the main loop for one tile.
    start: steps' worth of time that a block of the grid takes to start.
    processors: streaming multiprocessors.
  """
  most = blocks
  if tiles > TOGETHER:  # No more tiles of tokens at one time than those.
    most = max(1, blocks // -(-processors // TOGETHER))

  def time(walk):
    waves = -(-tiles * -(-blocks // walk) // processors)
    return waves * (walk * depth + start)

  return min(range(1, min(most, 64) + 1), key=time)


class DecodeTriton(NamedTuple):
  """Tile sizes and launch of the Triton decode kernel."""

  rows: int  # (query, head of the group) pairs
  keys: int  # positions of the cache
  warps: int
  stages: int


def decode_triton(chip: str | None, dim_head: int, rows: int, dtype) -> DecodeTriton:
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
  most, configs = 128 if dtype.itemsize == 2 else 32, chips.gpu(chip).configs
  if dim_head == 256:
    most = 16 if dtype.itemsize == 4 else {"rtx4090": 32, "a100": 64}.get(configs, 128)
  rows = min(max(16, 1 << (rows - 1).bit_length()), most)
  keys = 16_384 // dtype.itemsize // max(dim_head, 128 if rows > 32 else 64)
  return DecodeTriton(
      rows, keys, 4 if rows < 128 else 8, 2 if configs == "rtx4090" else 3)


class DecodeMosaicGpu(NamedTuple):
  """What the Hopper decode kernel has in flight; tiles are of 64 rows and 64 positions, always."""

  stages: int  # tiles of keys and values
  programs: int  # that fill the chip


# By dim_head and itemsize of the cache: as many stages as let two programs share a multiprocessor
# (113 KiB of shared memory each); at dim_head 256 queries and two stages take more, and one program
# has it. Beside each its shared memory in KiB, and the instructions of a tile without a mask, with
# ALiBi (ptxas 13.0), against the clocks that memory takes for it at 4.3 TB/s. Nothing was timed.
_DECODE_HOPPER = {
    (64, 2): DecodeMosaicGpu(6, 2 * 132),  # 106; 477, 882
    (64, 1): DecodeMosaicGpu(8, 2 * 132),  # 94; 729, 469
    (128, 2): DecodeMosaicGpu(2, 2 * 132),  # 82; 485, 1765. 3 stages take 114
    (128, 1): DecodeMosaicGpu(3, 2 * 132),  # 100; 1038, 910
    (256, 2): DecodeMosaicGpu(3, 132),  # 226; 602, 3530
}
DECODE_MOSAIC_GPU = {(chip, *key): value
                     for chip in ("h100", "h200") for key, value in _DECODE_HOPPER.items()}


def decode_mosaic_gpu(chip: str | None, dim_head: int, itemsize: int) -> DecodeMosaicGpu:
  """For a chip and an itemsize of the cache; that of an h200 where the chip is not known."""
  return DECODE_MOSAIC_GPU[chips.hopper(chip).configs, dim_head, itemsize]


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
_SMALL = dict(area=2**18, major=2048, cores=2)  # 16 MiB of VMEM

# On a v4, major 2048 gives 89.4 and 1024 gives 85.5 (backward, dim_head 128). Forward at 128, area
# 2**20 with rows 4096 and major 4096 gives 67.6 and documents of 512 cost 1.48 times their share;
# rows 2048 gives 64.8, area 2**18 with major 2048 gives 63.5 and 1.97 times. Backward at 256, chunk
# 512 does not fit beside major 2048, which gives 87.9 in place of 85.7.
# On a tpu7x, backward at 256, area 2**22 and major 2048: documents cost 1.25 times their share;
# 2**20 and 8192, 1.67 times, for 88.2 / 76.5 in place of 84.9 / 80.4. 2**22 and 8192 do not fit.
# (chip, dim_head up to): forward, backward.
ATTENTION_MOSAIC_TPU = {
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


def attention_mosaic_tpu(chip: str | None, dim_head: int) -> tuple[TpuBlocks, TpuBlocks]:
  """Block sizes of the forward and the backward kernel; those of a v4, the smallest, for None."""
  return ATTENTION_MOSAIC_TPU[chip or "v4", 128 if dim_head <= 128 else 256]


class CrossEntropyTpu(NamedTuple):
  """Block sizes of a cross-entropy kernel for TPUs, before they are fitted to a problem."""

  tokens: int  # held in VMEM while the embedding passes
  rows: int  # of the embedding in a step
  tile: int  # tokens in a tile of logits
  chunk: int  # rows in a tile of logits
  together: int  # tiles in straight-line code


# Figures: useful share of the matrix units' peak, in %, at dim 4096; cycles of libtpu 0.0.52.
# What chose a value:
#   together 2 gives 95.9 and 1 gives 92.8 (v5p, forward), 96.9 and 94.4 (v5p, gradient);
#   together 8 / 4 / 2 gives 93.0 / 88.7 / 79.7 (v6e, forward); 16 gives 95.2 in 17,000 bundles.
#   chunk 512, together 4 gives 90.1; 256, 8 gives 88.8, as much code (v6e, gradient).
#   tokens 2048: as many as fit, for each is one FLOP more for a byte of the embedding.
_LOSS = CrossEntropyTpu(tokens=2048, rows=1024, tile=256, chunk=256, together=2)
_LOSS_V6E = (_LOSS._replace(together=8), _LOSS._replace(chunk=512, together=4))

# Forward, gradient.
CROSS_ENTROPY_MOSAIC_TPU = {
    "v4": (_LOSS, _LOSS), "v5e": (_LOSS, _LOSS), "v5p": (_LOSS, _LOSS), "v6e": _LOSS_V6E,
    "tpu7x": _LOSS_V6E}


def cross_entropy_mosaic_tpu(chip: str | None) -> tuple[CrossEntropyTpu, CrossEntropyTpu]:
  """Block sizes of the forward and the gradient kernel; those of a v4 for None."""
  return CROSS_ENTROPY_MOSAIC_TPU[chip or "v4"]


class ProductTpu(NamedTuple):
  """Block sizes of a product in the parallel block on TPUs, before they are fitted to a problem."""

  rows: int  # tokens in a block, at most
  columns: int  # of the result in a step, at most
  work: int  # multiply-adds of a step, at most
  code: int  # multiply-adds in straight-line code, at most
  part: int  # tokens of one product, the next of which overlaps with what is done to its result


class ParallelBlockTpu(NamedTuple):
  """Block sizes of the parallel block's kernels."""

  in_projection: ProductTpu
  out_projection: ProductTpu
  swiglu_gradient: ProductTpu
  input_gradient: ProductTpu


# Figures: useful share of the matrix units' peak, in %, at dim 4096, 16 heads of 256, hidden width
# 16,384, 8,192 tokens, bfloat16; static cycles of libtpu 0.0.52. What chose a value:
#   code 2**29 on a v5 and 2**31 on a v6e are some 8,000 bundles in straight line. Of the sums 4,000
#   give 92.0 and 8,000 give 94.1 (v5e), 80.5 and 86.2 (v6e, half the rows).
#   work: in-projection, 1024 rows of a v6e with 256 columns give 86.6, 2048 with 512 give 91.9;
#   sums, 2**30 gives 94.5 / 94.4, 2**31 gives 95.6 / 95.1 (v5p, out / gradient of norm(x)).
#   rows: FLOPs for a byte of weights; a v6e needs 560.
#   part: 128 / 256 / 512 gives 86.7 / 86.6 / 86.9 (in-projection, v6e, 1024 rows). SwiGLU's
#   gradient on a v6e, 512 columns: 62.3 / 86.8 / 85.1; with 1024 columns 256 gives 91.3.
_BLOCK_V5 = ParallelBlockTpu(  # v5e 93.2, 93.2, 96.6, 93.1; v5p 95.0, 95.6, 95.6, 95.1
    in_projection=ProductTpu(rows=1024, columns=1024, work=2**31, code=2**29, part=128),
    out_projection=ProductTpu(rows=1024, columns=1024, work=2**31, code=2**29, part=256),
    swiglu_gradient=ProductTpu(rows=1024, columns=1024, work=2**30, code=2**29, part=256),
    input_gradient=ProductTpu(rows=1024, columns=1024, work=2**31, code=2**29, part=256))
_BLOCK_V6E = ParallelBlockTpu(  # 91.7, 92.5, 91.3, 91.7
    in_projection=ProductTpu(rows=2048, columns=2048, work=2**33, code=2**31, part=256),
    out_projection=ProductTpu(rows=2048, columns=2048, work=2**32, code=2**31, part=1024),
    swiglu_gradient=ProductTpu(rows=2048, columns=2048, work=2**33, code=2**31, part=256),
    input_gradient=ProductTpu(rows=2048, columns=2048, work=2**32, code=2**31, part=1024))
# 16 MiB of VMEM: 65.9, 87.9, 84.5, 75.0. With 1024 rows 79.7 (out); with 512 rows 78.1 (SwiGLU).
_BLOCK_V4 = ParallelBlockTpu(
    in_projection=_BLOCK_V5.in_projection,
    out_projection=ProductTpu(rows=512, columns=512, work=2**30, code=2**29, part=512),
    swiglu_gradient=_BLOCK_V5.swiglu_gradient._replace(rows=256),
    input_gradient=ProductTpu(rows=512, columns=512, work=2**30, code=2**29, part=512))
# 64 MiB: 87.1, 91.3, 87.9, 88.6. With a v6e's blocks, cut until they fit: 88.0, 84.8, 84.9, 80.6.
_BLOCK_7X = ParallelBlockTpu(
    in_projection=_BLOCK_V6E.in_projection._replace(rows=1024),
    out_projection=_BLOCK_V6E.out_projection._replace(rows=1024, columns=1024),
    swiglu_gradient=_BLOCK_V6E.swiglu_gradient._replace(rows=1024),
    input_gradient=_BLOCK_V6E.input_gradient._replace(rows=1024, columns=1024))
# In-projection, out-projection, SwiGLU's gradient, gradient of the norm's result.
PARALLEL_BLOCK_MOSAIC_TPU = {
    "v4": _BLOCK_V4, "v5e": _BLOCK_V5, "v5p": _BLOCK_V5, "v6e": _BLOCK_V6E, "tpu7x": _BLOCK_7X}


# From which dim on `auto` takes the kernels: where their static cycles together are fewer than
# XLA's for the same steps (`benchmarks.block_static`, `benchmarks.layer_static`). GPUs were not
# timed. At 1024, 16 heads of 64, 16,384 tokens, ms of a layer forward, and with its gradients,
# XLA's second: 3.64, 3.74 and 11.1, 11.3 (v5e), 1.59, 1.62 and 4.84, 5.04 (v5p), 1.09, 1.24 and
# 3.46, 3.90 (v6e). In float32 it takes XLA's, which multiply in one pass of bfloat16 unless asked
# for more, the kernels in six: 74 and 395 thousand cycles (v5e, SwiGLU's gradient, 1,024 tokens of
# dim 1024).
PARALLEL_BLOCK_AUTO = {"v5e": 1024, "v5p": 1024, "v6e": 1024}


def parallel_block_mosaic_tpu(chip: str | None) -> ParallelBlockTpu:
  """Block sizes of the kernels of the parallel block; those of a v4 for None."""
  return PARALLEL_BLOCK_MOSAIC_TPU[chip or "v4"]


class DecodeTpu(NamedTuple):
  """Block sizes of the decode kernel for TPUs, before they are fitted to a problem."""

  size: int  # positions of a block
  slots: int  # blocks in VMEM
  chunk: int  # positions of a product
  cores: int  # that the blocks are dealt to


DECODE_TPU_LEAST = 1024  # positions, where there are few in all; below, a turn costs the same

# By chip: positions of a block at dim_head 128, bfloat16 and int8. Figures: cycles of a turn over
# cycles of its copies, from the bundles of libtpu 0.0.52 and the published bandwidth; below 1 the
# copies are what binds (`python -m benchmarks.decode_static`). What chose a value:
#   bfloat16, 2048 / 4096 / 8192 gives 0.82 / 0.59 / 0.47 (v6e, 16 heads), in as much more code.
#   int8, 4096 / 8192 / 16384 gives 1.23 / 0.95 / 0.81 (v6e, 16 heads), 1.24 / 0.96 / 0.82 (v6e, 48
#   heads), 1.24 / 1.07 / 0.97 (v5p, 48 heads), 0.85 / 0.73 (v5e, 48 heads).
#   chunk 256 / 512 / 1024 gives 2197 / 2186 / 2184 cycles (v6e, int8, 48 heads, 8192).
#   slots: two are computed on, so four let copies of two blocks be under way.
_DECODE_SIZES = {"v4": (4096, 4096), "v5e": (4096, 8192), "v5p": (4096, 16384),
                 "v6e": (4096, 16384), "tpu7x": (8192, 16384)}


def decode_mosaic_tpu(chip: str | None, itemsize: int, dim_head: int) -> DecodeTpu:
  """Block sizes for a chip, those of a v4 for None; itemsize is that of the cache."""
  chip = chip or "v4"
  bfloat16, int8 = _DECODE_SIZES[chip]
  size = (int8 if itemsize == 1 else bfloat16 * 2 // itemsize) * 128 // max(dim_head, 128)
  return DecodeTpu(max(size // 1024 * 1024, 1024), slots=4, chunk=512,
                   cores=2 if chip in ("v4", "v5p") else 1)


class ParallelBlockTriton(NamedTuple):
  """Tile sizes and launch of one Triton kernel of the parallel block."""

  tokens: int
  columns: int
  depth: int  # of the contraction in one step
  warps: int
  stages: int


# Of the tiles in which no kernel spills, for sums of any length and for short ones. Beside each the
# instructions that all warps issue in the main loop of `in_projection` for 64 tokens, 64 columns
# and 64 of the contraction, and of the next best (triton 3.9, ptxas 13.0, bfloat16). Nothing was
# timed. Triton 3.6 does not spill in these either.
_BLOCK_WGMMA = (
    ParallelBlockTriton(128, 256, 64, 8, 4),  # 103; (256, 128, 64, 8, 4) 108, twice the HGMMA
    ParallelBlockTriton(128, 128, 64, 4, 3))  # 150; (128, 128, 64, 8, 3) 198
_BLOCK_HMMA = (
    ParallelBlockTriton(128, 256, 64, 8, 4),  # 231; 32 deep 280
    ParallelBlockTriton(128, 128, 32, 4, 4))  # 290; 64 deep 257, but 8 bytes spilled at dim 512
PARALLEL_BLOCK_TRITON = {
    "a100": _BLOCK_HMMA,
    "rtx4090": (_BLOCK_HMMA[0]._replace(stages=3), _BLOCK_HMMA[1]),  # 96 KiB of shared memory
    "h100": _BLOCK_WGMMA, "h200": _BLOCK_WGMMA,
    "b200": _BLOCK_WGMMA,  # 118, 157; (128, 256, 64, 4, 4) spills 1168 in `swiglu_gradient`
}

# Up to here two programs share a multiprocessor, for one's epilogue to run under the other's
# products. Outside of its main loop a warp of `swiglu_gradient` issues some 3,300 instructions:
# with two warps to a scheduler 6,600 clocks, as long as 6 steps of 64 take on Hopper, while no
# other program runs. Tiles of 128 columns read a quarter more of shared memory than it delivers in
# that time (128 bytes a clock), so they take 1,280 clocks where those of 256 take 1,024: with
# nothing else counted, the two are level at 26 steps for `swiglu_gradient` and, with some 1,300
# instructions, at 10 for `in_projection`.
PARALLEL_BLOCK_SHORT = 1024
PARALLEL_BLOCK_NORM = 4096  # numbers of x in a program of the norm: 32 a thread in 71 registers


def parallel_block_triton(chip: str | None, itemsize: int, contraction: int) -> ParallelBlockTriton:
  """Tiles for a chip, or the smallest ones; contraction is how long all products of a sum are."""
  long, short = PARALLEL_BLOCK_TRITON[chips.gpu(chip).configs]
  if itemsize == 4:
    return long._replace(columns=64, depth=32)
  return short if contraction <= PARALLEL_BLOCK_SHORT else long
