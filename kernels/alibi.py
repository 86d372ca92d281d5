"""ALiBi slopes (Press et al., arXiv:2108.12409, section 3)."""

import math

import numpy as np


def alibi_slopes(heads: int) -> np.ndarray:
  """One slope per head, steepest first: a geometric sequence that ends at 2**-8.

  For a head count that is not a power of two, the sequence of the power below it is
  followed by every other term of the sequence of the power above it.

  Returns:
    float32[heads]. Under tensor parallelism a shard takes its slice of this array: slopes
    belong to global heads.
  """
  if heads < 1:
    raise ValueError(f"heads must be positive; got {heads}")

  def geometric(n):
    return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

  below = 2 ** math.floor(math.log2(heads))
  return np.array(geometric(below) + geometric(2 * below)[::2][: heads - below], np.float32)
