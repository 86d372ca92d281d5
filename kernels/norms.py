"""Norms over the last axis."""

import jax
import jax.numpy as jnp

from .core.compat import promoting


@promoting()
def normalize(x: jax.Array, gain: jax.Array, bias: jax.Array | None = None, *, kind: str,
              eps: float):
  """LayerNorm ("layer") or RMSNorm ("rms") over the last axis, with a bias if one is given.

  Computed in float32 at least; returns the dtype of x.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if kind == "layer":
    wide -= wide.mean(-1, keepdims=True)
  wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  wide *= gain
  return (wide if bias is None else wide + bias).astype(x.dtype)


@promoting()
def l2_normalize(x: jax.Array, scale: jax.Array):
  """x divided by its l2 norm over the last axis, times a scale per channel (QK-norm)."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.square(wide).sum(-1, keepdims=True)
  return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * scale).astype(x.dtype)
