"""Steps of the parallel block that no kernel has: positions, attention, the activation."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from .. import rotary as rotations
from ..attention import flash_attention
from ..cache import write
from ..core import partition
from ..decode import decode_attention
from ..norms import l2_normalize, normalize


def project(x, weight, axes=1):
  """Contracts the last `axes` of x with the first of the weight, in the dtype of x.

  It is one product of two matrices. Written with the leading dimensions apart, its gradient by
  the weight contracts two of them, for which XLA makes transposed copies on CPU: the layer's
  forward and backward pass then takes 1.5 times as long (dim 512, 4 x 1024 tokens, float32).
  Over a mesh they stay apart: batch and sequence may be divided over different axes.
  """
  if partition.axes_of_kind(partition.current(x, weight), AxisType.Auto, AxisType.Explicit):
    return jnp.tensordot(x, weight.astype(x.dtype), axes)
  lead, rows = x.shape[: x.ndim - axes], math.prod(weight.shape[:axes])
  out = x.reshape(-1, rows) @ weight.reshape(rows, -1).astype(x.dtype)
  return out.reshape(*lead, *weight.shape[axes:])


def positioned(query, key, params, positions, *, norm_eps, rotary, rope_theta, xpos_scale_base):
  """Query and key [..., T, heads, Dh] as attention takes them: QK-norm, rotary, xPos."""
  if "query_scale" in params:
    query, key = (
        l2_normalize(x, scale) if scale.ndim == 1
        else normalize(x, scale, kind="layer", eps=norm_eps)
        for x, scale in ((query, params["query_scale"]), (key, params["key_scale"])))
  if rotary:
    options = dict(theta=rope_theta, xpos_scale_base=xpos_scale_base)
    query = rotations.rotate(query, positions, **options)
    key = rotations.rotate(key, positions, xpos_sign=-1, **options)
  return query, key


def values_are_keys(params, rotary) -> bool:
  """Whether attention reads one array as keys and values."""
  return "value" not in params and "key_scale" not in params and not rotary


def activate(gate, up):
  """silu(gate) * up (SwiGLU), or gelu(up) where there is no gate."""
  return jax.nn.gelu(up, approximate=False) if gate is None else jax.nn.silu(gate) * up


def attention(query, key, value, params, *, rotary, query_offset, kv_cache, **options):
  """The layer's attention, to its keys and values or to the cache, as a function to call.

  Args:
    query: [..., T, H, Dh].
    key, value: [..., T, K, Dh]; K may be several times the heads that params have, each repeated.

  Returns:
    A function of no arguments, of which the result is [..., T, H, Dh], and the cache with the new
    rows, or None.
  """
  if kv_cache is not None:
    grouped = params["key"].ndim == 3

    def stored(old, rows, offset):
      rows = rows[..., ::rows.shape[-2] // old.shape[-2], :] if grouped else rows[..., 0, :]
      return write(old, rows, offset, axis=-3 if grouped else -2)

    def filled(rows, end):
      end = jnp.asarray(end).reshape(jnp.shape(end) + (1,) * (rows.ndim - jnp.ndim(end)))
      position = jax.lax.broadcasted_iota(end.dtype, rows.shape, rows.ndim - 3)
      return jnp.where(position < end, rows, 0)

    kv_cache = tuple(partition.partitioned(stored, old, rows, query_offset)
                     for old, rows in zip(kv_cache, (key, value)))
    key, value = kv_cache[0], kv_cache[-1]
    if not grouped:
      key, value = key[..., None, :], value[..., None, :]
    if options["is_causal"]:  # The weights behind the last row are 0, and 0 * NaN is not.
      end = query_offset + query.shape[-3]
      key, value = (partition.partitioned(filled, rows, end) for rows in (key, value))
    key, value = key.astype(query.dtype), value.astype(query.dtype)
  if values_are_keys(params, rotary):
    value = key  # One object, so that a kernel can read it once.
  if jnp.ndim(query_offset):
    attend = functools.partial(
        decode_attention, query, key, value, query_offset + query.shape[-3],
        **{name: options[name] for name in ("alibi_slopes", "local_window_size", "implementation")})
  else:
    # Without a cache, keys begin where the queries do; only distances count.
    attend = functools.partial(flash_attention, query, key, value,
                               query_offset=0 if kv_cache is None else query_offset, **options)
  return attend, kv_cache
