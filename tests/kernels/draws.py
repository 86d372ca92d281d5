"""Random arrays from numpy: JAX's generators would be compiled in most tests, each time anew."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype)))


def integers(seed: int, shape: tuple[int, ...], low: int, high: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).integers(low, high, shape), jnp.int32)
