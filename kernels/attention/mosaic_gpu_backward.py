"""The backward of flash attention for Hopper: one kernel of 5 products at head_dim 128, else two.

All recompute p = exp2(scores - lse) tile by tile. Why head_dim 64 and 256 have a kernel for dq and
another for dk and dv: docs/attention.md.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core import chips, partition
from ..core.constants import FAR, LOG2E
from ..hopper import heads as packing, tiles
from ..hopper.tiles import COMPUTE, ROWS, WARPGROUP_ROWS
from ..interpreters import mode
from . import configs, mosaic_gpu_dkv, mosaic_gpu_dq, mosaic_gpu_joint, mosaic_gpu_mask as masking
from .residuals import Residuals


def backward(residuals: Residuals, dout: jax.Array, *,
             segment_ids: tuple[jax.Array, jax.Array] | None, alibi_slopes: jax.Array | None,
             query_offset: int | jax.Array, is_causal: bool, scale: float,
             window: tuple[int, int] | None, chip: str | None, config: Any = None,
             slope_gradients: bool = False):
  """(dquery, dkey, dvalue); where value is None, dkey is the sum of both.

  With `slope_gradients` also float32[B, heads], each sequence's part of the gradient of the slopes.
  """
  query, key, value, out, lse = residuals
  heads, dim, kv_heads = *query.shape[2:], key.shape[2]
  config = config or configs.mosaic_gpu(chip, dim)
  delta = jnp.einsum("bthd,bthd->bht", out, dout, preferred_element_type=jnp.float32)
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)  # exp2(anything - inf) is 0
  rows = pl.cdiv(query.shape[1] * heads // kv_heads, ROWS) * ROWS
  statistics = [packing.pack_rows(lse, kv_heads, rows, jnp.inf),
                packing.pack_rows(delta, kv_heads, rows, 0.0)]
  launch = _apart if config.rows is None else _joint
  dquery, moments, *grads = launch(
      (query, key, value, dout), statistics, segment_ids=segment_ids, alibi_slopes=alibi_slopes,
      query_offset=query_offset, scale=scale, chip=chip, config=config,
      mask=dict(is_causal=is_causal, window=window), slope_gradients=slope_gradients)
  moments = [packing.unpack_rows(x, delta.shape).sum(-1) for x in moments]
  grads = [x[:, :, :key.shape[1]] for x in grads]
  grads = [x.sum(0) if x.shape[0] > 1 else x[0] for x in grads]
  dquery = packing.unpack(dquery, query.shape, kv_heads)
  if value is None:
    return dquery, functools.reduce(jnp.add, grads).astype(key.dtype), None, *moments
  return dquery, grads[0].astype(key.dtype), grads[1].astype(key.dtype), *moments


def _launch(kernel, name, operands, scratch, out_type, **grid):
  results = plgpu.kernel(
      kernel, out_type=out_type, grid=tuple(grid.values()), grid_names=tuple(grid),
      kernel_name=f"flash_attention_{name}", num_threads=COMPUTE + 1, thread_name="wg",
      interpret=mode.mosaic_gpu(), compiler_params=tiles.COMPILER_PARAMS,
      scratch_types=[scratch])(operands)
  # Inside shard_map what JAX knows of a kernel's results is their shapes.
  return partition.varying_together(*results, *operands)[:len(results)]


def _packed(query, key, value, dout):
  kv_heads = key.shape[2]
  return packing.pad_rows(
      packing.pack(query, kv_heads), key, value, packing.pack(dout, kv_heads))


def _slopes(alibi_slopes, like, kv_heads):
  """ALiBi's slope of each row, in base 2; `like` is [B, kv_heads, rows]."""
  slopes = alibi_slopes.reshape(kv_heads, -1) * LOG2E
  every = jnp.tile(slopes, (1, pl.cdiv(like.shape[2], slopes.shape[1])))
  return jnp.broadcast_to(every[:, :like.shape[2]], like.shape)


def _memory(dtype):
  """Constructors of shared memory for wgmma, and of barriers."""
  return (functools.partial(plgpu.SMEM, dtype=dtype, transforms=tiles.TRANSFORMS),
          lambda n, arrivals=1: plgpu.Barrier(num_barriers=n, num_arrivals=arrivals))


def _joint(arrays, statistics, *, segment_ids, alibi_slopes, query_offset, scale, chip, config,
           mask, slope_gradients):
  """dq, the rows' shares of the slopes' gradient in a list or an empty one, and the parts of dk and
  dv, or of their sum, all by one kernel."""
  query, key, value, dout = arrays
  batch, num_keys, kv_heads, dim = key.shape
  group, rows, stages = query.shape[2] // kv_heads, config.rows, 2
  shared, segmented = value is None, segment_ids is not None
  num_rows = pl.cdiv(query.shape[1] * group, rows)
  bounds, q_segments, k_segments = masking.row_blocks(
      query, key, ROWS, rows, segment_ids, query_offset, **mask)
  bounds, order, seen = masking.in_order(bounds, num_rows, num_keys, ROWS)

  lse, delta = statistics
  row = jnp.arange(lse.shape[2], dtype=jnp.int32)
  position = (row // group - row // rows * rows // group).astype(jnp.float32)
  slopes = [] if alibi_slopes is None else [_slopes(alibi_slopes, lse, kv_heads)]
  shift = -(lse + slopes[0] * position) if slopes else -lse
  table = jnp.stack([shift, -delta, jnp.broadcast_to(position, lse.shape), *slopes], axis=2)

  packed, all_keys, all_values, packed_dout = _packed(query, key, value, dout)
  key_tiles = bounds.shape[1]
  parts = _parts(batch * kv_heads * key_tiles, group, chips.hopper(chip).multiprocessors)
  smem, barriers = _memory(query.dtype)
  partial = jax.ShapeDtypeStruct(
      (parts, batch, key_tiles * ROWS, kv_heads, dim), jnp.float32 if parts > 1 else query.dtype)
  dquery, *results = _launch(
      functools.partial(
          _without(mosaic_gpu_joint.joint_kernel, moment=not slope_gradients, dv=shared),
          group=group, kv_heads=kv_heads, num_keys=num_keys, parts=parts, scale=scale, **mask),
      "backward",
      mosaic_gpu_joint.Operands(
          packed, all_keys, all_values, packed_dout, table, bounds, order, q_segments, k_segments,
          mosaic_gpu_joint.places(query.dtype) if slope_gradients else None),
      mosaic_gpu_joint.Scratch(
          k_smem=smem((ROWS, dim)),
          v_smem=None if shared else smem((ROWS, dim)),
          q_smem=smem((stages, rows, dim)),
          dout_smem=smem((stages, rows, dim)),
          ds_smem=smem((2, ROWS, rows)),
          dq_smem=plgpu.SMEM(
              (COMPUTE, rows, dim // 2), jnp.float32,
              transforms=(plgpu.TilingTransform((8, 8)), plgpu.SwizzleTransform(32))),
          table_smem=plgpu.SMEM((stages, table.shape[2], rows), jnp.float32),
          key_segments_smem=plgpu.SMEM((ROWS,), jnp.int32) if segmented else None,
          query_segments_smem=plgpu.SMEM((stages, rows), jnp.int32) if segmented else None,
          places_smem=smem((8, ROWS)) if slope_gradients else None,
          moment_smem=plgpu.SMEM((rows,), jnp.float32) if slope_gradients else None,
          kv_ready=barriers(1, 2 + segmented + slope_gradients - shared),
          kv_free=barriers(1, COMPUTE),
          q_ready=barriers(stages, 2 + segmented),
          dout_ready=barriers(stages),
          q_free=barriers(stages, COMPUTE),
          dout_free=barriers(stages, COMPUTE),
          ds_ready=barriers(1, COMPUTE),
          dq_ready=barriers(1, COMPUTE),
          dq_free=barriers(1),
      ),
      [jax.ShapeDtypeStruct((packed.shape[0], num_rows * rows, *packed.shape[2:]), jnp.float32),
       *[jax.ShapeDtypeStruct((batch, kv_heads, num_rows * rows), jnp.float32)] * slope_gradients,
       *[partial] * (1 if shared else 2)],
      block=pl.cdiv(batch * kv_heads * parts, 2) * key_tiles)
  moments, grads = results[:slope_gradients], results[slope_gradients:]
  # Rows that no key sees have never been written.
  seen = jnp.repeat(seen, rows, axis=1)
  moments = [jnp.where(seen[:, None], x, 0) for x in moments]
  seen = jnp.repeat(seen[:, :, None, None], dquery.shape[0] // seen.shape[0], axis=0)
  return jnp.where(seen, dquery * scale, 0).astype(query.dtype), moments, *grads


def _apart(arrays, statistics, *, segment_ids, alibi_slopes, query_offset, scale, chip, config,
           mask, slope_gradients):
  """As `_joint`: dq and the rows' shares by one kernel, and the parts of dk and dv by another."""
  query, key, value, dout = arrays
  left, right = masking.reach(**mask)
  masked_left, masked_right = (x < FAR or segment_ids is not None for x in (left, right))
  batch, num_keys, kv_heads, dim = key.shape
  group = query.shape[2] // kv_heads
  packed, all_keys, all_values, packed_dout = _packed(query, key, value, dout)
  table = statistics + [jnp.broadcast_to(
      (jnp.arange(statistics[0].shape[2], dtype=jnp.int32) // group).astype(jnp.float32),
      statistics[0].shape)]
  slopes = None
  if alibi_slopes is not None:
    slopes = packing.row_slopes(alibi_slopes, kv_heads)
    table.append(_slopes(alibi_slopes, table[0], kv_heads))
  table = jnp.stack(table, axis=2)  # [B, kv_heads, 3 or 4, rows]
  smem, barriers = _memory(query.dtype)

  block, k_stages, v_stages = config.dq_block_kv, config.dq_k_stages, config.dq_v_stages
  bounds, q_segments, k_segments = masking.key_blocks(
      query, key, block, segment_ids, query_offset, **mask)
  dquery, *moments = _launch(
      functools.partial(
          _without(mosaic_gpu_dq.dq_kernel, moment=not slope_gradients), config=config,
          group=group, kv_heads=kv_heads, num_keys=num_keys, scale=scale, masked_head=masked_left,
          masked_tail=masked_right or num_keys % block != 0, **mask),
      "dq",
      mosaic_gpu_dq.Operands(
          packed, all_keys, all_values, packed_dout, table, bounds, q_segments, k_segments, slopes),
      mosaic_gpu_dq.Scratch(
          q_smem=smem((ROWS, dim)),
          dout_smem=smem((ROWS, dim)),
          k_smem=smem((k_stages, block, dim)),
          v_smem=None if value is None else smem((v_stages, block, dim)),
          q_ready=barriers(1, 2),
          k_ready=barriers(k_stages),
          v_ready=barriers(v_stages),
          k_free=barriers(k_stages, COMPUTE),
          v_free=barriers(v_stages, COMPUTE),
      ),
      [jax.ShapeDtypeStruct(packed.shape, query.dtype),
       *[jax.ShapeDtypeStruct(statistics[0].shape, jnp.float32)] * slope_gradients],
      block=bounds.shape[1] * batch * kv_heads)

  divided, shared = dim > 128, value is None
  keys, block, stages = (WARPGROUP_ROWS if divided else ROWS), config.dkv_block_q, config.dkv_stages
  bounds, q_segments, k_segments = masking.row_blocks(
      query, key, keys, block, segment_ids, query_offset, **mask)
  blocks = bounds.shape[1]
  parts = _parts(batch * kv_heads * blocks, group, chips.hopper(chip).multiprocessors)
  partial = jax.ShapeDtypeStruct(
      (parts, batch, blocks * keys, kv_heads, dim),
      query.dtype if parts == 1 and not shared else jnp.float32)
  one_sum = shared and not divided
  grads = _launch(
      functools.partial(
          _without(mosaic_gpu_dkv.dkv_kernel, dv=one_sum),
          config=config, kv_heads=kv_heads, splits=parts, scale=scale, alibi=slopes is not None,
          masked_head=masked_right, masked_tail=masked_left, **mask),
      "dkv",
      mosaic_gpu_dq.Operands(
          packed, all_keys, all_values, packed_dout, table, bounds, q_segments, k_segments),
      mosaic_gpu_dkv.Scratch(
          k_smem=smem((keys, dim)),
          v_smem=None if shared else smem((keys, dim)),
          q_smem=smem((stages, block, dim)),
          dout_smem=smem((stages, block, dim)),
          table_smem=plgpu.SMEM((stages, table.shape[2], block), jnp.float32),
          weights_smem=plgpu.SMEM(
              (WARPGROUP_ROWS, block), jnp.float32,
              transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
          ) if divided else None,
          kv_ready=barriers(1, 1 if shared else 2),
          q_ready=barriers(stages, 2),
          dout_ready=barriers(stages),
          q_free=barriers(stages, COMPUTE),
          dout_free=barriers(stages, COMPUTE),
          weights_ready=barriers(1),
          weights_free=barriers(1),
      ),
      [partial] * (1 if one_sum else 2), tile=blocks, split=parts, head=batch * kv_heads)
  return dquery, moments, *grads


def _without(kernel, *, moment: bool = False, dv: bool = False):
  """A kernel that has no `moment_ref`, and no `dv_ref` where one array takes the gradients of key
  and value."""
  def run(*refs, **keywords):
    operands, dq, *refs, scratch = refs
    return kernel(operands, dq, *[None] * moment, *refs, *[None] * dv, scratch, **keywords)

  return run


def _parts(blocks: int, group: int, multiprocessors: int) -> int:
  """Into how many parts the rows of each block of keys are dealt, so that the chip is full.

  A power of two up to the group's size: at that size the float32 parts of dk and dv take
  8 bytes an element of `query`.
  """
  parts = 1
  while parts * 2 <= group and 8 * blocks * parts < 15 * multiprocessors:
    parts *= 2
  return parts
