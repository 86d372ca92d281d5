"""The Mosaic GPU interpreter, with what it lacks: Hopper kernels on the CPU, races found."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from palm_haiku.kernels.hopper import tiles


class Race(AssertionError):
  """Two accesses to one place, one of them a write, that no barrier orders."""


@contextlib.contextmanager
def interpret(detect_races: bool = True, products: bool = False):
  """Runs the Hopper kernels called inside on the CPU; raises `Race` if there was one.

  Args:
    detect_races: whether to look for them.
    products: look at what wgmma reads as well, which the interpreter does not. For kernels that
      commit before they refill a tile: the arrival of another warpgroup is not seen as its order.
  """
  # With few threads for copies, waiting for one would order others that had the same thread.
  params = plgpu.InterpretGPUParams(
      detect_races=detect_races, num_tma_threads_per_device=24 if products else 5)
  gpu_callbacks.reset_gpu_interpret_mode_state()
  unoptimized = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)  # they would cost more than they save
  with (mock.patch.object(gpu_callbacks, "wgmma", functools.partial(_wgmma, products)),
        mock.patch.object(tiles, "product_onto", _product_onto),
        plgpu.force_gpu_interpret_mode(params)):
    try:
      yield
    except Exception as e:
      # 0.12 raises where 0.11 sets a flag; the callback's error arrives wrapped.
      if "RACE DETECTED" in str(e):
        raise Race(str(e)) from None
      raise
    finally:
      jax.config.update("jax_disable_most_optimizations", unoptimized)
      races = gpu_callbacks._races
      found = races is not None and races.races_found
      gpu_callbacks.reset_gpu_interpret_mode_state()
  if found:
    raise Race("the interpreter found a race")


_wgmma_of_refs = gpu_callbacks.wgmma


def _check_read(key, transforms, rest):
  """That an operand was there before the product began."""
  memory, thread = gpu_callbacks._get_shared_memory(), rest["thread"]
  if memory.detect_races:
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    where = memory.access(
        key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
    gpu_callbacks.get_races().check_read(
        thread, memory.incr_clock(thread).generic_clock, key, where,
        source_info=rest.get("source_info"))


def _wgmma(check, *, a_allocation_key_as_array, acc_allocation_key_as_array, acc_transforms,
           b_allocation_key_as_array, b_transforms, **rest):
  """`gpu_callbacks.wgmma`, which takes the left operand from shared memory only."""
  a = np.asarray(a_allocation_key_as_array)
  if check:
    _check_read(b_allocation_key_as_array, b_transforms, rest)
    if a.ndim == 1:
      _check_read(a_allocation_key_as_array, rest["a_transforms"], rest)
  if a.ndim == 1:
    return _wgmma_of_refs(
        a_allocation_key_as_array=a_allocation_key_as_array, acc_transforms=acc_transforms,
        acc_allocation_key_as_array=acc_allocation_key_as_array, b_transforms=b_transforms,
        b_allocation_key_as_array=b_allocation_key_as_array, **rest)
  memory, thread = gpu_callbacks._get_shared_memory(), rest["thread"]
  info = gpu_callbacks.memory.GPULoggingInfo(
      rest["mesh_location"], thread, rest.get("source_info"))

  def read(key, transforms):
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    where = memory.access(
        key, jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms)))
    return key, where, memory.get_buffer_content(key, where, thread, logging_info=info)[0]

  _, _, b = read(b_allocation_key_as_array, b_transforms)
  key, where, acc = read(acc_allocation_key_as_array, acc_transforms)
  memory.store_buffer_content(
      key, where, acc + np.matmul(a, b, dtype=acc.dtype), thread, logging_info=info)
  return rest["token"]


def _product_onto(start, a, b):
  """The interpreter has no `pl.run_state`: an accumulator can't start from a value."""
  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return start + pl.run_scoped(run, plgpu.ACC(start.shape, jnp.float32))
