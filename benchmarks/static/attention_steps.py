"""Trip counts of the parts of this project's TPU attention kernels, from their plans.

What a kernel decides at run time, in each step of its grid, is decided here for a mask with values.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from palm_haiku.kernels import aot
from palm_haiku.kernels.attention import (
  configs,
  mosaic_tpu_layout as layout,
  mosaic_tpu_mask as masking,
)


class Mask(NamedTuple):
  """Of self-attention: what a kernel is compiled for, with the segment ids that it meets."""

  is_causal: bool = True
  window: tuple[int, int] | None = None
  segment_ids: np.ndarray | None = None  # int32[batch, T]
  query_offset: int = 0

  @property
  def known(self) -> dict:
    """The static part of the mask, known when a kernel is compiled."""
    return dict(is_causal=self.is_causal, window=self.window, query_offset=self.query_offset)

  def share(self, length: int, rows: int = 256) -> float:
    """The share of the T x T pairs that it leaves."""
    key, seen = np.arange(length), 0
    for first in range(0, length, rows):
      query = np.arange(first, min(length, first + rows))[:, None]
      distance = key - query - self.query_offset
      left, right = self.window or (np.inf, np.inf)
      pairs = (distance >= -left) & (distance <= (min(right, 0) if self.is_causal else right))
      if self.segment_ids is None:
        seen += pairs.sum()
      else:
        ids = self.segment_ids
        seen += np.mean([(pairs & (x[query] == x)).sum() for x in ids])
    return float(seen) / length**2


def documents(length: int, size: int) -> np.ndarray:
  """Segment ids of packed documents of one size."""
  return (np.arange(length, dtype=np.int32) // size)[None]


def drawn_documents(length: int, number: int) -> np.ndarray:
  """The same of documents whose lengths are drawn: all sets of boundaries are as probable."""
  ends = np.random.default_rng(0).choice(np.arange(1, length), number - 1, replace=False)
  return np.searchsorted(np.sort(ends), np.arange(length), side="right").astype(np.int32)[None]


def plan_of(shape, chip, dtype, backward) -> layout.Plan:
  return layout.fit(configs.mosaic_tpu(chip, shape.dim_head)[backward],
                    length=shape.length, group=shape.heads // shape.kv_heads,
                    num_keys=shape.length, itemsize=jnp.dtype(dtype).itemsize)


def steps(plan, shape, chip, backward, mask=Mask(), compiled=None, alibi=True,
          core=None) -> aot.Steps:
  """Of a call of the kernel; of several calls, the mean.

  Args:
    plan: its `Plan`.
    shape: of the attention.
    chip: that it is compiled for.
    mask: what the kernel meets.
    compiled: the mask that it was compiled for, if that is another one: its guards are those that
      the program has.
    alibi: whether it has a bias.
    core: on which of the chip's; None for the mean of them.
  """
  compiled = compiled or mask
  does = visits(plan, shape.length, mask)
  has_ids, turns = compiled.segment_ids is not None, plan.padded_keys // plan.major
  edges = masking.find_edges(plan, length=shape.length, num_keys=shape.length, **compiled.known)
  whole = has_ids or not backward  # whether a diagonal that is all has a step of its own
  cores = [plan.dealt(core, np.arange(plan.num_blocks // plan.cores)) for core in range(plan.cores)]
  order = np.empty((plan.num_blocks, 1), int)  # of the blocks of rows on their core
  for blocks in cores:
    order[blocks, 0] = np.arange(len(blocks))

  # Guards in the order of the program, as bool[batch, blocks of rows, blocks of keys].
  key_block, never = np.arange(turns), np.zeros_like(does.seen)
  diagonal = does.states[0] if does.states else never
  diagonals = []
  for n in range(len(edges)):
    state = does.states[n] if n < len(does.states) else never
    if not whole:
      state = np.minimum(state, 1)
    for kind in (1, *((2,) if has_ids else ()), *((3,) if whole and n == 0 else ())):
      diagonals.append(does.here[n] & (state == kind) if n < len(does.here) else never)
  if backward:
    here = np.where(does.here[0], diagonal, 0) if does.here else never
    ends = [order == 0]
    # Work that all visits do is a part of them: both without a diagonal, the end without segments.
    if edges:
      ends.append(does.seen & (here == 0))
    if edges and has_ids:
      ends.append(does.seen & (here != 3))
    ends.append(does.idle(order, plan.cores) if turns > 1 else ~does.seen)
  else:
    # The last keys come first.
    begin = key_block == turns - 1
    ends = [begin & (diagonal == 0), begin & (order == 0), (key_block == 0) & (diagonal != 3)]
    if not alibi:
      del ends[1]  # fills the table of the bias

  blocks = slice(None) if core is None else cores[core]

  def mean(x, among=None):
    x = np.broadcast_to(x, does.seen.shape)[:, blocks]
    if among is None:
      return float(x.mean())
    return float(x[among[:, blocks]].mean()) if among[:, blocks].any() else 0.0

  rest = does.seen & ~does.alone
  # Loops' guards let pass whoever has a trip to make, which is in the mean of the trips.
  inner = [mean(trips, rest) / plan.steps for trips in does.trips]
  # Ahead of time a v4 is two devices of one core, each of which runs all blocks.
  grid = plan.num_blocks // (1 if chip == "v4" else plan.cores) * (1 if backward else turns)
  return aot.Steps(
      grid=grid * shape.batch * shape.kv_heads, edge=[mean(end) for end in ends], inner=inner,
      active=[*(mean(x, does.seen) for x in diagonals), *(1 for _ in inner)],
      visited=(mean(does.seen), *((mean(~does.alone, does.seen),) if edges else ())))


class Visits(NamedTuple):
  """Work of each block of rows on each block of keys, as [batch, blocks of rows, of keys]."""

  ranges: masking.Ranges
  seen: np.ndarray  # whether they meet at all
  here: list[np.ndarray]  # whether an edge lies in these keys
  states: list[np.ndarray]  # of each edge, as `Ranges` numbers them
  alone: np.ndarray  # whether the diagonal is all that the rows see
  trips: list[np.ndarray]  # of the loops over large, plain and fine steps, for all rows together

  def idle(self, order, cores):
    """Where rows that don't meet the keys lie between rows of their core that do."""
    first, last = np.stack([self.ranges.row_blocks(key_block, cores)
                            for key_block in range(self.seen.shape[-1])]).T[:, :, None]
    return ~self.seen & (first <= order) & (order <= last)


def visits(plan, length, mask) -> Visits:
  """The decisions of `masking.traverse`, for all blocks at once."""
  edges = masking.find_edges(plan, length=length, num_keys=length, **mask.known)
  ids = None if mask.segment_ids is None else (jnp.asarray(mask.segment_ids),) * 2
  chunks = masking.visible_chunks(
      plan, length=length, num_keys=length, segment_ids=ids, **mask.known)
  ranges = masking.Ranges(chunks, plan, edges, 1, mask.query_offset, ids)
  low, high, *states = np.asarray(ranges.operands[1]).reshape(
      len(chunks), 2 + len(edges), plan.num_blocks, 1).swapaxes(0, 1)
  per_block, ratio = plan.major // plan.fine, plan.chunk // plan.fine
  key_block = np.arange(plan.padded_keys // plan.major)
  seen = (low <= key_block) & (key_block <= high)

  lows = masking.edge_chunks(plan, edges, np.arange(plan.num_blocks)[:, None], mask.query_offset)
  visible = np.asarray(chunks).reshape(
      len(chunks), 4, plan.num_blocks, 1, plan.steps).swapaxes(0, 1)
  first, full, num_large, rest, last = map(np.asarray, masking.parts(
      plan, edges, [low[..., None] for low in lows], key_block[:, None] * per_block, visible))
  trips = [num_large, rest - full - num_large * ratio, full - first + last - rest]
  if ratio == 1:
    del trips[1]
  return Visits(ranges, seen, [low // per_block == key_block for low in lows], states,
                np.broadcast_to(states[0] == 3 if states else False, seen.shape),
                [x.sum(-1) for x in trips])
