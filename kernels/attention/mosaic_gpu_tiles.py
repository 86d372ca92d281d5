"""What the Hopper attention kernels share: rows, block bounds, columns, masks, feeding.

The query heads of one key/value head are rows of one matrix: row r = i * group + g is query i of
head g. Of the three warpgroups of a block of the grid, two compute, on 64 rows each, and the
third issues the copies.
"""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)
WARPGROUP_ROWS = 64  # M of one wgmma
COMPUTE = 2  # compute warpgroups; warpgroup COMPUTE issues the copies
ROWS = COMPUTE * WARPGROUP_ROWS
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24  # 2 * 240 + 24 = 3 * 168, what a launch is given
QUAD = 8  # columns that the four threads of a quad hold of one wgmma tile, two to a thread
FAR = 2**30  # a window this wide is no window

TILE = plgpu.Layout.WGMMA
ROW, COL = TILE.reduce(1), TILE.reduce(0)
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Layouts are set by hand where they matter: the inference of the default semantics runs out of
# fuel on the forward kernel at head_dim 256.
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane)


# Outside the kernels. --------------------------------------------------------------------------


def pack(x, kv_heads):
  """[B, T, heads, D] -> [B, rows, kv_heads, D] or [B * kv_heads, rows, 1, D].

  Multi-query attention has its rows in this order in memory already, and so has a group of one.
  """
  batch, length, heads, dim = x.shape
  group = heads // kv_heads
  if kv_heads == 1 or group == 1:
    return x.reshape(batch, length * group, kv_heads, dim)
  x = x.reshape(batch, length, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
  return x.reshape(batch * kv_heads, length * group, 1, dim)


def whole_copies(*arrays):
  """The arrays [B, rows, ...] with zeros after the last row, up to what a copy divides rows into.

  A copy into swizzled shared memory takes 8 rows at a time, and refuses an array whose rows are
  no multiple of that, though not a tile that reaches over the end of one.
  """
  def padded(x):
    missing = -x.shape[1] % TRANSFORMS[0].tiling[0]
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x

  return tuple(None if x is None else padded(x) for x in arrays)


def unpack(x, shape, kv_heads):
  """The inverse of `pack`, and of `whole_copies` after it; `shape` is [B, T, heads, D]."""
  batch, length, heads, dim = shape
  group = heads // kv_heads
  x = x[:, :length * group]
  if kv_heads == 1 or group == 1:
    return x.reshape(shape)
  x = x.reshape(batch, kv_heads, length, group, dim).transpose(0, 2, 1, 3, 4)
  return x.reshape(shape)


def pack_rows(x, kv_heads, padded, fill):
  """[B, heads, T] -> [B, kv_heads, padded], in the row order of `pack`."""
  batch, heads, length = x.shape
  x = x.reshape(batch, kv_heads, -1, length).swapaxes(2, 3).reshape(batch, kv_heads, -1)
  return jnp.pad(x, ((0, 0), (0, 0), (0, padded - x.shape[2])), constant_values=fill)


def unpack_rows(x, shape):
  """The inverse of `pack_rows`; `shape` is [B, heads, T]."""
  batch, heads, length = shape
  kv_heads = x.shape[1]
  x = x[:, :, :length * heads // kv_heads].reshape(batch, kv_heads, length, -1)
  return x.swapaxes(2, 3).reshape(shape)


def reach(is_causal, window):
  """(left, right): how far from its own position a query sees."""
  left, right = (min(w, FAR) for w in window or (FAR, FAR))
  return left, 0 if is_causal else right  # mutant: right edge


def key_blocks(query, key, block, segment_ids, query_offset, *, is_causal, window):
  """The blocks of keys that each tile of 128 rows sees.

  Returns int32[B or 1, tiles, 5] of (lo, full_lo, full_hi, hi, query_offset), and the segments of
  padded rows and padded keys (None without segments). Some query sees some key in each of the
  blocks [lo, hi); in [full_lo, full_hi) every query sees every key, so these need no mask.
  """
  length, num_keys, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
  num_tiles, num_blocks = pl.cdiv(length * group, ROWS), pl.cdiv(num_keys, block)
  offset = jnp.asarray(query_offset, jnp.int32)
  row = jnp.arange(num_tiles, dtype=jnp.int32) * ROWS
  first = offset + row // group
  last = offset + (jnp.minimum(row + ROWS, length * group) - 1) // group
  some_lo, some_hi = jnp.zeros_like(first), jnp.full_like(first, num_keys)
  all_lo, all_hi = some_lo, some_hi
  left, right = reach(is_causal, window)
  if right < FAR:
    some_hi, all_hi = (jnp.minimum(num_keys, x + (right + 1)) for x in (last, first))
  if left < FAR:
    some_lo, all_lo = (jnp.maximum(0, x - left) for x in (first, last))
  bounds = _round(some_lo, all_lo, all_hi, some_hi, block, num_blocks)  # mutant: key blocks
  return _narrow(
      bounds, offset, segment_ids, group, (num_tiles, ROWS), (num_blocks, block), False)


def row_blocks(query, key, block, block_q, segment_ids, query_offset, *, is_causal, window):
  """`key_blocks` the other way around: the blocks of rows that see each block of keys."""
  length, num_keys, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
  num_tiles, num_blocks = pl.cdiv(length * group, block_q), pl.cdiv(num_keys, block)
  offset = jnp.asarray(query_offset, jnp.int32)
  first = jnp.arange(num_blocks, dtype=jnp.int32) * block
  last = jnp.minimum(first + block, num_keys) - 1
  row = lambda position: jnp.clip(position - offset, 0, length) * group
  some_lo, some_hi = jnp.zeros_like(first), jnp.full_like(first, length * group)
  all_lo, all_hi = some_lo, some_hi
  left, right = reach(is_causal, window)
  if right < FAR:
    some_lo, all_lo = row(first - right), row(last - right)
  if left < FAR:
    some_hi, all_hi = row(last + (left + 1)), row(first + (left + 1))
  # The rows that pad the last block are inert: whoever sees all rows sees them too.
  all_hi = jnp.where(all_hi == length * group, num_tiles * block_q, all_hi)
  bounds = _round(some_lo, all_lo, all_hi, some_hi, block_q, num_tiles)  # mutant: row blocks
  return _narrow(
      bounds, offset, segment_ids, group, (num_tiles, block_q), (num_blocks, block), True)


def _round(some_lo, all_lo, all_hi, some_hi, block, num_blocks):
  lo = jnp.minimum(some_lo // block, num_blocks)
  hi = jnp.maximum(lo, -(-some_hi // block))
  full_lo = jnp.clip(-(-all_lo // block), lo, hi)
  return lo, full_lo, jnp.clip(all_hi // block, full_lo, hi), hi


def _narrow(bounds, offset, segment_ids, group, row_tiles, key_tiles, by_key):
  """Leaves out the blocks at either end whose segments do not meet."""
  bounds, rows, keys = [x[None] for x in bounds], None, None
  if segment_ids is not None:
    rows = _pad_segments(jnp.repeat(segment_ids[0], group, axis=1), math.prod(row_tiles))
    keys = _pad_segments(segment_ids[1], math.prod(key_tiles))
    mine, others = rows.reshape(-1, *row_tiles), keys.reshape(-1, *key_tiles)
    if by_key:
      mine, others = others, mine
    lo, full_lo, full_hi, hi = (x[..., None] for x in bounds)
    low, high = mine.min(-1)[..., None], mine.max(-1)[..., None]
    other_low, other_high = others.min(-1)[:, None], others.max(-1)[:, None]
    count = others.shape[1]
    block = jnp.arange(count, dtype=jnp.int32)  # [B, mine, others] lives inside fusions only
    meets = (low <= other_high) & (other_low <= high) & (lo <= block) & (block < hi)
    same = ((low == high) & (other_low == low) & (other_high == low)
            & (full_lo <= block) & (block < full_hi))
    lo = jnp.where(meets, block, count).min(-1)
    hi = jnp.maximum(lo, jnp.where(meets, block + 1, 0).max(-1))
    full_lo = jnp.where(same, block, count).min(-1)
    full_hi = jnp.where(~same & (block > full_lo[..., None]), block, count).min(-1)
    full_lo = jnp.clip(full_lo, lo, hi)
    bounds = [lo, full_lo, jnp.clip(full_hi, full_lo, hi), hi]
  return jnp.stack([*bounds, jnp.broadcast_to(offset, bounds[0].shape)], -1), rows, keys


def _pad_segments(ids, padded):
  return jnp.pad(ids.astype(jnp.int32), ((0, 0), (0, padded - ids.shape[1])), mode="edge")


def row_slopes(alibi_slopes, kv_heads):
  """float32[kv_heads, group + 64]: from any row on, the slopes of the next 64 rows."""
  slopes = jnp.asarray(alibi_slopes, jnp.float32).reshape(kv_heads, -1)  # mutant: slopes
  size = slopes.shape[1] + WARPGROUP_ROWS
  return jnp.tile(slopes, (1, pl.cdiv(size, slopes.shape[1])))[:, :size]


# Inside the kernels. ---------------------------------------------------------------------------


def rows_at(ref, b, kv, kv_heads, start, size):
  """The index of rows [start, start + size) in a `pack`ed array."""
  if ref.shape[2] == kv_heads:
    return b, pl.ds(start, size), kv
  return b * kv_heads + kv, pl.ds(start, size), 0


def feed(steps, streams):
  """What the copying warpgroup does: keeps the slots of each stream full, in order.

  A stream is (stages, copies, ready, free), and copies(i, slot) lists (source, target) pairs.
  """

  def step(i, _):
    for stages, copies, ready, free in streams:
      slot = lax.rem(i, stages)

      @pl.when(i >= stages)
      def _():
        plgpu.barrier_wait(free.at[slot])  # mutant: wait for a free slot

      for source, target in copies(i, slot):
        plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

  def drain(i, _, stages, free):
    plgpu.barrier_wait(free.at[lax.rem(i, stages)])

  lax.fori_loop(0, steps, step, None)
  for stages, _, _, free in streams:  # no barrier may be left behind with an arrival unseen
    lax.fori_loop(jnp.maximum(steps - stages, 0), steps,
                  lambda i, _, n=stages, b=free: drain(i, _, n, b), None)


def product(shape, a, b):
  """a @ b in float32; `a` is shared memory or registers, `b` is shared memory."""
  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def product_onto(start, a, b):
  """start + a @ b, accumulated in the registers of `start`."""
  return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(start))


def across(x, shape):
  """A value per row, broadcast over columns."""
  return lax.broadcast_in_dim(x, shape, [0])


def down(x, shape):
  """A value per column, broadcast over rows."""
  return lax.broadcast_in_dim(x, shape, [1])


def columns(n):
  """Column numbers as (fixed, lane): fixed is a constant of the code, lane of the thread.

  Column 8 g + 2 t + b lies in thread t of its quad. Split like this, `fixed` folds into immediate
  operands and `lane` takes one register; whole column numbers take n / 4.
  """
  column = plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=COL)
  return column & ~6, column & 6


def fold(x, op):
  """[64, n] -> [64, 8]: `op` over the columns that each thread holds, before any shuffle."""
  parts = [x[:, i:i + QUAD] for i in range(0, x.shape[1], QUAD)]
  while len(parts) > 1:
    parts = [op(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
  return parts[0]


def visible_keys(position, num_keys, *, is_causal, window):
  """The keys [lo, hi) that a query sees; lo is None where it is 0 for every query."""
  left, right = reach(is_causal, window)
  hi = jnp.full_like(position, num_keys)
  if right < FAR:
    hi = jnp.minimum(hi, position + (right + 1))
  return position - left if left < FAR else None, hi


def mask_scores(scores, visible, base, segments):
  """-inf where the row's query does not see the column's key; the tile's first key is `base`."""
  shape = scores.shape
  fixed, lane = (down(c, shape) for c in columns(shape[1]))
  lo, hi = visible
  seen = fixed < across(hi - base, shape) - lane
  if lo is not None:
    seen &= fixed >= across(lo - base, shape) - lane
  if segments is not None:
    seen &= across(segments[0], shape) == down(segments[1], shape)
  return jnp.where(seen, scores, -jnp.inf)


def clear_rows(tile, count):
  """Zeros in rows from `count` on of 64 rows of 16 bits in shared memory, for wgmma to read.

  The weights there are 0, and 0 * NaN is not.
  """
  rows, dim = tile.shape
  row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=ROW)
  for column in range(0, dim, 64):
    part = tile.at[:, pl.ds(column, 64)]
    x = plgpu.load(part, layout=TILE, optimized=False)
    part[...] = jnp.where(across(row, x.shape) < count, x, jnp.zeros_like(x))
  plgpu.commit_smem()
