"""Lowers and compiles a function for a target, in this process."""

import importlib
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import targets
from .errors import AotError


def compile(function: Callable, *args, target: str, compiler_options: dict | None = None,
            **kwargs) -> jax.stages.Compiled:
  """Compiles `function(*args, **kwargs)` for a chip that is not here.

  Set what `targets.environment(target)` says before the first import of jax. Ahead-of-time
  compilation of many programs, or of one whose compiler's dumps are wanted, is `report`'s.

  Args:
    function: jitted or not.
    args: arrays or jax.ShapeDtypeStructs, or pytrees of them. Those without a sharding are put on
      the first device; for a pod, give shardings over a mesh of `targets.devices(target)`.
    target: such as "h200", "v5e", "v4:12x16x16*2".
    compiler_options: XLA's, as `jax.stages.Lowered.compile` takes them.
    kwargs: static.

  Raises:
    AotError: an unknown target, or its compiler is not installed. Whatever the compiler raises
      comes through.
  """
  args, mesh = place(args, target)
  return lower(function, args, kwargs, target, mesh).compile(compiler_options)


def place(args, target):
  """Arguments as ShapeDtypeStructs with shardings, and the mesh that they are on."""
  meshes = [a.sharding.mesh for a in jax.tree.leaves(args)
            if isinstance(getattr(a, "sharding", None), NamedSharding)]
  mesh = meshes[0] if meshes else Mesh(np.array(targets.devices(target)[:1]), ("chip",))
  everywhere = NamedSharding(mesh, PartitionSpec())

  def abstract(a):
    sharding = getattr(a, "sharding", None)
    sharding = sharding if isinstance(sharding, NamedSharding) else everywhere
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

  return jax.tree.map(abstract, args), mesh


def lower(function, args, kwargs, target, mesh):
  # The abstract mesh is how an op sees the chip that it is compiled for.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    jitted = jax.jit(lambda *a: function(*a, **kwargs)) if kwargs else jax.jit(function)
    return jitted.trace(*args).lower(lowering_platforms=(targets.platform(target),))


def forward_and_backward(function: Callable, args: tuple, kwargs: dict):
  """(a function of the arguments and the result's cotangent, its arguments).

  It returns the result and the gradients of all floating-point arguments.
  """
  leaves, tree = jax.tree.flatten(args)
  floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

  def both(leaves, cotangent):
    def of_floating(*values):
      values = iter(values)
      merged = [next(values) if f else leaf for leaf, f in zip(leaves, floating, strict=True)]
      return function(*jax.tree.unflatten(tree, merged), **kwargs)

    out, pull = jax.vjp(of_floating, *[leaf for leaf, f in zip(leaves, floating, strict=True) if f])
    return out, pull(cotangent)

  cotangent = jax.eval_shape(lambda *a: function(*a, **kwargs), *args)
  cotangent = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), cotangent)
  return both, (leaves, cotangent)


def resolve(reference: str) -> Callable:
  """The function of "package.module:name" or "path/to/file.py:name".

  Raises:
    AotError: there is no such module or name.
  """
  where, _, name = reference.rpartition(":")
  if not where:
    raise AotError(f"a function is MODULE:NAME or FILE.py:NAME; got {reference!r}")
  try:
    if where.endswith(".py"):
      path = pathlib.Path(where).resolve()
      sys.path.insert(0, str(path.parent))
      spec = importlib.util.spec_from_file_location(path.stem, path)
      assert spec and spec.loader  # a name that ends in .py has both
      module = importlib.util.module_from_spec(spec)
      sys.modules[path.stem] = module
      spec.loader.exec_module(module)
    else:
      module = importlib.import_module(where)
    found: Any = module
    for part in name.split("."):
      found = getattr(found, part)
    return found
  except (ImportError, AttributeError, OSError) as error:
    raise AotError(f"{reference}: {error}") from error


def refer(function: Callable | str) -> str:
  """The inverse of `resolve`: how another process finds a function.

  Raises:
    AotError: it is a lambda or lives in another function, so no other process can find it.
  """
  if isinstance(function, str):
    return function
  module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
  if not module or "<" in name or not name:
    raise AotError(f"{function!r} has no name by which another process could find it: give a "
                   "function at the top of a module, with its settings as keyword arguments")
  if module == "__main__":
    module = getattr(sys.modules["__main__"], "__file__", None)
    if not module:
      raise AotError(f"{name} was typed into the interpreter: another process can't find it; "
                     "put it into a file")
  return f"{module}:{name}"
