"""Partitioning of an op's arrays over a mesh when the caller does not say.

A kernel is opaque to XLA's partitioner, so each op wraps its own in `jax.shard_map`. Axes in
Explicit mode keep the sharding that an array's type carries; axes in Auto mode follow the names
below; over any other axis the work is repeated.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

BATCH_AXES = ("data", "fsdp")  # sequences are divided over these
HEAD_AXIS = "model"  # heads, and the columns of weights, over this
SEQUENCE_AXIS = "seq"  # positions within a sequence, over this


def current(*arrays: jax.Array | jax.ShapeDtypeStruct) -> jax.sharding.AbstractMesh:
  """The mesh that the arrays live on, else that of the context; it may be empty."""
  for array in arrays:
    if isinstance(array, jax.Array) and not jax.typeof(array).sharding.mesh.empty:
      return jax.typeof(array).sharding.mesh
  return jax.sharding.get_abstract_mesh()


def axes_of_kind(mesh: jax.sharding.AbstractMesh, *kinds: AxisType) -> tuple[str, ...]:
  """Names of the mesh's axes of the given kinds that have more than one device."""
  return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types)
               if kind in kinds and mesh.shape[name] > 1)


def to_take_over(mesh: jax.sharding.AbstractMesh) -> set[str]:
  """All axes that are not manual yet, if one of them has more than one device; for `shard_map`.

  Those of one device are among them: in an interpreted kernel no axis may be left to XLA.
  """
  if not axes_of_kind(mesh, AxisType.Auto, AxisType.Explicit):
    return set()
  return {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual}


def devices(mesh: jax.sharding.AbstractMesh, axes: tuple[str, ...]) -> int:
  """The number of devices along the axes together."""
  return math.prod(mesh.shape[axis] for axis in axes)


def axes(array: jax.Array | jax.ShapeDtypeStruct, dim: int, names: tuple[str, ...],
         mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
  """The mesh axes that dimension `dim` is divided over.

  Args:
    array: whose type tells about Explicit axes; of a ShapeDtypeStruct only the shape counts.
    dim: one of its dimensions.
    names: Auto axes to use as far as they divide the dimension.
  """
  spec = jax.typeof(array).sharding.spec if isinstance(array, jax.Array) else ()
  entry = spec[dim] if dim < len(spec) else None
  entry = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
  axes = tuple(name for name in entry if mesh.shape[name] > 1)
  size = array.shape[dim] // devices(mesh, axes)
  for name in names:
    if name in axes_of_kind(mesh, AxisType.Auto) and size % mesh.shape[name] == 0:
      axes += (name,)
      size //= mesh.shape[name]
  return axes


def with_one_batch(array, dimensions: int) -> jax.Array | jax.ShapeDtypeStruct:
  """The array, or a type, whose dimensions before the last ones are one."""
  if array.ndim == dimensions + 1:
    return array  # with what its type tells about Explicit axes
  lead, rest = array.shape[:-dimensions], array.shape[-dimensions:]
  return jax.ShapeDtypeStruct((math.prod(lead), *rest), array.dtype)


def reshard(array: jax.Array, spec: PartitionSpec, mesh: jax.sharding.AbstractMesh) -> jax.Array:
  """The array laid out by `spec` as far as it names Explicit axes of the mesh."""
  explicit = axes_of_kind(mesh, AxisType.Explicit)
  if not explicit:
    return array

  def keep(entry):
    names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    return tuple(name for name in names if name in explicit) or None

  wanted = PartitionSpec(*map(keep, spec), *[None] * (array.ndim - len(spec)))
  return jax.reshard(array, jax.sharding.NamedSharding(mesh, wanted))


def partitioned(f: Callable, *arguments: Any, like: Any = None) -> Any:
  """f(*arguments); within f, all layouts are XLA's partitioner's choice.

  For what is sharded over Explicit axes in ways that the operations of f have no rule for.

  Args:
    like: arrays in the shape of the result, which is laid out as they are; None for the first
      argument.
  """
  like = arguments[0] if like is None else like
  arrays = jax.tree.leaves((like, arguments))
  mesh = next((m for m in map(current, arrays) if not m.empty), current())
  explicit = axes_of_kind(mesh, AxisType.Explicit)
  if not explicit:
    return f(*arguments)
  shardings = jax.tree.map(
      lambda x: jax.sharding.NamedSharding(mesh, jax.typeof(x).sharding.spec), like)
  return jax.sharding.auto_axes(f, axes=explicit, out_sharding=shardings)(*arguments)


def out_shape(shape: tuple[int, ...], dtype, *arrays: jax.Array | None) -> jax.ShapeDtypeStruct:
  """The type of a kernel's output that depends on the arrays, inside `shard_map` too."""
  manual = jax.typeof(arrays[0]).manual_axis_type.update(varying=_varying(arrays))
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)


def varying_together(*trees: Any) -> Any:
  """The trees, their arrays typed as varying over the same manual mesh axes.

  Inside `shard_map`, that is where JAX puts the sum over devices of the cotangent of an array
  that all of them share.
  """
  axes = _varying(jax.tree.leaves(trees))

  def cast(x):
    missing = tuple(axes - _varying((x,)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, trees)


def _varying(arrays) -> frozenset[str]:
  return frozenset().union(
      *(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))
