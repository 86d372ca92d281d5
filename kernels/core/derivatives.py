"""The derivatives of a kernel: its own in reverse mode, plain JAX's in every other.

`jax.custom_vjp` has the first of the two alone. Here the tangents of a kernel are one linear
primitive: reverse mode only ever transposes it, to the backward kernel; forward mode computes it,
from the formula. What forward and backward kernels return are constants to further derivatives,
to which `_attached` gives those of the formula.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .compat import promoting


@dataclasses.dataclass(frozen=True)
class Rules:
  """A kernel of arrays (trees of them, or None) and its derivatives.

  Attributes:
    op: its name, for errors.
    kernel: (*arrays) -> out.
    forward: (*arrays) -> (out, what else `backward` needs).
    backward: (arrays, what else, cotangents of out) -> a gradient for each of the arrays; None
      where the kernels have none. If `selective`, with a fourth argument: of which arrays it is
      asked for, a bool for each.
    plain: (*arrays) -> out; None where a kernel is asked for by name, and refuses what it has not.
    by: how many of the arrays, from the first on, `backward` has gradients of.
    selective: as `backward` says.
  """

  op: str
  kernel: Callable
  forward: Callable
  backward: Callable
  plain: Callable | None
  by: int
  selective: bool = False


def differentiable(rules: Rules) -> Callable:
  """rules.kernel, with the derivatives of the rules."""
  def derivative(arrays, tangents):
    primals, tree = jax.tree.flatten(arrays)
    tangents = jax.tree.leaves(tangents)
    backward_leaves = len(jax.tree.leaves(arrays[:rules.by]))
    by = [i for i, tangent in enumerate(tangents) if type(tangent) is not SymbolicZero]
    some = [tangents[i] for i in by]
    formula = _Formula(rules, tree, by)
    if by and by[-1] >= backward_leaves:
      return formula.with_tangents(primals, some)
    out, rest = rules.forward(*jax.tree.map(jax.lax.stop_gradient, arrays))
    out = _attached(out, formula.second_order, primals)
    rest, rest_tree = jax.tree.flatten(rest)
    outs, out_tree = jax.tree.flatten(out)
    asked = tuple(any(jax.tree.leaves(x))
                  for x in tree.unflatten(i in by for i in range(len(primals))))

    def transposed(known, cotangents):
      arrays, rest = known[:len(primals)], rest_tree.unflatten(known[len(primals):])
      constants = map(jax.lax.stop_gradient, arrays)
      gradients = rules.backward(
          tree.unflatten(constants), rest,
          out_tree.unflatten(map(jax.lax.stop_gradient, cotangents)),
          *((asked,) if rules.selective else ()))
      # None stands for the whole tree of an array.
      whole = [jax.tree.map(lambda _: None, array) if gradient is None else gradient
               for array, gradient in zip(tree.unflatten(arrays), gradients, strict=True)]
      flat = jax.tree.leaves(whole, is_leaf=lambda x: x is None)
      flat = [x for x, array in zip(flat, jax.tree.leaves(
          tree.unflatten(arrays), is_leaf=lambda x: x is None), strict=True) if array is not None]
      flat = [jnp.zeros_like(arrays[i]) if flat[i] is None else flat[i] for i in by]
      return _attached(flat, formula.gradients_of(len(primals), out_tree),
                       (*arrays, *cotangents))

    tangents = _tangents_p.bind(
        *primals, *rest, *some, num_known=len(primals) + len(rest),
        evaluate=promoting()(lambda known, tangents: formula.tangents(
            known[:len(primals)], tangents)),
        transposed=promoting()(transposed),
        avals=tuple(core.typeof(x).to_tangent_aval() for x in outs))
    return out, out_tree.unflatten(tangents)

  kernel = jax.custom_jvp(rules.kernel)
  kernel.defjvp(promoting()(derivative), symbolic_zeros=True)
  return kernel


@dataclasses.dataclass(frozen=True)
class _Formula:
  """Derivatives of plain JAX with respect to some of the leaves."""

  rules: Rules
  tree: Any
  by: list[int]

  def _of(self, leaves, some):
    if self.rules.plain is None:
      raise ValueError(f"{self.rules.op}: the fused kernels have no forward-mode derivative (jvp, "
                       "jacfwd, hessian); pass implementation='xla' for that")
    leaves = list(leaves)
    for i, x in zip(self.by, some, strict=True):
      leaves[i] = x
    return self.rules.plain(*self.tree.unflatten(leaves))

  def with_tangents(self, leaves, tangents):
    """(out, its tangents)."""
    if self.rules.plain is None:
      raise ValueError(f"{self.rules.op}: the fused kernels have no derivative with respect to one "
                       "of these arrays; pass implementation='xla' for that")
    return jax.jvp(lambda *some: self._of(leaves, some), [leaves[i] for i in self.by],
                   list(tangents))

  def tangents(self, leaves, tangents):
    """The tangents of out, flat."""
    some = [leaves[i] for i in self.by]
    return jax.tree.leaves(jax.jvp(lambda *some: self._of(leaves, some), some, list(tangents))[1])

  def second_order(self, *leaves):
    """out, of what is differentiated once more."""
    return self._plain_twice()(*self.tree.unflatten(leaves))

  def gradients_of(self, num_leaves, out_tree):
    """The function of (*leaves, *cotangents) that is the gradient, flat."""
    def gradients(*inputs):
      self._plain_twice()
      leaves, cotangents = inputs[:num_leaves], inputs[num_leaves:]
      pull = jax.vjp(lambda *some: self._of(leaves, some), *[leaves[i] for i in self.by])[1]
      return list(pull(out_tree.unflatten(cotangents)))
    return gradients

  def _plain_twice(self) -> Callable:
    if self.rules.plain is None:
      raise ValueError(f"{self.rules.op}: the fused kernels have no second derivative; "
                       "pass implementation='xla' for that")
    return self.rules.plain


def _attached(outs, formula, inputs):
  """outs, which are constants, with the derivatives of formula(*inputs)."""
  @jax.custom_jvp
  def identity(outs, *inputs):
    del inputs
    return outs

  def derivative(primals, tangents):
    outs, *inputs = primals
    by = [i for i, tangent in enumerate(tangents[1:]) if type(tangent) is not SymbolicZero]

    def of(*some):
      merged = list(inputs)
      for i, x in zip(by, some, strict=True):
        merged[i] = x
      return formula(*merged)

    return _attached(outs, formula, inputs), jax.jvp(
        of, [inputs[i] for i in by], [tangents[1 + i] for i in by])[1]

  identity.defjvp(promoting()(derivative), symbolic_zeros=True)
  return identity(outs, *inputs)


# (*known, *tangents) -> the tangents of a kernel's results, linear in those of its arguments.
_tangents_p = Primitive("kernel_tangents")
_tangents_p.multiple_results = True


def _evaluate(*arrays, num_known, evaluate, **_):
  return list(evaluate(arrays[:num_known], arrays[num_known:]))


_tangents_p.def_impl(_evaluate)
_tangents_p.def_abstract_eval(lambda *_, avals, **__: list(avals))
mlir.register_lowering(_tangents_p, mlir.lower_fun(_evaluate, multiple_results=True))


def _jvp(primals, tangents, **params):
  by = [i for i, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

  def of(*some):
    arrays = list(primals)
    for i, x in zip(by, some, strict=True):
      arrays[i] = x
    return _evaluate(*arrays, **params)

  return jax.jvp(of, [primals[i] for i in by], [tangents[i] for i in by])


ad.primitive_jvps[_tangents_p] = _jvp


def _transpose(cotangents, *arrays, num_known, transposed, avals, **_):
  cotangents = [jnp.zeros(aval.shape, aval.dtype) if type(ct) is ad.Zero else ct
                for ct, aval in zip(cotangents, avals, strict=True)]
  gradients = transposed(arrays[:num_known], cotangents)
  return [None] * num_known + [
      gradient if ad.is_undefined_primal(x) else None
      for x, gradient in zip(arrays[num_known:], gradients, strict=True)]


ad.primitive_transposes[_tangents_p] = _transpose


def _batch(arrays, axes, *, num_known, evaluate, transposed, avals):
  size = next(x.shape[axis] for x, axis in zip(arrays, axes) if axis is not None)
  known = tuple(axes[:num_known])
  if all(axis is None for axis in known):  # Several tangents at one place: of `jacfwd`.
    evaluated = lambda *tangents: list(evaluate(arrays[:num_known], tangents))
    outs = jax.vmap(evaluated, axes[num_known:], axis_size=size)(*arrays[num_known:])
    return outs, [0] * len(outs)
  tangents = [jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
              for x, axis in zip(arrays[num_known:], axes[num_known:])]
  over = lambda f: lambda known_arrays, linear: jax.vmap(
      f, (known, 0), axis_size=size)(tuple(known_arrays), list(linear))
  outs = _tangents_p.bind(
      *arrays[:num_known], *tangents, num_known=num_known, evaluate=over(evaluate),
      transposed=over(transposed),
      avals=tuple(core.unmapped_aval(size, 0, aval) for aval in avals))
  return outs, [0] * len(outs)


batching.primitive_batchers[_tangents_p] = _batch
