"""Memory of a device, as far as JAX or the operating system tells."""

import os
import sys

import jax


def peak(device: jax.Device) -> int | None:  # pyright: ignore[reportInvalidTypeForm]
  """The most bytes that were in use on a device; on a CPU, by this process."""
  stats = device.memory_stats() or {}
  return of_process() if device.platform == "cpu" else stats.get("peak_bytes_in_use")


def of_process() -> int | None:
  """The most bytes that this process has had in memory."""
  try:
    with open("/proc/self/status") as status:
      return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
  except (OSError, StopIteration):  # not Linux
    pass
  try:
    import resource
  except ImportError:  # Windows
    return None
  # On Linux this would be the memory of the process that started this one, if that had more.
  unit = 1 if sys.platform == "darwin" else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def total(device: jax.Device) -> int | None:  # pyright: ignore[reportInvalidTypeForm]
  """The bytes that a device has; on a CPU, this machine."""
  if device.platform != "cpu":
    return (device.memory_stats() or {}).get("bytes_limit")
  try:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (AttributeError, ValueError, OSError):  # Windows
    return None
