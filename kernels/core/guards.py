"""Identity functions that raise a clear error where a kernel meets what it cannot do.

Left alone, JAX answers with an error about its own internals, or about a lowering rule. These
are primitives, because only a primitive can tell how it is differentiated and for what platform
it is lowered.
"""

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ..interpreters import mode
from . import compat


def no_derivative(x: jax.Array, op: str) -> jax.Array:
  """x; any differentiation through it raises. For an op that has none in any implementation."""
  return _no_derivative_p.bind(x, op=op)


def only_on(x: jax.Array, op: str, implementation: str) -> jax.Array:
  """x; lowering it for a platform that the implementation is not for raises."""
  interpreted = mode.current.value is not None or compat.interpreting()
  return _only_on_p.bind(x, op=op, implementation=implementation, interpreted=interpreted)


def _identity(name: str) -> Primitive:
  primitive = Primitive(name)
  primitive.def_impl(lambda x, **_: x)
  primitive.def_abstract_eval(lambda x, **_: x)
  mlir.register_lowering(primitive, lambda ctx, x, **_: [x])
  batching.primitive_batchers[primitive] = lambda args, axes, **params: (
      primitive.bind(*args, **params), axes[0])
  return primitive


_no_derivative_p = _identity("no_derivative")
_only_on_p = _identity("only_on")


def _refuse_any(op):
  raise ValueError(f"{op} has no derivative; use flash_attention for that")


ad.primitive_jvps[_no_derivative_p] = lambda primals, tangents, *, op: _refuse_any(op)

_PLATFORMS = {"mosaic_gpu": ("cuda",), "mosaic_tpu": ("tpu",), "triton": ("cuda", "rocm")}


def platforms(implementation: str) -> tuple[str, ...]:
  """JAX's names of the platforms that an implementation is for."""
  return _PLATFORMS[implementation]


def _check_platform(ctx, x, *, op, implementation, interpreted):
  allowed = _PLATFORMS[implementation]
  for platform in ctx.module_context.platforms:
    if platform not in allowed and not interpreted:
      raise ValueError(
          f"{op}: {implementation} needs a device of {' or '.join(allowed)}; got {platform} "
          "(pass implementation='auto', or run it in kernels.interpret())")
  return [x]


@_only_on_p.def_impl
def _lower(x, **params):
  """An eager call is lowered too, so that it is checked; under `jax.disable_jit` as well."""
  with jax.disable_jit(False):
    return jax.jit(lambda x: _only_on_p.bind(x, **params))(x)


mlir.register_lowering(_only_on_p, _check_platform)
ad.deflinear2(_only_on_p, lambda ct, x, **_: [ct])
