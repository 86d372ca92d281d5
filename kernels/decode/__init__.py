"""Attention of the last few positions of each sequence to a key/value cache."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..attention import default_scale, window_of
from ..core import guards, integers, op
from ..core.compat import Array
from ..core.dispatch import Implementation
from .fused import OP, Options


def decode_attention(
    query: jax.Array,
    key_cache: jax.Array,
    value_cache: jax.Array,
    lengths: Array | int,
    *,
    alibi_slopes: Array | Sequence[float] | None = None,
    scale: float | jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
  """softmax(scale * q k^T + slope * (kv_pos - q_pos)) v over what is filled of a cache.

  Query i of a sequence stands at position `length - T + i` and sees the positions up to its own,
  with a window the last of them; one that stands before position 0 sees nothing and gives zeros.
  Not differentiable.

  Args:
    query: float[..., T, heads, dim_head], the last T positions of each sequence.
    key_cache: [..., max_len, kv_heads, dim_head], in the dtype of `query` or int8; kv_heads is 1
      (multi-query attention) or another divisor of heads. It has the axes of `flash_attention`'s
      key; a cache [..., max_len, dim_head] is one of `cache[..., None, :]`, which copies nothing.
      What is not filled yet has no influence, be it NaN; nor has it in the scales.
    value_cache: like `key_cache`. Where it is the same Python object, it is read once.
    lengths: int[...], positions filled, those of `query` included.
    alibi_slopes: float[heads]; None for no bias.
    scale: a number that multiplies q k^T; None means 1/sqrt(dim_head).
    local_window_size: how many positions before its own a query sees, as in `flash_attention`
      (the right side of a pair has no effect here); None for all.
    key_scales: float32[..., max_len, kv_heads] that int8 keys are multiplied by; else None.
    value_scales: the same for the values; None where they are the keys.
    implementation: "auto", or a backend by name.

  Returns:
    [..., T, heads, dim_head] in the dtype of `query`; softmax and accumulation are in float32
    (float64 for float64 inputs). Inside jit, a length that is negative or beyond the cache makes
    its sequence NaN.

  Raises:
    ValueError: shapes or dtypes that do not fit, int8 without scales, a derivative, a backend
      that cannot run, or, outside jit, a length that is negative or beyond the cache.

  References:
    MQA (arXiv:1911.02150), ALiBi (arXiv:2108.12409), the split over positions: Flash-Decoding.
  """
  shared = value_cache is key_cache
  _check(query, key_cache, value_cache, lengths, alibi_slopes, key_scales, value_scales)
  lead, (num_queries, heads, dim_head) = query.shape[:-3], query.shape[-3:]
  flat: Any = lambda x: None if x is None else x.reshape(math.prod(lead), *x.shape[len(lead):])
  query, key, value, key_scales, value_scales = map(flat, (
      query, key_cache, None if shared else value_cache,
      key_scales, None if shared else value_scales))
  # A length that is beyond 32 bits is beyond the cache as well.
  lengths = integers.clamped(lengths, -2**31, 2**31 - 1).reshape(math.prod(lead))
  if alibi_slopes is not None and not isinstance(alibi_slopes, jax.Array):
    alibi_slopes = np.asarray(alibi_slopes)

  scale = default_scale(dim_head) if scale is None else scale
  left = _left(window_of(local_window_size), key_cache.shape[-3])
  route = op.choose(OP, implementation, query, key, value, needs=op.untraced(scale, "query"))
  route, static_scale, scale = op.scaled(route, scale)
  query, key, value, *others = jax.tree.map(
      lambda x: guards.no_derivative(x, OP.name) if isinstance(x, jax.Array) else x,
      (query, key, value, key_scales, value_scales, alibi_slopes, scale))
  out = op.run(OP, route, Options(static_scale, left), query, key, value, lengths, *others)
  return out.reshape(*lead, num_queries, heads, dim_head)


def _left(window, max_len) -> int | None:
  """The number of earlier positions that a query sees; None where that is all of the cache."""
  if window is None or isinstance(max_len, int) and window[0] >= max_len - 1:
    return None
  return window[0]


def _check(query, key, value, lengths, slopes, key_scales, value_scales):
  for name, array in (("query", query), ("key_cache", key), ("value_cache", value)):
    if array.ndim < 3 or 0 in array.shape:
      raise ValueError(f"{name} must be [..., length, heads, dim_head], none of them 0; "
                       f"got {array.shape}")
  if not jnp.issubdtype(query.dtype, jnp.floating):
    raise ValueError(f"query must be floating point; got {query.dtype}")
  if key.dtype not in (query.dtype, jnp.int8) or value.dtype != key.dtype:
    raise ValueError(f"the caches must both be {query.dtype}, as query is, or int8; "
                     f"got {key.dtype}, {value.dtype}")
  if key.shape != value.shape:
    raise ValueError(f"the caches must have one shape; got {key.shape} and {value.shape}")
  if query.shape[:-3] != key.shape[:-3] or query.shape[-1] != key.shape[-1]:
    raise ValueError("query and caches must agree in leading dimensions and dim_head; got "
                     f"{query.shape} and {key.shape}")
  heads, kv_heads = query.shape[-2], key.shape[-2]
  if heads % kv_heads:
    raise ValueError(f"{kv_heads} key/value heads do not divide {heads} query heads")
  if integers.exceeds(query.shape[-3], key.shape[-3]):
    raise ValueError(
        f"{query.shape[-3]} queries do not fit in a cache of {key.shape[-3]} positions")
  if slopes is not None and np.shape(slopes) != (heads,):
    raise ValueError(f"alibi_slopes must be [{heads}], one per query head; got {np.shape(slopes)}")
  scales = {"key_scales": key_scales}
  if value is key:
    if value_scales is not None and value_scales is not key_scales:
      raise ValueError("value_scales must be None where the values are the keys")
  else:
    scales["value_scales"] = value_scales
  for name, array in scales.items():
    if (array is None) == (key.dtype == jnp.int8):
      raise ValueError(f"{name} must be given for int8 caches, and only for those; "
                       f"the caches are {key.dtype}")
    if array is not None and (array.shape != key.shape[:-1] or array.dtype != jnp.float32):
      raise ValueError(f"{name} must be float32{list(key.shape[:-1])}; "
                       f"got {array.dtype}{list(array.shape)}")
  dtype = getattr(lengths, "dtype", np.asarray(0).dtype if isinstance(lengths, int) else None)
  if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(f"lengths must be integers; got {dtype or type(lengths).__name__}")
  if np.shape(lengths) != query.shape[:-3]:
    raise ValueError(f"lengths must be {query.shape[:-3]}, one per sequence; "
                     f"got {np.shape(lengths)}")
  lengths = integers.known(lengths)
  if lengths is not None and lengths.size:
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or integers.exceeds(high, key.shape[-3]):
      raise ValueError(f"length {low if low < 0 else high} is outside the cache of "
                       f"{key.shape[-3]} positions")
