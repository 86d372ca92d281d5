"""Attention of the last few positions of each sequence to a key/value cache."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ..attention import default_scale, window_of
from ..core import compat, dispatch, guards, integers, partition, platforms
from ..core.compat import Array
from . import fused, xla


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
    implementation: dispatch.Implementation = "auto",
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
  flat = lambda x: None if x is None else x.reshape(math.prod(lead), *x.shape[len(lead):])
  arrays = {name: flat(x) for name, x in dict(
      query=query, key=key_cache, value=None if shared else value_cache,
      key_scales=key_scales, value_scales=None if shared else value_scales).items()}
  # A length that is beyond 32 bits is beyond the cache as well.
  arrays["lengths"] = integers.clamped(lengths, -2**31, 2**31 - 1).reshape(math.prod(lead))
  if alibi_slopes is not None and not isinstance(alibi_slopes, jax.Array):
    alibi_slopes = np.asarray(alibi_slopes)

  scale = default_scale(dim_head) if scale is None else scale
  window = window_of(local_window_size)
  needs = None
  if isinstance(scale, jax.core.Tracer):
    needs = ("a scale that is known when it is compiled; multiply query by it, or pass "
             "implementation='xla'")
  elif window is not None:
    needs = "local_window_size=None; got a window, which implementation='xla' has"
  on = dispatch.target(query, key_cache, value_cache)
  name = dispatch.choose(
      fused.OP, implementation, arrays["query"], arrays["key"], arrays["value"], on=on,
      needs=needs).implementation
  traced_scale = scale if name == "xla" and isinstance(scale, jax.Array) else None
  out = _decode(
      arrays, alibi_slopes, traced_scale, name=name, chip=dispatch.chip_for(name, on),
      undecided=implementation == "auto" and dispatch.undecided(query, key_cache, value_cache),
      left=None if window is None else window[0],
      scale=None if traced_scale is not None else float(
          jax.device_get(scale) if compat.is_known(scale) else scale))
  return out.reshape(*lead, num_queries, heads, dim_head)


@compat.compiled_once
def _decode(arrays, slopes, traced_scale, *, scale, left, name, chip, undecided):
  undifferentiated = lambda tree: jax.tree.map(
      lambda x: guards.no_derivative(jnp.asarray(x), fused.OP), tree)
  arrays = undifferentiated({name: x for name, x in arrays.items() if name != "lengths"}) | {
      "lengths": jnp.asarray(arrays["lengths"])}
  slopes = undifferentiated(slopes)
  if name == "xla" and undecided and traced_scale is None and left is None:
    return platforms.by_platform(
        _plain, [(("tpu",), _on_any_tpu)], (arrays, slopes), scale, dispatch.ANY_TPU_MESH)
  if name == "xla":
    traced_scale = undifferentiated(traced_scale)
    return partition.partitioned(
        lambda query, arrays, slopes, traced_scale: xla.attend(
            query, **arrays, alibi_slopes=slopes, left=left,
            scale=scale if traced_scale is None else traced_scale),
        arrays.pop("query"), arrays, slopes, traced_scale)
  kernel = functools.partial(fused.attention, scale=scale, chip=chip,
                             backend=dispatch.kernel_module(fused.OP, name))
  if undecided:
    plain = functools.partial(_plain, scale=scale)
    return platforms.here_or(plain, kernel, guards.platforms(name))(arrays, slopes)
  arrays["query"] = guards.only_on(arrays["query"], fused.OP, name)
  return kernel(arrays, slopes)


def _plain(arrays, slopes, scale):
  return xla.attend(**arrays, alibi_slopes=slopes, scale=scale)


@compat.promoting
def _on_any_tpu(arrays, slopes, scale):
  name = dispatch.choose(fused.OP, "auto", arrays["query"], arrays["key"], arrays["value"],
                        on=dispatch.ANY_TPU).implementation
  if name == "xla":
    return _plain(arrays, slopes, scale)
  return fused.attention(arrays, slopes, scale=scale, chip=None,
                         backend=dispatch.kernel_module(fused.OP, name))


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
