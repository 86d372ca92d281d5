"""One transformer layer: attention and feed-forward side by side, from one norm."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .. import attention
from ..core import compat, dispatch, integers, op
from ..core.compat import Array
from . import steps
from .fused import OP, Layer

REQUIRED = {"norm", "query", "key", "up", "attn_out", "ff_out"}  # of the weights


def parallel_attention_ffn(
    x: jax.Array,
    params: Mapping[str, jax.Array],
    *,
    norm: Literal["layer", "rms"] = "layer",
    norm_eps: float = 1e-5,
    rotary: bool = True,
    rope_theta: float = 10_000.0,
    xpos_scale_base: int | None = None,
    alibi_slopes: Array | Sequence[float] | None = None,
    is_causal: bool = True,
    segment_ids: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    query_offset: int | Array = 0,
    kv_cache: tuple[jax.Array, ...] | None = None,
    implementation: dispatch.Implementation = "auto",
) -> Any:
  """x + attention(norm(x)) + feed_forward(norm(x)), the parallel block of PaLM.

  Args:
    x: float[..., T, D], the residual stream. Matrices are cast to its dtype.
    params: the weights, apart rather than packed, so that each can be sharded by columns:
      norm [D], query [D, H, Dh], key [D, Dh], value [D, Dh], gate [D, F], up [D, F],
      attn_out [H, Dh, D], ff_out [F, D], where
      key and value [D, K, Dh] have K heads (grouped queries), no value makes the keys before
      QK-norm and rotary the values, and no gate makes the activation gelu(up) instead of
      silu(gate) * up. Optional: norm_bias [D]; query_scale and key_scale, [Dh] if queries and
      keys are l2-normalised, [H, Dh] and [K, Dh] if LayerNorm is applied to each head.
    norm: "layer" (LayerNorm with a gain and no bias) or "rms".
    norm_eps: added to the variance or to the mean square.
    rotary: rotate channel i with channel i + Dh/2 (arXiv:2104.09864).
    rope_theta: base of the rotary wavelengths.
    xpos_scale_base: xPos decay on top of rotary (arXiv:2212.10554); None for none.
    alibi_slopes: float[H]; see `flash_attention`.
    is_causal, segment_ids, local_window_size: see `flash_attention`.
    query_offset: position of the first row of x; int[], or int[...] for sequences that have come
      to different positions of their caches (then causal, without segments).
    kv_cache: (keys, values), or (keys,) where keys and values are the same array, each
      [..., S, Dh], or [..., S, K, Dh] for a key [D, K, Dh]: attention is to the cache, after the
      rows of x have been written to it at `query_offset`. If causal, what lies behind them has no
      influence, be it NaN.
    implementation: "auto", or a backend by name.

  Returns:
    [..., T, D] in the dtype of x; with `kv_cache`, a pair of that and the new cache.

  Raises:
    ValueError: weights, a cache or arguments of attention that do not fit, an offset beyond the
      cache (inside jit it is moved back, as `jax.lax.dynamic_update_slice` does), or a backend
      that cannot run.

  `jax.checkpoint_policies` can name what the products make, "block_query", "block_key",
  "block_value", "block_gate" and "block_up", in kernels also "block_act", and those of attention,
  "attention_out" and "attention_lse".

  References:
    PaLM (arXiv:2204.02311, section 2); GPT-J for the parallel form.
  """
  dispatch.choose(OP, implementation, on=dispatch.target(x, *params.values()))
  _check(x, params, norm, rotary, rope_theta, xpos_scale_base)
  if kv_cache is not None:
    _check_cache(x, params, rotary, kv_cache, query_offset)
  if np.ndim(query_offset):
    _check_offsets(x, query_offset, kv_cache, is_causal, segment_ids)
  length, (_, heads, dim_head) = x.shape[-2], params["query"].shape
  of_heads = lambda length, heads: jax.ShapeDtypeStruct(
      (*x.shape[:-2], length, heads, dim_head), x.dtype)
  grouped = params["key"].ndim == 3
  key = of_heads(length if kv_cache is None else kv_cache[0].shape[-3 if grouped else -2],
                 params["key"].shape[1] if grouped else 1)
  attention.check(of_heads(length, heads), key, key, alibi_slopes=alibi_slopes,
                  segment_ids=segment_ids, local_window_size=local_window_size,
                  query_offset=0 if np.ndim(query_offset) else query_offset)
  route = op.choose(OP, implementation, x, params)
  ids = None if segment_ids is None else integers.same_ids(*attention.pair(segment_ids))
  if alibi_slopes is not None and not isinstance(alibi_slopes, jax.Array):
    alibi_slopes = np.asarray(alibi_slopes)
  offset = _offset(query_offset)
  if (isinstance(offset, int) and integers.exceeds(attention.BLOCK_Q + 1, length)
      and not compat.under_jit()):
    offset = np.int32(offset)  # so that a loop that decodes compiles one program
  static_offset, offset = (offset, None) if isinstance(offset, int) else (None, offset)
  layer = Layer(norm, float(norm_eps), rotary, float(rope_theta), xpos_scale_base, is_causal,
                attention.window_of(local_window_size), static_offset, implementation)
  return op.run(OP, route, layer, x, dict(params), kv_cache, alibi_slopes, ids, offset)


def _offset(offset):
  """The offset, as an int where it is one number that is known, else of at least 32 bits."""
  if not isinstance(offset, jax.Array):
    outside = [n for n in np.ravel(offset).tolist() if not -2**31 <= n < 2**31]
    if outside:
      raise ValueError(f"query_offset must fit in 32 bits; got {outside[0]}")
    return np.asarray(offset, np.int32) if np.ndim(offset) else int(offset)
  return offset.astype(jnp.int32) if offset.dtype.itemsize < 4 else offset


def _check(x, params, norm, rotary, rope_theta, xpos_scale_base):
  if x.ndim < 2 or 0 in x.shape:
    raise ValueError(f"x must be [..., T, D] with at least one row; got {x.shape}")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x must be floating point; got {x.dtype}")
  if norm not in ("layer", "rms"):
    raise ValueError(f"norm must be layer or rms; got {norm!r}")
  missing = REQUIRED - params.keys()
  unknown = params.keys() - REQUIRED - {"value", "gate", "norm_bias", "query_scale", "key_scale"}
  if missing or unknown:
    raise ValueError("params lack " + ", ".join(sorted(missing)) if missing else
                     "params have unknown entries: " + ", ".join(sorted(unknown)))
  if ("query_scale" in params) != ("key_scale" in params):
    raise ValueError("query_scale and key_scale come together")
  if params["query"].ndim != 3 or params["up"].ndim != 2 or params["key"].ndim not in (2, 3):
    raise ValueError("query must be [D, H, Dh], key [D, Dh] or [D, K, Dh], and up [D, F]; got "
                     f"{params['query'].shape}, {params['key'].shape} and {params['up'].shape}")
  dim = x.shape[-1]
  _, heads, dim_head = params["query"].shape
  hidden = params["up"].shape[1]
  kv_heads = params["key"].shape[1:-1]
  if kv_heads and (not kv_heads[0] or heads % kv_heads[0]):
    raise ValueError(f"{kv_heads[0]} key/value heads do not divide {heads} query heads")
  of_heads = params["query_scale"].ndim == 2 if "query_scale" in params else False
  expected = {
      "norm": (dim,), "norm_bias": (dim,), "query": (dim, heads, dim_head),
      "key": (dim, *kv_heads, dim_head), "value": (dim, *kv_heads, dim_head),
      "gate": (dim, hidden), "up": (dim, hidden),
      "attn_out": (heads, dim_head, dim), "ff_out": (hidden, dim),
      "query_scale": (heads, dim_head) if of_heads else (dim_head,),
      "key_scale": (*(kv_heads or (1,)), dim_head) if of_heads else (dim_head,),
  }
  for name, array in params.items():
    if array.shape != expected[name] or 0 in array.shape:
      raise ValueError(f"params[{name!r}] must be {expected[name]}, none of them 0; "
                       f"got {array.shape}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"params[{name!r}] must be floating point; got {array.dtype}")
  if rotary and dim_head % 2:
    raise ValueError(f"rotary pairs channels: dim_head must be even; got {dim_head}")
  if not rope_theta > 0:
    raise ValueError(f"rope_theta must be positive; got {rope_theta}")
  if xpos_scale_base is not None and not (rotary and xpos_scale_base > 0):
    raise ValueError("xpos_scale_base must be positive, and comes with rotary; "
                     f"got {xpos_scale_base}, rotary={rotary}")


def _check_cache(x, params, rotary, kv_cache, offset):
  shared = steps.values_are_keys(params, rotary)
  if len(kv_cache) != (1 if shared else 2):
    raise ValueError(f"kv_cache must be {'(keys,)' if shared else '(keys, values)'}; "
                     f"got {len(kv_cache)} arrays")
  lead, length, row = x.shape[:-2], x.shape[-2], params["key"].shape[1:]
  size = kv_cache[0].shape[len(lead)] if kv_cache[0].ndim > len(lead) else 0
  for array in kv_cache:
    if array.shape != (*lead, size, *row) or integers.exceeds(length, size):
      raise ValueError(f"kv_cache must be {[*lead, 'S', *row]} with S of at least {length}; "
                       f"got {[a.shape for a in kv_cache]}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"kv_cache must be floating point; got {array.dtype}")
  offset = integers.known(offset)
  if offset is not None and offset.size:
    low, high = int(offset.min()), int(offset.max()) + length
    if low < 0 or integers.exceeds(high, size):
      raise ValueError(f"rows {low} to {high - 1} are not all in the cache of {size}")


def _check_offsets(x, offsets, kv_cache, is_causal, segment_ids):
  if np.shape(offsets) != x.shape[:-2]:
    raise ValueError(f"query_offset must be one integer or {x.shape[:-2]}, one per sequence; "
                     f"got {np.shape(offsets)}")
  if kv_cache is None or not is_causal or segment_ids is not None:
    raise ValueError("a query_offset per sequence needs a kv_cache and causal attention without "
                     "segment_ids")
