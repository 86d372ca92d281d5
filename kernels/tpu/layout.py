"""Sizes in whole tiles of a TPU's vector registers."""

import jax
import jax.numpy as jnp

LANES, SUBLANES = 128, 8


def round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def pad(x: jax.Array, axis: int, size: int, mode: str = "constant") -> jax.Array:
  """The array with zeros, or copies of its edge, behind it along an axis."""
  if x.shape[axis] == size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, mode=mode)


def widen(x: jax.Array) -> jax.Array:
  """[..., D] with zeros up to whole lanes."""
  return pad(x, x.ndim - 1, round_up(x.shape[-1], LANES))
