"""The parallel block in plain JAX: in-projection, attention, out-projection."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from .. import mesh as meshes
from ..compat import promoting
from ..attention import flash_attention
from ..decode import decode_attention


@promoting
def normalize(x, gain, *, kind, eps):
  """LayerNorm without bias ("layer") or RMSNorm ("rms") over the last axis.

  Computed in float32 at least; returns the dtype of x.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  if kind == "layer":
    wide -= wide.mean(-1, keepdims=True)
  wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
  return (wide * gain).astype(x.dtype)


@promoting
def l2_normalize(x, scale):
  """x divided by its l2 norm over the last axis, times a scale per channel (QK-norm)."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.square(wide).sum(-1, keepdims=True)
  return (wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24)) * scale).astype(x.dtype)


@promoting
def rotate(x, positions, *, xpos_scale_base=None, xpos_sign=1):
  """Rotary positions, the two halves of the channels paired (arXiv:2104.09864).

  Args:
    x: float[..., T, heads, dim_head].
    positions: int[..., T], its leading dimensions those of x or absent.
    xpos_scale_base: positions over which xPos decays by its base; None for plain rotary.
    xpos_sign: 1 for queries, -1 for keys.

  Returns:
    The rotated x, in its dtype.
  """
  half = x.shape[-1] // 2
  cos, sin = rotation_at(positions, half, jnp.promote_types(x.dtype, jnp.float32))
  if xpos_scale_base is not None:
    base = jnp.asarray((np.arange(half) / half + 0.4) / 1.4, cos.dtype)
    decay = base ** (xpos_sign * positions.astype(cos.dtype)[..., None] / xpos_scale_base)
    cos, sin = cos * decay, sin * decay
  return rotate_by(x, (cos, sin))


@promoting
def rotation_at(positions, half, dtype=jnp.float32):
  """Cosines and sines that positions [...] rotate channels by, two arrays [..., half]."""
  frequency = jnp.asarray(10_000.0 ** (-np.arange(half) / half), dtype)
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


def in_projection(x, params, positions, *, norm, norm_eps, rotary, xpos_scale_base):
  """All that the layer computes from norm(x), before attention.

  Returns:
    query [..., T, H, Dh]; key [..., T, 1, Dh]; value [..., T, 1, Dh], which is the key before
    QK-norm and rotary if params have no value; gate and up [..., T, F].
  """
  h = normalize(x, params["norm"], kind=norm, eps=norm_eps)
  query = project(h, params["query"])
  key = project(h, params["key"])[..., None, :]
  value = project(h, params["value"])[..., None, :] if "value" in params else key
  query, key = positioned(query, key, params, positions, rotary=rotary,
                          xpos_scale_base=xpos_scale_base)
  return query, key, value, project(h, params["gate"]), project(h, params["up"])


def positioned(query, key, params, positions, *, rotary, xpos_scale_base):
  """Query and key [..., T, heads, Dh] as attention takes them: QK-norm, rotary, xPos."""
  if "query_scale" in params:
    query = l2_normalize(query, params["query_scale"])
    key = l2_normalize(key, params["key_scale"])
  if rotary:
    query = rotate(query, positions, xpos_scale_base=xpos_scale_base)
    key = rotate(key, positions, xpos_scale_base=xpos_scale_base, xpos_sign=-1)
  return query, key


def values_are_keys(params, rotary) -> bool:
  """Whether attention reads one array as keys and values."""
  return "value" not in params and "key_scale" not in params and not rotary


def out_projection(x, attended, gate, up, params):
  """x + attended @ attn_out + (silu(gate) * up) @ ff_out; attended is [..., T, H, Dh]."""
  attn = project(attended, params["attn_out"], axes=2)
  return x + attn + project(jax.nn.silu(gate) * up, params["ff_out"])


def parallel_attention_ffn(x, params, *, norm, norm_eps, rotary, xpos_scale_base, query_offset,
                           kv_cache, **attention_options):
  """See the op of the same name.

  The backward pass keeps x and what the matrix products made, and recomputes what is between
  them: of a layer's activations that is less than half, for hardly any time. A policy of
  `jax.checkpoint` knows them by the names that they have in the fused form.
  """
  positions = jnp.asarray(query_offset)[..., None] + jnp.arange(x.shape[-2])
  project_in = functools.partial(
      in_projection, norm=norm, norm_eps=norm_eps, rotary=rotary, xpos_scale_base=xpos_scale_base)
  made = jax.checkpoint(project_in, prevent_cse=False)(x, params, positions)
  query, key, value, gate, up = map(
      checkpoint_name, made, [f"block_{name}" for name in ("query", "key", "value", "gate", "up")])
  attended, kv_cache = attend(query, key, value, params, rotary=rotary, query_offset=query_offset,
                              kv_cache=kv_cache, **attention_options)
  y = jax.checkpoint(out_projection, prevent_cse=False)(x, attended, gate, up, params)
  return y if kv_cache is None else (y, kv_cache)


def attend(query, key, value, params, *, rotary, query_offset, kv_cache, **options):
  """The layer's attention, to its keys and values or to the cache.

  Args:
    query: [..., T, H, Dh].
    key, value: [..., T, K, Dh]; K copies of the only head.

  Returns:
    What the queries attended to, [..., T, H, Dh], and the cache with the new rows, or None.
  """
  if kv_cache is not None:
    kv_cache = tuple(write(old, rows[..., 0, :], query_offset)
                     for old, rows in zip(kv_cache, (key, value)))
    key, value = kv_cache[0], kv_cache[-1]
    if options["is_causal"]:  # The weights behind the last row are 0, and 0 * NaN is not.
      end = jnp.asarray(query_offset + query.shape[-3])
      end = end.reshape(end.shape + (1,) * (key.ndim - end.ndim))
      filled = jax.lax.broadcasted_iota(end.dtype, key.shape, key.ndim - 2) < end
      key, value = jnp.where(filled, key, 0), jnp.where(filled, value, 0)
    key, value = (x.astype(query.dtype)[..., None, :] for x in (key, value))
  if values_are_keys(params, rotary):
    value = key  # One object, so that a kernel can read it once.
  if jnp.ndim(query_offset):
    attended = decode_attention(
        query, key, value, query_offset + query.shape[-3],
        alibi_slopes=options["alibi_slopes"], implementation=options["implementation"])
  else:
    # Without a cache, keys begin where the queries do; only distances count.
    attended = flash_attention(
        query, key, value, query_offset=0 if kv_cache is None else query_offset, **options)
  return attended, kv_cache


def write(cache, rows, offset):
  """The cache [..., S, Dh] with rows [..., T, Dh] from position `offset` on, int[] or int[...]."""
  rows = rows.astype(cache.dtype)
  if not jnp.ndim(offset):
    return jax.lax.dynamic_update_slice_in_dim(cache, rows, offset, axis=-2)
  write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
  for _ in range(jnp.ndim(offset)):
    write = jax.vmap(write)
  return write(cache, rows, offset)
