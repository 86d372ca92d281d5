"""The division of attention over a mesh: its sequences and its heads."""

import jax

from . import partition


def sequences_and_heads(query, key, mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """The mesh axes that sequences and that heads of attention are divided over.

  Args:
    query, key: arrays or their types, [B, T or S, heads, dim_head].
  """
  batch = partition.axes(query, 0, partition.BATCH_AXES, mesh)
  heads = partition.axes(query, 2, (partition.HEAD_AXIS,), mesh)
  kv_heads = key.shape[2]
  if kv_heads > 1 and kv_heads % partition.devices(mesh, heads):
    heads = ()  # A shard would need a part of the key heads that is not its own.
  return batch, heads


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

  key = shard(key, heads if key.shape[2] > 1 else ())
  return shard(query, heads), key, None if value is None else key
