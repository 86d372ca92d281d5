"""Attention with an optional ALiBi bias that is computed, never stored."""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..core import compat, integers, op
from ..core.compat import Array
from ..core.dispatch import Implementation
from .fused import OP, Options
from .xla import BLOCK_Q


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    is_causal: bool = True,
    alibi_slopes: Array | Sequence[float] | None = None,
    scale: float | jax.Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: int | Array = 0,
    implementation: Implementation = "auto",
) -> jax.Array:
  """softmax(scale * q k^T + slope * (kv_pos - q_pos)) v, with no [T, S] array in memory.

  Query i stands at position `query_offset + i`, key j at position j. A query that may attend
  to no key at all gives zeros. Masks hide finite numbers alone: a NaN or an infinity in a key or
  value that no query sees (or in a query, for gradients) reaches the results of all that share a
  tile with it, since weights of 0 multiply it; replace it before the call.

  Args:
    query: float[..., T, heads, dim_head].
    key: float[..., S, kv_heads, dim_head]; kv_heads is 1 (multi-query attention) or another
      divisor of heads.
    value: float[..., S, kv_heads, dim_head]. May be the same array as `key`.
    is_causal: a query attends to no later position.
    alibi_slopes: float[heads], from `alibi_slopes(heads)`, or learnt; None for no bias. An
      argument, so that a tensor-parallel shard passes the slopes of its own heads.
    scale: a number that multiplies q k^T; None means 1/sqrt(dim_head).
    segment_ids: int[..., T] if T == S, or a pair int[..., T], int[..., S]: attention stays
      within equal ids.
    local_window_size: how many positions a query sees to either side, or (left, right), as in
      `jax.nn.dot_product_attention`.
    query_offset: position of the first query; a Python int lets unreachable keys be skipped.
    implementation: "auto", or a backend by name.

  Returns:
    [..., T, heads, dim_head] in the dtype of `query`. Softmax and accumulation are in float32
    (float64 for float64 inputs).

  Raises:
    ValueError: shapes, head counts or dtypes that do not fit, or a backend that cannot run.

  References:
    FlashAttention (arXiv:2205.14135), ALiBi (arXiv:2108.12409), MQA (arXiv:1911.02150).
  """
  check(query, key, value, alibi_slopes=alibi_slopes, segment_ids=segment_ids,
        local_window_size=local_window_size, query_offset=query_offset)
  lead, (num_queries, heads, dim_head) = query.shape[:-3], query.shape[-3:]
  num_keys, kv_heads = key.shape[-3:-1]
  batch = math.prod(lead)
  window = window_of(local_window_size)
  if segment_ids is not None:
    segment_ids = integers.same_ids(
        *(ids.reshape(batch, ids.shape[-1]) for ids in pair(segment_ids)))
  if alibi_slopes is not None and not isinstance(alibi_slopes, jax.Array):
    alibi_slopes = np.asarray(alibi_slopes)

  shared = value is key
  query = query.reshape(batch, num_queries, heads, dim_head)
  key = key.reshape(batch, num_keys, kv_heads, dim_head)
  values = None if shared else value.reshape(batch, num_keys, kv_heads, dim_head)
  scale = default_scale(dim_head) if scale is None else scale
  route = op.choose(
      OP, implementation, query, key, values, needs=op.untraced(scale, "query"))
  route, static_scale, scale = op.scaled(route, scale)
  offset = _near(query_offset, num_queries, num_keys, window)
  if (route.implementation == "xla" and isinstance(num_queries, int) and num_queries <= BLOCK_Q
      and isinstance(offset, int) and not compat.under_jit()):
    # It leaves out no keys, and one program is enough for a loop that decodes.
    offset = np.int32(offset)
  static_offset, offset = (offset, None) if isinstance(offset, int) else (None, offset)
  out = op.run(OP, route, Options(is_causal, window, static_offset, static_scale),
               query, key, values, segment_ids, alibi_slopes, offset, scale)
  return out.reshape(*lead, num_queries, heads, dim_head)


def default_scale(dim_head: int) -> float | jax.Array:
  """1/sqrt(dim_head); an array where programs are exported for any."""
  if isinstance(dim_head, int):
    return dim_head**-0.5
  return jax.lax.rsqrt(jnp.asarray(dim_head, jnp.float32))


def check(query: Any, key: Any, value: Any, *, alibi_slopes: Any, segment_ids: Any,
          local_window_size: Any, query_offset: Any):
  """Raises a ValueError where arguments of `flash_attention` do not fit, arrays or their types."""
  for name, array in (("query", query), ("key", key), ("value", value)):
    if array.ndim < 3:
      raise ValueError(f"{name} must be [..., length, heads, dim_head]; got {array.shape}")
    if array.dtype.name not in ("bfloat16", "float16", "float32", "float64"):
      raise ValueError(f"{name} must be floating point, of 16 bits or more; got {array.dtype}")
  if not query.dtype == key.dtype == value.dtype:
    raise ValueError("query, key and value must have one dtype; got "
                     f"{query.dtype}, {key.dtype}, {value.dtype}")
  if key.shape != value.shape:
    raise ValueError(f"key and value must have one shape; got {key.shape} and {value.shape}")
  if query.shape[:-3] != key.shape[:-3] or query.shape[-1] != key.shape[-1]:
    raise ValueError("query and key must agree in leading dimensions and dim_head; got "
                     f"{query.shape} and {key.shape}")
  if 0 in query.shape or 0 in key.shape:
    raise ValueError(f"no dimension may be empty; got query {query.shape}, key {key.shape}")
  heads, kv_heads = query.shape[-2], key.shape[-2]
  if heads % kv_heads:
    raise ValueError(f"{kv_heads} key/value heads do not divide {heads} query heads")
  if alibi_slopes is not None and np.shape(alibi_slopes) != (heads,):
    raise ValueError(f"alibi_slopes must be [{heads}], one per query head; "
                     f"got {np.shape(alibi_slopes)}")
  if not isinstance(query_offset, int) and not (
      np.ndim(query_offset) == 0 and hasattr(query_offset, "dtype")
      and jnp.issubdtype(query_offset.dtype, jnp.integer)):
    raise ValueError(f"query_offset must be one integer; got {query_offset}")
  window_of(local_window_size)
  if segment_ids is not None:
    _check_segments(pair(segment_ids), query.shape[:-2], key.shape[:-2])


def window_of(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
  """A `local_window_size` as (left, right), or None."""
  if size is None:
    return None
  try:
    left, right = map(operator.index, size if isinstance(size, (tuple, list)) else (size, size))
  except (TypeError, ValueError):
    raise ValueError("local_window_size must be an integer or two, (left, right); "
                     f"got {size!r}") from None
  if left < 0 or right < 0:
    raise ValueError(f"local_window_size must not be negative; got {size}")
  return min(left, 2**30), min(right, 2**30)  # as far as positions go, in 32 bits


def _near(offset, num_queries, num_keys, window):
  """The offset, or where it is far outside of the keys the nearest one that gives the same.

  There each row sees all keys or none, and what its bias has in common for all keys goes. But the
  logarithm that the backward pass starts from grows with that, and is rounded.
  """
  left, right = window or (0, 0)
  low, high = -num_queries - right, num_keys + left
  if not isinstance(offset, jax.Array):
    offset = int(offset)
  if isinstance(low, int) and isinstance(high, int):
    return min(max(offset, low), high) if isinstance(offset, int) else (
        integers.clamped(offset, low, high))
  if isinstance(offset, int) and offset == 0:
    return 0
  return jnp.clip(integers.clamped(offset, -2**30, 2**30), *map(jnp.asarray, (low, high)))


def pair(segment_ids: Array | tuple[Array, Array]):
  return segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)


def _check_segments(segment_ids, *shapes):
  if len(segment_ids) != 2:
    raise ValueError("segment_ids must be an array or a pair of them, of queries and of keys; "
                     f"got {len(segment_ids)}")
  for ids, shape in zip(segment_ids, shapes):
    if not hasattr(ids, "dtype") or not jnp.issubdtype(ids.dtype, jnp.integer):
      raise ValueError("segment_ids must be arrays of integers; got "
                       f"{getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.shape != shape:
      raise ValueError(f"segment_ids must be {shape}; got {ids.shape}"
                       + (" (pass a pair when T != S)" if shapes[0] != shapes[1] else ""))
