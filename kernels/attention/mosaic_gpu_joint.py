"""The backward of flash attention for Hopper in one kernel of 5 products, for head_dim 128.

A block of the grid has 128 keys at a time, a warpgroup 64 of them, and the rows that see them pass.
Tiles are transposed: a row is a key, a column is a query of some head. dk and dv stay in
registers. dq is added to float32 in global memory, each tile of rows by one block after the other.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core.constants import FAR, LOG2E
from ..hopper import heads as packing, tiles
from ..hopper.tiles import COL, COMPUTE, ROW, ROWS, WARPGROUP_ROWS, across, down
from . import mosaic_gpu_mask as masking

# The table's figures of each row. SHIFT is -(lse + slope * POSITION) in base 2, DELTA is negated,
# and POSITION counts from the first row of the tile.
SHIFT, DELTA, POSITION, SLOPE = range(4)


class Operands(NamedTuple):
  """Arrays in global memory."""

  query: Any  # [B, rows, kv_heads, dim], packed; so is dout
  key: Any  # [B, S, kv_heads, dim]
  value: Any  # likewise; None where it is the key
  dout: Any
  table: Any  # float32[B, kv_heads, 3 or 4, rows]
  bounds: Any  # int32[1 or B, tiles, 5], of `mosaic_gpu_mask.in_order`
  order: Any  # int32[1 or B, 2, tiles of rows]: the last and the first tile of keys that see one
  query_segments: Any  # int32[B, rows] or None
  key_segments: Any  # int32[B, S] or None
  places: Any = None  # of `places`, for the gradient of the slopes


def places(dtype):
  """[8, 128] of which the first row has the number of each key in its tile, the second ones.

  ds @ places.T has the sums over keys of ds * number and of ds, which is all that a row's share of
  the gradient of its slope needs of a tile, for a product 8 columns wide.
  """
  number = jnp.arange(ROWS, dtype=jnp.float32)
  return jnp.zeros((8, ROWS), dtype).at[0].set(number.astype(dtype)).at[1].set(1)  # mutant: places


class Scratch(NamedTuple):
  """Shared memory and barriers."""

  dout_free: Any
  dout_ready: Any
  dout_smem: Any  # [stages, rows, dim]
  dq_free: Any
  dq_ready: Any
  dq_smem: Any  # float32[COMPUTE, rows, dim / 2]
  ds_ready: Any
  ds_smem: Any  # [2, ROWS, rows]
  k_smem: Any  # [ROWS, dim]
  key_segments_smem: Any  # int32[ROWS] or None
  kv_free: Any
  kv_ready: Any
  moment_smem: Any  # float32[rows], or None
  places_smem: Any  # [8, ROWS], or None
  q_free: Any
  q_ready: Any
  q_smem: Any  # [stages, rows, dim]
  query_segments_smem: Any  # int32[stages, rows] or None
  table_smem: Any  # float32[stages, 3 or 4, rows]
  v_smem: Any  # [ROWS, dim]; None where it is the key's


class _Walk(NamedTuple):
  """The way of a block over the rows that see one tile of keys; all are scalars."""

  part: Any
  tile: Any
  b: Any
  kv: Any
  origin: Any  # position of the first key less that of the first query
  steps: Any
  start: Any  # the first tile of rows, and the way to the next
  stride: Any
  plain_lo: Any  # steps [plain_lo, plain_hi) need no mask
  plain_hi: Any

  def row_tile(self, i):
    return self.start + i * self.stride


def _walk(operands, index, turn, parts, kv_heads) -> _Walk:
  """The first or the second walk of a block.

  Blocks have the rows of two heads, or two parts of one's, between them. Block k begins with tile
  -1 - k of the keys of the first, upwards from the diagonal, and ends with tile k of the second's,
  down to the diagonal. So under a causal mask all are equally long, a tile of rows is passed on
  from block to block without a wait, and a block waits for blocks before it only.
  """
  num_tiles = operands.bounds.shape[1]
  k, down_ = lax.rem(index, num_tiles), turn == 1
  tile = jnp.where(down_, k, num_tiles - 1 - k)
  which = 2 * lax.div(index, num_tiles) + turn
  part, head = lax.rem(which, parts), lax.div(which, parts)
  b, kv = lax.div(head, kv_heads), lax.rem(head, kv_heads)
  bounds = operands.bounds.at[b if operands.bounds.shape[0] > 1 else 0, tile]
  lo, full_lo, full_hi, hi, offset = (bounds[i] for i in range(5))
  # The tiles of rows are dealt out: this part takes part, part + parts, ...
  first = lo + lax.rem(part + parts - lax.rem(lo, parts), parts)
  dealt = lambda end: lax.div(jnp.maximum(end - first, 0) + (parts - 1), parts)
  steps, plain_lo, plain_hi = dealt(hi), dealt(full_lo), dealt(full_hi)
  return _Walk(
      part, tile, b, kv, tile * ROWS - offset, steps,
      jnp.where(down_, first + (steps - 1) * parts, first), jnp.where(down_, -parts, parts),
      jnp.where(down_, steps - plain_hi, plain_lo), jnp.where(down_, steps - plain_lo, plain_hi))


def joint_kernel(operands, dq_ref, moment_ref, dk_ref, dv_ref, scratch, *, group, kv_heads,
                 num_keys, parts, scale, is_causal, window):
  """dk and dv of two tiles of keys from every `parts`-th tile of rows, and their shares of dq.

  Without `dv_ref`, key and value are one array, and `dk_ref` takes both gradients. `moment_ref`,
  float32[B, kv_heads, rows] or None, takes each row's share of the gradient of its slope.
  """
  s = scratch
  rows, dim = s.q_smem.shape[1:]
  wg, index = lax.axis_index("wg"), lax.axis_index("block")
  heads = operands.key.shape[0] * kv_heads
  turns = jnp.minimum(2, heads * parts - 2 * lax.div(index, operands.bounds.shape[1]))
  walk_of = functools.partial(_walk, operands, parts=parts, kv_heads=kv_heads)

  @pl.when(wg == COMPUTE)
  def copy():
    plgpu.set_max_registers(tiles.COPY_REGISTERS, action="decrease")
    semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((heads, operands.order.shape[2])))
    lax.fori_loop(0, turns, lambda turn, _: _copy(
        operands, dq_ref, moment_ref, scratch, semaphores, walk_of(index, turn), turn, kv_heads),
        None)

  @pl.when(wg < COMPUTE)
  def compute():
    plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")

    def sums(turn, _):
      again = lambda: walk_of(*lax.optimization_barrier((index, turn)))  # not kept for so long
      walk = walk_of(index, turn)
      geometry = dict(group=group, num_keys=num_keys, reach=masking.reach(is_causal, window))
      step = functools.partial(
          _step, operands, scratch, walk, wg, group=group,
          hidden=functools.partial(_hidden, operands, walk, again, rows=rows, **geometry),
          weights=functools.partial(_weights, operands, scratch, walk, scale=scale, **geometry))

      def loop(dk_acc, dv_acc):
        lax.fori_loop(0, walk.steps, lambda i, _: step(dk_acc, dv_acc, i), None)
        return dk_acc[...], dv_acc[...]

      plgpu.barrier_wait(s.kv_ready)
      acc = plgpu.ACC((WARPGROUP_ROWS, dim), jnp.float32)
      dk, dv = pl.run_scoped(loop, acc, acc)

      @pl.when(walk.steps > 0)  # after that the other warpgroup reads no keys any more
      def _():
        plgpu.barrier_wait(s.dq_free)

      walk = again()
      own_keys = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
      target = lambda ref: ref.at[
          walk.part, walk.b, pl.ds(walk.tile * ROWS + wg * WARPGROUP_ROWS, WARPGROUP_ROWS), walk.kv]
      if dv_ref is None:
        tiles.store(target(dk_ref), dk * scale + dv, s.k_smem.at[own_keys])
      else:
        tiles.store(target(dk_ref), dk * scale, s.k_smem.at[own_keys])
        tiles.store(target(dv_ref), dv, s.v_smem.at[own_keys])
      plgpu.barrier_arrive(s.kv_free)

    lax.fori_loop(0, turns, sums, None)


def _copy(operands, dq_ref, moment_ref, s, semaphores, walk, turn, kv_heads):
  """A walk of the warpgroup that copies: rows in, dq out."""
  stages, rows, dim = s.q_smem.shape
  part, tile, b, kv = walk[:4]
  keys = pl.ds(tile * ROWS, ROWS)
  plgpu.copy_gmem_to_smem(operands.key.at[b, keys, kv], s.k_smem, s.kv_ready)
  if operands.value is not None:
    plgpu.copy_gmem_to_smem(operands.value.at[b, keys, kv], s.v_smem, s.kv_ready)
  if operands.key_segments is not None:
    plgpu.copy_gmem_to_smem(operands.key_segments.at[b, keys], s.key_segments_smem, s.kv_ready)
  if operands.places is not None:
    plgpu.copy_gmem_to_smem(operands.places, s.places_smem, s.kv_ready)
  at = lambda ref, i: ref.at[packing.rows_at(ref, b, kv, kv_heads, walk.row_tile(i) * rows, rows)]

  def of_query(i, slot):
    each = pl.ds(walk.row_tile(i) * rows, rows)
    copies = [(at(operands.query, i), s.q_smem.at[slot]),
              (operands.table.at[b, kv, :, each], s.table_smem.at[slot])]
    if operands.query_segments is not None:
      copies.append((operands.query_segments.at[b, each], s.query_segments_smem.at[slot]))
    return copies

  streams = [
      (stages, of_query, s.q_ready, s.q_free),
      (stages, lambda i, slot: [(at(operands.dout, i), s.dout_smem.at[slot])],
       s.dout_ready, s.dout_free),
  ]
  order = operands.order.at[b if operands.order.shape[0] > 1 else 0, turn]

  def add(i):
    """Adds this block's part of the dq of a tile of rows, when its turn has come."""
    semaphore = semaphores.at[b * kv_heads + kv, walk.row_tile(i)]
    before = jnp.abs(order[walk.row_tile(i)] - tile)  # how many have added before
    plgpu.barrier_wait(s.dq_ready)  # mutant: wait for dq
    plgpu.semaphore_wait(semaphore, before, decrement=False, memory_scope="gpu")  # mutant: turn

    def put(reduction_op):
      for h in range(COMPUTE):
        piece = at(dq_ref, i).at[:, pl.ds(h * (dim // 2), dim // 2)]
        plgpu.copy_smem_to_gmem(s.dq_smem.at[h], piece, reduction_op=reduction_op)
      if moment_ref is not None:
        plgpu.copy_smem_to_gmem(
            s.moment_smem, moment_ref.at[b, kv, pl.ds(walk.row_tile(i) * rows, rows)],
            reduction_op=reduction_op)  # mutant: moment

    pl.when(before == 0)(lambda: put(None))
    pl.when(before > 0)(lambda: put("add"))  # mutant: reduction
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(s.dq_free)
    plgpu.wait_smem_to_gmem(0)  # mutant: added
    plgpu.semaphore_signal(semaphore, memory_scope="gpu")

  def step(i, _):
    pl.when(i < walk.steps)(lambda: tiles.fill(i, streams))
    pl.when(i >= stages)(lambda: add(i - stages))

  lax.fori_loop(0, walk.steps + stages, step, None)
  tiles.drain(walk.steps, streams)
  plgpu.barrier_wait(s.kv_free)  # mutant: wait for the keys


def _step(operands, s, walk, wg, dk_acc, dv_acc, i, *, group, hidden, weights):
  """The five products of a warpgroup's 64 keys and a tile of rows."""
  stages, rows, dim = s.q_smem.shape
  v_smem = s.k_smem if operands.value is None else s.v_smem
  slot, ds_tile, shape = lax.rem(i, stages), s.ds_smem.at[lax.rem(i, 2)], (WARPGROUP_ROWS, rows)
  # The compiler must not see that it never changes, or it keeps descriptors in registers.
  opaque_wg = lambda: lax.optimization_barrier(wg)
  own_keys = lambda: pl.ds(opaque_wg() * WARPGROUP_ROWS, WARPGROUP_ROWS)

  masked = hidden(i)  # here, where fewer registers are taken

  def scores(ds_acc, s_acc):
    plgpu.barrier_wait(s.q_ready.at[slot])
    # Set before a product is in flight: ptxas waits for all before it touches an accumulator.
    ds_acc[...] = down(plgpu.load(s.table_smem.at[slot, DELTA], layout=COL, optimized=False),
                       shape)
    plgpu.wgmma(s_acc, s.k_smem.at[own_keys()], s.q_smem.at[slot].T)
    plgpu.barrier_wait(s.dout_ready.at[slot])
    plgpu.wgmma(ds_acc, v_smem.at[own_keys()], s.dout_smem.at[slot].T)
    p = weights(plgpu.wgmma_accumulator_load(s_acc, wait_n=1), slot, i, opaque_wg(), masked)
    ds = p * plgpu.wgmma_accumulator_load(ds_acc, wait_n=0)
    return p.astype(s.q_smem.dtype), ds.astype(s.q_smem.dtype)

  acc = plgpu.ACC(shape, jnp.float32)
  p, ds = pl.run_scoped(scores, acc, acc)
  plgpu.wgmma(dv_acc, p, s.dout_smem.at[slot])
  ds_tile.at[own_keys()][...] = ds
  plgpu.commit_smem()
  plgpu.barrier_arrive(s.ds_ready)

  def rest(dq_acc, *moment_acc):
    plgpu.barrier_wait(s.ds_ready)
    for acc in moment_acc:
      plgpu.wgmma(acc, ds_tile.T, s.places_smem.T)
    plgpu.wgmma(dq_acc, ds_tile.T, s.k_smem.at[:, pl.ds(opaque_wg() * (dim // 2), dim // 2)])
    plgpu.wgmma(dk_acc, ds, s.q_smem.at[slot])
    dq = plgpu.wgmma_accumulator_load(dq_acc, wait_n=1)
    sums = [plgpu.wgmma_accumulator_load(acc, wait_n=1) for acc in moment_acc]
    plgpu.barrier_arrive(s.dout_free.at[slot])

    @pl.when(i > 0)  # a branch that the compiler moves nothing across
    def _():
      plgpu.barrier_wait(s.dq_free)  # mutant: wait for room

    s.dq_smem.at[wg][...] = dq
    for x in sums:
      # Of the first key, from each row.
      ahead = (walk.origin - lax.div(walk.row_tile(i) * rows, group)).astype(jnp.float32)
      ahead -= plgpu.load(s.table_smem.at[slot, POSITION], layout=ROW, optimized=False)
      which = down(plgpu.broadcasted_iota(jnp.int32, x.shape[1:], 0, layout=COL), x.shape)
      moment = (x * jnp.where(which == 1, across(ahead, x.shape), 1.0)).sum(axis=1)

      @pl.when(wg == 0)  # both have all keys
      def _():
        s.moment_smem[...] = moment

    plgpu.commit_smem()
    plgpu.barrier_arrive(s.dq_ready)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(s.q_free.at[slot])

  accs = [plgpu.ACC((rows, dim // 2), jnp.float32)]
  if operands.places is not None:
    accs.append(plgpu.ACC((rows, s.places_smem.shape[0]), jnp.float32))
  pl.run_scoped(rest, *accs)


def _weights(operands, scratch, walk, scores, slot, i, wg, hidden, *, group, num_keys, scale,
             reach):
  """exp2 of scaled, biased, masked scores less lse, for the keys of a warpgroup."""
  shape = scores.shape
  key0, row0 = wg * WARPGROUP_ROWS, walk.row_tile(i) * shape[1]
  column = lambda which: plgpu.load(
      scratch.table_smem.at[slot, which], layout=COL, optimized=False)
  key = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=ROW)
  row = across(key.astype(jnp.float32), shape)
  # Of the first key, from the first row.
  ahead = (walk.origin + key0 - lax.div(row0, group)).astype(jnp.float32)
  shift = column(SHIFT)
  if operands.table.shape[2] > SLOPE:
    slope = column(SLOPE)
    shift += slope * ahead
    x = scores * (scale * LOG2E) + down(shift, shape) + down(slope, shape) * row
  else:
    x = scores * (scale * LOG2E) + down(shift, shape)
  if hidden is not None:
    x = lax.cond(hidden, lambda x: _mask(
        operands, scratch, walk, x, slot, key, key0, ahead, num_keys, reach), lambda x: x, x)
  return jnp.exp2(x)


def _hidden(operands, walk, again, i, *, rows, group, num_keys, reach):
  """Whether some query of a tile does not see some key; None if that is so for no tile."""
  if operands.query_segments is not None:
    walk = again()
    return (i < walk.plain_lo) | (i >= walk.plain_hi)
  left, right = reach
  row0, conditions = walk.row_tile(i) * rows, []
  if right < FAR:
    conditions.append(walk.origin + (ROWS - 1 - right) > lax.div(row0, group))
  if left < FAR:
    conditions.append(walk.origin + left < lax.div(row0 + (rows - 1), group))
  if num_keys % ROWS:
    conditions.append(walk.tile == num_keys // ROWS)
  return functools.reduce(jnp.logical_or, conditions) if conditions else None


def _mask(operands, scratch, walk, x, slot, key, key0, ahead, num_keys, reach):
  """-inf where a query does not see a key."""
  shape, seen = x.shape, []
  left, right = reach
  if num_keys % ROWS:  # keys behind the last one, which dq would be a sum over
    seen.append(across(key + (walk.tile * ROWS + key0) < num_keys, shape))
  if right < FAR or left < FAR:
    at = across(key.astype(jnp.float32) + ahead, shape)
    query = plgpu.load(scratch.table_smem.at[slot, POSITION], layout=COL, optimized=False)
    if right < FAR:
      seen.append(at <= down(query + right if right else query, shape))
    if left < FAR:
      seen.append(at >= down(query - left, shape))
  if operands.query_segments is not None:
    keys = plgpu.load(scratch.key_segments_smem.at[pl.ds(key0, WARPGROUP_ROWS)], layout=ROW,
                      optimized=False)
    queries = plgpu.load(scratch.query_segments_smem.at[slot], layout=COL, optimized=False)
    seen.append(across(keys, shape) == down(queries, shape))
  return jnp.where(functools.reduce(jnp.logical_and, seen), x, -jnp.inf)
