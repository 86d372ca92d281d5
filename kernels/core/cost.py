"""Cost estimates of kernels: to XLA's scheduler, a Pallas call without one is free.

It then hides one transfer behind as many of them as there are and leaves none for the next.
"""

import math
from collections.abc import Iterable

import jax
from jax.experimental import pallas as pl


def estimate(flops: int, transcendentals: int,
             arrays: Iterable[jax.Array | jax.ShapeDtypeStruct]) -> pl.CostEstimate:
  """The estimate of a call with these operands and results, each moved once."""
  moved = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
  return pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=moved)
