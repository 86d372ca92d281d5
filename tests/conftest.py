"""Settings that every test shares."""

import glob
import os

import hypothesis

# The wheels for ahead-of-time compilation make JAX look for chips; without one, it need not.
if not glob.glob("/dev/nvidia[0-9]*") and not glob.glob("/dev/accel*"):
  os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compiling programs that run once: a quarter less of it (generation,
# block and attention on a CPU, 195 s of processor time with and 148 s without optimization).
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Meshes are tested on eight CPU devices; JAX reads this when it is first used.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("default")
