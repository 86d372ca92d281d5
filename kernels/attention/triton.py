"""Flash attention in Triton, through jax-triton: forward and backward for any CUDA GPU.

The backward is two kernels, one per owner of a sum: `dq` by rows of queries (it also leaves
`delta` = sum(out * dout)), `dkv` by blocks of keys. Nothing is added atomically, so the same
inputs give the same bits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ..core import chips
from ..core.constants import FAR, LOG2E
from ..core.vmap import folding_vmap
from ..triton import call as triton_call
from . import configs
from .residuals import Residuals

_DIMS = (16, 32, 64, 128, 256)
_DTYPES = ("bfloat16", "float16", "float32")


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
    return f"dtype in {{{', '.join(_DTYPES)}}}; got {query.dtype.name}"
  if query.shape[-1] not in _DIMS:
    return f"dim_head in {{{', '.join(map(str, _DIMS))}}}; got {query.shape[-1]}"
  rows = query.shape[1] * query.shape[2]
  if rows >= 2**31:
    return f"fewer than 2^31 rows (length x heads) a sequence; got {rows}"
  return triton_call.problem()


def forward(query: jax.Array, key: jax.Array, value: jax.Array | None, *,
            segment_ids: tuple[jax.Array, jax.Array] | None, alibi_slopes: jax.Array | None,
            query_offset: int | jax.Array, is_causal: bool, scale: float,
            window: tuple[int, int] | None, chip: str | None):
  """Attention and the log of each row's sum of exponentials.

  Args:
    query: [B, T, heads, dim_head] of bfloat16, float16 or float32.
    key, value: [B, S, kv_heads, dim_head]; value is None where it is the key.
    segment_ids: None or (int32[B, T], int32[B, S]).
    alibi_slopes: None or float32[heads].
    query_offset: position of the first query, a Python int or int32[].
    is_causal, scale, window, chip: known when compiling; window is None or (left, right).

  Returns:
    out [B, T, heads, dim_head] in query's dtype, and lse float32[B, heads, T]: -inf, with out 0,
    for a row that sees nothing.

  References:
    FlashAttention-2 (arXiv:2307.08691), algorithm 1.
  """
  static = _static(query.shape, key.shape, is_causal, scale, window, value is None, chip)
  query, _ = _positive_scale(query, scale)
  extras = _extras(query, segment_ids, alibi_slopes, query_offset)
  return _of_batch(_forward, static, query, key, value, *extras)


def backward(residuals: Residuals, dout: jax.Array, *,
             segment_ids: tuple[jax.Array, jax.Array] | None, alibi_slopes: jax.Array | None,
             query_offset: int | jax.Array, is_causal: bool, scale: float,
             window: tuple[int, int] | None, chip: str | None, slope_gradients: bool = False):
  """dquery, dkey, dvalue; dkey is the sum of both and dvalue None where value is the key.

  dout is like out, the other arguments are those of `forward`. With `slope_gradients` there is one
  more result, float32[B, heads]: each sequence's part of the gradient of the slopes.

  References:
    FlashAttention-2 (arXiv:2307.08691), algorithm 2, split in two kernels.
  """
  query, key, value, out, lse = residuals
  static = _static(query.shape, key.shape, is_causal, scale, window, value is None, chip)
  query, sign = _positive_scale(query, scale)
  extras = _extras(query, segment_ids, alibi_slopes, query_offset)
  dquery, *others = _of_batch(
      functools.partial(_backward, slope_gradients), static, query, key, value, out, lse, dout,
      *extras)
  return (dquery if sign == 1 else sign * dquery), *others


def _of_batch(function, static, *arrays):
  """function(static, *arrays), where `vmap` adds to the batch; jax-triton has no rule for it."""
  return folding_vmap(lambda arrays, _: function(static, *arrays))(arrays, ())


def _positive_scale(query, scale):
  """The query with the sign of the scale, since the kernels take row maxima before scaling."""
  sign = np.sign(scale).astype(query.dtype)
  return (query if sign == 1 else sign * query), sign


def _static(query_shape, key_shape, is_causal, scale, window, shared, chip):
  """Static arguments of the kernels."""
  left, right = window or (FAR, FAR)
  right = min(right, 0) if is_causal else right
  return dict(
      chip=chip, GROUP=query_shape[2] // key_shape[2], KV_HEADS=key_shape[2], DIM=query_shape[3],
      SCALE=abs(scale) or 1.0, LEFT=left if left < FAR else None,
      RIGHT=right if right < FAR else None, SHARED=shared)


def _extras(query, segment_ids, alibi_slopes, query_offset):
  """The small operands, each with a batch dimension, so that `vmap` may map any of them."""
  batch, _, heads, _ = query.shape
  offset = jnp.broadcast_to(jnp.asarray(query_offset, jnp.int32), (batch,))
  if alibi_slopes is not None:
    alibi_slopes = jnp.broadcast_to(jnp.asarray(alibi_slopes, jnp.float32), (batch, heads))
  return segment_ids, alibi_slopes, offset


def _blocks(static, dtype, kernel):
  """Tile sizes of one kernel: "forward", "dq" or "dkv"."""
  number = ("forward", "dq", "dkv").index(kernel)
  blocks = configs.triton(static["chip"], static["DIM"])[number]
  if dtype.itemsize == 4:
    blocks = blocks._replace(rows=blocks.rows // 2, keys=blocks.keys // 2)
  return blocks


def _forward(static, query, key, value, segment_ids, slopes, offset):
  batch, length, heads, _ = query.shape
  blocks = _blocks(static, query.dtype, "forward")
  out_types = (jax.ShapeDtypeStruct(query.shape, query.dtype),
               jax.ShapeDtypeStruct((batch, heads, length), jnp.float32))
  return _call("forward", blocks, static, query, key, value, (), segment_ids, slopes, offset,
               out_types)


def _backward(
    slope_gradients, static, query, key, value, out, lse, dout, segment_ids, slopes, offset):
  batch, length = query.shape[:2]
  extras = (segment_ids, slopes, offset)
  lse2 = lse * LOG2E
  blocks, statistics = _blocks(static, query.dtype, "dq"), lse.shape
  if slope_gradients:  # with more scores to a warp it would spill
    warps = max(blocks.warps, blocks.rows * blocks.keys // 1024)
    blocks, statistics = blocks._replace(warps=warps), (2, *lse.shape)
  dquery, delta = _call(
      "dq", blocks, static, query, key, value, (out, lse2, dout), *extras,
      (jax.ShapeDtypeStruct(query.shape, query.dtype),
       jax.ShapeDtypeStruct(statistics, jnp.float32)), DSLOPES=slope_gradients)
  delta, *moments = delta if slope_gradients else [delta]

  blocks = _blocks(static, query.dtype, "dkv")
  splits = _splits(static, batch, length, key.shape[1], blocks)
  summed = splits > 1 or value is None and blocks.apart
  part = jax.ShapeDtypeStruct((splits, *key.shape), jnp.float32 if summed else key.dtype)
  unused = jax.ShapeDtypeStruct((1,), key.dtype)

  def keys_and_values(dk, dv):
    one_sum = dk and dv and value is None
    return _call("dkv", blocks, static, query, key, value, (dout, lse2, delta), *extras,
                 (part if dk and not one_sum else unused, part if dv else unused),
                 SPLITS=splits, DK=dk, DV=dv)

  if blocks.apart:
    (dkey, _), (_, dvalue) = keys_and_values(True, False), keys_and_values(False, True)
    if value is None:
      dkey, dvalue = dkey + dvalue, None
  else:
    dkey, dvalue = keys_and_values(True, True)
    if value is None:
      dkey, dvalue = dvalue, None
  add = lambda parts: None if parts is None else parts.sum(0).astype(key.dtype)
  return dquery, add(dkey), add(dvalue), *(x.sum(-1) for x in moments)


def _splits(static, batch, length, num_keys, blocks):
  """The number of programs that share a block of keys: enough for two on each multiprocessor.

  In multi-query attention one key head has few blocks of keys and many rows that see them. A
  split costs one float32 copy of dkey and dvalue; never more of them than query heads.
  """
  programs = batch * static["KV_HEADS"] * -(-num_keys // blocks.keys)
  tiles = -(-length * static["GROUP"] // blocks.rows)
  multiprocessors = chips.gpu(static["chip"]).multiprocessors
  wanted = min(2 * multiprocessors // programs, static["GROUP"], tiles, 8)
  return 1 << max(wanted, 1).bit_length() - 1


def _call(name, blocks, static, query, key, value, others, segment_ids, slopes, offset, out_types,
          **constants):
  triton_call.check()
  from . import triton_kernels  # and with it Triton, which may be absent

  batch, length, heads, _ = query.shape
  num_keys, kv_heads = key.shape[1:3]
  group = heads // kv_heads
  by_rows = name != "dkv"
  if by_rows:
    programs = batch * kv_heads * -(-length * group // blocks.rows)
  else:
    programs = batch * kv_heads * -(-num_keys // blocks.keys) * constants["SPLITS"]

  nothing = offset  # stands for what is absent: a kernel needs a pointer
  query_ids = key_ids = ranges = nothing
  if segment_ids is not None:
    query_ids, key_ids = segment_ids
    if by_rows:
      ranges = _ranges(key_ids, num_keys, blocks.keys, 1)
    else:
      ranges = _ranges(query_ids, length, blocks.rows, group)
  kernel = getattr(triton_kernels, f"{name}_kernel")
  static = dict(static)
  return triton_call.call(
      kernel, query, key, key if value is None else value, *others, offset,
      nothing if slopes is None else slopes, query_ids, key_ids, ranges,
      length, num_keys, batch * kv_heads, out_types=out_types, grid=programs,
      num_warps=blocks.warps, num_stages=blocks.stages, chip=static.pop("chip"), **static,
      BLOCK_Q=blocks.rows, BLOCK_K=blocks.keys, ALIBI=slopes is not None,
      SEGMENTS=segment_ids is not None,
      PRECISION="tf32x3" if query.dtype == jnp.float32 else "tf32", **constants)


def _ranges(ids, length, block, group):
  """int32[B, 2, blocks]: the smallest and largest segment id in each block of rows.

  ids: int32[B, length], each standing for `group` rows.
  """
  row = jnp.arange(-(-length * group // block)) * block
  last = jnp.minimum((row + block - 1) // group, length - 1)
  width = (block + group - 2) // group + 1  # elements that a block of rows can touch
  index = jnp.minimum((row // group)[:, None] + jnp.arange(width), last[:, None])
  blocks = ids[:, index]
  return jnp.stack([blocks.min(-1), blocks.max(-1)], axis=1)
