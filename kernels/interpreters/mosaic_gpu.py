"""JAX's interpreter of Mosaic GPU kernels, with products whose left operand is in registers."""

import functools

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from . import callbacks, mosaic_gpu_order, races
from .mode import Mode

# Threads for copies, with which what a product reads is checked: with few of them, waiting for one
# copy would order others that had the same thread.
_MANY = 24


def params(settings: Mode) -> plgpu.InterpretGPUParams:
  """Parameters of an interpreted kernel."""
  callbacks.mend()
  races.watch(gpu_callbacks.reset_gpu_interpret_mode_state)
  _mend()
  return plgpu.InterpretGPUParams(
      detect_races=settings.detect_races,
      num_tma_threads_per_device=_MANY if settings.check_products else 5)


def product_onto(start: jax.Array, a, b) -> jax.Array:
  """start + a @ b; the interpreter has no `pl.run_state`, by which an accumulator has a start."""
  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return start + pl.run_scoped(run, plgpu.ACC(start.shape, jnp.float32))  # pyright: ignore[reportArgumentType]


@functools.cache
def _mend() -> None:
  """Changes the interpreter, from now on."""
  shared_memory._to_int = lambda x: x if isinstance(x, jax.core.Tracer) else int(x)
  gpu_callbacks.wgmma = functools.partial(_wgmma, gpu_callbacks.wgmma)
  mosaic_gpu_order.mend()


def _check_read(key, transforms, rest):
  """That an operand was there before the product began."""
  memory, thread = gpu_callbacks._get_shared_memory(), rest["thread"]
  if memory.detect_races:
    key, access = _access(key, transforms)
    gpu_callbacks.get_races().check_read(
        thread, memory.incr_clock(thread).generic_clock, key, access,
        source_info=rest.get("source_info"))


def _access(key, transforms):
  key = gpu_callbacks.HostAllocationKey.from_array(key)
  transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
  return key, gpu_callbacks._get_shared_memory().access(key, transforms)


def _wgmma(of_refs, *, a_allocation_key_as_array, acc_allocation_key_as_array,
           acc_transforms, b_allocation_key_as_array, b_transforms, **rest):
  """`gpu_callbacks.wgmma`, which takes the left operand from shared memory only."""
  a = np.asarray(a_allocation_key_as_array)
  memory, thread = gpu_callbacks._get_shared_memory(), rest["thread"]
  if memory.num_tma_threads == _MANY * memory.num_devices:
    _check_read(b_allocation_key_as_array, b_transforms, rest)
    if a.ndim == 1:
      _check_read(a_allocation_key_as_array, rest["a_transforms"], rest)
  if a.ndim == 1:
    return of_refs(
        a_allocation_key_as_array=a_allocation_key_as_array, acc_transforms=acc_transforms,
        acc_allocation_key_as_array=acc_allocation_key_as_array, b_transforms=b_transforms,
        b_allocation_key_as_array=b_allocation_key_as_array, **rest)
  info = gpu_callbacks.memory.GPULoggingInfo(
      rest["mesh_location"], thread, rest.get("source_info"))
  read = lambda key, access: memory.get_buffer_content(key, access, thread, logging_info=info)[0]
  b = read(*_access(b_allocation_key_as_array, b_transforms))
  key, access = _access(acc_allocation_key_as_array, acc_transforms)
  acc = read(key, access)
  memory.store_buffer_content(
      key, access, acc + np.matmul(a, b, dtype=acc.dtype),  # pyright: ignore[reportArgumentType]
      thread, logging_info=info)
  return rest["token"]
