"""Attention to a cache for Hopper in Pallas Mosaic GPU: the split over positions.

How it works, and what it costs: docs/decode.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core import chips, partition
from ..core.constants import LOG2E
from ..hopper import heads as packing, softmax, tiles
from ..hopper.tiles import COL, ROW, TILE, across, down
from ..interpreters import mode
from . import configs, mosaic_gpu_merge, splits
from .xla import first_seen

ROWS = tiles.WARPGROUP_ROWS  # M of one wgmma: (query, head of the group) pairs of a program
BLOCK = 64  # positions of a tile
PIECE = 16  # positions of a copy: no more than these are loaded past a sequence's end
COLUMNS = 64  # of a tile of shared memory, and of an int8 tile on its way to 16 bits


def unsupported(query: jax.Array | jax.ShapeDtypeStruct, key: jax.Array | jax.ShapeDtypeStruct,
                value: jax.Array | jax.ShapeDtypeStruct | None, *, chip: str | None):
  """The first requirement that the operands fail, or None."""
  del value
  if chip not in (None, *chips.HOPPER):
    return f"a Hopper GPU (h100, h200); got {chip}"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"queries of bfloat16 or float16; got {query.dtype}"
  if query.shape[-1] not in (64, 128, 256):
    return f"dim_head in {{64, 128, 256}}; got {query.shape[-1]}"
  if key.dtype == jnp.int8 and query.shape[-1] == 256:  # it would spill
    return "a dim_head of 64 or 128 for an int8 cache; got 256"
  if key.shape[1] % 8:
    return f"caches of a length that is a multiple of 8; got {key.shape[1]}"
  return None


def _transforms(dtype):
  """The transforms of rows in shared memory, by 64 columns: what wgmma wants, of 16 bits."""
  return (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(COLUMNS * dtype.itemsize))


class _Operands(NamedTuple):
  """Arrays in global memory."""

  table: Any  # int32[slots, 3], of `splits`
  lengths: Any  # int32[B]
  query: Any  # [B, rows, kv_heads, dim], packed
  key: Any  # [B, S, kv_heads, dim]
  value: Any  # likewise; None where it is the key
  key_scales: Any  # float32[B, kv_heads, S], or None
  value_scales: Any
  slopes: Any  # float32[kv_heads, ...] of `heads.row_slopes`, or None


class _Scratch(NamedTuple):
  """Shared memory and barriers."""

  k_scale_smem: Any  # float32[stages, BLOCK]
  k_smem: Any  # [stages, BLOCK, dim], in the cache's dtype
  k_wide: Any  # [BLOCK, dim], in the query's; None unless the cache is int8
  q_ready: Any
  q_smem: Any  # [ROWS, dim]; at the end it holds the result
  ready: Any
  v_scale_smem: Any
  v_smem: Any  # None where the value is the key; so is v_wide
  v_wide: Any


def _fetch(operands, scratch, at, b, kv, start, begin, end):
  """Copies a block. Pieces with nothing to see are taken from behind the cache: zeros."""
  ready = scratch.ready.at[at]
  for ref, smem in ((operands.key, scratch.k_smem), (operands.value, scratch.v_smem)):
    if ref is not None:
      for piece in range(0, BLOCK, PIECE):
        seen = start + piece < end  # mutant: pieces
        if begin is not None:
          seen &= start + piece + PIECE > begin  # mutant: pieces before a window
        first = jnp.where(seen, start + piece, ref.shape[1])
        plgpu.copy_gmem_to_smem(
            ref.at[b, pl.ds(first, PIECE), kv], smem.at[at, pl.ds(piece, PIECE)], ready)
  for ref, smem in ((operands.key_scales, scratch.k_scale_smem),
                    (operands.value_scales, scratch.v_scale_smem)):
    if ref is not None:
      plgpu.copy_gmem_to_smem(ref.at[b, kv, pl.ds(start, BLOCK)], smem.at[at], ready)


def _widened(smem, wide, at):
  """A tile as wgmma takes it: int8 is exact in 16 bits."""
  if wide is None:
    return smem.at[at]
  # 128 columns at once are 64 registers beside the accumulator's, and spill.
  for column in range(0, wide.shape[1], COLUMNS):
    part = pl.ds(column, COLUMNS)
    x = plgpu.load(smem.at[at].at[:, part], layout=TILE, optimized=False)
    wide[:, part] = x.astype(wide.dtype)
  plgpu.commit_smem()
  return wide


def _kernel(operands, out_ref, lse_ref, scratch, *, kv_heads, tiles_of_rows, group, num_queries,
            scale, left):
  """One slot of the table, one key/value head, 64 rows: one warpgroup, which copies for itself."""
  table_ref, lengths_ref, q_ref, k_ref, v_ref, k_scale_ref, v_scale_ref, slopes_ref = operands
  k_scale_smem, k_smem, k_wide, q_ready, q_smem, ready, v_scale_smem, v_smem, v_wide = scratch
  index, stages = lax.axis_index("block"), k_smem.shape[0]
  slot, index = lax.div(index, kv_heads * tiles_of_rows), lax.rem(index, kv_heads * tiles_of_rows)
  kv, row0 = lax.div(index, tiles_of_rows), lax.rem(index, tiles_of_rows) * ROWS
  b, lo, end = table_ref[slot, 0], table_ref[slot, 1], table_ref[slot, 2]
  dim = k_ref.shape[3]

  @pl.when(b >= 0)
  def attend():
    steps = pl.cdiv(end - lo, BLOCK)
    begin = None if left is None else first_seen(lengths_ref[b], num_queries, left)
    copy = lambda i: _fetch(
        operands, scratch, lax.rem(i, stages), b, kv, lo + i * BLOCK, begin, end)
    rows = packing.rows_at(q_ref, b, kv, kv_heads, row0, ROWS)  # mutant: rows
    plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem, q_ready)
    lax.fori_loop(0, jnp.minimum(steps, stages), lambda i, _: copy(i), None)

    row = row0 + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
    length = lengths_ref[b]
    position = length - num_queries + lax.div(row, group)
    hi = jnp.minimum(end, position + 1)  # mutant: mask
    slope = None
    if slopes_ref is not None:
      slope = plgpu.load(  # mutant: slopes
          slopes_ref.at[kv, pl.ds(lax.rem(row0, group), ROWS)], layout=ROW, optimized=False)
    factor = softmax.factor_of(scale)
    fixed, lane = (x.astype(jnp.float32) for x in tiles.columns(BLOCK))
    shape = (ROWS, BLOCK)

    def step(i, carry, masked, edge=False):
      acc, top, total = carry
      at = lax.rem(i, stages)
      plgpu.barrier_wait(ready.at[at])  # mutant: wait for a tile
      filled = end - (lo + i * BLOCK)
      unseen = begin - (lo + i * BLOCK) if edge else None
      if masked and k_wide is None:
        values = k_smem if v_ref is None else v_smem
        pl.when(filled < BLOCK if unseen is None else (filled < BLOCK) | (unseen > 0))(
            lambda: tiles.clear_rows(values.at[at], filled, unseen))
      k_tile = _widened(k_smem, k_wide, at)

      def scores_of(acc_ref):
        plgpu.wgmma(acc_ref, q_smem, k_tile.T)
        return acc_ref[...]

      scores = pl.run_scoped(scores_of, plgpu.ACC(shape, jnp.float32))
      k_scale = None
      if k_scale_ref is not None:
        k_scale = plgpu.load(k_scale_smem.at[at], layout=COL, optimized=False)
        scores *= down(k_scale, shape)  # mutant: key scales
      if scale <= 0:
        scores *= scale * LOG2E
      if slope is not None:
        scores += across(slope * (LOG2E / factor), shape) * down(fixed, shape)
      if masked:
        low = position - left if edge else None  # mutant: window
        scores = softmax.mask_scores(scores, (low, hi), lo + i * BLOCK, None)

      weights, decay, new_top, total = softmax.update(
          scores, top, total, factor=factor, slope=slope, lane=lane)
      acc *= across(decay, acc.shape)  # mutant: fade of the accumulator
      if k_scale is not None:
        if v_scale_ref is not None:  # mutant: values' scales
          k_scale = plgpu.load(v_scale_smem.at[at], layout=COL, optimized=False)
        unscaled = weights
        weights *= down(k_scale, shape)  # mutant: value scales
        if masked:  # a scale behind the end may be NaN
          weights = jnp.where(unscaled == 0, 0.0, weights)
      weights = weights.astype(q_smem.dtype)
      acc, new_top, total, weights = lax.optimization_barrier((acc, new_top, total, weights))
      v_tile = k_tile if v_ref is None else _widened(v_smem, v_wide, at)
      acc = tiles.product_onto(acc, weights, v_tile)  # mutant: product

      plgpu.commit_smem()  # every warp has read these tiles  # mutant: commit before a refill
      pl.when(i + stages < steps)(lambda: copy(i + stages))  # mutant: refill
      return acc, new_top, total

    carry = tiles.zeros(dim), *softmax.start()
    plgpu.barrier_wait(q_ready)  # mutant: wait for the queries
    # Every row sees the positions up to that of the first query: these tiles need no mask.
    # mutant: plain end
    plain = jnp.minimum(end, jnp.maximum(length - num_queries + 1, 0)) - lo
    plain = lax.div(jnp.maximum(plain, 0), BLOCK)
    seen = 0
    if left is not None:  # Up to where the last query sees nothing of a tile's beginning.
      seen = pl.cdiv(jnp.maximum(length - 1 - left - lo, 0), BLOCK)  # mutant: window's edge
      seen = jnp.minimum(seen, steps)
      plain = jnp.maximum(plain, seen)
      carry = lax.fori_loop(0, seen, functools.partial(step, masked=True, edge=True), carry)
    # mutant: plain tiles
    carry = lax.fori_loop(seen, plain, functools.partial(step, masked=False), carry)
    acc, top, total = lax.fori_loop(plain, steps, functools.partial(step, masked=True), carry)

    if slope is not None:  # out of the last tile's frame, into one for all parts of a row
      # mutant: frame of a row
      top += slope * LOG2E * (lo + (steps - 1) * BLOCK - position).astype(jnp.float32)
    acc, total, empty = softmax.normalize(acc, total)
    q_smem[...] = acc.astype(q_smem.dtype)
    plgpu.commit_smem()  # mutant: commit of the result
    if lse_ref is None:
      to = out_ref.at[rows]
    else:
      rows = pl.ds(row0, ROWS)
      to = out_ref.at[kv, rows, slot]
      lse_ref.at[kv, slot, rows][...] = jnp.where(empty, -jnp.inf, top + jnp.log2(total))
    plgpu.copy_smem_to_gmem(q_smem, to)
    plgpu.wait_smem_to_gmem(0)


def forward(query: jax.Array, key: jax.Array, value: jax.Array | None, lengths: jax.Array, *,
            alibi_slopes: jax.Array | None, scale: float, left: int | None = None,
            key_scales: jax.Array | None, value_scales: jax.Array | None, chip: str | None,
            config: Any = None):
  """Attention to what is filled of a cache; arguments and result as in `xla.attend`."""
  dim, kv_heads = query.shape[3], key.shape[2]
  config = config or configs.mosaic_gpu(chip, dim, key.dtype.itemsize)
  stages, int8 = config.stages, key.dtype == jnp.int8
  packed, = packing.pad_rows(packing.pack(query, kv_heads))
  num_rows = packed.shape[1]
  tiles_of_rows = pl.cdiv(num_rows, ROWS)
  rows = jax.ShapeDtypeStruct((len(lengths), num_rows, kv_heads, dim), query.dtype)
  programs = config.programs * chips.hopper(chip).multiprocessors
  limits = splits.limits(rows, key, BLOCK, programs // tiles_of_rows,
                         None if left is None else query.shape[1] + left)
  table, starts = splits.split(lengths, limits)

  array = jax.ShapeDtypeStruct
  operands = _Operands(
      table, lengths, packed, key, value,
      *(None if x is None else x.swapaxes(1, 2) for x in (key_scales, value_scales)),
      None if alibi_slopes is None else packing.row_slopes(alibi_slopes, kv_heads))
  out_types = [array(packed.shape, query.dtype)]
  if limits.parts:
    out_types = [array((kv_heads, num_rows, limits.slots, dim), query.dtype),
                 array((kv_heads, limits.slots + mosaic_gpu_merge.PARTS, tiles_of_rows * ROWS),
                       jnp.float32)]
  kernel = functools.partial(
      _kernel, kv_heads=kv_heads, tiles_of_rows=tiles_of_rows,
      group=query.shape[2] // kv_heads, num_queries=query.shape[1], scale=scale, left=left)
  if not limits.parts:
    with_lse = kernel
    kernel = lambda operands, out_ref, scratch: with_lse(operands, out_ref, None, scratch)

  tile = lambda x, *lead: None if x is None else plgpu.SMEM(
      (*lead, BLOCK, dim), x.dtype, transforms=_transforms(x.dtype))
  wide = lambda x: tile(query) if int8 and x is not None else None
  column = lambda x: None if x is None else plgpu.SMEM((stages, BLOCK), jnp.float32)
  copies = (BLOCK // PIECE) * (1 + (value is not None)) + int8 * (1 + (value_scales is not None))
  out = plgpu.kernel(
      kernel,
      out_type=out_types,
      grid=(limits.slots * kv_heads * tiles_of_rows,),
      grid_names=("block",),
      kernel_name="decode_attention",
      interpret=mode.mosaic_gpu(),
      compiler_params=tiles.COMPILER_PARAMS,
      scratch_types=[_Scratch(
          q_smem=plgpu.SMEM((ROWS, dim), query.dtype, transforms=_transforms(query.dtype)),
          k_smem=tile(key, stages), v_smem=tile(value, stages),
          k_scale_smem=column(key_scales), v_scale_smem=column(value_scales),
          k_wide=wide(key), v_wide=wide(value),
          q_ready=plgpu.Barrier(),
          ready=plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
      )],
  )(operands)
  if limits.parts:
    most = min(limits.programs, key.shape[1] // limits.least)
    parts, lse2 = out
    # The store of one part's column, in the order that the merge loads, is no whole sector.
    out = [mosaic_gpu_merge.merge(
        parts, lse2.swapaxes(1, 2), starts, most, _transforms(query.dtype))]
    if packed.shape[2] != kv_heads:  # one key/value head after the other, as `pack` has them
      out = [out[0].swapaxes(1, 2).reshape(packed.shape)]
  # Inside shard_map what JAX knows of a kernel's results is their shapes.
  out = partition.varying_together(*out, *operands)[0]
  return packing.unpack(out, query.shape, kv_heads)
