"""Settings that every test shares."""

import os

import hypothesis

# Most of the time goes into compiling programs that run once: a quarter less of it (generation,
# block and attention on a CPU, 195 s of processor time with and 148 s without optimization).
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Meshes are tested on eight CPU devices; JAX reads this when it is first used.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import jax  # noqa: E402  (after the settings that it reads)

import palm_haiku  # noqa: E402, F401  (leaves out platforms without a chip)

# The same for processes that tests start, which do not import this project first.
if jax.config.jax_platforms:
  os.environ["JAX_PLATFORMS"] = jax.config.jax_platforms

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("default")
