"""The backward of flash attention for Hopper: dq in one kernel, dk and dv in another.

Both recompute p = exp2(scores - lse) tile by tile. A fused kernel would save two of the seven
matrix products, but has to add to dq from many blocks at once, in an order that changes from
run to run.
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
from . import configs, mosaic_gpu_dkv, mosaic_gpu_dq, mosaic_gpu_mask as masking
from .mosaic_gpu_dq import Operands
from .residuals import Residuals


def backward(residuals: Residuals, dout: jax.Array, *,
             segment_ids: tuple[jax.Array, jax.Array] | None, alibi_slopes: jax.Array | None,
             query_offset: int | jax.Array, is_causal: bool, scale: float,
             window: tuple[int, int] | None, chip: str | None, config: Any = None):
  """(dquery, dkey, dvalue); where value is None, dkey is the sum of both."""
  query, key, value, out, lse = residuals
  batch, length, heads, dim = query.shape
  num_keys, kv_heads = key.shape[1:3]
  group, rows = heads // kv_heads, length * heads // kv_heads
  config = config or configs.mosaic_gpu(chip, dim)
  left, right = masking.reach(is_causal, window)
  segmented, shared = segment_ids is not None, value is None
  mask = dict(is_causal=is_causal, window=window)

  delta = jnp.einsum("bthd,bthd->bht", out, dout, preferred_element_type=jnp.float32)
  lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)  # exp2(anything - inf) is 0
  padded = pl.cdiv(rows, ROWS) * ROWS
  table = [packing.pack_rows(lse, kv_heads, padded, jnp.inf),
           packing.pack_rows(delta, kv_heads, padded, 0.0)]
  position = (jnp.arange(padded, dtype=jnp.int32) // group).astype(jnp.float32)
  table.append(jnp.broadcast_to(position, table[0].shape))
  slopes = None
  if alibi_slopes is not None:
    slopes = packing.row_slopes(alibi_slopes, kv_heads)
    every = jnp.tile(alibi_slopes.reshape(kv_heads, group), (1, pl.cdiv(padded, group)))
    table.append(jnp.broadcast_to(every[:, :padded] * LOG2E, table[0].shape))
  table = jnp.stack(table, axis=2)  # [B, kv_heads, 3 or 4, rows]

  packed, packed_dout, all_keys, all_values = packing.pad_rows(
      packing.pack(query, kv_heads), packing.pack(dout, kv_heads), key, value)
  smem = functools.partial(plgpu.SMEM, dtype=query.dtype, transforms=tiles.TRANSFORMS)
  barriers = lambda n, arrivals=1: plgpu.Barrier(num_barriers=n, num_arrivals=arrivals)
  launch = functools.partial(
      plgpu.kernel, num_threads=COMPUTE + 1, thread_name="wg",
      interpret=mode.mosaic_gpu(),
      compiler_params=tiles.COMPILER_PARAMS)

  block = config.dq_block_kv
  bounds, q_segments, k_segments = masking.key_blocks(
      query, key, block, segment_ids, query_offset, **mask)
  operands = Operands(
      packed, all_keys, all_values, packed_dout, table, bounds, q_segments, k_segments, slopes)
  k_stages, v_stages = config.dq_k_stages, config.dq_v_stages
  dquery = launch(
      functools.partial(
          mosaic_gpu_dq.dq_kernel, config=config, group=group, kv_heads=kv_heads, num_keys=num_keys,
          scale=scale,
          masked_head=left < FAR or segmented,
          masked_tail=right < FAR or segmented or num_keys % block != 0, **mask),
      out_type=jax.ShapeDtypeStruct(packed.shape, query.dtype),
      grid=(bounds.shape[1] * batch * kv_heads,),
      grid_names=("block",),
      kernel_name="flash_attention_dq",
      scratch_types=[mosaic_gpu_dq.Scratch(
          q_smem=smem((ROWS, dim)),
          dout_smem=smem((ROWS, dim)),
          k_smem=smem((k_stages, block, dim)),
          v_smem=None if shared else smem((v_stages, block, dim)),
          q_ready=plgpu.Barrier(num_arrivals=2),
          k_ready=barriers(k_stages),
          v_ready=barriers(v_stages),
          k_free=barriers(k_stages, COMPUTE),
          v_free=barriers(v_stages, COMPUTE),
      )],
  )(operands)

  divided = dim > 128
  keys, block, stages = (WARPGROUP_ROWS if divided else ROWS), config.dkv_block_q, config.dkv_stages
  bounds, q_segments, k_segments = masking.row_blocks(
      query, key, keys, block, segment_ids, query_offset, **mask)
  blocks = bounds.shape[1]
  splits = _splits(batch * kv_heads * blocks, group, chips.hopper(chip).multiprocessors)
  operands = Operands(
      packed, all_keys, all_values, packed_dout, table, bounds, q_segments, k_segments)
  partial = jax.ShapeDtypeStruct(
      (splits, batch, blocks * keys, kv_heads, dim),
      query.dtype if splits == 1 and not shared else jnp.float32)
  one_sum = shared and not divided
  dkey, *dvalue = launch(
      functools.partial(
          _without_dv if one_sum else mosaic_gpu_dkv.dkv_kernel, config=config, kv_heads=kv_heads,
          splits=splits, scale=scale, alibi=slopes is not None,
          masked_head=right < FAR or segmented, masked_tail=left < FAR or segmented, **mask),
      out_type=[partial] * (1 if one_sum else 2),
      grid=(blocks, splits, batch * kv_heads),
      grid_names=("tile", "split", "head"),
      kernel_name="flash_attention_dkv",
      scratch_types=[mosaic_gpu_dkv.Scratch(
          k_smem=smem((keys, dim)),
          v_smem=None if shared else smem((keys, dim)),
          q_smem=smem((stages, block, dim)),
          dout_smem=smem((stages, block, dim)),
          table_smem=plgpu.SMEM((stages, table.shape[2], block), jnp.float32),
          weights_smem=plgpu.SMEM(
              (WARPGROUP_ROWS, block), jnp.float32,
              transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
          ) if divided else None,
          kv_ready=plgpu.Barrier(num_arrivals=1 if shared else 2),
          q_ready=barriers(stages, 2),
          dout_ready=barriers(stages),
          q_free=barriers(stages, COMPUTE),
          dout_free=barriers(stages, COMPUTE),
          weights_ready=plgpu.Barrier(),
          weights_free=plgpu.Barrier(),
      )],
  )(operands)
  # Inside shard_map what JAX knows of a kernel's results is their shapes.
  dquery, dkey, *dvalue = partition.varying_together(
      dquery, dkey, *dvalue, *operands)[:2 + len(dvalue)]
  grads = [x[:, :, :num_keys] for x in (dkey, *dvalue)]
  grads = [x.sum(0) if splits > 1 else x[0] for x in grads]
  dquery = packing.unpack(dquery, query.shape, kv_heads)
  if shared:
    return dquery, functools.reduce(jnp.add, grads).astype(key.dtype), None
  return dquery, grads[0].astype(key.dtype), grads[1].astype(key.dtype)


def _without_dv(operands, dk_ref, scratch, **keywords):
  """`dkv_kernel` where one sum takes the gradients of key and value alike."""
  mosaic_gpu_dkv.dkv_kernel(operands, dk_ref, None, scratch, **keywords)


def _splits(blocks: int, group: int, multiprocessors: int) -> int:
  """Into how many parts the rows of each block of keys are dealt, so that the chip is full.

  A power of two up to the group's size: at that size the float32 parts of dk and dv take
  8 bytes an element of `query`.
  """
  parts = 1
  while parts * 2 <= group and blocks * parts < 2 * multiprocessors:
    parts *= 2
  return parts
