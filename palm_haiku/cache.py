"""Key/value cache of generation: a row for each position, or a ring of as many as a window sees."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from palm_haiku import memory, terminal
from palm_haiku.config import PaLMConfig
from palm_haiku.kernels.cache import write
from palm_haiku.kernels.core import partition


class Int8Rows(NamedTuple):
  """Rows of a cache as int8, with a scale for each row and head."""

  values: jax.Array  # int8[..., S, Dh] or int8[..., S, K, Dh]
  scales: jax.Array  # float32[..., S] or float32[..., S, K]


class Cache(NamedTuple):
  """Keys and values of the positions seen so far, layer by layer."""

  # (keys, values) or (keys,): [..., S, Dh], or with several kv_heads [..., S, K, Dh]; K may be
  # several times the kv_heads, each of them repeated.
  layers: tuple[tuple[jax.Array | Int8Rows, ...], ...]
  length: jax.Array  # int32[], positions filled; or int32[...], by sequence


class View(NamedTuple):
  """Rows that queries attend to, in the order of their positions unless `window` is None."""

  rows: tuple[Any, ...]  # as a layer of `Cache`
  lengths: jax.Array  # int32[...], rows filled
  window: int | None  # rows that a query sees, its own included; None: all before it


def empty_cache(config: PaLMConfig, lead: tuple[int, ...], max_len: int, dtype: DTypeLike,
                step: int = 1) -> Cache:
  """A cache with room for at least `max_len` positions of sequences with leading dimensions `lead`.

  Args:
    dtype: of keys and values; int8 for `Int8Rows`.
    step: most tokens that are added at once, or taken back, after the prompt. A layer with a
      window keeps `window + step - 1` rows.
  """
  max_len = -(-max_len // 8) * 8  # kernels need multiples of 8
  heads = (_stored_heads(config),) if config.kv_heads > 1 else ()

  def rows(layer):
    size = max_len
    if config.window is not None and not config.is_global(layer):
      size = min(size, config.window + step - 1)
    values = jnp.zeros((*lead, size, *heads, config.dim_head), dtype)
    return Int8Rows(values, jnp.zeros(values.shape[:-1])) if values.dtype == jnp.int8 else values

  num = 1 if config.values_are_keys else 2
  return Cache(tuple(tuple(rows(layer) for _ in range(num)) for layer in range(config.depth)),
               jnp.zeros((), jnp.int32))


def _stored_heads(config: PaLMConfig) -> int:
  """Key heads of a cache, each repeated until the mesh in context divides them as the queries'.

  A device then holds the heads that its queries attend to, never more than all of them; else it
  would copy these out of all of them at every token.
  """
  mesh = partition.current()
  of_queries = partition.axes(
      jax.ShapeDtypeStruct((config.heads,), jnp.float32), 0, (partition.HEAD_AXIS,), mesh)
  return math.lcm(config.kv_heads, partition.devices(mesh, of_queries))


def check_memory(config: PaLMConfig, length: int, dtype: DTypeLike) -> None:
  """Raises where a cache is larger than all memory: some systems kill a process for that."""
  there = memory.total(jax.local_devices()[0])
  if there is not None and 0 < length < 2**31:
    cache = jax.eval_shape(lambda: empty_cache(config, (), length, dtype))
    need = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    if need > there:
      raise MemoryError(f"keys and values of {length} tokens are {terminal.size(need)}, of "
                        f"{terminal.size(there)} there are")


def repeated(stored, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """Keys and values [..., T, K, Dh] with each head as often as a layer of `Cache` stores it."""
  heads = jax.tree.leaves(stored)[0].shape[-2]
  return tuple(jnp.repeat(x, heads // x.shape[-2], axis=-2) for x in rows)


def fill(stored, rows: tuple[jax.Array, ...], lengths: jax.Array, *, window: int | None):
  """A layer's empty cache with the rows of prompts.

  Args:
    stored: a layer of `Cache`.
    rows: keys and values [..., T, Dh] or [..., T, K, Dh] of positions 0 to T - 1.
    lengths: int32[...], how many of them count; what is stored of the rest is overwritten before
      a query comes to its position.
    window: of the layer; None for all positions.
  """
  axis, formed = lengths.ndim, _in_form(stored, rows)
  size, length = (jax.tree.leaves(x)[0].shape[axis] for x in (stored, formed))
  if window is not None and length > size:
    last = lengths[..., None] - 1
    newest = last - (last - jnp.arange(size)) % size  # position of each slot of the ring
    return _take(formed, jnp.maximum(newest, 0))
  return jax.tree.map(lambda old, new: _write(old, new, jnp.zeros((), jnp.int32), axis),
                      stored, formed)


def extend(stored, rows: tuple[Any, ...], length: jax.Array, *, axis: int, window: int | None,
           by_position: bool):
  """A layer's cache with rows added, and what their queries attend to.

  Args:
    stored: a layer of `Cache`.
    rows: keys and values [..., T, Dh] or [..., T, K, Dh] of positions `length` and on.
    length: int32[] or int32[...], positions filled before.
    axis: of the positions.
    window: of the layer; None for all positions.
    by_position: attention depends on distances (ALiBi), so that a ring must be put in order.

  Returns:
    The new `stored`, and a `View`.
  """
  rows = _in_form(stored, rows)
  size, steps = (jax.tree.leaves(x)[0].shape[axis] for x in (stored, rows))
  lead = jax.tree.leaves(rows)[0].shape[:axis]
  put = lambda old, new, offset: jax.tree.map(
      lambda old, new: _write(old, new, offset, axis), old, new)
  if window is None:
    new = put(stored, rows, length)
    return new, View(new, jnp.broadcast_to(length + steps, lead), None)
  if steps == 1:
    new = put(stored, rows, length % size)
    if size <= window and not by_position:  # all that the ring holds is seen, in any order
      return new, View(new, jnp.broadcast_to(jnp.minimum(length + 1, size), lead), None)
  length = jnp.broadcast_to(length, lead)
  slots = (length[..., None] + jnp.arange(steps)) % size
  new = jax.tree.map(lambda old, new: _scatter(old, new, slots), stored, rows)
  first = jnp.where(length >= size, length % size, 0)  # slot of the oldest row
  ordered = _take(stored, (first[..., None] + jnp.arange(size)) % size)
  room = [(0, 0)] * axis + [(0, -(-(size + steps) // 8) * 8 - size)]
  ordered = jax.tree.map(lambda x: jnp.pad(x, room + [(0, 0)] * (x.ndim - axis - 1)), ordered)
  before = jnp.minimum(length, size)
  return new, View(put(ordered, rows, before), before + steps, window)


def _in_form(stored, rows):
  """Rows as a layer's cache stores them."""
  return tuple(_quantized(new) if isinstance(old, Int8Rows) else new.astype(old.dtype)
               for old, new in zip(stored, rows))


def _quantized(rows):
  rows = rows.astype(jnp.float32)
  scales = jnp.abs(rows).max(-1) / 127
  values = jnp.round(rows / jnp.where(scales == 0, 1, scales)[..., None])
  return Int8Rows(values.astype(jnp.int8), scales)


def _write(old, new, offset, axis):
  """`old` with `new` from position `offset` on, int32[] or int32[...]."""
  flat = lambda x: x.reshape(*x.shape[:axis + 1], -1)  # [..., S, Dh]: one row a position
  return write(flat(old), flat(new), offset).reshape(old.shape)


def _take(rows, index):
  """Rows by slots int32[..., N]."""
  def take(x):
    shape = index.shape + (1,) * (x.ndim - index.ndim)
    return jnp.take_along_axis(x, index.reshape(shape), index.ndim - 1)

  return jax.tree.map(take, rows)


def _scatter(old, new, slots):
  """`old` [..., S, ...] with `new` [..., T, ...] at int32[..., T]."""
  put = lambda old, new, slots: old.at[slots].set(new)
  for _ in range(slots.ndim - 1):
    put = jax.vmap(put)
  return put(old, new, slots)
