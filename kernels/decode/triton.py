"""Attention to a cache in Triton, through jax-triton, for any CUDA GPU: the split over positions.

How it works, and what it costs: docs/decode.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ..core import chips
from ..triton import call as triton_call
from . import configs, splits

_DIMS = (16, 32, 64, 128, 256)
_DTYPES = ("bfloat16", "float16", "float32")
_PROGRAMS = 2  # a multiprocessor: one computes while the other waits for memory
_PARTS = 64  # of a row that the merge loads at a time


def unsupported(query: jax.Array | jax.ShapeDtypeStruct, key: jax.Array | jax.ShapeDtypeStruct,
                value: jax.Array | jax.ShapeDtypeStruct | None, *, chip: str | None) -> str | None:
  """The first requirement that shapes and dtypes fail, in words, or None.

  Args:
    query, key, value: arrays or `jax.ShapeDtypeStruct`, as for `forward`.
    chip: a name such as "a100"; None for any GPU.
  """
  del value
  if trouble := triton_call.unfit(chip):
    return trouble
  if query.dtype.name not in _DTYPES:
    return f"queries of dtype in {{{', '.join(_DTYPES)}}}; got {query.dtype.name}"
  if query.shape[-1] not in _DIMS:
    return f"dim_head in {{{', '.join(map(str, _DIMS))}}}; got {query.shape[-1]}"
  if key.shape[1] * key.shape[2] >= 2**31:
    return f"fewer than 2^31 positions x heads in a sequence; got {key.shape[1] * key.shape[2]}"
  return triton_call.problem()


def forward(query: jax.Array, key: jax.Array, value: jax.Array | None, lengths: jax.Array, *,
            alibi_slopes: jax.Array | None, scale: float, left: int | None = None,
            key_scales: jax.Array | None, value_scales: jax.Array | None, chip: str | None):
  """Attention to what is filled of a cache.

  Args:
    query: [B, T, heads, dim_head] of bfloat16, float16 or float32.
    key, value: [B, S, kv_heads, dim_head] of query's dtype or int8; value is None where it is
      the key.
    lengths: int32[B], in [0, S].
    alibi_slopes: None or float32[heads].
    scale, chip: known when compiling.
    left: as of `xla.attend`.
    key_scales, value_scales: None or float32[B, S, kv_heads].

  Returns:
    [B, T, heads, dim_head] in query's dtype.

  References:
    Flash-Decoding (Dao et al., 2023); FlashAttention-2 (arXiv:2307.08691), algorithm 1.
  """
  triton_call.check()
  from . import triton_kernels  # and with it Triton, which may be absent

  batch, num_queries, heads, dim = query.shape
  max_len, kv_heads = key.shape[1:3]
  rows = num_queries * heads // kv_heads
  blocks = configs.triton(chip, dim, rows, query.dtype)
  tiles = -(-rows // blocks.rows)
  programs = _PROGRAMS * chips.gpu(chip).multiprocessors // tiles
  limits = splits.limits(query, key, blocks.keys, programs,
                         None if left is None else num_queries + left)
  table, starts = splits.split(lengths, limits)

  # Row maxima are taken before scaling, so the sign of the scale goes to the query.
  sign = np.sign(scale).astype(query.dtype)
  query = query if sign == 1 else sign * query
  nothing = lengths  # stands for what is absent: a kernel needs a pointer
  or_nothing = lambda x: nothing if x is None else x
  call = functools.partial(triton_call.call, chip=chip)
  array = jax.ShapeDtypeStruct
  out, lse2 = call(
      triton_kernels.attend_kernel, query, key, key if value is None else value,
      or_nothing(key_scales), or_nothing(value_scales), or_nothing(alibi_slopes), lengths, table,
      num_queries, max_len,
      out_types=(array((limits.slots, *query.shape[1:]), query.dtype),
                 array((limits.slots, num_queries, heads) if limits.parts else (1,), jnp.float32)),
      grid=limits.slots * kv_heads * tiles, num_warps=blocks.warps, num_stages=blocks.stages,
      GROUP=heads // kv_heads, KV_HEADS=kv_heads, DIM=dim, ROWS=blocks.rows, BLOCK=blocks.keys,
      TILES=tiles, SCALE=abs(scale) or 1.0, ALIBI=alibi_slopes is not None,
      LEFT=-1 if left is None else left, INT8=key.dtype == jnp.int8, SHARED=value is None,
      PARTS=limits.parts,
      PRECISION="tf32x3" if query.dtype == jnp.float32 else "tf32")
  if not limits.parts:
    return out
  return call(
      triton_kernels.merge_kernel, out, lse2, starts, num_queries * heads,
      out_types=(array(query.shape, query.dtype),), grid=batch * num_queries * heads,
      num_warps=4, num_stages=2, DIM=dim, BLOCK=_PARTS)[0]
