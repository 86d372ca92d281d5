"""Memory of a device, as far as JAX or the operating system tells."""

import os
import sys

import jax


def peak(device: jax.Device) -> int | None:  # pyright: ignore[reportInvalidTypeForm]
  """The most bytes that were in use on a device; on a CPU, by this process."""
  stats = device.memory_stats() or {}
  if device.platform != "cpu":
    return stats.get("peak_bytes_in_use")
  try:
    import resource
  except ImportError:  # Windows
    return None
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
