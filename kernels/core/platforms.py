"""Choices that `auto` leaves to the lowering: which platform a program is for.

A program is traced before JAX knows where it will run, and an exported one may run in many places.
Where plain JAX is traced, it is one primitive; a platform that has a kernel gets that in its place,
which is traced only then. Where a kernel is traced, other platforms get plain JAX.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from . import dispatch


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A function of arrays that platforms have in place of plain JAX; equal ones are equal."""

  platforms: tuple[str, ...]  # "cuda", "rocm", "tpu"
  function: Callable  # of the arrays and `options`, to a tree as plain JAX's
  options: Hashable
  tree: Any  # of the arrays: a PyTreeDef
  on: dispatch.Target | None = None  # that it is compiled for, if that is not here
  maps: tuple[tuple[tuple[int | None, ...], int], ...] = ()  # axes of the leaves, size; by `vmap`

  def __call__(self, *leaves):
    def call(*leaves):
      return jax.tree.leaves(
          self.function(*jax.tree.unflatten(self.tree, leaves), self.options))

    for axes, size in self.maps:
      call = jax.vmap(call, axes, axis_size=size)
    return call(*leaves)


def by_platform(plain: Callable, kernels, arrays, options: Hashable):
  """plain(*arrays, options), or on the platforms of a kernel what that makes.

  Args:
    plain: defines the derivatives.
    kernels: of each its platforms, a function like `plain`, and what it is compiled for, None if
      that is here.
    arrays: trees of arrays.
    options: what else the functions are told.
  """
  leaves, tree = jax.tree.flatten(arrays)
  kernels = tuple(
      Kernel(platforms, function, options, tree, on) for platforms, function, on in kernels)
  jaxpr, out = jax.make_jaxpr(
      lambda *leaves: plain(*jax.tree.unflatten(tree, leaves), options), return_shape=True)(*leaves)
  return jax.tree.unflatten(
      jax.tree.structure(out), _by_platform_p.bind(*leaves, jaxpr=jaxpr, kernels=kernels))


_by_platform_p = Primitive("by_platform")
_by_platform_p.multiple_results = True
_by_platform_p.def_abstract_eval(lambda *_, jaxpr, kernels: jaxpr.out_avals)


@_by_platform_p.def_impl
def _run(*leaves, **params):
  with jax.disable_jit(False):
    return jax.jit(functools.partial(_by_platform_p.bind, **params))(*leaves)


def _lower(platform, ctx, *leaves, jaxpr: ClosedJaxpr, kernels):
  kernel = next((kernel for kernel in kernels if platform in kernel.platforms), None)
  # JAX compiles kernels for the device of the mesh in context, which can't be exchanged.
  if kernel is None or kernel.on and not jax.sharding.get_abstract_mesh().empty:
    return mlir.lower_fun(jaxpr_as_fun(jaxpr), multiple_results=True)(ctx, *leaves)
  alone = ctx.module_context.replace(platforms=(platform,))  # of those of the whole program
  with dispatch.lowering_for(kernel.on):
    return mlir.lower_fun(kernel, multiple_results=True)(
        ctx.replace(module_context=alone), *leaves)


mlir.register_lowering(_by_platform_p, functools.partial(_lower, None))
for _platform in ("cuda", "rocm", "tpu"):
  mlir.register_lowering(
      _by_platform_p, functools.partial(_lower, _platform), platform=_platform)


def here_or(plain: Callable, kernels) -> Callable:
  """The kernels, and plain JAX on other platforms than theirs; the derivatives are plain JAX's.

  Args:
    plain: a function of arrays.
    kernels: as of `by_platform`, each a function like `plain`.
  """
  alone = lambda f: lambda *arrays: f(*arrays[:-1])
  return lambda *arrays: by_platform(
      alone(plain), [(platforms, alone(kernel), on) for platforms, kernel, on in kernels],
      arrays, None)


def _batch(leaves, axes, *, jaxpr, kernels):
  size = next(x.shape[axis] for x, axis in zip(leaves, axes) if axis is not None)
  mapped = jax.vmap(jaxpr_as_fun(jaxpr), tuple(axes), axis_size=size)
  kernels = tuple(dataclasses.replace(kernel, maps=(*kernel.maps, (tuple(axes), size)))
                  for kernel in kernels)
  outs = _by_platform_p.bind(*leaves, jaxpr=jax.make_jaxpr(mapped)(*leaves), kernels=kernels)
  return outs, [0] * len(outs)


batching.primitive_batchers[_by_platform_p] = _batch


def _differentiate(primals, tangents, *, jaxpr, kernels):
  del kernels
  by = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

  def plain(*some):
    leaves = list(primals)
    for i, x in zip(by, some):
      leaves[i] = x
    return jaxpr_as_fun(jaxpr)(*leaves)

  return jax.jvp(plain, [primals[i] for i in by], [tangents[i] for i in by])


ad.primitive_jvps[_by_platform_p] = _differentiate
