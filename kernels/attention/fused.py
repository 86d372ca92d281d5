"""Attention around the kernels of all backends: their functions, derivative, division over a mesh.

  unsupported(query, key, value, *, chip) -> the first requirement that is not met, or None
  forward(query, key, value, *, segment_ids, alibi_slopes, query_offset, is_causal, scale,
          window, chip) -> (out, lse)
  backward(residuals, dout, *, ..., slope_gradients) -> (dquery, dkey, dvalue), and with
          `slope_gradients` float32[B, heads], each sequence's part of the gradient of the slopes

with arrays as `Residuals` has them, the other arguments as `xla.attention`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from ..core import heads as division, op, partition
from ..core.compat import in_32_bits
from ..core.derivatives import Rules, differentiable
from . import configs, ring as rings, xla
from .residuals import Residuals


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

  is_causal: bool
  window: tuple[int, int] | None
  query_offset: int | None  # None where it is an array
  scale: float | None  # the same

  def keywords(self, segment_ids, slopes, offset, scale):
    """The keyword arguments of a backend's functions, and of `xla.attention`."""
    return dict(segment_ids=segment_ids, alibi_slopes=slopes, is_causal=self.is_causal,
                window=self.window, query_offset=self.query_offset if offset is None else offset,
                scale=self.scale if scale is None else scale)

  def for_kernels(self, segment_ids, slopes, offset, scale):
    return self.keywords(
        segment_ids, None if slopes is None else slopes.astype(jnp.float32),
        None if offset is None else offset.astype(jnp.int32), scale)


def _plain(route, options, *arrays):
  """Attention in plain JAX on the mesh in context.

  Rows are positions by heads, which XLA's partitioner cannot divide by heads: it would gather
  them. So each device takes its own heads; positions are left to the partitioner.
  """
  attend = functools.partial(_formula, options)

  def divided(query, key, *others):
    mesh = partition.current(query)
    batch, heads = division.sequences_and_heads(query, key, mesh)
    if not heads:
      return attend(query, key, *others)
    local, in_specs, out_specs = _divided_heads(attend, batch, heads, None, key, mesh)
    return op.over_mesh(mesh, local, in_specs, out_specs, query, key, *others,
                        axis_names={*batch, *heads})

  return partition.partitioned(divided, *arrays)


def _divided_heads(attend, batch, heads, seq, key, mesh):
  """(function, in_specs, out_specs) of attention over these axes of the mesh."""
  kv_heads, own = division.key_heads(key.shape[2], heads, mesh)
  local = lambda query, key, value, *others: attend(query, *own(key, value), *others)
  rows = P(batch or None, seq, heads or None, None)
  columns = P(batch or None, seq, kv_heads or None, None)
  ids = P(batch or None, seq)
  return local, (rows, columns, columns, (ids, ids), P(heads or None), P(), P()), rows


_SLOPES = 4  # their place among the arrays: query, key, value, ids, slopes, offset, scale


def attention(route, options):
  """Attention by the kernels, a function of one device's arrays."""
  local = not isinstance(route.backend, rings.Ring)  # else no device has all keys of its queries
  return differentiable(Rules(
      op=OP.name, kernel=functools.partial(_attended, route, options),
      forward=functools.partial(_forward, route, options),
      backward=functools.partial(_backward, route, options),
      plain=functools.partial(_formula, options) if route.auto and local else None,
      by=_SLOPES + 1, selective=True))


def _attended(route, options, *arrays):
  return _out_and_lse(route, options, *arrays)[0]


def _divided(route, options, mesh, query, key, value, *_):
  """Batch over the data axes, heads (with their slopes) over the model axis, positions over seq."""
  batch, heads = division.sequences_and_heads(query, key, mesh)
  ring = rings.over(mesh, query, key, route.backend, is_causal=options.is_causal,
                    window=options.window, query_offset=options.query_offset)
  if ring is None:
    seq, attend = None, attention(route, options)
  else:
    route = dataclasses.replace(route, backend=ring)
    seq, attend = ring.axis, ring.balanced(attention(route, options))
  return _divided_heads(attend, batch, heads, seq, key, mesh)


OP = op.Op(
    "flash_attention",
    dict(mosaic_gpu=_mosaic_gpu, mosaic_tpu=_mosaic_tpu, triton=_triton), configs,
    ranks=(3, 3, 3), on_one_device=division.on_one_device, plain=_plain, fused=attention,
    divide=_divided)


def _out_and_lse(route, options, query, key, value, *others):
  if route.undecided:
    return route.by_platform(
        _plain_out_and_lse, _out_and_lse, options, query, key, value, *others)
  keywords = options.for_kernels(*others)
  with in_32_bits():
    return route.backend.forward(query, key, value, chip=route.chip, **keywords)


def _plain_out_and_lse(options, query, key, value, *others):
  (batch, length, heads, _) = query.shape
  lse = jnp.zeros((batch, heads, length), jnp.float32)  # its backward pass has no use for it
  return _formula(options, query, key, value, *others), lse


def _formula(options, query, key, value, *others):
  return xla.attention(query, key, key if value is None else value, **options.keywords(*others))


def _forward(route, options, *arrays):
  out, lse = _out_and_lse(route, options, *arrays)
  # Named here, where they are residuals: a policy that keeps both does not rerun the kernel.
  out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
  return out, (out, lse)


def _backward(route, options, arrays, residuals, dout, asked):
  query, key, value, *others = arrays
  gradients = _gradients(
      asked[_SLOPES], route, options, Residuals(query, key, value, *residuals), dout, *others)
  dslopes = gradients[3].astype(arrays[_SLOPES].dtype) if asked[_SLOPES] else None
  return (*gradients[:3], None, dslopes, None, None)


def _gradients(of_slopes, route, options, residuals, dout, *others):
  """(dquery, dkey, dvalue), and dslopes if `of_slopes`."""
  if route.undecided:
    return route.by_platform(
        functools.partial(_plain_gradients, of_slopes), functools.partial(_gradients, of_slopes),
        options, residuals, dout, *others)
  keywords = options.for_kernels(*others)
  with in_32_bits():
    gradients = route.backend.backward(
        residuals, dout, chip=route.chip, slope_gradients=of_slopes, **keywords)
    return (*gradients[:3], *(x.sum(0) for x in gradients[3:]))


def _plain_gradients(of_slopes, options, residuals, dout, ids, slopes, *others):
  attend = lambda query, key, value, slopes=slopes: _formula(
      options, query, key, value, ids, slopes, *others)
  arrays = (*residuals[:3], slopes) if of_slopes else residuals[:3]
  gradients = jax.vjp(attend, *arrays)[1](dout)
  return (*gradients[:3], *(x.astype(jnp.float32) for x in gradients[3:]))
