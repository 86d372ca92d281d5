import glob
import importlib.metadata
import sys
import types

import jax
import pytest

from palm_haiku import platforms
from palm_haiku.kernels.core import plugins as jax_plugins
from tests import short_runs

CHIPS = ["/dev/nvidia0", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvmap", "/dev/dxg", "/dev/kfd",
         "/dev/accel0", "/dev/vfio/0"]


@pytest.fixture
def bare(monkeypatch):
  """Makes this a machine with no chip, JAX's own plugins and nothing set."""
  monkeypatch.setattr(glob, "glob", lambda pattern: [])
  monkeypatch.setattr(platforms, "_has_cuda_driver", lambda: False)
  monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins("xla_cuda13"))
  for name in ("PJRT_NAMES_AND_LIBRARY_PATHS", *platforms._TPU_HOST):
    monkeypatch.delenv(name, raising=False)
  before = jax.config.jax_platforms
  jax.config.update("jax_platforms", None)
  yield
  jax.config.update("jax_platforms", before)


def plugins(*names):
  return [importlib.metadata.EntryPoint(name, f"jax_plugins.{name}", "jax_plugins")
          for name in names]


def chosen():
  platforms.leave_out_absent()
  return jax.config.jax_platforms


def test_without_a_chip_the_cpu_alone_is_started(bare):
  assert chosen() == "cpu"


@pytest.mark.parametrize("path", CHIPS)
def test_a_device_file_changes_nothing(bare, monkeypatch, path):
  monkeypatch.setattr(glob, "glob", lambda pattern: glob.fnmatch.filter([path], pattern))
  assert chosen() is None


@pytest.mark.parametrize("name", platforms._TPU_HOST)
def test_a_tpu_host_changes_nothing(bare, monkeypatch, name):
  monkeypatch.setenv(name, "0")
  assert chosen() is None


def test_a_driver_or_another_plugin_changes_nothing(bare, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(platforms, "_has_cuda_driver", lambda: True)
    assert chosen() is None
  with monkeypatch.context() as patch:
    patch.setenv("PJRT_NAMES_AND_LIBRARY_PATHS", "mine:/lib/mine.so")
    assert chosen() is None
  monkeypatch.setattr(importlib.metadata, "entry_points",
                      lambda group: plugins("xla_cuda13", "metal_plugin"))
  assert chosen() is None


@pytest.mark.parametrize("setting", ["", "cpu", "cuda,cpu"])
def test_what_is_set_stays(bare, setting):
  jax.config.update("jax_platforms", setting)
  assert chosen() == setting


@pytest.mark.skipif(platforms._chip_possible(), reason="JAX looks for the chip of this machine")
def test_nothing_is_printed_where_jax_starts():
  assert short_runs.output("-c", "import jax, palm_haiku; print(jax.default_backend())") == "cpu\n"


@pytest.mark.skipif(platforms._chip_possible() or not jax_plugins.installed()
                    or sys.platform != "linux",
                    reason="needs JAX's plugin for CUDA on a Linux machine without a chip")
def test_the_library_of_cuda_is_loaded_to_compile_and_not_before():
  said = short_runs.output("-c", """
import jax, palm_haiku
from palm_haiku.kernels.aot import targets
loaded = lambda: "xla_cuda_plugin" in open("/proc/self/maps").read()
print(jax.devices()[0].platform, loaded(), targets.devices("h100")[0].platform, loaded())
""")
  assert said == "cpu False gpu True\n"


@pytest.mark.parametrize("asked, before, after, times", [
    ("cpu", False, False, 0), ("cpu", True, False, 1), ("cpu", False, True, 1),
    ("cuda,cpu", False, False, 1), (None, False, False, 1)])
def test_a_plugin_is_postponed_until_it_is_needed(asked, before, after, times, monkeypatch):
  calls = []
  module = types.SimpleNamespace(initialize=lambda: calls.append(1))
  monkeypatch.setitem(sys.modules, "a_plugin", module)
  monkeypatch.setattr(jax_plugins, "installed", lambda: ["a_plugin"])
  monkeypatch.setattr(jax_plugins, "_wanted", False)
  monkeypatch.setattr(jax_plugins, "_postponed", [])
  jax_plugins.postpone()
  jax_plugins.postpone()
  if before:
    jax_plugins.load()
  was = jax.config.jax_platforms
  jax.config.update("jax_platforms", asked)
  try:
    module.initialize()  # as JAX does when it first computes
  finally:
    jax.config.update("jax_platforms", was)
  if after:
    jax_plugins.load()
    jax_plugins.load()
  assert len(calls) == times
