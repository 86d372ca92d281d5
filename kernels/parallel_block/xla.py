"""The parallel block in plain JAX: in-projection, attention, out-projection."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from .. import mesh as meshes
from ..attention import flash_attention
from ..compat import promoting
from ..decode import decode_attention


@promoting
def normalize(x, gain, bias=None, *, kind, eps):
  """LayerNorm ("layer") or RMSNorm ("rms") over the last axis, with a bias if one is given.

  Computed in float32 at least; returns the dtype of x.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if kind == "layer":
    wide -= wide.mean(-1, keepdims=True)
  wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  wide *= gain
  return (wide if bias is None else wide + bias).astype(x.dtype)


@promoting
def l2_normalize(x, scale):
  """x divided by its l2 norm over the last axis, times a scale per channel (QK-norm)."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.square(wide).sum(-1, keepdims=True)
  return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * scale).astype(x.dtype)


@promoting
def rotate(x, positions, *, theta=10_000.0, xpos_scale_base=None, xpos_sign=1):
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


@promoting
def rotation_at(positions, half, theta=10_000.0, dtype=jnp.float32):
  """Cosines and sines that positions [...] rotate channels by, two arrays [..., half]."""
  frequency = jnp.asarray(theta ** (-np.arange(half) / half), dtype)
  angle = positions.astype(dtype)[..., None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


@promoting
def rotate_by(x, rotation):
  """x [..., heads, dim_head] rotated by a pair of cosines and sines, each [..., dim_head / 2]."""
  cos, sin = (a[..., None, :] for a in rotation)
  first, second = jnp.split(x.astype(cos.dtype), 2, -1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def project(x, weight, axes=1):
  """Contracts the last `axes` of x with the first of the weight, in the dtype of x.

  It is one product of two matrices. Written with the leading dimensions apart, its gradient by
  the weight contracts two of them, for which XLA makes transposed copies on CPU: the layer's
  forward and backward pass then takes 1.5 times as long (dim 512, 4 x 1024 tokens, float32).
  Over a mesh they stay apart: batch and sequence may be divided over different axes.
  """
  if meshes.axes_of_kind(meshes.current(x, weight), AxisType.Auto, AxisType.Explicit):
    return jnp.tensordot(x, weight.astype(x.dtype), axes)
  lead, rows = x.shape[: x.ndim - axes], math.prod(weight.shape[:axes])
  out = x.reshape(-1, rows) @ weight.reshape(rows, -1).astype(x.dtype)
  return out.reshape(*lead, *weight.shape[axes:])


def in_projection(x, params, positions, *, norm, norm_eps, **positions_options):
  """All that the layer computes from norm(x), before attention.

  Returns:
    query [..., T, H, Dh]; key [..., T, K, Dh]; value [..., T, K, Dh], which is the key before
    QK-norm and rotary if params have no value; gate, None where params have none, and up
    [..., T, F].
  """
  def kv_heads(name):
    heads = project(h, params[name])
    return heads[..., None, :] if params[name].ndim == 2 else heads

  h = normalize(x, params["norm"], params.get("norm_bias"), kind=norm, eps=norm_eps)
  query, key = project(h, params["query"]), kv_heads("key")
  value = kv_heads("value") if "value" in params else key
  query, key = positioned(query, key, params, positions, norm_eps=norm_eps, **positions_options)
  gate = project(h, params["gate"]) if "gate" in params else None
  return query, key, value, gate, project(h, params["up"])


def positioned(query, key, params, positions, *, norm_eps, rotary, rope_theta, xpos_scale_base):
  """Query and key [..., T, heads, Dh] as attention takes them: QK-norm, rotary, xPos."""
  if "query_scale" in params:
    query, key = (
        l2_normalize(x, scale) if scale.ndim == 1
        else normalize(x, scale, kind="layer", eps=norm_eps)
        for x, scale in ((query, params["query_scale"]), (key, params["key_scale"])))
  if rotary:
    options = dict(theta=rope_theta, xpos_scale_base=xpos_scale_base)
    query = rotate(query, positions, **options)
    key = rotate(key, positions, xpos_sign=-1, **options)
  return query, key


def values_are_keys(params, rotary) -> bool:
  """Whether attention reads one array as keys and values."""
  return "value" not in params and "key_scale" not in params and not rotary


def activate(gate, up):
  """silu(gate) * up (SwiGLU), or gelu(up) where there is no gate."""
  return jax.nn.gelu(up, approximate=False) if gate is None else jax.nn.silu(gate) * up


def out_projection(x, attended, gate, up, params):
  """x + attended @ attn_out + act(gate, up) @ ff_out; attended is [..., T, H, Dh]."""
  attn = project(attended, params["attn_out"], axes=2)
  return x + attn + project(activate(gate, up), params["ff_out"])


def parallel_attention_ffn(x, params, *, norm, norm_eps, rotary, rope_theta, xpos_scale_base,
                           query_offset, kv_cache, **attention_options):
  """See the op of the same name.

  The backward pass keeps x and what the matrix products made, and recomputes what is between
  them: of a layer's activations that is less than half, for hardly any time. A policy of
  `jax.checkpoint` knows them by the names that they have in the fused form.
  """
  positions = jnp.asarray(query_offset)[..., None] + jnp.arange(x.shape[-2])
  project_in = functools.partial(
      in_projection, norm=norm, norm_eps=norm_eps, rotary=rotary, rope_theta=rope_theta,
      xpos_scale_base=xpos_scale_base)
  projected = jax.checkpoint(project_in, prevent_cse=False)(x, params, positions)
  query, key, value, gate, up = (
      None if array is None else checkpoint_name(array, f"block_{name}")
      for name, array in zip(("query", "key", "value", "gate", "up"), projected))
  attended, kv_cache = attend(query, key, value, params, rotary=rotary, query_offset=query_offset,
                              kv_cache=kv_cache, **attention_options)
  y = jax.checkpoint(out_projection, prevent_cse=False)(x, attended, gate, up, params)
  return y if kv_cache is None else (y, kv_cache)


def attend(query, key, value, params, *, rotary, query_offset, kv_cache, **options):
  """The layer's attention, to its keys and values or to the cache.

  Args:
    query: [..., T, H, Dh].
    key, value: [..., T, K, Dh]; where params have one head, K copies of it.

  Returns:
    What the queries attended to, [..., T, H, Dh], and the cache with the new rows, or None.
  """
  if kv_cache is not None:
    grouped = params["key"].ndim == 3
    kv_cache = tuple(
        write(old, rows, query_offset, axis=-3) if grouped
        else write(old, rows[..., 0, :], query_offset)
        for old, rows in zip(kv_cache, (key, value)))
    key, value = kv_cache[0], kv_cache[-1]
    if not grouped:
      key, value = key[..., None, :], value[..., None, :]
    if options["is_causal"]:  # The weights behind the last row are 0, and 0 * NaN is not.
      end = jnp.asarray(query_offset + query.shape[-3])
      end = end.reshape(end.shape + (1,) * (key.ndim - end.ndim))
      filled = jax.lax.broadcasted_iota(end.dtype, key.shape, key.ndim - 3) < end
      key, value = jnp.where(filled, key, 0), jnp.where(filled, value, 0)
    key, value = key.astype(query.dtype), value.astype(query.dtype)
  if values_are_keys(params, rotary):
    value = key  # One object, so that a kernel can read it once.
  if jnp.ndim(query_offset):
    attended = decode_attention(
        query, key, value, query_offset + query.shape[-3],
        **{name: options[name] for name in ("alibi_slopes", "local_window_size", "implementation")})
  else:
    # Without a cache, keys begin where the queries do; only distances count.
    attended = flash_attention(
        query, key, value, query_offset=0 if kv_cache is None else query_offset, **options)
  return attended, kv_cache


def write(cache, rows, offset, axis=-2):
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
