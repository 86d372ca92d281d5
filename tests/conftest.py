"""Settings that every test shares."""

import os

import hypothesis
import numpy as np

# Most of the time goes into compiling programs that run once: a quarter less of it (generation,
# block and attention on a CPU, 195 s of processor time with and 148 s without optimization).
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Meshes are tested on eight CPU devices; JAX reads this when it is first used.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import jax  # noqa: E402  (after the settings that it reads)

from jax._src import callback as _callback  # noqa: E402
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as _gpu_memory  # noqa: E402

import palm_haiku  # noqa: E402, F401  (leaves out platforms without a chip)

# The same for processes that tests start, which do not import this project first.
if jax.config.jax_platforms:
  os.environ["JAX_PLATFORMS"] = jax.config.jax_platforms

# Without a search for a smaller example, which takes minutes: messages have the case.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("default")


def _with_numpy(*args, callback, **_):
  return jax.tree.map(np.asarray, callback(*map(np.array, args)))


# Pallas's interpreters call Python at each access to memory, with arrays that JAX first puts on a
# device: that is four fifths of a run. They work as well on numpy's.
_callback.io_callback_impl = _with_numpy
_gpu_memory._to_int = lambda x: x if isinstance(x, jax.core.Tracer) else int(x)
