"""Rotary positions, with the decay of xPos."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .core.compat import promoting


@promoting()
def rotate(x: jax.Array, positions: jax.Array, *, theta: float = 10_000.0,
           xpos_scale_base: int | None = None, xpos_sign: int = 1):
  """Rotary positions, the two halves of the channels paired (arXiv:2104.09864).

  Args:
    x: float[..., T, heads, dim_head].
    positions: int[..., T], its leading dimensions those of x or absent.
    theta: base of the wavelengths.
    xpos_scale_base: positions over which xPos decays by its base; None for plain rotary.
    xpos_sign: 1 for queries, -1 for keys.

  Returns:
    The rotated x, in its dtype.
  """
  half = x.shape[-1] // 2
  cos, sin = rotation_at(positions, half, theta, jnp.promote_types(x.dtype, jnp.float32))
  if xpos_scale_base is not None:
    base = jnp.asarray((np.arange(half) / half + 0.4) / 1.4, cos.dtype)
    decay = base ** (xpos_sign * positions.astype(cos.dtype)[..., None] / xpos_scale_base)
    cos, sin = cos * decay, sin * decay
  return rotate_by(x, (cos, sin))


@promoting()
def rotation_at(positions: jax.Array, half: int, theta: float = 10_000.0, dtype: Any = jnp.float32):
  """Cosines and sines that positions [...] rotate channels by, two arrays [..., half]."""
  frequency = jnp.asarray(theta ** (-np.arange(half) / half), dtype)
  angle = positions.astype(dtype)[..., None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


@promoting()
def rotate_by(x: jax.Array, rotation: tuple[jax.Array, jax.Array]):
  """x [..., heads, dim_head] rotated by a pair of cosines and sines, each [..., dim_head / 2]."""
  cos, sin = (a[..., None, :] for a in rotation)
  first, second = jnp.split(x.astype(cos.dtype), 2, -1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
