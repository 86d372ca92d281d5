"""Matrices as int8 with a scale for each column, for products that read little else."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Rows that one pass over a CPU's accumulators takes. Of 512 x 4,672 weights on two cores (AVX-512)
# it multiplies 18 a nanosecond with 8 rows, 14 with 32 and 10 with 128; XLA's product of float32
# multiplies 10, and one of converted int8, which it writes to memory first, 6.
ROWS = 8


class Int8(NamedTuple):
  """A matrix [K, N], which is values * scales."""

  values: jax.Array  # int8[K, N]
  scales: jax.Array  # float32[N]

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  def columns(self, index: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The columns that int[...] names, [..., K]."""
    picked = jnp.moveaxis(jnp.take(self.values, index, axis=1), 0, -1).astype(jnp.float32)
    return (picked * jnp.take(self.scales, index)[..., None]).astype(dtype)


def quantize(matrix: jax.Array) -> Int8:
  """The nearest int8 matrix, by a scale for each column of float[K, N]; zero columns stay zero."""
  matrix = matrix.astype(jnp.float32)
  scales = jnp.abs(matrix).max(0) / 127
  return Int8(jnp.round(matrix / jnp.where(scales == 0, 1, scales)).astype(jnp.int8), scales)


def product(x: jax.Array, matrix, accum=None):
  """x @ matrix, for a matrix of the dtype of x or an `Int8`.

  Args:
    x: float[..., K].
    matrix: [K, N].
    accum: dtype of the result; the default is that of x.

  Returns:
    [..., N].
  """
  lead, accum = x.shape[:-1], accum or x.dtype
  x = x.reshape(-1, x.shape[-1])
  if not isinstance(matrix, Int8):
    out = jnp.dot(x, matrix, preferred_element_type=accum)
  elif len(x) == 1 and x.shape[1] % ROWS == 0:
    out = jax.lax.platform_dependent(x, matrix, cpu=_by_rows, default=_converted)
  else:
    out = _converted(x, matrix)
  return out.astype(accum).reshape(*lead, -1)


def _converted(x, matrix):
  wide = jnp.promote_types(x.dtype, jnp.float32)
  return jnp.dot(x, matrix.values.astype(x.dtype), preferred_element_type=wide) * matrix.scales


def _by_rows(x, matrix):
  """One row of x: a few rows of the matrix at a time are converted in registers and added."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  weights = matrix.values.reshape(-1, ROWS, matrix.shape[1])

  def add(total, rows):
    x, weights = rows
    for i in range(ROWS):
      total += x[i] * weights[i].astype(wide)
    return total, None

  zero = jnp.zeros(matrix.shape[1], wide)
  out, _ = jax.lax.scan(add, zero, (x[0].astype(wide).reshape(-1, ROWS), weights))
  return (out * matrix.scales)[None]
