"""Which implementation of an op runs where, and why."""

import contextlib
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.core

from ..triton import call as triton_call
from . import chips, compat, partition

if TYPE_CHECKING:
  from .op import Op

Implementation = Literal["auto", "xla", "pallas", "mosaic_gpu", "mosaic_tpu", "triton"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)


class Choice(NamedTuple):
  """An implementation and the reason that it was chosen."""

  implementation: str
  reason: str


class Target(NamedTuple):
  """The target of a compilation."""

  platform: str  # "cpu", "gpu", "tpu"
  chip: str | None  # "h200", "v5e", "sm_86", ... (`chips.name`); None for one that has no name


# Where the op runs that another one is part of, whose arrays are traced: a `Target`.
placed = jax.make_user_context(None)


def target(*operands: compat.Array | None) -> Target:
  """The device that arrays are committed to, else that of their mesh or of the mesh in context,
  else the default one."""
  arrays = [x for x in operands if isinstance(x, jax.Array)]
  committed = [x for x in arrays if compat.is_known(x) and x.committed]
  device: Any
  if committed:
    device = next(iter(committed[0].sharding.device_set))
  else:
    device = partition.current(*arrays).abstract_device
  if device is None and placed.value is not None:
    return placed.value
  if device is None:
    device = jax.config.jax_default_device or jax.devices()[0]
    if isinstance(device, str):
      device = jax.devices(device)[0]
  platform = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, str(device.platform))
  return Target(platform, chips.name(device.device_kind, _capability(device, platform)))


def _capability(device, platform: str) -> str | None:
  """The compute capability of a GPU, which an abstract device does not know of its kind."""
  if platform != "gpu" or hasattr(device, "compute_capability"):
    return getattr(device, "compute_capability", None)
  return next((getattr(same, "compute_capability", None) for same in jax.devices()
               if same.device_kind == device.device_kind), None)


# Names of the ops whose kernels failed a check on the machine at hand: `auto` takes plain JAX.
failed = jax.make_user_context(frozenset())


# Code compiled for a v4, the oldest TPU with the least memory, runs on all.
ANY_TPU = Target("tpu", "v4")

# Targets of `export_for`, one of a platform.
exported = jax.make_user_context(())


def lowering_for(target: Target | None) -> contextlib.AbstractContextManager:
  """A context, outside of any mesh, in which kernels are compiled for a chip that is not here; None
  for what is."""
  if target is None:
    return contextlib.nullcontext()
  device = jax.sharding.AbstractDevice(
      device_kind=chips.ALL[target.chip or ""].kind, platform=target.platform,
      num_cores=1 if target.platform == "tpu" else None)
  return jax.sharding.use_abstract_mesh(
      jax.sharding.AbstractMesh((1,), ("_",), abstract_device=device))


def undecided(*operands: compat.Array | None) -> bool:
  """Whether a program is traced of which nothing says where it will run."""
  arrays = [x for x in operands if isinstance(x, jax.Array)]
  return (any(isinstance(x, jax.core.Tracer) for x in arrays)
          and not any(compat.is_known(x) and x.committed for x in arrays)
          and placed.value is None and partition.current(*arrays).abstract_device is None)


def choose(op: "Op", implementation: str, *arrays: Any, on: Target,
           needs: str | None = None) -> Choice:
  """An implementation of an op, and why.

  Args:
    implementation: what the caller of the op passed.
    arrays: all of them, or their types; or none.
    on: from `target`.
    needs: a requirement of every kernel that what else is asked for does not meet, in words.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
        f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
  if implementation == "xla":
    return Choice("xla", "asked for by name")
  fitting = _fitting(on)
  symbolic = [x.shape for x in jax.tree.leaves(arrays)
              if not all(isinstance(n, int) for n in x.shape)]
  if symbolic:
    needs = needs or f"dimensions that are known when it is compiled; got {symbolic[0]}"
  elif arrays:
    arrays = op.on_one_device(*arrays)

  if implementation == "auto":
    if fitting is None or fitting not in op.backends:
      lacks = on.platform == "gpu" and triton_call.unfit(on.chip)
      return Choice("xla", f"{op.name} has no fused kernel for {on.chip or on.platform}"
                    + (f": triton needs {lacks}" if lacks else ""))
    if op.name in failed.value:
      return Choice("xla", f"{fitting} failed its check on this chip (palm-haiku doctor)")
    problem = needs or _unasked(op, on.chip)
    if arrays and not problem:
      problem = (op.backends[fitting]().unsupported(*arrays, chip=on.chip)
                 or _unasked(op, on.chip, arrays[0]))
    if problem:
      return Choice("xla", f"{fitting} needs {problem}")
    reason = f"the fused kernel for {on.chip}"
    if family := chips.FAMILIES.get(on.chip or ""):
      reason += f", with the block sizes of {family.like}"
    if op.name == "flash_attention":
      reason += " (xla for forward mode and second derivatives)"
    return Choice(fitting, reason if arrays else (
        f"{reason}, if shapes and dtypes fit it, with {op.configs.NEEDS}; else xla"))

  name, reason = implementation, "asked for by name"
  if implementation == "pallas":
    if fitting not in ("mosaic_gpu", "mosaic_tpu"):
      raise ValueError(f"{op.name}: no Pallas kernel is for {on.chip or on.platform}; pass "
                       "implementation='auto', or name a backend")
    name, reason = fitting, f"the Pallas kernel for {on.chip or on.platform}"
  if name not in op.backends:
    raise ValueError(
        f"{op.name} has no {name} kernel; it runs on {', '.join(('xla', *op.backends))} (or auto)")
  if arrays:
    problem = needs or op.backends[name]().unsupported(*arrays, chip=chip_for(name, on))
    if problem:
      raise ValueError(f"{op.name}: {name} needs {problem}")
  return Choice(name, reason)


def _unasked(op: "Op", chip: str | None, array=None) -> str | None:
  """The reason why `auto` passes over a kernel that could run; see `unasked` of an op's configs."""
  if chip not in chips.ALL:
    return f"a chip of known block sizes; got {chip or 'one of no known name'}"
  return op.configs.unasked(chip, array)


def chip_for(implementation: str, on: Target) -> str | None:
  """The chip that an implementation compiles for.

  None on another platform than its own, where it is interpreted or compiled ahead of time.
  """
  own = "tpu" if implementation == "mosaic_tpu" else "gpu"
  return on.chip if on.platform == own else None


def _fitting(on: Target) -> str | None:
  """The backend that was written for a chip."""
  if on.platform == "tpu":
    return "mosaic_tpu"
  if on.chip in chips.HOPPER:
    return "mosaic_gpu"
  if on.platform == "gpu" and not triton_call.unfit(on.chip):
    return "triton"
  return None
