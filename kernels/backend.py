"""Which implementation of an op runs where, and why."""

import importlib
import types
from typing import NamedTuple

import jax

from . import mesh, tuning

IMPLEMENTATIONS = ("auto", "xla", "pallas", "mosaic_gpu", "mosaic_tpu", "triton")

_EVERY = ("mosaic_gpu", "mosaic_tpu", "triton")

# The backends that an op has kernels for; "xla" is the fallback of every one.
KERNELS = {
    "flash_attention": _EVERY,
    "parallel_attention_ffn": _EVERY,  # of its products; attention is another op
    "linear_cross_entropy": _EVERY,
    "decode_attention": _EVERY,
}

# JAX's name of a chip (lower case, by its beginning) and ours.
_CHIPS = {
    "nvidia a100": "a100", "nvidia h100": "h100", "nvidia h200": "h200", "nvidia b200": "b200",
    "nvidia geforce rtx 4090": "rtx4090", "tpu v4": "v4", "tpu v5 lite": "v5e", "tpu v5e": "v5e",
    "tpu v5p": "v5p", "tpu v5": "v5p", "tpu v6 lite": "v6e", "tpu v6e": "v6e", "tpu7x": "tpu7x",
    "tpu v7x": "tpu7x",
}


class Choice(NamedTuple):
  """An implementation and the reason that it was chosen."""

  implementation: str
  reason: str


class Target(NamedTuple):
  """What is compiled for."""

  platform: str  # "cpu", "gpu", "tpu"
  chip: str | None  # "h200", "v5e", ...; None for one that has no name here


def target(*arrays: jax.Array) -> Target:
  """The device of the arrays' mesh or of the mesh in context, else of the default backend."""
  device = mesh.current(*(x for x in arrays if x is not None)).abstract_device
  if device is None:
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
      device = jax.devices(device)[0]
  platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
  kind = device.device_kind.lower()
  chip = next((name for prefix, name in _CHIPS.items() if kind.startswith(prefix)), None)
  return Target(platform, chip)


def kernel_module(op: str, implementation: str) -> types.ModuleType:
  """The module of an op's backend; imported when first needed."""
  return _module(op, implementation)


def explain(op: str, implementation: str = "auto", *arrays) -> Choice:
  """The implementation that an op would run, and why.

  Args:
    op: the name of a public op, such as "flash_attention".
    implementation: what the caller would pass to it.
    arrays: of the op, or `jax.ShapeDtypeStruct`s: query, key, value of attention; x, params of
      the block; x, embedding of the loss; query and both caches when decoding. They are whole;
      under a mesh, what counts is what a device has of them. Without them the answer leaves out
      what depends on shapes.

  Raises:
    ValueError: an unknown op or implementation, or a backend asked for by name that cannot
      run; the message says which requirement failed.
  """
  if op not in KERNELS:
    raise ValueError(f"no op is called {op!r}; there are {', '.join(sorted(KERNELS))}")
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
        f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
  if implementation == "xla":
    return Choice("xla", "asked for by name")
  on = target(*(x for x in arrays[:2] if isinstance(x, jax.Array)))
  fitting = _fitting(on)
  if arrays and KERNELS[op]:
    arrays = _module(op, "fused").on_one_device(*arrays)

  if implementation == "auto":
    if fitting not in KERNELS[op]:
      return Choice("xla", f"{op} has no fused kernel for {on.chip or on.platform}")
    if arrays:
      problem = kernel_module(op, fitting).unsupported(*arrays, chip=on.chip)
      problem = problem or tuning.unknown(on.chip, op, arrays[0])
      if problem:
        return Choice("xla", f"{fitting} needs {problem}")
    return Choice(fitting, f"the fused kernel for {on.chip or on.platform}")

  name, reason = implementation, "asked for by name"
  if implementation == "pallas":
    if fitting not in ("mosaic_gpu", "mosaic_tpu"):
      raise ValueError(f"{op}: no Pallas kernel is for {on.chip or on.platform}; pass "
                       "implementation='auto', or name a backend")
    name, reason = fitting, f"the Pallas kernel for {on.chip or on.platform}"
  if name not in KERNELS[op]:
    raise ValueError(
        f"{op} has no {name} kernel; it runs on {', '.join(('xla', *KERNELS[op]))} (or auto)")
  if arrays:
    problem = kernel_module(op, name).unsupported(*arrays, chip=chip_for(name, on))
    if problem:
      raise ValueError(f"{op}: {name} needs {problem}")
  return Choice(name, reason)


def chip_for(implementation: str, on: Target) -> str | None:
  """The chip that an implementation compiles for.

  None on another platform than its own, where it is interpreted or compiled ahead of time.
  """
  own = "tpu" if implementation == "mosaic_tpu" else "gpu"
  return on.chip if on.platform == own else None


def _module(op, name):
  folder = {"flash_attention": "attention", "parallel_attention_ffn": "parallel_block",
            "linear_cross_entropy": "cross_entropy", "decode_attention": "decode"}[op]
  return importlib.import_module(f".{folder}.{name}", __package__)


def _fitting(on: Target) -> str | None:
  """The backend that was written for a chip."""
  if on.platform == "tpu":
    return "mosaic_tpu"
  if on.chip in ("h100", "h200"):
    return "mosaic_gpu"
  if on.platform == "gpu":
    return "triton"
  return None
