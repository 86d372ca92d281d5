"""The division of attention over a mesh: its sequences and its heads.

Each device has the key heads that its query heads attend to. Where the devices divide the key heads
these are shares of them; else a head is on several devices, and where a device's query heads are
no whole groups, as often on each as makes them so.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import partition


def sequences_and_heads(query, key, mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The mesh axes that sequences and that heads of attention are divided over.

  Args:
    query, key: arrays or their types, [B, T or S, heads, dim_head].
  """
  batch = partition.axes(query, 0, partition.BATCH_AXES, mesh)
  return batch, partition.axes(query, 2, (partition.HEAD_AXIS,), mesh)


def key_heads(kv_heads: int, heads: tuple[str, ...], mesh) -> tuple[tuple[str, ...], Callable]:
  """The mesh axes that key heads are divided over, where query heads are over `heads`, and a
  function from arrays [B, S, kv_heads, ...] or None in `shard_map` to this device's key heads."""
  if kv_heads % partition.devices(mesh, heads) == 0:
    return heads, lambda *arrays: arrays
  return (), lambda *arrays: (x if x is None else own(x, 2, heads, mesh) for x in arrays)


def held(kv_heads: int, devices: int) -> int:
  """Key heads on each of the devices that query heads are divided over."""
  return math.lcm(kv_heads, devices) // devices


def own(array: jax.Array, dim: int, heads: tuple[str, ...], mesh) -> jax.Array:
  """This device's key heads, inside `shard_map`.

  Args:
    array: all key heads along dimension `dim`, which the devices do not divide.
    heads: the mesh axes that query heads are divided over.
  """
  kv_heads, devices = array.shape[dim], partition.devices(mesh, heads)
  if kv_heads == 1:
    return array
  count = held(kv_heads, devices)
  repeats = count * devices // kv_heads
  first = jax.lax.axis_index(heads) * count  # mutant: first key head
  if count == 1:
    return jax.lax.dynamic_slice_in_dim(array, first // repeats, 1, dim)
  return jnp.take(array, (first + jnp.arange(count)) // repeats, dim)


def on_one_device(query, key, value):
  """The types of what a device's kernel is given, but for a ring, with all positions.

  Args:
    query, key, value: whole arrays or their types, [..., T or S, heads, dim_head]; value None for
      the key.
  """
  mesh = partition.current(query, key)
  query, key = (partition.with_one_batch(x, 3) for x in (query, key))
  batch, heads = sequences_and_heads(query, key, mesh) if partition.to_take_over(mesh) else ((), ())

  def shard(x, heads):
    by = (partition.devices(mesh, batch), 1, partition.devices(mesh, heads), 1)
    return jax.ShapeDtypeStruct(tuple(n // d for n, d in zip(x.shape, by)), x.dtype)

  kv_heads = held(key.shape[2], partition.devices(mesh, heads))
  key = jax.ShapeDtypeStruct((*shard(key, ()).shape[:2], kv_heads, key.shape[3]), key.dtype)
  return shard(query, heads), key, None if value is None else key
