"""The backward of flash attention for Hopper, in Pallas Mosaic GPU: dq in one kernel, dk and dv in
another.

Both recompute p = exp2(scores - lse) tile by tile. A fused kernel would save two of the seven
matrix products, but has to add to dq from many blocks at once, in an order that changes from
run to run.
"""

import functools
from typing import Any

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

LSE, DELTA, POSITION, SLOPE = range(4)  # rows of the table that the dk, dv kernel reads


def _dq_kernel(q_ref, k_ref, v_ref, dout_ref, table_ref, bounds_ref, q_seg_ref, k_seg_ref,
               slopes_ref, dq_ref, q_smem, dout_smem, k_smem, v_smem,
               q_ready, k_ready, v_ready, k_free, v_free, *,
               config, group, kv_heads, num_keys, scale, is_causal, window, masked_head,
               masked_tail):
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

    def step(i, _, dq_acc, masked):
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
      dscores = (weights * centered).astype(q_smem.dtype)  # pyright: ignore[reportOperatorIssue]
      plgpu.wgmma(dq_acc, dscores, k_smem.at[k_slot])
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(k_free.at[k_slot])

    kept = (None,) * 5 if dim > 128 else facts(wg)
    plgpu.barrier_wait(q_ready)

    def loops(dq_acc):
      plain_lo = full_lo - lo if masked_head else 0
      plain_hi = full_hi - lo if masked_tail else hi - lo
      run = lambda start, stop, masked: lax.fori_loop(
          start, stop, functools.partial(step, dq_acc=dq_acc, masked=masked), None)
      if masked_head:
        run(0, plain_lo, True)
      run(plain_lo, plain_hi, False)
      if masked_tail:
        run(plain_hi, hi - lo, True)
      return dq_acc[...]

    dq = pl.run_scoped(loops, plgpu.ACC((WARPGROUP_ROWS, dim), jnp.float32))
    q_tile = half(q_smem, wg)
    q_tile[...] = (dq * scale).astype(q_smem.dtype)
    plgpu.commit_smem()
    row0 = tile * ROWS + wg * WARPGROUP_ROWS
    plgpu.copy_smem_to_gmem(q_tile, dq_ref.at[rows(row0, WARPGROUP_ROWS)])
    plgpu.wait_smem_to_gmem(0)


def _dkv_kernel(q_ref, k_ref, v_ref, dout_ref, table_ref, bounds_ref, q_seg_ref, k_seg_ref,
                dk_ref, dv_ref, k_smem, v_smem, q_smem, dout_smem, table_smem, weights_smem,
                kv_ready, q_ready, dout_ready, q_free, dout_free, weights_ready, weights_free, *,
                config, kv_heads, splits, scale, alibi, is_causal, window, masked_head,
                masked_tail):
  """Tiles are transposed: a row is a key, a column is a query of some head.

  Each compute warpgroup owns 64 keys, unless dk and dv of 64 keys take more registers than one
  warpgroup has: then both work on the same keys, the first on dv, the second on dk.
  """
  dim = k_ref.shape[3]
  divided = weights_smem is not None
  keys, block, stages = k_smem.shape[0], config.dkv_block_q, config.dkv_stages
  wg, part = lax.axis_index("wg"), lax.axis_index("split")
  b, kv = lax.div(lax.axis_index("head"), kv_heads), lax.rem(lax.axis_index("head"), kv_heads)
  tile = lax.axis_index("tile")
  bounds = bounds_ref.at[b if bounds_ref.shape[0] > 1 else 0, tile]
  lo, full_lo, full_hi, hi, offset = (bounds[i] for i in range(5))
  # The blocks of rows are dealt out: this part takes lo + part, lo + part + splits, ...
  dealt = lambda end: lax.div(jnp.maximum(end - lo - part, 0) + (splits - 1), splits)
  steps = dealt(hi)
  first_row = lambda i: (lo + part + i * splits) * block
  shared = v_ref is None
  if shared:
    v_smem = k_smem

  @pl.when(wg == COMPUTE)
  def copy():
    plgpu.set_max_registers(tiles.COPY_REGISTERS, action="decrease")
    for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
      if ref is not None:
        plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(tile * keys, keys), kv], smem, kv_ready)
    rows = lambda ref, i: ref.at[packing.rows_at(ref, b, kv, kv_heads, first_row(i), block)]
    table = lambda i: table_ref.at[b, kv, :, pl.ds(first_row(i), block)]
    tiles.feed(steps, [
        (stages, lambda i, slot: [(rows(q_ref, i), q_smem.at[slot]),
                                  (table(i), table_smem.at[slot])], q_ready, q_free),
        (stages, lambda i, slot: [(rows(dout_ref, i), dout_smem.at[slot])], dout_ready, dout_free),
    ])

  factor = scale * LOG2E
  shape = (WARPGROUP_ROWS, block)
  key0 = tile * keys + (0 if divided else wg * WARPGROUP_ROWS)
  here = pl.ds(0 if divided else wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
  k_tile, v_tile = k_smem.at[here], v_smem.at[here]
  left, right = masking.reach(is_causal, window)

  def weights_of(i, slot, masked):
    """exp2 of scaled, biased, masked scores less lse."""
    scores = tiles.product(shape, k_tile, q_smem.at[slot].T)
    column = lambda which: plgpu.load(table_smem.at[slot, which], layout=COL, optimized=False)
    shift: Any = -column(LSE)
    row: Any = None
    if alibi or masked:
      row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=ROW)
      row = across(row.astype(jnp.float32), shape)
      ahead = (key0 - offset).astype(jnp.float32) - column(POSITION)  # of key row 0, per column
    scores *= factor
    if alibi:
      slope = column(SLOPE)
      shift += slope * ahead
      scores += down(slope, shape) * row
    scores += down(shift, shape)
    if masked:
      distance = row + down(ahead, shape)
      seen: Any = distance <= right if right < FAR else None
      if left < FAR:
        seen = distance >= -left if seen is None else seen & (distance >= -left)
      if q_seg_ref is not None:
        segments = (
            plgpu.load(k_seg_ref.at[b, pl.ds(key0, WARPGROUP_ROWS)], layout=ROW, optimized=False),
            plgpu.load(q_seg_ref.at[b, pl.ds(first_row(i), block)], layout=COL, optimized=False))
        same = across(segments[0], shape) == down(segments[1], shape)
        seen = same if seen is None else seen & same
      scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.exp2(scores)

  def dscores_of(slot, weights):
    delta = plgpu.load(table_smem.at[slot, DELTA], layout=COL, optimized=False)
    centered = tiles.product_onto(down(-delta, shape), v_tile, dout_smem.at[slot].T)
    dscores = weights() * centered
    return dscores * scale if shared else dscores

  def loops(step, *accs):
    plgpu.barrier_wait(kv_ready)
    run = lambda start, stop, masked: lax.fori_loop(
        start, stop, lambda i, _: step(i, lax.rem(i, stages), masked, *accs), None)
    plain_lo = dealt(full_lo) if masked_head else 0
    plain_hi = dealt(full_hi) if masked_tail else steps
    if masked_head:
      run(0, plain_lo, True)
    run(plain_lo, plain_hi, False)
    if masked_tail:
      run(plain_hi, steps, True)
    return tuple(acc[...] for acc in accs)

  def store(ref, x, own):
    """Writes a result; `own` is shared memory that this warpgroup alone reads, and no more."""
    target = ref.at[part, b, pl.ds(key0, WARPGROUP_ROWS), kv]
    if ref.dtype == jnp.float32:  # whole sectors from registers; there is no room for it in `own`
      target[...] = x
    else:
      own[...] = x.astype(ref.dtype)
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(own, target)
      plgpu.wait_smem_to_gmem(0)

  def whole(i, slot, masked, dk_acc, dv_acc: Any = None):
    plgpu.barrier_wait(q_ready.at[slot])
    weights = weights_of(i, slot, masked)
    plgpu.barrier_wait(dout_ready.at[slot])
    plgpu.wgmma(dk_acc if shared else dv_acc, weights.astype(q_smem.dtype), dout_smem.at[slot])
    dscores = dscores_of(slot, lambda: weights)
    plgpu.barrier_arrive(dout_free.at[slot])
    plgpu.wgmma(dk_acc, dscores.astype(q_smem.dtype), q_smem.at[slot])
    plgpu.wgmma_wait(0)
    plgpu.commit_smem()  # the table was read by threads, and is next written by a copy
    plgpu.barrier_arrive(q_free.at[slot])

  def dv_part(i, slot, masked, acc):
    plgpu.barrier_wait(q_ready.at[slot])
    weights = weights_of(i, slot, masked)
    plgpu.commit_smem()
    plgpu.barrier_arrive(q_free.at[slot])
    plgpu.barrier_wait(weights_free)
    weights_smem[...] = weights
    plgpu.barrier_arrive(weights_ready)
    plgpu.barrier_wait(dout_ready.at[slot])
    plgpu.wgmma(acc, weights.astype(q_smem.dtype), dout_smem.at[slot])
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(dout_free.at[slot])

  def dk_part(i, slot, masked, acc):
    plgpu.barrier_arrive(weights_free)
    plgpu.barrier_wait(q_ready.at[slot])
    plgpu.barrier_wait(dout_ready.at[slot])

    def weights():
      plgpu.barrier_wait(weights_ready)  # mutant: wait for the weights
      return plgpu.load(weights_smem, layout=tiles.TILE)

    dscores = dscores_of(slot, weights)
    plgpu.barrier_arrive(dout_free.at[slot])
    plgpu.wgmma(acc, dscores.astype(q_smem.dtype), q_smem.at[slot])
    plgpu.wgmma_wait(0)
    plgpu.commit_smem()
    plgpu.barrier_arrive(q_free.at[slot])

  acc = plgpu.ACC((WARPGROUP_ROWS, dim), jnp.float32)
  scaled = lambda dk: dk if shared else dk * scale
  if divided:
    @pl.when(wg == 0)
    def compute_dv():
      plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
      dv, = pl.run_scoped(lambda a: loops(dv_part, a), acc)
      store(dv_ref, dv, k_tile)

    @pl.when(wg == 1)
    def compute_dk():
      plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
      dk, = pl.run_scoped(lambda a: loops(dk_part, a), acc)
      store(dk_ref, scaled(dk), v_tile)
  else:
    @pl.when(wg < COMPUTE)
    def compute():
      plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
      if shared:
        dk, = pl.run_scoped(lambda a: loops(whole, a), acc)
        store(dk_ref, dk, k_tile)
      else:
        dk, dv = pl.run_scoped(lambda *accs: loops(whole, *accs), acc, acc)
        store(dk_ref, scaled(dk), k_tile)
        store(dv_ref, dv, v_tile)


def backward(query: jax.Array, key: jax.Array, value: jax.Array | None, out: jax.Array,
             lse: jax.Array, dout: jax.Array, *, segment_ids: tuple[jax.Array, jax.Array] | None,
             alibi_slopes: jax.Array | None, query_offset: int | jax.Array, is_causal: bool,
             scale: float, window: tuple[int, int] | None, chip: str | None, config: Any = None):
  """(dquery, dkey, dvalue) from what `forward` returned; without `value`, dkey is both's sum."""
  batch, length, heads, dim = query.shape
  num_keys, kv_heads = key.shape[1:3]
  group, rows = heads // kv_heads, length * heads // kv_heads
  config = config or configs.mosaic_gpu(chip, dim)
  left, right = masking.reach(is_causal, window)
  segmented, shared = segment_ids is not None, value is None
  mask = dict(is_causal=is_causal, window=window)

  delta = jnp.einsum("bthd,bthd->bht", out, dout, preferred_element_type=jnp.float32)
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)  # exp2(anything - inf) is 0
  padded = pl.cdiv(rows, ROWS) * ROWS
  table = [packing.pack_rows(lse, kv_heads, padded, jnp.inf),
           packing.pack_rows(delta, kv_heads, padded, 0.0)]
  position = (jnp.arange(padded, dtype=jnp.int32) // group).astype(jnp.float32)
  table.append(jnp.broadcast_to(position, table[0].shape))
  slopes = None
  if alibi_slopes is not None:
    slopes = packing.row_slopes(alibi_slopes, kv_heads)
    every = jnp.tile(alibi_slopes.reshape(kv_heads, group), (1, pl.cdiv(padded, group)))
    table.append(jnp.broadcast_to(every[:, :padded] * LOG2E, table[0].shape))
  table = jnp.stack(table, axis=2)  # [B, kv_heads, 3 or 4, rows]

  packed, packed_dout, all_keys, all_values = packing.pad_rows(
      packing.pack(query, kv_heads), packing.pack(dout, kv_heads), key, value)
  smem = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=tiles.TRANSFORMS)
  barriers = lambda n, arrivals=1: plgpu.Barrier(num_barriers=n, num_arrivals=arrivals)
  launch = functools.partial(
      plgpu.kernel, num_threads=COMPUTE + 1, thread_name="wg",
      interpret=mode.mosaic_gpu(),
      compiler_params=tiles.COMPILER_PARAMS)

  block = config.dq_block_kv
  bounds, q_segments, k_segments = masking.key_blocks(
      query, key, block, segment_ids, query_offset, **mask)
  operands = [packed, all_keys, all_values, packed_dout, table, bounds, q_segments, k_segments,
              slopes]
  k_stages, v_stages = config.dq_k_stages, config.dq_v_stages
  dquery = launch(
      functools.partial(
          _dq_kernel, config=config, group=group, kv_heads=kv_heads, num_keys=num_keys,
          scale=scale,
          masked_head=left < FAR or segmented,
          masked_tail=right < FAR or segmented or num_keys % block != 0, **mask),
      out_type=jax.ShapeDtypeStruct(packed.shape, query.dtype),
      grid=(bounds.shape[1] * batch * kv_heads,),
      grid_names=("block",),
      kernel_name="flash_attention_dq",
      scratch_types=dict(  # pyright: ignore[reportArgumentType]
          q_smem=smem((ROWS, dim)),
          dout_smem=smem((ROWS, dim)),
          k_smem=smem((k_stages, block, dim)),
          v_smem=None if shared else smem((v_stages, block, dim)),
          q_ready=plgpu.Barrier(num_arrivals=2),
          k_ready=barriers(k_stages),
          v_ready=barriers(v_stages),
          k_free=barriers(k_stages, COMPUTE),
          v_free=barriers(v_stages, COMPUTE),
      ),
  )(*operands)

  divided = dim > 128
  keys, block, stages = (WARPGROUP_ROWS if divided else ROWS), config.dkv_block_q, config.dkv_stages
  bounds, q_segments, k_segments = masking.row_blocks(
      query, key, keys, block, segment_ids, query_offset, **mask)
  blocks = bounds.shape[1]
  splits = _splits(batch * kv_heads * blocks, group, chips.hopper(chip).multiprocessors)
  operands = [packed, all_keys, all_values, packed_dout, table, bounds, q_segments, k_segments]
  partial = jax.ShapeDtypeStruct(
      (splits, batch, blocks * keys, kv_heads, dim),
      query.dtype if splits == 1 and not shared else jnp.float32)
  one_sum = shared and not divided
  dkey, *dvalue = launch(
      functools.partial(
          _without_dv if one_sum else _dkv_kernel, config=config, kv_heads=kv_heads, splits=splits,
          scale=scale, alibi=slopes is not None, masked_head=right < FAR or segmented,
          masked_tail=left < FAR or segmented, **mask),
      out_type=[partial] * (1 if one_sum else 2),
      grid=(blocks, splits, batch * kv_heads),
      grid_names=("tile", "split", "head"),
      kernel_name="flash_attention_dkv",
      scratch_types=dict(  # pyright: ignore[reportArgumentType]
          k_smem=smem((keys, dim)),
          v_smem=None if shared else smem((keys, dim)),
          q_smem=smem((stages, block, dim)),
          dout_smem=smem((stages, block, dim)),
          table_smem=plgpu.SMEM((stages, table.shape[2], block), jnp.float32),
          weights_smem=plgpu.SMEM(
              (WARPGROUP_ROWS, block), jnp.float32,
              transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
          ) if divided else None,
          kv_ready=plgpu.Barrier(num_arrivals=1 if shared else 2),
          q_ready=barriers(stages, 2),
          dout_ready=barriers(stages),
          q_free=barriers(stages, COMPUTE),
          dout_free=barriers(stages, COMPUTE),
          weights_ready=plgpu.Barrier(),
          weights_free=plgpu.Barrier(),
      ),
  )(*operands)
  # Inside shard_map what JAX knows of a kernel's results is their shapes.
  dquery, dkey, *dvalue = partition.varying_together(
      dquery, dkey, *dvalue, *operands)[:2 + len(dvalue)]
  grads = [x[:, :, :num_keys] for x in (dkey, *dvalue)]
  grads = [x.sum(0) if splits > 1 else x[0] for x in grads]
  dquery = packing.unpack(dquery, query.shape, kv_heads)
  if shared:
    return dquery, functools.reduce(jnp.add, grads).astype(key.dtype), None
  return dquery, grads[0].astype(key.dtype), grads[1].astype(key.dtype)


def _without_dv(*refs, **keywords):
  """`_dkv_kernel` where one accumulator takes the gradients of key and value alike."""
  operands = 8
  _dkv_kernel(*refs[:operands + 1], None, *refs[operands + 1:], **keywords)


def _splits(blocks: int, group: int, multiprocessors: int) -> int:
  """Into how many parts the rows of each block of keys are dealt, so that the chip is full.

  A power of two up to the group's size: at that size the float32 parts of dk and dv take
  8 bytes an element of `query`.
  """
  parts = 1
  while parts * 2 <= group and blocks * parts < 2 * multiprocessors:
    parts *= 2
  return parts
