"""The parallel block in plain JAX: in-projection, attention, out-projection."""

import jax
import jax.numpy as jnp
import numpy as np

from ..attention import flash_attention


def normalize(x, gain, *, kind, eps):
  """LayerNorm without bias ("layer") or RMSNorm ("rms") over the last axis.

  Computed in float32 at least; returns the dtype of x.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if kind == "layer":
    wide -= wide.mean(-1, keepdims=True)
  wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  return (wide * gain).astype(x.dtype)


def l2_normalize(x, scale):
  """x divided by its l2 norm over the last axis, times a scale per channel (QK-norm)."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.square(wide).sum(-1, keepdims=True)
  return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * scale).astype(x.dtype)


def rotate(x, positions, *, xpos_scale_base=None, xpos_sign=1):
  """Rotary positions, the two halves of the channels paired (arXiv:2104.09864).

  Args:
    x: float[..., T, heads, dim_head].
    positions: int[T].
    xpos_scale_base: positions over which xPos decays by its base; None for plain rotary.
    xpos_sign: 1 for queries, -1 for keys.

  Returns:
    The rotated x, in its dtype.
  """
  half = x.shape[-1] // 2
  accum = jnp.promote_types(x.dtype, jnp.float32)
  channel = np.arange(half)
  frequency = jnp.asarray(10_000.0 ** (-channel / half), accum)
  angle = positions.astype(accum)[:, None, None] * frequency  # [T, 1, half]
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  if xpos_scale_base is not None:
    base = jnp.asarray((channel / half + 0.4) / 1.4, accum)
    decay = base ** (xpos_sign * positions.astype(accum)[:, None, None] / xpos_scale_base)
    sin, cos = sin * decay, cos * decay
  first, second = x[..., :half].astype(accum), x[..., half:].astype(accum)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def in_projection(x, params, positions, *, norm, norm_eps, rotary, xpos_scale_base):
  """Everything that the layer reads from norm(x).

  Returns:
    query [..., T, H, Dh]; key [..., T, Dh]; value [..., T, Dh], which is the key before
    QK-norm and rotary if params have no value; hidden [..., T, F] = silu(gate) * up.
  """
  weight = {name: array.astype(x.dtype) for name, array in params.items()}
  h = normalize(x, params["norm"], kind=norm, eps=norm_eps)
  query = jnp.einsum("...d,dhk->...hk", h, weight["query"])
  key = h @ weight["key"]
  value = h @ weight["value"] if "value" in params else key
  if "query_scale" in params:
    query = l2_normalize(query, params["query_scale"])
    key = l2_normalize(key, params["key_scale"])
  if rotary:
    query = rotate(query, positions, xpos_scale_base=xpos_scale_base)
    key = rotate(key[..., None, :], positions, xpos_scale_base=xpos_scale_base, xpos_sign=-1)
    key = key[..., 0, :]
  hidden = jax.nn.silu(h @ weight["gate"]) * (h @ weight["up"])
  return query, key, value, hidden


def out_projection(x, attended, hidden, params):
  """x + attended @ attn_out + hidden @ ff_out; attended is [..., T, H, Dh]."""
  attn = jnp.einsum("...hk,hkd->...d", attended, params["attn_out"].astype(x.dtype))
  return x + attn + hidden @ params["ff_out"].astype(x.dtype)


def parallel_attention_ffn(x, params, *, norm, norm_eps, rotary, xpos_scale_base, query_offset,
                           kv_cache, **attention_options):
  """See the op of the same name."""
  positions = query_offset + jnp.arange(x.shape[-2])
  query, key, value, hidden = in_projection(
      x, params, positions, norm=norm, norm_eps=norm_eps, rotary=rotary,
      xpos_scale_base=xpos_scale_base)
  if kv_cache is not None:
    new = (key,) if len(kv_cache) == 1 else (key, value)
    kv_cache = tuple(
        jax.lax.dynamic_update_slice_in_dim(old, rows.astype(old.dtype), query_offset, axis=-2)
        for old, rows in zip(kv_cache, new))
    key, value = kv_cache[0].astype(x.dtype), kv_cache[-1].astype(x.dtype)
  attended = flash_attention(
      query, key[..., None, :], value[..., None, :], query_offset=query_offset,
      **attention_options)
  y = out_projection(x, attended, hidden, params)
  return y if kv_cache is None else (y, kv_cache)
