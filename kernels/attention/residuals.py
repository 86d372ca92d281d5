"""Residuals of attention's forward pass."""

from typing import NamedTuple

import jax


class Residuals(NamedTuple):
  """Operands and results of the forward pass.

  Attributes:
    query, out: float[B, T, heads, dim_head].
    key, value: float[B, S, kv_heads, dim_head]; value None where it is the key.
    lse: float32[B, heads, T], the log of each row's sum of exponentials, -inf where the row sees
      nothing.
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array | None
  out: jax.Array
  lse: jax.Array
