"""The dq kernel of flash attention for Hopper: the rows of a tile walk over the keys they see."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core.constants import LOG2E
from ..hopper import heads as packing, softmax, tiles
from ..hopper.tiles import COL, COMPUTE, ROW, ROWS, WARPGROUP_ROWS, across, down
from . import mosaic_gpu_mask as masking

LSE, DELTA, POSITION, SLOPE = range(4)  # of the table: figures of each row


class Operands(NamedTuple):
  """Arrays in global memory, those that this kernel and that of dk and dv read."""

  query: Any  # [B, rows, kv_heads, dim], packed; so is dout
  key: Any  # [B, S, kv_heads, dim]
  value: Any  # likewise; None where it is the key
  dout: Any
  table: Any  # float32[B, kv_heads, 3 or 4, rows]: LSE in base 2, DELTA, POSITION, SLOPE
  bounds: Any  # int32[1 or B, tiles, 5], of `mosaic_gpu_mask`
  query_segments: Any  # int32[B, rows] or None
  key_segments: Any  # int32[B, S] or None
  slopes: Any = None  # float32[kv_heads, ...] of `heads.row_slopes`, for dq alone


class Scratch(NamedTuple):
  """Shared memory and barriers: tiles of queries stay, those of keys and values pass through."""

  dout_smem: Any
  k_free: Any
  k_ready: Any
  k_smem: Any  # [stages, block, dim]
  q_ready: Any
  q_smem: Any  # [ROWS, dim]; at the end it holds dq
  v_free: Any
  v_ready: Any
  v_smem: Any  # None where the value is the key


def dq_kernel(operands, dq_ref, moment_ref, scratch, *, config, group, kv_heads, num_keys, scale,
              is_causal, window, masked_head, masked_tail):
  """dq of 128 rows of one key/value head: a warpgroup has 64 of them.

  `moment_ref`, float32[B, kv_heads, rows] or None, takes each row's share of the gradient of its
  slope: the sum of ds * (key - query).
  """
  q_ref, k_ref, v_ref, dout_ref, table_ref, bounds_ref, q_seg_ref, k_seg_ref, slopes_ref = operands
  dout_smem, k_free, k_ready, k_smem, q_ready, q_smem, v_free, v_ready, v_smem = scratch
  dim = k_ref.shape[3]
  block, k_stages, v_stages = config.dq_block_kv, config.dq_k_stages, config.dq_v_stages
  wg, index, heads = lax.axis_index("wg"), lax.axis_index("block"), k_ref.shape[0] * kv_heads
  tile, head = lax.div(index, heads), lax.rem(index, heads)
  b, kv = lax.div(head, kv_heads), lax.rem(head, kv_heads)
  tile = pl.cdiv(q_ref.shape[1], ROWS) - 1 - tile
  rows = lambda start, size: packing.rows_at(q_ref, b, kv, kv_heads, start, size)
  bounds = bounds_ref.at[b if bounds_ref.shape[0] > 1 else 0, tile]
  lo, full_lo, full_hi, hi, offset = (bounds[i] for i in range(5))
  shared = v_ref is None
  if shared:
    v_smem, v_ready, v_free, v_stages = k_smem, k_ready, k_free, k_stages

  @pl.when(wg == COMPUTE)
  def copy():
    plgpu.set_max_registers(tiles.COPY_REGISTERS, action="decrease")
    for ref, smem in ((q_ref, q_smem), (dout_ref, dout_smem)):
      plgpu.copy_gmem_to_smem(ref.at[rows(tile * ROWS, ROWS)], smem, q_ready)

    def stream(stages, ref, smem, ready, free):
      source = lambda i: ref.at[b, pl.ds((lo + i) * block, block), kv]
      return stages, lambda i, slot: [(source(i), smem.at[slot])], ready, free

    streams = [stream(k_stages, k_ref, k_smem, k_ready, k_free),
               stream(v_stages, v_ref, v_smem, v_ready, v_free)]
    tiles.feed(hi - lo, streams[:1] if shared else streams)

  @pl.when(wg < COMPUTE)
  def compute():
    plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")

    def facts(wg):
      """Of each of the warpgroup's rows: position, lse, delta, slope, segment."""
      row0 = tile * ROWS + wg * WARPGROUP_ROWS
      row = row0 + plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=ROW)
      position = offset + lax.div(row, group)
      mine = pl.ds(row0, WARPGROUP_ROWS)
      load = lambda ref: plgpu.load(ref, layout=ROW, optimized=False)
      lse, delta = (load(table_ref.at[b, kv, i, mine]) for i in (LSE, DELTA))
      slope = segment = None
      if slopes_ref is not None:
        slope = LOG2E * load(slopes_ref.at[kv, pl.ds(lax.rem(row0, group), WARPGROUP_ROWS)])
      if q_seg_ref is not None:
        segment = load(q_seg_ref.at[b, mine])
      return position, lse, delta, slope, segment

    half = lambda smem, wg: smem.at[pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
    factor = softmax.factor_of(scale)
    shape = (WARPGROUP_ROWS, block)
    fixed, lane = (x.astype(jnp.float32) for x in tiles.columns(block))

    def step(i, moment, dq_acc, masked):
      k_slot, v_slot = lax.rem(i, k_stages), lax.rem(i, v_stages)
      plgpu.barrier_wait(k_ready.at[k_slot])
      here, (position, lse, delta, slope, segment) = wg, kept
      if dim > 128:
        # Kept across the loop these would be spilled, and so would the 64 registers that the
        # descriptors of Q and dO take: the compiler must not see that they never change.
        here = lax.optimization_barrier(wg)
        position, lse, delta, slope, segment = facts(here)
      scores = tiles.product(shape, half(q_smem, here), k_smem.at[k_slot].T)
      if scale <= 0:
        scores *= scale * LOG2E
      base, shift = (lo + i) * block, across(-lse, shape)
      if slope is not None:
        scores += across(slope * (1 / factor), shape) * down(fixed, shape)
        shift = across(slope * (base - position).astype(jnp.float32) - lse, shape)
        shift += across(slope, shape) * down(lane, shape)
      if masked:
        segments = None
        if segment is not None:
          keys = k_seg_ref.at[b, pl.ds(base, block)]
          segments = segment, plgpu.load(keys, layout=COL, optimized=False)
        visible = masking.visible_keys(position, num_keys, is_causal=is_causal, window=window)
        scores = softmax.mask_scores(scores, visible, base, segments)
      weights = jnp.exp2(scores * factor + shift)
      if not shared:
        plgpu.barrier_wait(v_ready.at[v_slot])
      # dweights - delta: the subtraction is the accumulator's start.
      centered = tiles.product_onto(
          across(-delta, shape), half(dout_smem, here), v_smem.at[v_slot].T)
      if not shared:
        plgpu.barrier_arrive(v_free.at[v_slot])
      dscores: Any = weights * centered  # pyright: ignore[reportOperatorIssue]
      if moment is not None:
        distance = across((base - position).astype(jnp.float32), shape) + down(lane, shape)
        distance += down(fixed, shape)
        moment += tiles.fold(dscores * distance, jnp.add)  # mutant: moment
      plgpu.wgmma(dq_acc, dscores.astype(q_smem.dtype), k_smem.at[k_slot])
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(k_free.at[k_slot])
      return moment

    kept = (None,) * 5 if dim > 128 else facts(wg)
    plgpu.barrier_wait(q_ready)

    def loops(dq_acc):
      moment = None if moment_ref is None else tiles.zeros(tiles.QUAD)
      moment = _run(functools.partial(step, dq_acc=dq_acc), moment, (lo, full_lo, full_hi, hi),
                    masked_head, masked_tail)
      return dq_acc[...], moment

    dq, moment = pl.run_scoped(loops, plgpu.ACC((WARPGROUP_ROWS, dim), jnp.float32))
    q_tile = half(q_smem, wg)
    q_tile[...] = (dq * scale).astype(q_smem.dtype)
    plgpu.commit_smem()
    row0 = tile * ROWS + wg * WARPGROUP_ROWS
    plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[rows(row0, WARPGROUP_ROWS)])
    if moment_ref is not None:  # from registers: at head_dim 256 shared memory is full
      moment_ref.at[b, kv, pl.ds(row0, WARPGROUP_ROWS)][...] = moment.sum(axis=1)
    plgpu.wait_smem_to_gmem(0)


def _run(step, carry, bounds, masked_head, masked_tail):
  """All steps: those under the mask at either end, if there are any, and between those without."""
  lo, full_lo, full_hi, hi = bounds
  plain_lo = full_lo - lo if masked_head else 0
  plain_hi = full_hi - lo if masked_tail else hi - lo
  run = lambda start, stop, masked, carry: lax.fori_loop(
      start, stop, functools.partial(step, masked=masked), carry)
  if masked_head:
    carry = run(0, plain_lo, True, carry)
  carry = run(plain_lo, plain_hi, False, carry)
  return run(plain_hi, hi - lo, True, carry) if masked_tail else carry
