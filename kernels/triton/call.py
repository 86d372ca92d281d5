"""Calls of the ops' Triton kernels: through jax-triton, imported when first needed.

jax-triton's releases differ; the ops see one `call`.
"""

import importlib.metadata
import inspect

import jax

from ..core import chips, compat, partition
from ..interpreters import mode


def unfit(chip: str | None) -> str | None:
  """The reason why Triton kernels can't take a chip, in words, or None."""
  if chip is None or chip in chips.GPUS:
    return None
  known = sorted({gpu.capability for gpu in chips.GPUS.values()})
  return ("a GPU with bfloat16 in its tensor cores, of compute capability "
          f"{', '.join(f'{major}.{minor}' for major, minor in known)}; got {chip}")


def problem() -> str | None:
  """The packages that Triton kernels miss, with the way to install them; or None."""
  if mode.current.value is not None:
    from ..interpreters import triton as interpreter

    return interpreter.problem()
  try:
    bridge = importlib.metadata.version("jax-triton")
    triton = importlib.metadata.version("triton")
  except importlib.metadata.PackageNotFoundError as missing:
    return f"{missing.name}, which is not installed: pip install 'jax-triton>=0.3.1' 'triton>=3.6'"
  old = _release(bridge) < (0, 4)
  if _release(bridge) < (0, 3, 1) or old != (_release(triton) < (3, 7)):
    return ("jax-triton 0.3.1 with triton 3.6, or jax-triton 0.4.1 with triton 3.7 or newer; got "
            f"jax-triton {bridge} with triton {triton}: pip install 'jax-triton>=0.4.1' "
            "'triton>=3.7'")
  try:
    import jax_triton  # noqa: F401
  except Exception as error:
    return f"a jax-triton that can be imported; pip install 'jax-triton>=0.4.1' ({error!r})"
  return None


def check() -> None:
  """Raises ImportError, in one line, where Triton kernels can't be run or compiled."""
  if trouble := problem():
    raise ImportError(f"Triton kernels need {trouble}")


def _release(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def call(kernel, *inputs, out_types: tuple[jax.ShapeDtypeStruct, ...], grid: int, num_warps: int,
         num_stages: int, chip: str | None, **constants) -> tuple[jax.Array, ...]:
  """Runs `grid` programs of a `triton.jit` kernel.

  Args:
    kernel: its parameters are the inputs, then pointers to the outputs, then the constants.
    inputs: arrays, and Python integers.
    out_types: shapes and dtypes of the outputs.
    chip: the name of a GPU to compile for; None for the first one of this machine.
    constants: values of the kernel's `constexpr` parameters.

  Raises:
    ImportError: no jax-triton, or one that does not go with the installed triton.
  """
  check()
  if mode.current.value is not None:
    from ..interpreters import triton as interpreter

    return interpreter.call(mode.current.value, kernel, *inputs, out_types=out_types, grid=grid,
                            **constants)
  import jax_triton

  compat.mend_jax_triton()
  if "out_type" in inspect.signature(jax_triton.triton_call).parameters:
    # Triton may write PTX newer than what the ptxas of jax's CUDA plugin (13.0 or later) reads.
    # Triton 3.10 will no longer fuse products and sums unasked.
    options = dict(out_type=out_types,
                   backend_options={"ptx_version": 90, "enable_fp_fusion": True})
  else:
    options = dict(out_shape=out_types)
  major, minor = chips.GPUS[chip].capability if chip in chips.GPUS else (0, 0)
  outputs = jax_triton.triton_call(
      *inputs, kernel=kernel, grid=(grid,), num_warps=num_warps, num_stages=num_stages,
      compute_capability=10 * major + minor or None, **options, **constants)
  # jax-triton's outputs do not say over which manual mesh axes they vary.
  arrays = tuple(x for x in inputs if isinstance(x, jax.Array))
  return partition.varying_together(*outputs, *arrays)[:len(out_types)]
