"""The mask of the Hopper attention kernels: bounds of blocks, and what a query sees."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..core.constants import FAR
from ..hopper.tiles import ROWS


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


def in_order(bounds, num_rows, num_keys, block):
  """`row_blocks` for a kernel whose blocks of keys add to the same rows in a fixed order.

  Args:
    bounds: of `row_blocks`.
    num_rows: blocks of rows.
    num_keys, block: keys, and how many a block has.

  Returns the bounds, now such that the blocks of keys that walk over a block of rows are
  consecutive; int32[B or 1, 2, num_rows], the last of them and the first; and a bool for whether
  there is any. What a last block of keys has too many is masked in every step.
  """
  lo, full_lo, full_hi, hi, offset = jnp.moveaxis(bounds, -1, 0)
  some = lo < hi
  # Neither decreases. Sorted segments and all other masks have them so already.
  lo = lax.cummin(jnp.where(some, lo, num_rows), axis=1, reverse=True)
  hi = jnp.maximum(lo, lax.cummax(jnp.where(some, hi, 0), axis=1))
  if num_keys % block:
    full_lo, full_hi = (x.at[:, -1].set(hi[:, -1]) for x in (full_lo, full_hi))
  full_lo, full_hi = jnp.clip(full_lo, lo, hi), jnp.clip(full_hi, lo, hi)
  row = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
  first = (hi[:, None] <= row).sum(-1, dtype=jnp.int32)  # [B, rows, keys] lives in fusions only
  last = (lo[:, None] <= row).sum(-1, dtype=jnp.int32) - 1
  return (jnp.stack([lo, full_lo, full_hi, hi, offset], -1), jnp.stack([last, first], 1),
          first <= last)


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


def visible_keys(position, num_keys, *, is_causal, window):
  """The keys [lo, hi) that a query sees; lo is None where it is 0 for every query."""
  left, right = reach(is_causal, window)
  hi = jnp.full_like(position, num_keys)
  if right < FAR:
    hi = jnp.minimum(hi, position + (right + 1))
  return position - left if left < FAR else None, hi
