"""The online softmax of Hopper kernels, over tiles of scores in registers."""

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core.constants import LOG2E, LOWEST
from .tiles import COL, QUAD, ROW, TILE, WARPGROUP_ROWS, across, columns, down, fold


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
