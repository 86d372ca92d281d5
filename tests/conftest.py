"""Settings that every test shares."""

import gc
import os
import resource
import sys
from pathlib import Path

import hypothesis
import pytest

# Python's own compiler ran in each worker (2.8 s) and in each process that tests start (0.15 s)
# where the environment says to keep nothing, as images of containers often do.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Most of the time goes into compiling programs that run once: a quarter less of it (generation,
# block and attention on a CPU, 195 s of processor time with and 148 s without optimization).
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Programs say nowhere which line they come from: 2 to 6% less of all time.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# Meshes are tested on eight CPU devices; JAX reads this when it is first used.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import jax  # noqa: E402  (after the settings that it reads)

import palm_haiku  # noqa: E402, F401  (leaves out platforms without a chip)
from palm_haiku.kernels.aot import server  # noqa: E402
from palm_haiku.kernels.interpreters import triton  # noqa: E402

# The same for processes that tests start, which do not import this project first.
if jax.config.jax_platforms:
  os.environ["JAX_PLATFORMS"] = jax.config.jax_platforms

# Cycles in what JAX keeps were looked for so often that it took 3% of all time.
gc.set_threshold(20_000, 50, 100)

# Without a search for a smaller example, which takes minutes: messages have the case.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, database=None,
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("default")


# Files are dealt to workers whole, in this order, the longest first; the rest follow.
LONGEST = (
    "kernels/attention/test_mosaic_gpu.py", "kernels/attention/test_mosaic_tpu.py",
    "kernels/decode/test_mosaic_gpu.py", "test_sharding.py", "test_generate.py",
    "kernels/parallel_block/test_mosaic_gpu.py", "kernels/parallel_block/test_fused.py",
    "benchmarks/test_commands.py", "kernels/aot/test_report.py", "test_hub.py", "test_train.py",
    "test_model.py", "test_distributed.py", "test_plan.py", "test_evaluate.py", "test_cli.py",
    "kernels/attention/test_triton_aot.py",
    "kernels/attention/test_fused.py", "kernels/decode/test_mosaic_tpu.py",
    "kernels/attention/test_ring.py", "kernels/attention/test_triton.py", "test_examples.py",
    "kernels/cross_entropy/test_fused.py", "kernels/cross_entropy/test_mosaic_gpu.py",
    "kernels/decode/test_triton.py", "test_planted.py", "test_hub_commands.py", "test_demo.py")


def pytest_collection_modifyitems(items):
  order = {Path(__file__).parent / name: n for n, name in enumerate(LONGEST)}
  assert all(path.exists() for path in order), "conftest's LONGEST names files that are gone"
  items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_make_parametrize_id(val, argname):
  """Names bytes after their argument: gzip's hold the time, and workers must agree on names."""
  return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True, scope="module")
def _no_programs_of_other_files():
  """Frees a file's compiled programs at its end: a worker grew to 5 GB."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True, scope="session")
def _processes_end():
  """Ends the processes of interpreters and compilers, so that their coverage is counted."""
  yield
  triton.stop()
  server.stop()


@pytest.fixture
def limit_files():
  """Sets the bytes that a file may grow to, as on a disk that has no more room; None for any."""
  limits, kept = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode

  def limit(num_bytes):
    # Of a module that is imported now, Python would keep the beginning of its bytecode.
    sys.dont_write_bytecode = kept if num_bytes is None else True
    resource.setrlimit(
        resource.RLIMIT_FSIZE, limits if num_bytes is None else (num_bytes, limits[1]))

  yield limit
  limit(None)
