"""Decoding around the kernels of all backends: their functions, division over a mesh, `vmap`.

  unsupported(query, key, value, *, chip) -> the first requirement that is not met, or None
  forward(query, key, value, lengths, *, alibi_slopes, scale, left, key_scales, value_scales,
          chip) -> out

with arguments and result as `xla.attend` has them, float32 slopes, and lengths in [0, S].
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ..core import heads as division, op, partition
from ..core.vmap import folding_vmap
from . import configs, xla


def _mosaic_gpu():
  from . import mosaic_gpu
  return mosaic_gpu


def _mosaic_tpu():
  from . import mosaic_tpu
  return mosaic_tpu


def _triton():
  from . import triton
  return triton


class Options(NamedTuple):
  """Static arguments of the op."""

  scale: float | None  # None where it is an array
  left: int | None  # positions before its own that a query sees; None for all


def _plain(route, options, query, *others):
  def attend(query, key, value, lengths, key_scales, value_scales, slopes, scale):
    return xla.attend(query, key, value, lengths, key_scales=key_scales, value_scales=value_scales,
                      alibi_slopes=slopes, scale=options.scale if scale is None else scale,
                      left=options.left)

  return partition.partitioned(attend, query, *others)


def _fused(route, options, query, *others):
  """Attention by the kernel, on one device."""
  if route.undecided:
    return route.by_platform(
        lambda *arguments: _plain(None, *arguments), _fused, options, query, *others)

  def attend(tokens, slopes):
    query, key, value, lengths, key_scales, value_scales = tokens
    max_len = key.shape[1]
    out = route.backend.forward(
        query, key, value, jnp.clip(lengths, 0, max_len), alibi_slopes=slopes, scale=options.scale,
        left=options.left, key_scales=key_scales, value_scales=value_scales, chip=route.chip)
    return xla.nan_outside(out, lengths, max_len)

  *tokens, slopes, _ = query, *others
  return folding_vmap(attend)(
      tuple(tokens), None if slopes is None else slopes.astype(jnp.float32))


def _divided(route, options, mesh, query, key, *_):
  """Batch over the data axes, heads over the model axis."""
  batch, heads = division.sequences_and_heads(query, key, mesh)
  kv_heads, own = division.key_heads(key.shape[2], heads, mesh)
  axes = lambda *axes: P(*(axis or None for axis in axes))
  cache, scales = axes(batch, (), kv_heads, ()), axes(batch, (), kv_heads)
  rows = axes(batch, (), heads, ())
  in_specs = rows, cache, cache, axes(batch), scales, scales, axes(heads), P()

  def attend(query, key, value, lengths, key_scales, value_scales, *others):
    key, value, key_scales, value_scales = own(key, value, key_scales, value_scales)
    return _fused(route, options, query, key, value, lengths, key_scales, value_scales, *others)

  return attend, in_specs, rows


OP = op.Op(
    "decode_attention",
    dict(mosaic_gpu=_mosaic_gpu, mosaic_tpu=_mosaic_tpu, triton=_triton), configs,
    ranks=(3, 3, 3), on_one_device=division.on_one_device, plain=_plain,
    fused=lambda *static: functools.partial(_fused, *static),
    divide=_divided)
