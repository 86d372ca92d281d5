"""The one pipeline, from an op's arguments to a backend's kernel.

  check -> choose -> guard -> shard_map -> vmap -> 32 bits -> derivative

An op checks its arguments, `choose`s a route and `run`s it with what is known when a program is
compiled (a hashable tuple) and the arrays. `run` compiles, guards and divides; the rest is in the
op's function of one device's arrays, whose derivative calls the backend.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.core
import jax.numpy as jnp

from . import compat, dispatch, guards, partition, platforms


class Backend(Protocol):
  """A module of kernels; an op's `fused.py` states the functions beside this one."""

  def unsupported(self, *arrays: Any, **options: Any) -> str | None:
    """The first requirement that shapes, dtypes or the `chip` fail, in words, or None."""
    ...


@dataclasses.dataclass(frozen=True)
class Route:
  """The route of one call; equal for calls that compile to the same."""

  implementation: str
  backend: Any  # a `Backend`; None for plain JAX
  chip: str | None  # that kernels are compiled for
  on: dispatch.Target | None = None  # None where nothing says on what it will run
  auto: bool = False  # nobody asked for a kernel by its name: plain JAX does what it can't
  undecided: bool = False  # each platform of a program has its own implementation
  exported: dispatch.Target | None = None  # of `export_for`
  others: tuple["Route", ...] = ()  # of other platforms, where `undecided`

  def by_platform(self, plain: Callable, kernel: Callable, options: Any, *arrays: Any) -> Any:
    """kernel(route, options, *arrays) on platforms that have it, plain(options, *arrays) on others;
    of a route that is `undecided`."""
    plain = compat.promoting()(functools.partial(plain, options))
    kernels = [route.alternative(functools.partial(
        kernel, dataclasses.replace(route, undecided=False, others=()), options))
        for route in (self, *self.others)]
    return platforms.here_or(plain, kernels)(*arrays)

  def alternative(self, kernel: Callable) -> tuple:
    """The platforms of a kernel, the kernel, and the chip that it is compiled for, if that is not
    here; for `platforms.here_or`."""
    if self.exported is None:
      return guards.platforms(self.implementation), kernel, None
    platform = "cuda" if self.exported.platform == "gpu" else self.exported.platform
    return (platform,), kernel, self.exported


@dataclasses.dataclass(frozen=True, eq=False)
class Op:
  """An op, as the pipeline sees it; its first arrays are `Backend.unsupported`'s."""

  name: str
  backends: Mapping[str, Callable[[], Backend]]  # each imports its own when it is first needed
  configs: types.ModuleType  # `unasked` and `NEEDS`, for `auto`
  ranks: tuple[int | None, ...]  # of the first arrays, at least; None for a tree of weights
  on_one_device: Callable  # of the first arrays or their types, to those of a device's part
  plain: Callable  # (route, options, *arrays), in plain JAX
  fused: Callable  # (route, options), to the function of arrays that calls the backend
  # (route, options, mesh, *arrays), to the function and specs that `over_mesh` takes; None for an
  # op that calls that itself.
  divide: Callable | None = None
  for_any_tpu: bool = True  # exported programs have its kernels for TPUs


def choose(op: Op, implementation: str, *arrays: Any, needs: str | None = None) -> Route:
  """The route of a call with these first arrays; see `dispatch.choose`."""
  leaves = jax.tree.leaves(arrays)
  on = dispatch.target(*leaves)
  name = dispatch.choose(op, implementation, *arrays, on=on, needs=needs).implementation
  auto = implementation == "auto"
  undecided = auto and not needs and dispatch.undecided(*leaves)
  if undecided and (exported := _exported(op, arrays, on)):
    return exported
  backend = None if name == "xla" else op.backends[name]()
  return Route(name, backend, dispatch.chip_for(name, on), None if undecided else on, auto,
               undecided)


def _exported(op, arrays, default):
  """The route of a program for the chips of `export_for` and, on its platform, for that here; None
  outside of that, and where no kernel fits."""
  chips = dispatch.exported.value
  if chips and default.platform not in [on.platform for on in chips]:
    chips += default,
  routes = []
  for on in chips:
    name = dispatch.choose(op, "auto", *arrays, on=on).implementation
    if name != "xla":
      routes.append(Route(name, op.backends[name](), dispatch.chip_for(name, on), auto=True,
                          undecided=True, exported=None if on is default else on))
  return dataclasses.replace(routes[0], others=tuple(routes[1:])) if routes else None


def untraced(scale: Any, operand: str) -> str | None:
  """The requirement of kernels that a scale fails, for `choose`, or None."""
  if isinstance(scale, jax.core.Tracer):
    return (f"a scale that is known when it is compiled; multiply {operand} by it, or "
            "pass implementation='xla'")
  return None


def scaled(route: Route, scale: Any) -> tuple[Route, float | None, Any]:
  """A scale as a number that kernels are compiled for, or as an array, which is plain JAX's."""
  if not isinstance(scale, jax.Array):
    return route, float(scale), None
  if route.implementation == "xla":
    return dataclasses.replace(route, undecided=False), None, scale
  return route, float(jax.device_get(scale)), None


def run(op: Op, route: Route, options: Any, *arrays: Any) -> Any:
  """The op on this route; outside of `jit` as a program of its own, compiled once."""
  if not compat.under_jit() and not jax.config.jax_disable_jit:
    return _program(op)(route, options, *compat.on_device(arrays))
  with compat.promoting(), dispatch.placed(route.on):
    arrays = jax.tree.map(jnp.asarray, arrays)
    if route.implementation == "xla":
      if route.undecided and op.for_any_tpu:
        return platforms.by_platform(_plain, [(("tpu",), _on_any_tpu, dispatch.ANY_TPU)], arrays,
                                     (op, route, options))
      return op.plain(route, options, *arrays)
    if not route.undecided:
      arrays = guards.only_on(arrays[0], op.name, route.implementation), *arrays[1:]
    fused = op.fused(route, options)
    if op.divide is None:
      return fused(*arrays)
    mesh = partition.current(*arrays[:2])
    if partition.to_take_over(mesh):
      f, *specs = op.divide(route, options, mesh, *arrays)
      return over_mesh(
          mesh, lambda *arrays: f(*partition.varying_together(*arrays)), *specs, *arrays)
    return fused(*partition.varying_together(*arrays))


@functools.cache
def _program(op):
  def program(*arguments):
    return run(op, *arguments)

  program.__name__ = op.name
  return jax.jit(program, static_argnums=(0, 1))


def _plain(*arguments):
  *arrays, (op, route, options) = arguments
  return op.plain(route, options, *arrays)


def _on_any_tpu(*arguments):
  """The replacement of plain JAX in a program that is exported for TPUs."""
  *arrays, (op, _, options) = arguments
  on = dispatch.ANY_TPU
  name = dispatch.choose(op, "auto", *arrays[:len(op.ranks)], on=on).implementation
  backend = None if name == "xla" else op.backends[name]()
  return run(op, Route(name, backend, None, on, auto=True), options, *arrays)


def over_mesh(mesh: jax.sharding.AbstractMesh, f: Callable, in_specs: tuple, out_specs: Any,
              *arrays: Any, axis_names: set[str] | None = None) -> Any:
  """f of each device's part of the arrays, in `shard_map` unless all axes are manual already.

  Args:
    axis_names: the axes to be divided over; None for all that are not manual.
  """
  free = axis_names or partition.to_take_over(mesh)
  if not free:
    return f(*arrays)
  in_specs = tuple(None if x is None else spec for x, spec in zip(arrays, in_specs))
  arrays = jax.tree.map(lambda x, spec: partition.reshard(x, spec, mesh), arrays, in_specs)
  return jax.shard_map(f, mesh=mesh, axis_names=free, in_specs=in_specs, out_specs=out_specs)(
      *arrays)
