"""Splits of a ragged cache over positions, one for each program of the GPU kernels.

A slot is one program's share of one sequence, for every key/value head. Sequences get slots in
proportion to their length, so that one long sequence fills the chip and a short one beside it
does not wait. A slot leaves (out, lse) of its positions, a part; `starts` says whose parts those
are for the kernel that merges them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Positions of a slot for each row, of a cache in the dtype of the query. A position's keys and
# values are the bytes of two rows; a slot reads its rows of queries, writes as many of its part and
# has them read. With 68 that is 2.2% more bytes than the cache's; where a copy of two parts takes
# SPARE, 4.8% with the result, the most there is. (64 makes it 5.1%.)
POSITIONS_PER_ROW = 68
# Parts are copied by so many at least; the merge clears what is copied with a part.
SPARE = 8


class Splits(NamedTuple):
  """The slots of a batch."""

  # int32[slots, 3]: sequence, first position, end. Behind the slots of all sequences there are up
  # to SPARE without positions, whose parts are empty, and then those without a sequence: -1.
  table: jax.Array
  starts: jax.Array  # int32[B + 1]: sequence b has the slots [starts[b], starts[b + 1])


class Limits(NamedTuple):
  """Static arguments of the splits."""

  block: int  # positions: a slot begins at a multiple of it
  least: int  # positions of a slot, if its sequence has more than one
  programs: int  # slots to have in all, or a little more: what fills the chip
  slots: int  # rows of the table
  span: int | None = None  # last positions of a sequence that are seen; None for all

  @property
  def parts(self) -> bool:
    """Whether a sequence may have several slots."""
    return self.least > 0


def limits(query, key, block: int, programs: int, span: int | None = None) -> Limits:
  """The limits for query [B, T, heads, dim] and key [B, S, kv_heads, dim].

  Args:
    block: positions that a kernel computes at a time.
    programs: each for one key/value head, that fill the chip.
    span: last positions of a sequence that its queries see; None for all.
  """
  batch, max_len, kv_heads = key.shape[:3]
  if span is not None:
    max_len = min(max_len, span + block - 1)  # what is dealt out begins with a block
  rows = query.shape[1] * query.shape[2] // kv_heads
  least = POSITIONS_PER_ROW * rows * query.dtype.itemsize // key.dtype.itemsize
  least = -(-least // block) * block
  programs = max(1, programs // kv_heads)
  slots = batch * min(programs, max(1, max_len // least))
  if slots == batch:
    least = 0
  else:
    slots = -(-min(slots, batch + programs) // SPARE) * SPARE + SPARE
  return Limits(block, least, programs, slots, span)


def split(lengths: jax.Array, limits: Limits) -> Splits:
  """The slots of sequences of these lengths, int32[B]: a few operations on small arrays."""
  block, least, programs, slots, span = limits
  blocks, skipped, dealt = -(-lengths // block), None, lengths
  if span is not None:
    skipped = jnp.maximum(lengths - span, 0) // block  # mutant: skipped blocks
    blocks -= skipped
    dealt = lengths - skipped * block
  if limits.parts:
    # In floating point, where the product can't overflow; at most a slot is lost to its rounding.
    share = blocks * (programs / jnp.maximum(blocks.sum(), 1).astype(jnp.float32))
    count = jnp.maximum(jnp.minimum(share.astype(jnp.int32), dealt // least), 1)
  else:
    count = jnp.ones_like(lengths)
  ends = jnp.cumsum(count)
  slot = jnp.arange(slots)
  sequence = (ends <= slot[:, None]).sum(1)
  at = jnp.minimum(sequence, len(lengths) - 1)
  part = slot - (ends - count)[at]
  edge = lambda i: i * blocks[at] // count[at] * block
  if skipped is not None:
    edge = lambda i: (skipped[at] + i * blocks[at] // count[at]) * block
  first, end = edge(part), jnp.minimum(edge(part + 1), lengths[at])
  used = slot < ends[-1]
  table = jnp.stack([jnp.where(slot < ends[-1] + SPARE, at, -1),
                     jnp.where(used, first, 0), jnp.where(used, end, 0)], axis=1)
  return Splits(table.astype(jnp.int32),
                jnp.concatenate([jnp.zeros(1, jnp.int32), ends.astype(jnp.int32)]))
