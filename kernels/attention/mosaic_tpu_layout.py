"""Shared parts of the TPU kernels' two passes: packed rows, plans and tiles of scores.

The query heads of one key/value head are packed into rows: row r of a key/value head stands at
position r // group and belongs to head r % group. For multi-query attention that is how
[T, heads, D] lies in memory already, a tile of rows spans few positions, and so the diagonal
of the causal mask wastes little.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from ..core.constants import FAR, LOG2E
from ..tpu.layout import LANES, pad, round_up


def widen(x: jax.Array | None) -> Any:  # None of None
  """[..., D] with zeros up to the next width that fills whole tiles."""
  if x is None or x.shape[-1] == 64:
    return x
  return pad(x, x.ndim - 1, round_up(x.shape[-1], LANES))


def pack(x: jax.Array, kv_heads: int, num_rows: int) -> jax.Array:
  """[B, T, heads, D] as [B * kv_heads, num_rows, D]; rows past T * group are zeros."""
  batch, length, heads, dim = x.shape
  group = heads // kv_heads
  x = x.reshape(batch, length, kv_heads, group, dim).swapaxes(1, 2)
  return pad(x.reshape(batch * kv_heads, length * group, dim), 1, num_rows)


def unpack(x: jax.Array, batch: int, length: int, heads: int) -> jax.Array:
  """The inverse of `pack`."""
  kv_heads, dim = x.shape[0] // batch, x.shape[-1]
  group = heads // kv_heads
  x = x[:, : length * group].reshape(batch, kv_heads, length, group, dim)
  return x.swapaxes(1, 2).reshape(batch, length, heads, dim)


def pack_vector(x: jax.Array, kv_heads: int, num_rows: int, fill: float) -> jax.Array:
  """float32[B, heads, T] as float32[B * kv_heads, 1, num_rows]."""
  batch, heads, length = x.shape
  x = x.reshape(batch * kv_heads, heads // kv_heads, length).swapaxes(1, 2)
  x = x.reshape(batch * kv_heads, 1, -1)
  return jnp.pad(x, ((0, 0), (0, 0), (0, num_rows - x.shape[-1])), constant_values=fill)


def unpack_vector(x: jax.Array, batch: int, length: int, heads: int) -> jax.Array:
  """The inverse of `pack_vector`."""
  kv_heads = x.shape[0] // batch
  group = heads // kv_heads
  x = x[:, 0, : length * group].reshape(batch, kv_heads, length, group)
  return x.swapaxes(2, 3).reshape(batch, heads, length)


def row_positions(length: int, group: int, num_rows: int, query_offset) -> jax.Array:
  """int32[1, num_rows]: the position of each row."""
  return (jnp.arange(num_rows, dtype=jnp.int32) // group + query_offset).astype(jnp.int32)[None]


def row_slopes(slopes: jax.Array, kv_heads: int, num_rows: int) -> jax.Array:
  """float32[kv_heads, 1, num_rows]: the slope of each row, for scores in base 2."""
  slopes = slopes.astype(jnp.float32).reshape(kv_heads, 1, -1) * LOG2E
  return jnp.tile(slopes, (1, 1, -(-num_rows // slopes.shape[-1])))[:, :, :num_rows]


class Plan(NamedTuple):
  """Block sizes of one call."""

  block_rows: int  # rows of a grid step
  rows: int  # rows of a step without a mask; divides block_rows
  lanes: int  # rows of one score tile; divides rows
  chunk: int  # keys of a step without a mask
  fine: int  # keys of a step under the mask, and the unit of `visible_chunks`
  major: int  # keys of a grid step
  ahead: int  # score tiles computed before the softmax of an earlier one
  cores: int
  group: int  # query heads of a key/value head
  num_blocks: int
  num_rows: int
  padded_keys: int

  @property
  def steps(self) -> int:
    """Steps of `rows` in a block of rows."""
    return self.block_rows // self.rows

  def dealt(self, core, n):
    """The n-th block of rows of a core: 0, 3, 4, 7, ... or 1, 2, 5, 6, ... of two cores.

    The causal triangle and short documents split evenly.
    """
    return 2 * n + (core ^ n & 1) if self.cores > 1 else n

  @property
  def period(self) -> int | None:
    """Rows after which the slopes repeat within a tile, if they do."""
    lanes = min(128, self.lanes)
    return lanes if lanes % self.group == 0 else None


def vmem_bytes(plan: Plan, *, dim, itemsize, shared, backward) -> int:
  """VMEM that a kernel takes, at most.

  Blocks that change from step to step have two buffers. Score tiles that wait for their turn
  are spilled; the compiler's allocations stayed below this count of them.
  """
  dim, edge = round_up(dim, 128), plan.block_rows // plan.group
  row, key = plan.block_rows * dim, plan.major * dim
  tile = 4 * plan.lanes * max(plan.chunk, edge)
  vectors = 2 * 8 * 4 * plan.block_rows + 4 * 128 * max(plan.chunk, edge)
  if backward:
    # Accumulator and result; where several blocks of keys add to it, what there was before.
    dquery = 4 + (2 * itemsize if plan.padded_keys == plan.major else 3 * 4)
    return (row * (4 * itemsize + dquery) + (1 if shared else 2) * key * (itemsize + 4)
            + 2 * (plan.ahead + 3) * tile + vectors)
  # One tile is finished after the next one's products.
  return (row * (4 * itemsize + 4) + 16 * 4 * plan.block_rows
          + (1 if shared else 2) * 2 * key * itemsize + (plan.ahead + 4) * tile
          + 4 * dim * plan.lanes + vectors)


def moment_bytes(plan: Plan) -> int:
  """VMEM that the backward kernel takes more for the gradient of the slopes, at most."""
  return (2 * 8 * 4 * plan.block_rows
          + 2 * 4 * plan.lanes * max(plan.chunk, plan.block_rows // plan.group))


def fit(config, *, length, group, num_keys, itemsize) -> Plan:
  """Block sizes for this problem."""
  if itemsize > 2:  # float32: half as many rows and keys in the same memory
    config = config._replace(area=config.area // 4, rows=max(config.rows // 2, config.lanes),
                             major=max(config.major // 2, config.chunk))
  unit = min(128, config.lanes)
  lanes = min(config.lanes, round_up(length * group, unit))
  positions = 1
  while (positions < -(-length // config.cores)
         and (2 * positions) ** 2 * group <= config.area):
    positions *= 2
  block_rows = rows = positions * group
  while rows > config.rows and rows % (2 * lanes) == 0:
    rows //= 2
  if rows > config.rows or rows % lanes:  # an odd group: any size of block
    block_rows = rows = min(config.rows, round_up(-(-length * group // config.cores), lanes))
  num_blocks = round_up(-(-length * group // block_rows), config.cores)
  diagonal = positions if block_rows == positions * group else 1
  major = min(config.major, round_up(num_keys, max(config.fine, diagonal)))
  return Plan(
      block_rows=block_rows, rows=rows, lanes=lanes, chunk=min(config.chunk, major),
      fine=config.fine, major=major, ahead=config.ahead, cores=config.cores, group=group,
      num_blocks=num_blocks, num_rows=num_blocks * block_rows,
      padded_keys=round_up(num_keys, major))


def row_operands(plan, kv_heads, length, slopes, segment_ids, query_offset, row_spec, ids_spec):
  """Operands of both kernels for rows and keys: {name: (array, its BlockSpec)}.

  Args:
    row_spec: index of the leading dimension as a function of (batch, key/value head) -> spec.
    ids_spec: spec of int32[B, 1, padded_keys].
  """
  positions = row_positions(length, plan.group, plan.num_rows, query_offset)
  operands = dict(position=(positions[None], row_spec(lambda b: 0)))
  if slopes is not None:
    operands["slope"] = (row_slopes(slopes, kv_heads, plan.num_rows),
                         row_spec(lambda b: b % kv_heads))
  if segment_ids is not None:
    ids = jnp.repeat(segment_ids[0], plan.group, axis=1)
    operands["query_id"] = (pad(ids, 1, plan.num_rows)[:, None],
                            row_spec(lambda b: b // kv_heads))
    operands["key_id"] = (pad(segment_ids[1], 1, plan.padded_keys)[:, None], ids_spec)
  return operands


def bias_scratch(plan, edges):
  keys = max(plan.chunk, plan.fine, plan.block_rows // plan.group if edges else 0)
  return pltpu.VMEM((keys, plan.period or 1), jnp.float32)


def fill_bias(refs, plan):
  """slope * (key's place in its step), which is the same for every step, for one period of rows."""
  bias = refs["bias"]
  place = jax.lax.broadcasted_iota(jnp.int32, bias.shape, 0).astype(jnp.float32)
  bias[...] = place * refs["slope"][:, : plan.period] if plan.period else place


def biased(x, refs, at, span, plan):
  """Scores [keys, lanes] with slope * (key's place in its step) added."""
  if "slope" not in refs:
    return x
  bias = refs["bias"][slice(*span), :]
  if plan.period:
    return x + jnp.concatenate([bias] * (plan.lanes // plan.period), axis=1)
  return x + bias[:, :1] * refs["slope"][:, at]


def hide(x, tile, distance, num_keys, refs, at, key_ids, *, is_causal, window):
  """Scores [keys, lanes] of a tile with -inf where the row does not see the key.

  Args:
    distance: int32[1, lanes], position of the step's first key minus that of the row.
    num_keys: keys from the step's first to the last one there is; None if they all exist.
    key_ids: int32[size of the step, 1 or lanes] or None.
  """
  if key_ids is not None:
    x = jnp.where(key_ids[slice(*tile.keys)] == refs["query_id"][:, at], x, -jnp.inf)
  start, end = tile.cut
  if start >= end:
    return x
  place = start + jax.lax.broadcasted_iota(jnp.int32, (end - start, x.shape[1]), 0)
  last = None if num_keys is None else num_keys - 1
  for bound in ([-distance] if is_causal else []) + (
      [min(window[1], FAR) - distance] if window is not None else []):
    last = bound if last is None else jnp.minimum(last, bound)
  mask = place >= -min(window[0], FAR) - distance if window is not None else None
  if last is not None:
    mask = place <= last if mask is None else mask & (place <= last)
  if mask is None:
    return x
  start, end = start - tile.keys[0], end - tile.keys[0]
  parts = [jnp.where(mask, x[start:end], -jnp.inf)]
  # Mosaic has no empty vectors.
  if start:
    parts.insert(0, x[:start])
  if end < x.shape[0]:
    parts.append(x[end:])
  return jnp.concatenate(parts, axis=0)


def turned(key_ids, lanes):
  """Ids int32[1, keys], which lie along lanes, as int32[keys, lanes]."""
  width = min(128, lanes)
  ids = jnp.broadcast_to(key_ids, (width, key_ids.shape[1])).T
  return jnp.concatenate([ids] * (lanes // width), axis=1)
