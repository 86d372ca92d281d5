"""Whether kernels are interpreted, and how: part of the key that JAX keeps a program under."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax


def _read(path: str) -> str:
  return Path(path).read_text()


@dataclasses.dataclass(frozen=True)
class Mode:
  """Settings of the interpreters.

  Attributes:
    detect_races: look for unordered accesses to one place.
    check_products: look at what Hopper's wgmma reads as well. For kernels that commit before they
      refill a tile: the arrival of another warpgroup is not seen as its order.
    triton_source: the text to interpret in place of a file of Triton kernels.
  """

  detect_races: bool = False
  check_products: bool = False
  triton_source: Callable[[str], str] = _read


current = jax.make_user_context(None)  # a Mode, or None where kernels are compiled


def mosaic_tpu(cores: int = 1):
  """The argument `interpret` of `pl.pallas_call`, for a TPU of so many cores."""
  if current.value is None:
    return False
  from . import mosaic_tpu

  return mosaic_tpu.params(current.value, cores)


def mosaic_gpu():
  """The argument `interpret` of `plgpu.kernel`."""
  if current.value is None:
    return False
  from . import mosaic_gpu

  return mosaic_gpu.params(current.value)


def product_onto(start: jax.Array, a, b) -> jax.Array:
  """start + a @ b, in an interpreted Hopper kernel."""
  from . import mosaic_gpu

  return mosaic_gpu.product_onto(start, a, b)
