"""Settings that every test shares."""

import glob
import os

import hypothesis

# The wheels for ahead-of-time compilation make JAX look for chips; without one, it need not.
if not glob.glob("/dev/nvidia[0-9]*") and not glob.glob("/dev/accel*"):
  os.environ["JAX_PLATFORMS"] = "cpu"

hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("default")
