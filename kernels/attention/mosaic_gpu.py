"""Flash attention for Hopper in Pallas Mosaic GPU: the forward kernel and its launcher.

The query heads of one key/value head are rows of one matrix: row r = i * group + g is query i of
head g. A block of the grid takes 128 rows, 64 for each of two compute warpgroups; a third
warpgroup feeds them K and V through TMA.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import tuning

LOG2E = math.log2(math.e)
LANES = 8  # columns of a wgmma tile that one quad of threads holds, two to a thread
WARPGROUP_ROWS = 64  # M of one wgmma
COMPUTE = 2  # compute warpgroups; warpgroup COMPUTE issues the copies
ROWS = COMPUTE * WARPGROUP_ROWS
LOWEST = -1e30  # the running maximum of a row that has seen nothing: finite, so no inf - inf
FAR = 2**30  # a window this wide is no window

TILE = plgpu.Layout.WGMMA
ROW, COL = TILE.reduce(1), TILE.reduce(0)
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane)
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def unsupported(query, key, value, *, chip):
  """The first requirement that the operands fail, or None."""
  del key, value
  if chip not in (None, "h100", "h200"):
    return f"a Hopper GPU (h100, h200); got {chip}"
  if query.dtype not in (jnp.bfloat16, jnp.float16):
    return f"bfloat16 or float16; got {query.dtype}"
  if query.shape[-1] not in (64, 128, 256):
    return f"dim_head in {{64, 128, 256}}; got {query.shape[-1]}"
  return None


# Outside the kernels: rows, bounds, small tables. ----------------------------------------------


def pack(x, kv_heads):
  """[B, T, heads, D] -> [B, rows, kv_heads, D] or [B * kv_heads, rows, 1, D].

  Multi-query attention has rows in this order in memory already, and so has a group of one.
  """
  batch, length, heads, dim = x.shape
  group = heads // kv_heads
  if kv_heads == 1 or group == 1:
    return x.reshape(batch, length * group, kv_heads, dim)
  x = x.reshape(batch, length, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
  return x.reshape(batch * kv_heads, length * group, 1, dim)


def unpack(x, shape, kv_heads):
  """The inverse of `pack`; `shape` is [B, T, heads, D]."""
  batch, length, heads, dim = shape
  group = heads // kv_heads
  if kv_heads == 1 or group == 1:
    return x.reshape(shape)
  x = x.reshape(batch, kv_heads, length, group, dim).transpose(0, 2, 1, 3, 4)
  return x.reshape(shape)


def block_bounds(num_blocks, block, num_keys, first, last, *, is_causal, window):
  """Which blocks of keys the queries at positions [first, last] see: (lo, full_lo, full_hi, hi).

  Some query sees some key in each of the blocks [lo, hi); in [full_lo, full_hi) every query sees
  every key, so these need no mask. All are int32 arrays.
  """
  some_lo, some_hi = jnp.zeros_like(first), jnp.full_like(first, num_keys)
  all_lo, all_hi = some_lo, some_hi
  left, right = reach(is_causal, window)
  if right < FAR:
    some_hi, all_hi = jnp.minimum(some_hi, last + right + 1), jnp.minimum(all_hi, first + right + 1)
  if left < FAR:
    some_lo, all_lo = jnp.maximum(some_lo, first - left), jnp.maximum(all_lo, last - left)
  lo = jnp.minimum(some_lo // block, num_blocks)
  hi = jnp.maximum(lo, -(-some_hi // block))
  full_lo = jnp.clip(-(-all_lo // block), lo, hi)
  full_hi = jnp.clip(all_hi // block, full_lo, hi)
  return lo, full_lo, full_hi, hi


def segment_bounds(bounds, segments, others):
  """`bounds` [B or 1, n] narrowed to blocks whose segments meet; ids int32[B, n, _], [B, m, _]."""
  lo, full_lo, full_hi, hi = (b[..., None] for b in bounds)
  low, high = segments.min(-1)[..., None], segments.max(-1)[..., None]
  other_low, other_high = others.min(-1)[:, None], others.max(-1)[:, None]
  block = jnp.arange(others.shape[1], dtype=jnp.int32)  # [B, n, m] exists inside fusions only
  meets = (low <= other_high) & (other_low <= high) & (lo <= block) & (block < hi)
  same = ((low == high) & (other_low == low) & (other_high == low)
          & (full_lo <= block) & (block < full_hi))
  lo = jnp.where(meets, block, len(block)).min(-1)
  hi = jnp.maximum(lo, jnp.where(meets, block + 1, 0).max(-1))
  full_lo = jnp.where(same, block, len(block)).min(-1)
  gap = ~same & (block > full_lo[..., None])
  full_hi = jnp.where(gap, block, len(block)).min(-1)
  full_lo = jnp.clip(full_lo, lo, hi)
  return lo, full_lo, jnp.clip(full_hi, full_lo, hi), hi


def reach(is_causal, window):
  """(left, right): how far from its own position a query sees."""
  left, right = (min(w, FAR) for w in window or (FAR, FAR))
  return left, 0 if is_causal else right


def row_slopes(alibi_slopes, kv_heads):
  """float32[kv_heads, group + 64]: from any row on, the slopes of the next 64 rows."""
  slopes = jnp.asarray(alibi_slopes, jnp.float32).reshape(kv_heads, -1)
  size = slopes.shape[1] + WARPGROUP_ROWS
  return jnp.tile(slopes, (1, pl.cdiv(size, slopes.shape[1])))[:, :size]


def segment_rows(ids, group, padded):
  """int32[B, length] -> int32[B, padded], each id `group` times; the padding repeats the last."""
  ids = jnp.repeat(ids.astype(jnp.int32), group, axis=1)
  return jnp.pad(ids, ((0, 0), (0, padded - ids.shape[1])), mode="edge")


def like(x, shape, dtype):
  """The type of an output that varies over the mesh axes that `x` varies over."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


# Inside the kernels. ---------------------------------------------------------------------------


def across(x, shape):
  """A value per row, broadcast over columns."""
  return lax.broadcast_in_dim(x, shape, [0])


def down(x, shape):
  """A value per column, broadcast over rows."""
  return lax.broadcast_in_dim(x, shape, [1])


def columns(n):
  """Column numbers as (fixed, lane): fixed is a constant of the instruction, lane of the thread.

  Column 8 g + 2 t + b lies in thread t of its quad. Splitting it keeps n / 4 registers free and
  n / 4 conversions out of the loop: `fixed` folds into immediates, `lane` into one register.
  """
  column = plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=COL)
  return column & ~6, column & 6


def fold(x, op):
  """[64, n] -> [64, 8]: `op` over the columns that each thread holds, before any shuffle."""
  parts = [x[:, i:i + LANES] for i in range(0, x.shape[1], LANES)]
  while len(parts) > 1:
    parts = [op(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
  return parts[0]


def visible_keys(position, num_keys, *, is_causal, window):
  """The range [lo, hi) of keys that a query sees; lo is None where it is 0 for every query."""
  left, right = reach(is_causal, window)
  lo = position - left if left < FAR else None
  hi = jnp.full_like(position, num_keys)
  return lo, jnp.minimum(hi, position + (right + 1)) if right < FAR else hi


def mask_scores(scores, visible, base, q_segment, k_segment):
  """-inf where the row's query does not see the column's key; the tile's first key is `base`."""
  fixed, lane = (down(c, scores.shape) for c in columns(scores.shape[1]))
  lo, hi = visible
  seen = fixed < across(hi - base, scores.shape) - lane
  if lo is not None:
    seen &= fixed >= across(lo - base, scores.shape) - lane
  if q_segment is not None:
    seen &= across(q_segment, scores.shape) == down(k_segment, scores.shape)
  return jnp.where(seen, scores, -jnp.inf)


def _forward_kernel(q_ref, k_ref, v_ref, bounds_ref, slopes_ref, q_seg_ref, k_seg_ref,
                    out_ref, lse_ref, q_smem, k_smem, v_smem, lse_smem,
                    q_ready, k_ready, v_ready, k_free, v_free, turn, *,
                    config, group, kv_heads, scale, is_causal, window, masked_head, masked_tail):
  num_keys, dim = k_ref.shape[1], k_ref.shape[3]
  block, stages = config.block_kv, config.stages
  tile, wg = lax.axis_index("tile"), lax.axis_index("wg")
  b, kv = lax.div(lax.axis_index("head"), kv_heads), lax.rem(lax.axis_index("head"), kv_heads)
  tile = pl.cdiv(q_ref.shape[1], ROWS) - 1 - tile  # under a causal mask the long ones first
  rows = lambda start, size: rows_at(q_ref, b, kv, kv_heads, start, size)
  bounds = bounds_ref.at[b if bounds_ref.shape[0] > 1 else 0, tile]
  lo, full_lo, full_hi, hi, offset = (bounds[i] for i in range(5))
  shared = v_ref is None
  if shared:
    v_smem, v_ready = k_smem, None

  @pl.when(wg == COMPUTE)
  def copy():
    plgpu.set_max_registers(40, action="decrease")
    plgpu.copy_gmem_to_smem(q_ref.at[rows(tile * ROWS, ROWS)], q_smem, q_ready)

    streams = [(k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)]

    def step(i, _, wait, load):
      slot = lax.rem(i, stages)
      for ref, smem, ready, free in streams[:1 if shared else 2]:
        if wait:
          plgpu.barrier_wait(free.at[slot])
        if load:
          plgpu.copy_gmem_to_smem(ref.at[b, pl.ds((lo + i) * block, block), kv], smem.at[slot],
                                  ready.at[slot])

    steps, filled = hi - lo, jnp.minimum(stages, hi - lo)
    lax.fori_loop(0, filled, functools.partial(step, wait=False, load=True), None)
    lax.fori_loop(filled, steps, functools.partial(step, wait=True, load=True), None)
    lax.fori_loop(steps - filled, steps, functools.partial(step, wait=True, load=False), None)

  @pl.when(wg < COMPUTE)
  def compute():
    plgpu.set_max_registers(232, action="increase")
    row0 = tile * ROWS + wg * WARPGROUP_ROWS
    row = row0 + plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=ROW)
    position = offset + lax.div(row, group)
    visible = visible_keys(position, num_keys, is_causal=is_causal, window=window)
    slope = q_segment = None
    if slopes_ref is not None:
      at = pl.ds(lax.rem(row0, group), WARPGROUP_ROWS)
      slope = plgpu.load(slopes_ref.at[kv, at], layout=ROW, optimized=False)
    if q_seg_ref is not None:
      at = pl.ds(row0, WARPGROUP_ROWS)
      q_segment = plgpu.load(q_seg_ref.at[b, at], layout=ROW, optimized=False)
    q_tile = q_smem.at[pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
    # Scores are multiplied by `factor` as they enter exp2, which is one fused multiply-add; that
    # needs factor > 0, so that it commutes with the maximum.
    factor = scale * LOG2E if scale > 0 else 1.0

    steps = hi - lo
    fixed, lane = (x.astype(jnp.float32) for x in columns(block))

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
        base, k_segment = (lo + i) * block, None
        if k_seg_ref is not None:
          k_segment = plgpu.load(k_seg_ref.at[b, pl.ds(base, block)], layout=COL, optimized=False)
        scores = mask_scores(scores, visible, base, q_segment, k_segment)

      high = fold(scores, jnp.maximum)
      if slope is None:
        new_top = jnp.maximum(top, high.max(axis=1) * factor)
        shift = across(-new_top, shape)
      else:
        top -= slope * (LOG2E * block)  # into this tile's frame
        high = high * factor + across(slope * LOG2E, high.shape) * down(lane[:LANES], high.shape)
        new_top = jnp.maximum(top, high.max(axis=1))
        shift = across(slope * LOG2E, shape) * down(lane, shape) - across(new_top, shape)
      decay = jnp.exp2(top - new_top)
      weights = jnp.exp2(scores * factor + shift)
      total = total * across(decay, total.shape) + fold(weights, jnp.add)
      acc *= across(decay, acc.shape)
      weights = weights.astype(q_smem.dtype)
      acc, new_top, total, weights = lax.optimization_barrier((acc, new_top, total, weights))
      plgpu.barrier_arrive(turn)
      if not shared:
        plgpu.barrier_wait(v_ready.at[slot])
      plgpu.barrier_wait(turn)

      def weigh(acc_ref):
        plgpu.wgmma(acc_ref, weights, v_smem.at[slot])

      acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
      plgpu.barrier_arrive((k_free if shared else v_free).at[slot])
      return acc, new_top, total

    cast = plgpu.layout_cast
    carry = (
        cast(jnp.zeros((WARPGROUP_ROWS, dim), jnp.float32), TILE),
        cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), ROW),
        cast(jnp.zeros((WARPGROUP_ROWS, LANES), jnp.float32), TILE),
    )
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
    total = total.sum(axis=1)
    empty = total == 0
    acc *= across(1 / jnp.where(empty, 1.0, total), acc.shape)
    q_tile[...] = acc.astype(q_smem.dtype)
    lse_tile = lse_smem.at[pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)]
    lse_tile[...] = jnp.where(empty, -jnp.inf, (top + jnp.log2(total)) / LOG2E)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_tile, out_ref.at[rows(row0, WARPGROUP_ROWS)])
    plgpu.copy_smem_to_gmem(lse_tile, lse_ref.at[b, kv, pl.ds(row0, WARPGROUP_ROWS)])
    plgpu.wait_smem_to_gmem(0)


def rows_at(ref, b, kv, kv_heads, start, size):
  """The index of rows [start, start + size) in a `pack`ed array."""
  if ref.shape[2] == kv_heads:
    return b, pl.ds(start, size), kv
  return b * kv_heads + kv, pl.ds(start, size), 0


def forward(query, key, value, *, segment_ids, alibi_slopes, query_offset, is_causal, scale,
            window, chip):
  """(out, lse) of flash attention; see `attention.flash_attention` for the contract."""
  batch, length, heads, dim = query.shape
  num_keys, kv_heads = key.shape[1:3]
  group, rows = heads // kv_heads, length * heads // kv_heads
  config = tuning.ATTENTION_MOSAIC_GPU[dim]
  block, stages = config.block_kv, config.stages
  tiles, num_blocks = pl.cdiv(rows, ROWS), pl.cdiv(num_keys, block)

  first = jnp.arange(tiles, dtype=jnp.int32) * ROWS
  last = jnp.minimum(first + ROWS, rows) - 1
  offset = jnp.asarray(query_offset, jnp.int32)
  bounds = [x[None] for x in block_bounds(
      num_blocks, block, num_keys, offset + first // group, offset + last // group,
      is_causal=is_causal, window=window)]
  q_segments = k_segments = None
  if segment_ids is not None:
    q_segments = segment_rows(segment_ids[0], group, tiles * ROWS)
    k_segments = segment_rows(segment_ids[1], 1, num_blocks * block)
    bounds = segment_bounds(bounds, q_segments.reshape(batch, tiles, -1),
                            k_segments.reshape(batch, num_blocks, -1))
  bounds = jnp.stack([*bounds, jnp.broadcast_to(offset, bounds[0].shape)], -1)
  slopes = None if alibi_slopes is None else row_slopes(alibi_slopes, kv_heads)

  masked_head = segment_ids is not None or reach(is_causal, window)[0] < FAR
  masked_tail = (segment_ids is not None or reach(is_causal, window)[1] < FAR
                 or num_keys % block != 0)
  packed = pack(query, kv_heads)
  smem = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=TRANSFORMS)
  out, lse = plgpu.kernel(
      functools.partial(
          _forward_kernel, config=config, group=group, kv_heads=kv_heads, scale=scale,
          is_causal=is_causal, window=window, masked_head=masked_head, masked_tail=masked_tail),
      out_type=[like(query, packed.shape, query.dtype),
                like(query, (batch, kv_heads, tiles * ROWS), jnp.float32)],
      grid=(tiles, batch * kv_heads),
      grid_names=("tile", "head"),
      num_threads=COMPUTE + 1,
      thread_name="wg",
      kernel_name="flash_attention_forward",
      compiler_params=COMPILER_PARAMS,
      scratch_types=dict(
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
      ),
  )(packed, key, value, bounds, slopes, q_segments, k_segments)
  lse = lse[:, :, :rows].reshape(batch, kv_heads, length, group).transpose(0, 1, 3, 2)
  return unpack(out, query.shape, kv_heads), lse.reshape(batch, heads, length)
