"""The online softmax of Hopper kernels, over tiles of scores in the registers of a warpgroup.

A row's state is the maximum of its scores so far, `top`, and the sum of the weights relative to
it: [64, 8] partial sums, which threads add up at the end alone.
"""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core.constants import LOG2E, LOWEST
from .tiles import QUAD, ROW, WARPGROUP_ROWS, across, columns, down, fold, zeros


def start():
  """(top, total) of rows that have seen nothing."""
  return (plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), LOWEST, jnp.float32), ROW),
          zeros(QUAD))


def factor_of(scale):
  """The factor of scores as they enter exp2, which is one fused multiply-add.

  It has to be positive, to commute with the maximum; any other scale multiplies the scores.
  """
  return scale * LOG2E if scale > 0 else 1.0


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


def update(scores, top, total, *, factor=None, slope=None, lane=None):
  """The weights of a tile of scores, what older weights fade by, and the new state.

  Args:
    scores: float32[64, n].
    top, total: the state.
    factor: of the scores as they enter exp2; None for 1.
    slope: None, or ALiBi's of each row. Then `top` is relative to a tile's first column, and of
      the bias slope / factor * column the part that is of `tiles.columns`' constants is in scores.
    lane: float32[n], the other part of the columns' numbers.

  Returns:
    weights float32[64, n], decay float32[64], top, total.
  """
  shape, scaled = scores.shape, lambda x: x if factor is None else x * factor
  high = fold(scores, jnp.maximum)
  if slope is None:
    new_top = jnp.maximum(top, scaled(high.max(axis=1)))
    shift = across(-new_top, shape)
  else:
    top -= slope * (LOG2E * shape[1])  # into this tile's frame  # mutant: frame of a tile
    high = scaled(high) + across(slope * LOG2E, high.shape) * down(lane[:QUAD], high.shape)
    new_top = jnp.maximum(top, high.max(axis=1))
    shift = across(slope * LOG2E, shape) * down(lane, shape) - across(new_top, shape)
  decay = jnp.exp2(top - new_top)
  weights = jnp.exp2(scaled(scores) + shift)
  total = total * across(decay, total.shape) + fold(weights, jnp.add)  # mutant: sum
  return weights, decay, new_top, total


def update_exactly(scores, top, total, *, factor):
  """The new state after a tile of scores whose maximum is subtracted before they are scaled.

  There the difference is exact: scores of 10^5 would lose 2^-8 to the rounding of their product.
  """
  new_top = jnp.maximum(top, fold(scores, jnp.maximum).max(axis=1))
  weights = jnp.exp2((scores - across(new_top, scores.shape)) * factor)
  decay = jnp.exp2((top - new_top) * factor)
  return new_top, total * across(decay, total.shape) + fold(weights, jnp.add)  # mutant: running sum


def normalize(acc, total):
  """acc over the rows' sums of weights, or 0; the sums, and which of them are 0."""
  total = total.sum(axis=1)
  empty = total == 0
  return acc * across(1 / jnp.where(empty, 1.0, total), acc.shape), total, empty
