"""What the attention kernels of all backends have in common: derivative, residuals, mesh.

A backend module has three functions:

  unsupported(query, key, value, *, chip) -> the first requirement that is not met, or None
  forward(query, key, value, *, segment_ids, alibi_slopes, query_offset, is_causal, scale,
          window, chip) -> (out, lse)
  backward(query, key, value, out, lse, dout, *, ...) -> (dquery, dkey, dvalue)

with query, out [B, T, heads, dim_head]; key, value [B, S, kv_heads, dim_head], value None where
it is the key; lse float32[B, heads, T], the log of each row's sum of exponentials, -inf where the
row sees nothing; the other arguments as `xla.attention` has them.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from ..core import heads as division, partition
from ..core.compat import in_32_bits, promoting
from ..core.guards import not_differentiable, reverse_only
from ..core.heads import on_one_device as on_one_device
from ..core.platforms import here_or
from . import ring as rings, xla

_OP = "flash_attention"


@dataclasses.dataclass(frozen=True)
class Options:
  """What is known when a program is compiled."""

  backend: types.ModuleType | rings.Ring
  chip: str | None
  is_causal: bool
  scale: float
  window: tuple[int, int] | None
  query_offset: int | None  # None where it is an array
  auto: bool = False  # nobody asked for a kernel: plain JAX does what it can't
  platforms: tuple[str, ...] = ()  # that have the kernel; empty where the program is for them alone

  def keywords(self, segment_ids, alibi_slopes, query_offset):
    """The keyword arguments of a backend's functions."""
    return dict(
        segment_ids=segment_ids, alibi_slopes=alibi_slopes, chip=self.chip,
        query_offset=query_offset if self.query_offset is None else self.query_offset,
        is_causal=self.is_causal, scale=self.scale, window=self.window)


def attention(query, key, value, *, backend, chip, is_causal, alibi_slopes, scale, segment_ids,
              window, query_offset, auto=False, platforms=()):
  """Attention by one backend's kernels; arguments as `xla.attention`, value None for the key."""
  static_offset = isinstance(query_offset, int)
  options = Options(backend, chip, is_causal, float(scale), window,
                    query_offset if static_offset else None, auto, platforms)
  if segment_ids is not None:
    segment_ids = tuple(map(jnp.asarray, segment_ids))
  alibi_slopes = None if alibi_slopes is None else jnp.asarray(alibi_slopes, jnp.float32)
  offset = None if static_offset else jnp.asarray(query_offset, jnp.int32)
  query, key = reverse_only(query, _OP), reverse_only(key, _OP)
  value = None if value is None else reverse_only(value, _OP)
  return _over_mesh(options, query, key, value, segment_ids, alibi_slopes, offset)


def _over_mesh(options, query, key, value, segment_ids, slopes, offset):
  """Batch over the data axes, heads (with their slopes) over the model axis, positions over seq."""
  mesh = partition.current(query, key)
  free = partition.to_take_over(mesh)
  if not free:
    return _one_device(options, query, key, value, segment_ids, slopes, offset)
  batch, heads = division.sequences_and_heads(query, key, mesh)
  kv_heads = division.divided(key.shape[2], heads, mesh)
  ring = rings.over(mesh, query, key, options.backend, is_causal=options.is_causal,
                    window=options.window, query_offset=options.query_offset)
  local = functools.partial(_one_device, options)
  if ring is not None:
    local = ring.balanced(functools.partial(
        _one_device, dataclasses.replace(options, backend=ring)))

  def attend(query, key, value, *others):
    if heads and not kv_heads:
      key, value = (x if x is None else division.own(x, 2, heads, mesh) for x in (key, value))
    return local(query, key, value, *others)

  seq = None if ring is None else ring.axis
  rows = P(batch or None, seq, heads or None, None)
  columns = P(batch or None, seq, kv_heads or None, None)
  arrays = (query, key, value, segment_ids, slopes, offset)
  specs = (rows, columns, None if value is None else columns,
           None if segment_ids is None else (P(batch or None, seq),) * 2,
           None if slopes is None else P(heads or None),
           None if offset is None else P())
  arrays = jax.tree.map(lambda x, spec: partition.reshard(x, spec, mesh), arrays, specs)
  return jax.shard_map(
      attend, mesh=mesh, axis_names=free, in_specs=specs, out_specs=rows)(*arrays)


def _one_device(options, query, key, value, segment_ids, slopes, offset):
  query_ids, key_ids = segment_ids or (None, None)
  query, key, value, query_ids, key_ids, slopes, offset = partition.varying_together(
      query, key, value, query_ids, key_ids, slopes, offset)
  segment_ids = None if segment_ids is None else (query_ids, key_ids)
  return _attention(options, query, key, value, segment_ids, slopes, offset)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, *arrays):
  return _out_and_lse(options, *arrays)[0]


def _out_and_lse(options, *arrays):
  def kernel(*arrays):
    return in_32_bits(options.backend.forward)(*arrays[:3], **options.keywords(*arrays[3:]))

  def plain(*arrays):
    (batch, length, heads, _) = arrays[0].shape
    lse = jnp.zeros((batch, heads, length), jnp.float32)  # its backward pass has no use for it
    return _plain(options, arrays[3], arrays[5], *arrays[:3], arrays[4]), lse

  run = here_or(promoting(plain), kernel, options.platforms) if options.platforms else kernel
  return run(*arrays)


def _plain(options, segment_ids, offset, query, key, value, slopes):
  keywords = options.keywords(segment_ids, slopes, offset)
  del keywords["chip"]
  return xla.attention(query, key, key if value is None else value, **keywords)


def _forward(options, *arrays):
  slopes = arrays[4]
  if slopes is not None and slopes.perturbed and options.auto and isinstance(
      options.backend, types.ModuleType):
    query, key, value, segment_ids, slopes, offset = jax.tree.map(
        lambda x: x.value, arrays, is_leaf=lambda x: hasattr(x, "perturbed"))
    return jax.vjp(functools.partial(_plain, options, segment_ids, offset),
                   query, key, value, slopes)
  if slopes is not None and slopes.perturbed:
    raise ValueError(f"{_OP}: the fused kernels have no derivative with respect to alibi_slopes; "
                     "pass implementation='xla' for that, or jax.lax.stop_gradient(alibi_slopes)")
  arrays = jax.tree.map(lambda x: x.value, arrays, is_leaf=lambda x: hasattr(x, "perturbed"))
  query, key, value, segment_ids, slopes, offset = arrays
  # Only a second derivative differentiates these.
  query, key = not_differentiable(query, _OP), not_differentiable(key, _OP)
  value = None if value is None else not_differentiable(value, _OP)
  out, lse = _out_and_lse(options, query, key, value, segment_ids, slopes, offset)
  # Named here, where they are residuals: a policy that keeps both does not rerun the kernel.
  out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
  return out, (query, key, value, segment_ids, slopes, offset, out, lse)


def _backward(options, residuals, dout):
  if not isinstance(residuals, tuple):  # the derivative of plain JAX
    if type(dout) is jax.custom_derivatives.SymbolicZero:
      dout = jnp.zeros(dout.shape, dout.dtype)  # pyright: ignore[reportArgumentType]
    *gradients, dslopes = residuals(dout)
    return (*gradients, None, dslopes, None)
  query, key, value, segment_ids, slopes, offset, out, lse = residuals
  if type(dout) is jax.custom_derivatives.SymbolicZero:
    dout = jnp.zeros(out.shape, out.dtype)
  query, key, out, dout = (not_differentiable(x, _OP) for x in (query, key, out, dout))
  value = None if value is None else not_differentiable(value, _OP)

  def kernel(query, key, value, out, lse, dout, *others):
    return tuple(in_32_bits(options.backend.backward)(
        query, key, value, out, lse, dout, **options.keywords(*others)))

  def plain(query, key, value, out, lse, dout, segment_ids, slopes, offset):
    attend = lambda *arrays: _plain(options, segment_ids, offset, *arrays, slopes)
    return tuple(jax.vjp(attend, query, key, value)[1](dout))

  run = here_or(promoting(plain), kernel, options.platforms) if options.platforms else kernel
  gradients = run(query, key, value, out, lse, dout, segment_ids, slopes, offset)
  return (*gradients, None, None, None)


_attention.defvjp(promoting(_forward), promoting(_backward), symbolic_zeros=True)
