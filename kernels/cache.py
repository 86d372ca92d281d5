"""Rows written into caches of keys and values."""

import functools

import jax
import jax.numpy as jnp


def write(cache: jax.Array, rows: jax.Array, offset: int | jax.Array, axis: int = -2):
  """The cache [..., S, Dh] with rows [..., T, Dh] from position `offset` on, int[] or int[...].

  Args:
    axis: of the positions S and T; -3 for [..., S, K, Dh].
  """
  rows = rows.astype(cache.dtype)
  if not jnp.ndim(offset):
    return jax.lax.dynamic_update_slice_in_dim(cache, rows, offset, axis=axis)
  write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
  for _ in range(jnp.ndim(offset)):
    write = jax.vmap(write)
  return write(cache, rows, offset)
