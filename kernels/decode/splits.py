"""How the GPU kernels deal a ragged cache out to programs: the split over positions.

A slot is one program's share of one sequence, for every key/value head. Sequences get slots in
proportion to their length, so that one long sequence fills the chip and a short one beside it
does not wait. A slot leaves (out, lse) of its positions, a part; `starts` says whose parts those
are for the kernel that merges them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Programs for each multiprocessor, so that one computes while the other waits for memory.
PROGRAMS = 2
# Positions of a slot for each row, of a cache in the dtype of the query. A position's keys and
# values are the bytes of two rows; a slot reads its rows of queries, writes as many of its part and
# has them read. With 48 that is 3.1% more bytes than the cache's, and for a sequence that has one
# slot, with its result, 4.2%.
POSITIONS_PER_ROW = 48


class Splits(NamedTuple):
  """The slots of a batch."""

  table: jax.Array  # int32[slots, 3]: sequence (-1: nothing to do), first position, end
  starts: jax.Array  # int32[B + 1]: sequence b has the slots [starts[b], starts[b + 1])


class Limits(NamedTuple):
  """What is known of them when a program is compiled."""

  block: int  # positions: a slot begins at a multiple of it
  least: int  # positions of a slot, if its sequence has more than one
  programs: int  # slots to have in all, or a little more: what fills the chip
  slots: int  # rows of the table

  @property
  def parts(self) -> bool:
    """Whether a sequence may have several slots."""
    return self.least > 0


def limits(query, key, block: int, multiprocessors: int, tiles: int = 1) -> Limits:
  """The limits for query [B, T, heads, dim] and key [B, S, kv_heads, dim].

  Args:
    block: positions that a kernel loads at a time.
    multiprocessors: of the chip.
    tiles: programs that share a slot and a key/value head, each with other rows.
  """
  batch, max_len, kv_heads = key.shape[:3]
  rows = query.shape[1] * query.shape[2] // kv_heads
  least = POSITIONS_PER_ROW * rows * query.dtype.itemsize // key.dtype.itemsize
  least = -(-least // block) * block
  programs = max(1, PROGRAMS * multiprocessors // (kv_heads * tiles))
  slots = batch * min(programs, max(1, max_len // least))
  if slots == batch:
    least = 0
  return Limits(block, least, programs, min(slots, batch + programs))


def split(lengths: jax.Array, limits: Limits) -> Splits:
  """The slots of sequences of these lengths, int32[B]: a few operations on small arrays."""
  block, least, programs, slots = limits
  blocks = -(-lengths // block)
  if limits.parts:
    # In floating point, where the product can't overflow; at most a slot is lost to its rounding.
    share = blocks * (programs / jnp.maximum(blocks.sum(), 1).astype(jnp.float32))
    count = jnp.maximum(jnp.minimum(share.astype(jnp.int32), lengths // least), 1)
  else:
    count = jnp.ones_like(lengths)
  ends = jnp.cumsum(count)
  slot = jnp.arange(slots)
  sequence = (ends <= slot[:, None]).sum(1)
  used = sequence < len(lengths)
  at = jnp.minimum(sequence, len(lengths) - 1)
  part = slot - (ends - count)[at]
  edge = lambda i: i * blocks[at] // count[at] * block
  first, end = edge(part), jnp.minimum(edge(part + 1), lengths[at])
  table = jnp.stack([jnp.where(used, x, nothing) for x, nothing in (
      (at, -1), (first, 0), (end, 0))], axis=1)
  return Splits(table.astype(jnp.int32),
                jnp.concatenate([jnp.zeros(1, jnp.int32), ends.astype(jnp.int32)]))
