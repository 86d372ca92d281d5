"""Visits of the TPU kernels under a mask: keys of a block of rows, and the steps for them.

A diagonal of the mask, where blocks of rows and keys align, is one step of its own; chunks that all
rows see take large steps without a mask, what else is left small ones under it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from ..core.constants import FAR
from ..tpu.layout import pad, round_up


class Tile(NamedTuple):
  """Some rows against some keys of a step, all relative to the step's first."""

  row: int
  keys: tuple[int, int]  # from, to
  cut: tuple[int, int]  # the keys among them that not every row sees


class Edge(NamedTuple):
  """A block of keys that the mask cuts along its diagonal, as long as the block of rows is."""

  start: int  # of the keys, relative to the first position of the rows
  tiles: tuple[Tile, ...]


def pairs(*, length, num_keys, query_offset, is_causal, window) -> int:
  """(query, key) pairs that the mask leaves of each head; those of different segments count."""
  # Of an offset that only the device knows: the last queries are at the last keys.
  first = query_offset if isinstance(query_offset, int) else num_keys - length
  position = first + np.arange(length)
  low, high = np.zeros(length, int), np.full(length, num_keys - 1)
  if is_causal:
    high = np.minimum(high, position)
  if window is not None:
    left, right = (min(w, FAR) for w in window)
    low, high = np.maximum(low, position - left), np.minimum(high, position + right)
  return int(np.maximum(high - low + 1, 0).sum())


def visible_chunks(plan, *, length, num_keys, query_offset, is_causal, window, segment_ids):
  """Which chunks of `fine` keys each step of `rows` visits, and which need no mask.

  Returns:
    int32[batch or 1, 4, num_rows / rows]: (first, full, rest, last). A step visits chunks
    [first, last); every row of it sees every key of the chunks [full, rest). Computed from
    arrays of size O(T / rows + S / fine), and right for any segment ids, sorted or not: what
    can't be excluded is visited under the mask.
  """
  rows, fine, group = plan.rows, plan.fine, plan.group
  num_blocks, num_chunks = plan.num_rows // rows, -(-num_keys // fine)
  row = np.arange(num_blocks) * rows
  used = row < length * group
  low = query_offset + jnp.asarray(row // group, jnp.int32)  # positions of a block's ends
  high = query_offset + jnp.asarray(
      np.minimum((row + rows - 1) // group, length - 1), jnp.int32)

  # Keys that some row sees, then keys that every row sees; both ends belong to the range.
  some, every = [0, num_keys - 1], [0, num_keys - 1]
  if is_causal:
    some[1], every[1] = jnp.minimum(some[1], high), jnp.minimum(every[1], low)
  if window is not None:
    left, right = (min(w, FAR) for w in window)
    some = [jnp.maximum(some[0], low - left), jnp.minimum(some[1], high + right)]
    every = [jnp.maximum(every[0], high - left), jnp.minimum(every[1], low + right)]
  first = jnp.clip(some[0] // fine, 0, num_chunks)
  last = jnp.clip(some[1] // fine + 1, 0, num_chunks)
  full = -(-every[0] // fine)
  rest = (every[1] + 1) // fine

  if segment_ids is not None:
    query_ids, key_ids = segment_ids  # [B, T], [B, S]
    row_ids = jnp.repeat(query_ids, group, axis=1)
    blocks = pad(row_ids, 1, num_blocks * rows, "edge").reshape(-1, num_blocks, rows)
    chunks = pad(key_ids, 1, num_chunks * fine, "edge").reshape(-1, num_chunks, fine)
    block_min, block_max = blocks.min(-1), blocks.max(-1)
    chunk_min, chunk_max = chunks.min(-1), chunks.max(-1)
    # No chunk before `met` reaches the block's smallest id, none from `left_at` on starts
    # below its largest; for sorted ids that is exactly the range of chunks that share an id.
    met = jax.vmap(jnp.searchsorted)(jax.lax.cummax(chunk_max, axis=1), block_min)
    tail_min = jax.lax.cummin(chunk_min, axis=1, reverse=True)
    left_at = jax.vmap(lambda a, v: jnp.searchsorted(a, v, side="right"))(tail_min, block_max)
    first, last = jnp.maximum(first, met), jnp.minimum(last, left_at)

    # Runs of chunks that hold one and the same id; a block of that id alone needs no mask there.
    single = chunk_min == chunk_max
    same = single[:, 1:] & single[:, :-1] & (chunk_min[:, 1:] == chunk_min[:, :-1])
    ends = jnp.pad(~same, ((0, 0), (0, 1)), constant_values=True)
    index = jnp.arange(num_chunks)
    run_end = jax.lax.cummin(jnp.where(ends, index + 1, num_chunks), axis=1, reverse=True)
    at = lambda x, i: jnp.take_along_axis(x, jnp.clip(i, 0, num_chunks - 1), axis=1)
    uniform = lambda i: at(single, i) & (at(chunk_min, i) == block_min) & (i < num_chunks)
    start = jnp.maximum(full, first)
    start = jnp.where(uniform(start), start, start + 1)
    ok = uniform(start) & (block_min == block_max)
    full, rest = start, jnp.where(ok, jnp.minimum(rest, at(run_end, start)), start)

  last = jnp.where(used & (first < last), last, first)
  full = jnp.clip(full, first, last)
  rest = jnp.clip(rest, full, last)
  ranges = jnp.broadcast_arrays(*(jnp.atleast_2d(x) for x in (first, full, rest, last)))
  out = jnp.stack(ranges, axis=1).astype(jnp.int32)
  return jnp.broadcast_to(out, (*out.shape[:2], num_blocks))


def find_edges(plan, *, length, num_keys, query_offset, is_causal, window) -> tuple[Edge, ...]:
  """The diagonals of a causal mask and of its window, where blocks of rows and keys align.

  There each tile visits its own range of keys, and only the last of them need the mask.
  """
  size = plan.block_rows // plan.group
  if not (is_causal and plan.block_rows % plan.group == 0 and size % plan.fine == 0
          and plan.major % size == 0 and isinstance(query_offset, int)
          and query_offset % size == 0 and 0 <= query_offset <= num_keys - length):
    return ()
  grain, sublanes = max(plan.fine // 8, 8), 8
  narrow = window is not None and window[0] < size  # also cuts the diagonal block from the left
  right, left = [], []
  for row in range(0, plan.block_rows, plan.lanes):
    first, last = row // plan.group, (row + plan.lanes - 1) // plan.group
    end = round_up(last + 1, grain)
    cut = 0 if narrow else (first + 1) // sublanes * sublanes
    right.append(Tile(row, (0, end), (cut, end)))
    start = first // grain * grain
    left.append(Tile(row, (start, size), (start, round_up(last, sublanes))))
  # Tiles of many keys come first, for nothing hides the end of the last one: 7043 bundles on a
  # tpu7x, forward at dim_head 256, and 7164 in ascending order.
  edges = [Edge(0, tuple(reversed(right)))]
  if window is not None and window[0] >= size and window[0] % size == 0:
    edges.append(Edge(-window[0], tuple(left)))
  return tuple(edges)


class Ranges:
  """`visible_chunks` as scalar operands of a kernel, and how its code reads them."""

  def __init__(self, chunks, plan, edges, kv_heads, query_offset, segment_ids):
    batch, _, num_steps = chunks.shape
    per_major = plan.major // plan.fine
    by_block = lambda x: x.reshape(batch, plan.num_blocks, plan.steps)
    first, last = by_block(chunks[:, 0]), by_block(chunks[:, 3])
    visits = first < last
    # The blocks of keys between which a block of rows finds all that it sees.
    high = jnp.maximum(jnp.where(visits, last, 0).max(-1) - 1, 0) // per_major
    low = jnp.minimum(jnp.where(visits, first, FAR).min(-1) // per_major, high)
    # Rows that see nothing have no such block: low is then above high. Outside of `row_blocks` they
    # would write to the last block of rows that is there.
    low = jnp.where(visits.any(-1), low, high + 1)
    rows = [low, high]
    self._low, self._high = low, high

    # Per edge: 0 not visited, 1 visited, 2 visited and segment ids differ within it, 3 visited,
    # ids do not differ, and it is all that the rows see (as in the first block, or in short
    # documents).
    size = plan.block_rows // plan.group
    rows_min = rows_max = keys_min = keys_max = np.zeros((batch, 0))  # without ids
    if edges and segment_ids is not None:
      ids = (pad(jnp.repeat(segment_ids[0], plan.group, axis=1), 1, plan.num_rows, "edge"),
             pad(segment_ids[1], 1, round_up(plan.padded_keys, size), "edge"))
      blocks = (ids[0].reshape(batch, plan.num_blocks, -1), ids[1].reshape(batch, -1, size))
      (rows_min, rows_max), (keys_min, keys_max) = ((x.min(-1), x.max(-1)) for x in blocks)
    for edge in edges:
      number = np.arange(plan.num_blocks) + (query_offset + edge.start) // size  # of the keys
      start = number * (size // plan.fine)
      state = (visits & (first < start[:, None] + size // plan.fine)
               & (last > start[:, None])).any(-1).astype(jnp.int32)
      if segment_ids is not None:
        number = np.clip(number, 0, keys_min.shape[1] - 1)
        one = ((rows_min == rows_max) & (keys_min[:, number] == rows_min)
               & (keys_max[:, number] == rows_min))
        state *= jnp.where(one, 1, 2)
      if edge.start == 0:
        alone = jnp.where(visits, first >= start[:, None], True).all(-1)
        state = jnp.where(alone & (state == 1), 3, state)
      rows.append(state)

    self.has_ids = segment_ids is not None
    self.operands = (chunks.reshape(-1), jnp.stack(rows, axis=1).astype(jnp.int32).reshape(-1))
    self.batch = lambda head: head // kv_heads if batch > 1 else 0
    self._num_steps, self._num_blocks, self._num_rows = num_steps, plan.num_blocks, len(rows)

  def of_step(self, refs, head, step):
    """first, full, rest, last."""
    row = self.batch(head) * 4
    return [refs["chunks"][(row + k) * self._num_steps + step] for k in range(4)]

  def _of_block(self, ref, head, block, k):
    return ref[(self.batch(head) * self._num_rows + k) * self._num_blocks + block]

  def of_edge(self, refs, head, block, n):
    return self._of_block(refs["blocks"], head, block, 2 + n)

  def row_blocks(self, key_block, cores):
    """int32[batch, 2]: the first and last row-block index of a core that visits a block of keys."""
    low, high = self._low, self._high
    visits = (low <= key_block) & (key_block <= high)
    index = jnp.arange(self._num_blocks)
    first = jnp.where(visits, index, self._num_blocks).min(-1) // cores
    last = jnp.where(visits, index, 0).max(-1) // cores
    return jnp.stack([jnp.minimum(first, last), last], axis=1).astype(jnp.int32)

  def key_blocks(self, scalars, head, block):
    """The first and the last block of keys to visit."""
    return [self._of_block(scalars[1], head, block, k) for k in range(2)]


def edge_chunks(plan, edges, block, query_offset):
  """The chunk of `fine` keys at which each edge of a block of rows begins."""
  span = plan.block_rows // plan.group // plan.fine
  return [block * span + (query_offset + edge.start) // plan.fine for edge in edges]


def parts(plan, edges, lows, offset, visible):
  """Visits of `rows` in a block of keys beside the edges, in chunks of `fine` keys.

  Args:
    edges, lows: of its block of rows, and where they begin.
    offset: where the block of keys begins.
    visible: (first, full, rest, last) of `visible_chunks`.

  Returns:
    (first, full, num_large, rest, last), relative to the block of keys: as many large steps from
    `full` on, chunks without a mask from there to `rest`, and [first, full) and [rest, last) under
    the mask.
  """
  first, full, rest, last = visible
  span, per_block = plan.block_rows // plan.group // plan.fine, plan.major // plan.fine
  if edges:
    last, rest = jnp.minimum(last, lows[0]), jnp.minimum(rest, lows[0])
  if len(edges) > 1:
    first, full = jnp.maximum(first, lows[1] + span), jnp.maximum(full, lows[1] + span)
  first, full, rest, last = (jnp.clip(x - offset, 0, per_block) for x in (first, full, rest, last))
  last = jnp.maximum(first, last)
  full = jnp.clip(full, first, last)
  rest = jnp.clip(rest, full, last)
  return first, full, (rest - full) // (plan.chunk // plan.fine), rest, last


def traverse(ranges, refs, head, block, key_block, query_offset, plan, edges, step, *, window,
             whole=False):
  """Visits what a block of rows sees of a block of keys.

  Args:
    ranges: `Ranges`.
    head, block, key_block: int32 scalars.
    query_offset: the first query's position, an int if there are edges.
    step: called as step(first_row, first_key, tiles, size, masked, ids, fresh, whole) with the
      first row and key within their blocks, dynamic; whether the mask counts, whether segment
      ids do, whether it is the first step of all its rows, and whether it is their only one.
    window: of the mask.
    whole: whether that last distinction is worth a step of its own.
  """
  fine = plan.fine
  span = plan.block_rows // plan.group // fine
  per_block, every = plan.major // fine, range(0, plan.rows, plan.lanes)
  offset = key_block * per_block  # in chunks of `fine` keys, as all ranges here
  ratio = plan.chunk // fine
  lows = edge_chunks(plan, edges, block, query_offset)
  # Before a diagonal all keys exist, and of them only segments and a window's left end hide any.
  cut = (0, fine) if not edges or window is not None else (0, 0)

  alone = False  # whether the diagonal is all that the block sees
  for n, edge in enumerate(edges):
    here = (lows[n] >= offset) & (lows[n] < offset + per_block)
    state = ranges.of_edge(refs, head, block, n)
    alone |= (n == 0) & (state == 3)
    kinds = [(1, False), (2, False)] if ranges.has_ids else [(1, False)]
    if n == 0 and whole:
      kinds.append((3, True))
    elif n == 0:
      state = jnp.where(state == 3, 1, state)
    for kind, only in kinds:
      @pl.when(here & (state == kind))
      def _(n=n, edge=edge, kind=kind, only=only):
        step(0, (lows[n] - offset) * fine, edge.tiles, span * fine, True, kind == 2, n == 0, only)

  def of_rows(n, _):
    first, full, num_large, rest, last = parts(
        plan, edges, lows, offset, ranges.of_step(refs, head, block * plan.steps + n))
    middle = full + num_large * ratio
    before = full - first

    def large(t, _):
      tiles = [Tile(row, (0, ratio * fine), (0, 0)) for row in every]
      step(n * plan.rows, (full + t * ratio) * fine, tiles, ratio * fine, False, False, False,
           False)

    def small(chunk, masked):
      tiles = [Tile(row, (0, fine), cut) for row in every]
      step(n * plan.rows, chunk * fine, tiles, fine, masked, masked and ranges.has_ids, False,
           False)

    jax.lax.fori_loop(0, num_large, large, None)
    if ratio > 1:
      jax.lax.fori_loop(middle, rest, lambda chunk, _: small(chunk, False), None)
    jax.lax.fori_loop(
        0, before + last - rest,
        lambda t, _: small(jnp.where(t < before, first + t, rest + t - before), True), None)

  @pl.when(jnp.logical_not(alone))
  def _():
    jax.lax.fori_loop(0, plan.steps, of_rows, None)
