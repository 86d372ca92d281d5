"""The dk, dv kernel of flash attention for Hopper: keys walk over the rows that see them.

Tiles are transposed: a row is a key, a column is a query of some head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core.constants import FAR, LOG2E
from ..hopper import heads as packing, tiles
from ..hopper.tiles import COL, COMPUTE, ROW, WARPGROUP_ROWS, across, down
from . import mosaic_gpu_mask as masking
from .mosaic_gpu_dq import DELTA, LSE, POSITION, SLOPE, Operands


class Scratch(NamedTuple):
  """Shared memory and barriers: tiles of keys stay, those of queries pass through."""

  dout_free: Any
  dout_ready: Any
  dout_smem: Any  # [stages, block, dim]
  k_smem: Any  # [keys, dim]
  kv_ready: Any
  q_free: Any
  q_ready: Any
  q_smem: Any  # [stages, block, dim]
  table_smem: Any  # float32[stages, 3 or 4, block]
  v_smem: Any  # [keys, dim]; None where it is the key's
  weights_free: Any
  weights_ready: Any
  weights_smem: Any  # float32[64, block] from one warpgroup to the other; None if each has its keys


@dataclasses.dataclass(frozen=True)
class _Keys:
  """The 64 keys of a warpgroup, and its work on one block of rows."""

  operands: Operands
  scratch: Scratch
  batch: Any
  key0: Any  # position of the first key
  k_tile: Any
  v_tile: Any
  first_row: Callable  # of the block that is in step i
  offset: Any  # position of the first query
  reach: tuple  # (left, right) of the mask
  scale: float
  alibi: bool

  def weights(self, i, slot, masked):
    """exp2 of scaled, biased, masked scores less lse."""
    scratch, shape = self.scratch, self._shape
    scores = tiles.product(shape, self.k_tile, scratch.q_smem.at[slot].T)
    shift: Any = -self._column(slot, LSE)
    row: Any = None
    if self.alibi or masked:
      row = plgpu.broadcasted_iota(jnp.int32, (WARPGROUP_ROWS,), 0, layout=ROW)
      row = across(row.astype(jnp.float32), shape)
      # Of key row 0, per column.
      ahead = (self.key0 - self.offset).astype(jnp.float32) - self._column(slot, POSITION)
    scores *= self.scale * LOG2E
    if self.alibi:
      slope = self._column(slot, SLOPE)
      shift += slope * ahead
      scores += down(slope, shape) * row
    scores += down(shift, shape)
    if masked:
      scores = jnp.where(self._seen(i, row + down(ahead, shape)), scores, -jnp.inf)
    return jnp.exp2(scores)

  def _seen(self, i, distance):
    left, right = self.reach
    seen: Any = distance <= right if right < FAR else None
    if left < FAR:
      seen = distance >= -left if seen is None else seen & (distance >= -left)
    if self.operands.query_segments is not None:
      segments = (
          plgpu.load(self.operands.key_segments.at[self.batch, pl.ds(self.key0, WARPGROUP_ROWS)],
                     layout=ROW, optimized=False),
          plgpu.load(self.operands.query_segments.at[
              self.batch, pl.ds(self.first_row(i), self._shape[1])], layout=COL, optimized=False))
      same = across(segments[0], distance.shape) == down(segments[1], distance.shape)
      seen = same if seen is None else seen & same
    return seen

  def dscores(self, slot, weights):
    """The gradient of the scores; `weights` is called when the products before it are done."""
    delta = self._column(slot, DELTA)
    centered = tiles.product_onto(
        down(-delta, self._shape), self.v_tile, self.scratch.dout_smem.at[slot].T)
    dscores = weights() * centered
    return dscores * self.scale if self.operands.value is None else dscores

  @property
  def _shape(self):
    return WARPGROUP_ROWS, self.scratch.q_smem.shape[1]

  def _column(self, slot, which):
    return plgpu.load(self.scratch.table_smem.at[slot, which], layout=COL, optimized=False)

  # One step of the loop, for a warpgroup that has both sums, and for two that have one each.

  def both(self, i, slot, masked, dk_acc, dv_acc: Any = None):
    """Without dv_acc one sum takes both, since key and value are one array."""
    s = self.scratch
    plgpu.barrier_wait(s.q_ready.at[slot])
    weights = self.weights(i, slot, masked)
    plgpu.barrier_wait(s.dout_ready.at[slot])
    plgpu.wgmma(dk_acc if dv_acc is None else dv_acc, weights.astype(s.q_smem.dtype),
                s.dout_smem.at[slot])
    dscores = self.dscores(slot, lambda: weights)
    plgpu.barrier_arrive(s.dout_free.at[slot])
    plgpu.wgmma(dk_acc, dscores.astype(s.q_smem.dtype), s.q_smem.at[slot])
    plgpu.wgmma_wait(0)
    plgpu.commit_smem()  # the table was read by threads, and is next written by a copy
    plgpu.barrier_arrive(s.q_free.at[slot])

  def dv(self, i, slot, masked, acc):
    s = self.scratch
    plgpu.barrier_wait(s.q_ready.at[slot])
    weights = self.weights(i, slot, masked)
    plgpu.commit_smem()
    plgpu.barrier_arrive(s.q_free.at[slot])
    plgpu.barrier_wait(s.weights_free)
    s.weights_smem[...] = weights
    plgpu.barrier_arrive(s.weights_ready)
    plgpu.barrier_wait(s.dout_ready.at[slot])
    plgpu.wgmma(acc, weights.astype(s.q_smem.dtype), s.dout_smem.at[slot])
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(s.dout_free.at[slot])

  def dk(self, i, slot, masked, acc):
    del i, masked
    s = self.scratch
    plgpu.barrier_arrive(s.weights_free)
    plgpu.barrier_wait(s.q_ready.at[slot])
    plgpu.barrier_wait(s.dout_ready.at[slot])

    def weights():
      plgpu.barrier_wait(s.weights_ready)  # mutant: wait for the weights
      return plgpu.load(s.weights_smem, layout=tiles.TILE)

    dscores = self.dscores(slot, weights)
    plgpu.barrier_arrive(s.dout_free.at[slot])
    plgpu.wgmma(acc, dscores.astype(s.q_smem.dtype), s.q_smem.at[slot])
    plgpu.wgmma_wait(0)
    plgpu.commit_smem()
    plgpu.barrier_arrive(s.q_free.at[slot])


def dkv_kernel(operands, dk_ref, dv_ref, scratch, *, config, kv_heads, splits, scale, alibi,
               is_causal, window, masked_head, masked_tail):
  """dk and dv of a tile of keys from every `splits`-th block of the rows that see them.

  Each compute warpgroup owns 64 keys, unless dk and dv of 64 keys take more registers than one
  warpgroup has: then both work on the same keys, the first on dv, the second on dk.
  """
  dim = operands.key.shape[3]
  divided = scratch.weights_smem is not None
  keys, block, stages = scratch.k_smem.shape[0], config.dkv_block_q, config.dkv_stages
  wg, part = lax.axis_index("wg"), lax.axis_index("split")
  b, kv = lax.div(lax.axis_index("head"), kv_heads), lax.rem(lax.axis_index("head"), kv_heads)
  tile = lax.axis_index("tile")
  bounds = operands.bounds.at[b if operands.bounds.shape[0] > 1 else 0, tile]
  lo, full_lo, full_hi, hi, offset = (bounds[i] for i in range(5))
  # The blocks of rows are dealt out: this part takes lo + part, lo + part + splits, ...
  dealt = lambda end: lax.div(jnp.maximum(end - lo - part, 0) + (splits - 1), splits)
  steps = dealt(hi)
  first_row = lambda i: (lo + part + i * splits) * block
  shared = operands.value is None

  @pl.when(wg == COMPUTE)
  def copy():
    plgpu.set_max_registers(tiles.COPY_REGISTERS, action="decrease")
    for ref, smem in ((operands.key, scratch.k_smem), (operands.value, scratch.v_smem)):
      if ref is not None:
        plgpu.copy_gmem_to_smem(ref.at[b, pl.ds(tile * keys, keys), kv], smem, scratch.kv_ready)
    rows = lambda ref, i: ref.at[packing.rows_at(ref, b, kv, kv_heads, first_row(i), block)]
    table = lambda i: operands.table.at[b, kv, :, pl.ds(first_row(i), block)]
    tiles.feed(steps, [
        (stages, lambda i, slot: [(rows(operands.query, i), scratch.q_smem.at[slot]),
                                  (table(i), scratch.table_smem.at[slot])],
         scratch.q_ready, scratch.q_free),
        (stages, lambda i, slot: [(rows(operands.dout, i), scratch.dout_smem.at[slot])],
         scratch.dout_ready, scratch.dout_free),
    ])

  key0 = tile * keys + (0 if divided else wg * WARPGROUP_ROWS)
  mine = pl.ds(0 if divided else wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
  k_tile = scratch.k_smem.at[mine]
  own = _Keys(
      operands, scratch, batch=b, key0=key0, k_tile=k_tile,
      v_tile=k_tile if shared else scratch.v_smem.at[mine], first_row=first_row, offset=offset,
      reach=masking.reach(is_causal, window), scale=scale, alibi=alibi)

  def sums(step, count=1):
    """Runs all steps of a warpgroup; its `count` sums."""
    def loops(*accs):
      plgpu.barrier_wait(scratch.kv_ready)
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

    plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")
    return pl.run_scoped(loops, *[plgpu.ACC((WARPGROUP_ROWS, dim), jnp.float32)] * count)

  target = lambda ref: ref.at[part, b, pl.ds(key0, WARPGROUP_ROWS), kv]
  scaled = lambda dk: dk if shared else dk * scale
  if divided:
    @pl.when(wg == 0)
    def compute_dv():
      dv, = sums(own.dv)
      tiles.store(target(dv_ref), dv, own.k_tile)

    @pl.when(wg == 1)
    def compute_dk():
      dk, = sums(own.dk)
      tiles.store(target(dk_ref), scaled(dk), own.v_tile)
  else:
    @pl.when(wg < COMPUTE)
    def compute():
      dk, *dv = sums(own.both, 1 if shared else 2)
      tiles.store(target(dk_ref), scaled(dk), own.k_tile)
      for x in dv:
        tiles.store(target(dv_ref), x, own.v_tile)
