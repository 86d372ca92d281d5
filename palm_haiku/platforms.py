"""The platforms that JAX starts.

Wheels that compile for GPUs and TPUs (the extras aot, cuda and tpu) make JAX look for those chips
when it first computes, and on a machine without them it prints the errors of both.
"""

import ctypes
import glob
import importlib.metadata
import os
import pkgutil

import jax

from palm_haiku.kernels.core import plugins

# Device files on Linux of the chips of JAX's own plugins. WSL has its GPUs behind /dev/dxg.
_DEVICES = (
    "/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap", "/dev/dxg",  # NVIDIA, Jetson, WSL
    "/dev/kfd",  # AMD
    "/dev/accel*", "/dev/vfio/[0-9]*",  # TPU
)
_TPU_HOST = ("TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE",
             "CLOUD_TPU_TASK_ID", "JAX_FORCE_TPU_INIT")
_PLUGINS = ("xla_cuda", "xla_rocm")


def leave_out_absent() -> None:
  """Has JAX start its CPU platform alone, if no other can have a chip here.

  What JAX_PLATFORMS or `jax_platforms` names stays. Where it is the CPU platform alone, CUDA's
  compiler loads when something is compiled ahead of time.
  """
  if jax.config.jax_platforms is None and not _chip_possible():
    jax.config.update("jax_platforms", "cpu")
  if jax.config.jax_platforms == "cpu":
    plugins.postpone()


def _chip_possible() -> bool:
  return (any(map(glob.glob, _DEVICES)) or any(name in os.environ for name in _TPU_HOST)
          or _has_other_plugin() or _has_cuda_driver())


def _has_other_plugin() -> bool:
  """Whether JAX would load a plugin for chips that `_DEVICES` does not list, such as Metal."""
  if "PJRT_NAMES_AND_LIBRARY_PATHS" in os.environ:
    return True
  modules = [entry.value for entry in importlib.metadata.entry_points(group="jax_plugins")]
  try:
    import jax_plugins
    modules += [module.name for module in pkgutil.iter_modules(jax_plugins.__path__)]
  except ImportError:
    pass
  return any(not module.rpartition(".")[2].startswith(_PLUGINS) for module in modules)


def _has_cuda_driver() -> bool:
  try:
    ctypes.CDLL("libcuda.so.1")
  except OSError:
    return False
  return True
