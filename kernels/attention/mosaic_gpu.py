"""Flash attention for Hopper in Pallas Mosaic GPU: the backend's functions, the forward kernel.

How it works, and what it costs: docs/attention.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core import chips, partition
from ..core.constants import FAR, LOG2E
from ..hopper import heads as packing, softmax, tiles
from ..hopper.tiles import COL, COMPUTE, ROW, ROWS, WARPGROUP_ROWS, across, down
from ..interpreters import mode
from . import configs, mosaic_gpu_mask as masking
from .mosaic_gpu_backward import backward as backward


def unsupported(query: jax.Array | jax.ShapeDtypeStruct, key: jax.Array | jax.ShapeDtypeStruct,
                value: jax.Array | jax.ShapeDtypeStruct | None, *, chip: str | None):
  """The first requirement that the operands fail, or None."""
  del key, value
  if chip not in (None, *chips.HOPPER):
    return f"a Hopper GPU (h100, h200); got {chip}"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"bfloat16 or float16; got {query.dtype}"
  if query.shape[-1] not in (64, 128, 256):
    return f"dim_head in {{64, 128, 256}}; got {query.shape[-1]}"
  return None


class _Operands(NamedTuple):
  """Arrays in global memory."""

  query: Any  # [B, rows, kv_heads, dim], packed
  key: Any  # [B, S, kv_heads, dim]
  value: Any  # likewise; None where it is the key
  bounds: Any  # int32[1 or B, tiles, 5], of `mosaic_gpu_mask`
  query_segments: Any  # int32[B, rows] or None
  key_segments: Any  # int32[B, S] or None
  slopes: Any  # float32[kv_heads, ...] of `heads.row_slopes`, or None


class _Scratch(NamedTuple):
  """Shared memory and barriers: a tile of queries stays, those of keys and values pass through."""

  k_free: Any
  k_ready: Any
  k_smem: Any  # [stages, block, dim]
  lse_smem: Any  # float32[ROWS]
  q_ready: Any
  q_smem: Any  # [ROWS, dim]; at the end it holds the result
  turn: Any
  v_free: Any
  v_ready: Any
  v_smem: Any  # None where the value is the key


def _forward_kernel(operands, out_ref, lse_ref, scratch, *, config, group, kv_heads, num_keys,
                    scale, is_causal, window, masked_head, masked_tail):
  """128 rows of one key/value head: a warpgroup has 64 of them."""
  q_ref, k_ref, v_ref, bounds_ref, q_seg_ref, k_seg_ref, slopes_ref = operands
  (k_free, k_ready, k_smem, lse_smem, q_ready, q_smem, turn, v_free, v_ready,
   v_smem) = scratch
  dim = k_ref.shape[3]
  block, stages = config.block_kv, config.stages
  wg, index, heads = lax.axis_index("wg"), lax.axis_index("block"), k_ref.shape[0] * kv_heads
  tile, head = lax.div(index, heads), lax.rem(index, heads)
  b, kv = lax.div(head, kv_heads), lax.rem(head, kv_heads)
  tile = pl.cdiv(q_ref.shape[1], ROWS) - 1 - tile  # under a causal mask the long ones first
  rows = lambda start, size: packing.rows_at(q_ref, b, kv, kv_heads, start, size)
  bounds = bounds_ref.at[b if bounds_ref.shape[0] > 1 else 0, tile]
  lo, full_lo, full_hi, hi, offset = (bounds[i] for i in range(5))
  shared = v_ref is None
  if shared:
    v_smem, v_ready = k_smem, None

  @pl.when(wg == COMPUTE)
  def copy():
    plgpu.set_max_registers(tiles.COPY_REGISTERS, action="decrease")
    plgpu.copy_gmem_to_smem(q_ref.at[rows(tile * ROWS, ROWS)], q_smem, q_ready)

    def stream(ref, smem, ready, free):
      source = lambda i: ref.at[b, pl.ds((lo + i) * block, block), kv]
      return stages, lambda i, slot: [(source(i), smem.at[slot])], ready, free

    streams = [stream(k_ref, k_smem, k_ready, k_free), stream(v_ref, v_smem, v_ready, v_free)]
    tiles.feed(hi - lo, streams[:1] if shared else streams)

  @pl.when(wg < COMPUTE)
  def compute():
    plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
    row0 = tile * ROWS + wg * WARPGROUP_ROWS
    row = row0 + plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=ROW)
    position = offset + lax.div(row, group)
    visible = masking.visible_keys(position, num_keys, is_causal=is_causal, window=window)
    slope = q_segment = None
    if slopes_ref is not None:
      at = pl.ds(lax.rem(row0, group), WARPGROUP_ROWS)
      slope = plgpu.load(slopes_ref.at[kv, at], layout=ROW, optimized=False)
    if q_seg_ref is not None:
      at = pl.ds(row0, WARPGROUP_ROWS)
      q_segment = plgpu.load(q_seg_ref.at[b, at], layout=ROW, optimized=False)
    q_tile = q_smem.at[pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
    factor = softmax.factor_of(scale)

    steps = hi - lo
    fixed, lane = (x.astype(jnp.float32) for x in tiles.columns(block))

    def pass_turn():
      plgpu.barrier_arrive(turn)
      plgpu.barrier_wait(turn)

    def step(i, carry, masked):
      acc, top, total = carry
      slot = lax.rem(i, stages)
      shape = (WARPGROUP_ROWS, block)
      plgpu.barrier_wait(k_ready.at[slot])

      def scores_of(acc_ref):
        plgpu.wgmma(acc_ref, q_tile, k_smem.at[slot].T)
        pass_turn()
        return acc_ref[...]

      scores = pl.run_scoped(scores_of, plgpu.ACC(shape, jnp.float32))
      if not shared:
        plgpu.barrier_arrive(k_free.at[slot])
      if scale <= 0:
        scores *= scale * LOG2E
      if slope is not None:
        scores += across(slope * (LOG2E / factor), shape) * down(fixed, shape)
      if masked:
        base, segments = (lo + i) * block, None
        if q_segment is not None:
          keys = k_seg_ref.at[b, pl.ds(base, block)]
          segments = q_segment, plgpu.load(keys, layout=COL, optimized=False)
        scores = softmax.mask_scores(scores, visible, base, segments)

      weights, decay, new_top, total = softmax.update(
          scores, top, total, factor=factor, slope=slope, lane=lane)
      acc *= across(decay, acc.shape)
      weights = weights.astype(q_smem.dtype)
      acc, new_top, total, weights = lax.optimization_barrier((acc, new_top, total, weights))
      plgpu.barrier_arrive(turn)
      if not shared:
        plgpu.barrier_wait(v_ready.at[slot])  # mutant: wait for values
      plgpu.barrier_wait(turn)  # mutant: wait for the turn
      acc = tiles.product_onto(acc, weights, v_smem.at[slot])
      plgpu.barrier_arrive((k_free if shared else v_free).at[slot])
      return acc, new_top, total

    carry = tiles.zeros(dim), *softmax.start()
    plgpu.barrier_wait(q_ready)

    # The warpgroups take turns: one is in its matrix products while the other is in its softmax.
    pl.when(wg == 1)(pass_turn)
    plain_lo = full_lo - lo if masked_head else 0
    plain_hi = full_hi - lo if masked_tail else steps
    if masked_head:
      carry = lax.fori_loop(0, plain_lo, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(plain_lo, plain_hi, functools.partial(step, masked=False), carry)
    if masked_tail:
      carry = lax.fori_loop(plain_hi, steps, functools.partial(step, masked=True), carry)
    pl.when(wg == 0)(pass_turn)

    acc, top, total = carry
    if slope is not None:  # out of the last tile's frame
      top += slope * LOG2E * ((hi - 1) * block - position).astype(jnp.float32)
    acc, total, empty = softmax.normalize(acc, total)
    q_tile[...] = acc.astype(q_smem.dtype)
    lse_tile = lse_smem.at[pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
    lse_tile[...] = jnp.where(empty, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
    plgpu.commit_smem()  # mutant: commit of the result
    plgpu.copy_smem_to_gmem(q_tile, out_ref.at[rows(row0, WARPGROUP_ROWS)])
    plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[b, kv, pl.ds(row0, WARPGROUP_ROWS)])
    plgpu.wait_smem_to_gmem(0)


def forward(query: jax.Array, key: jax.Array, value: jax.Array | None, *,
            segment_ids: tuple[jax.Array, jax.Array] | None, alibi_slopes: jax.Array | None,
            query_offset: int | jax.Array, is_causal: bool, scale: float,
            window: tuple[int, int] | None, chip: str | None, config: Any = None):
  """(out, lse); shapes and meaning as in `flash_attention`, heads and batch flat."""
  batch, length, heads, dim = query.shape
  num_keys, kv_heads = key.shape[1:3]
  config = config or configs.mosaic_gpu(chip, dim)
  block, stages = config.block_kv, config.stages
  bounds, q_segments, k_segments = masking.key_blocks(
      query, key, block, segment_ids, query_offset, is_causal=is_causal, window=window)
  left, right = masking.reach(is_causal, window)
  packed, key, value = packing.pad_rows(packing.pack(query, kv_heads), key, value)
  num_tiles = bounds.shape[1]
  operands = _Operands(
      packed, key, value, bounds, q_segments, k_segments,
      None if alibi_slopes is None else packing.row_slopes(alibi_slopes, kv_heads))
  smem = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=tiles.TRANSFORMS)
  out, lse = plgpu.kernel(
      functools.partial(
          _forward_kernel, config=config, group=heads // kv_heads, kv_heads=kv_heads,
          num_keys=num_keys, scale=scale, is_causal=is_causal, window=window,
          masked_head=left < FAR or segment_ids is not None,
          masked_tail=right < FAR or segment_ids is not None or num_keys % block != 0),
      out_type=[jax.ShapeDtypeStruct(packed.shape, query.dtype),
                jax.ShapeDtypeStruct((batch, kv_heads, num_tiles * ROWS), jnp.float32)],
      grid=(num_tiles * batch * kv_heads,),
      grid_names=("block",),
      num_threads=COMPUTE + 1,
      thread_name="wg",
      kernel_name="flash_attention_forward",
      interpret=mode.mosaic_gpu(),
      compiler_params=tiles.COMPILER_PARAMS,
      scratch_types=[_Scratch(
          q_smem=smem((ROWS, dim)),
          k_smem=smem((stages, block, dim)),
          v_smem=None if value is None else smem((stages, block, dim)),
          lse_smem=plgpu.SMEM((ROWS,), jnp.float32),
          q_ready=plgpu.Barrier(),
          k_ready=plgpu.Barrier(num_barriers=stages),
          v_ready=plgpu.Barrier(num_barriers=stages),
          k_free=plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE),
          v_free=plgpu.Barrier(num_barriers=stages, num_arrivals=COMPUTE),
          turn=plgpu.Barrier(num_arrivals=COMPUTE),
      )],
  )(operands)
  # Inside shard_map what JAX knows of a kernel's results is their shapes.
  out, lse = partition.varying_together(out, lse, *operands)[:2]
  return (packing.unpack(out, query.shape, kv_heads),
          packing.unpack_rows(lse, (batch, heads, length)))
