"""The chips that a program can be compiled for without having one, as their compilers see them."""

import contextlib
import importlib.util
import os
import re

from ..core import chips, plugins
from ..core.chips import Gpu, Tpu
from .errors import AotError, missing_wheel


def target_config(gpu: Gpu) -> str:
  """XLA's `GpuTargetConfigProto` in text form."""
  major, minor = gpu.capability
  # The driver keeps 1 KiB of a multiprocessor's shared memory for itself.
  fields = dict(
      threads_per_block_limit=1024, threads_per_warp=32, shared_memory_per_block=49152,
      shared_memory_per_core=gpu.shared_memory + 1024,
      shared_memory_per_block_optin=gpu.shared_memory, threads_per_core_limit=gpu.threads,
      core_count=gpu.multiprocessors, fpus_per_core=gpu.lanes,
      block_dim_limit_x=2**31 - 1, block_dim_limit_y=65535, block_dim_limit_z=65535,
      memory_bandwidth=int(gpu.bandwidth), l2_cache_size=gpu.l2,
      clock_rate_ghz=gpu.clock / 1e9, device_memory_size=gpu.device_memory,
      registers_per_core_limit=65536, registers_per_block_limit=65536)
  body = "\n".join(f"  {key}: {value}" for key, value in fields.items())
  return (f"gpu_device_info {{\n{body}\n"
          f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
          'platform_name: "CUDA"\n'
          "dnn_version_info { major: 9 minor: 10 }\n"
          f'device_description_str: "{gpu.kind}"\n')


def chip(target: str) -> Gpu | Tpu:
  """The chip of a target's name ("v4:12x16x16*2" names a v4)."""
  name = target.partition(":")[0]
  if name not in chips.ALL:
    raise AotError(f"no target is called {target!r}; there are {', '.join(chips.ALL)}, "
                   "and TPU pods such as v5e:16x16 or v4:12x16x16*2 (two slices)")
  return chips.ALL[name]


def slice_shape(what: Tpu, written: str) -> tuple[int, ...] | None:
  """The chips of a TPU slice by dimension: of "2x4", "8" or "2x2x1"; None if it is no shape."""
  dims = what.topology.partition(":")[2].count("x") + 1
  if not re.fullmatch("[0-9]{1,6}(x[0-9]{1,6})*", written):
    return None
  sizes = tuple(map(int, written.split("x")))
  if len(sizes) == 1:
    (size,) = sizes
    if size.bit_count() != 1:
      return None
    power = size.bit_length() - 1
    # Four are the chips of one host.
    return (2, 2, 1)[:dims] if size == 4 else tuple(
        sorted(2 ** ((power + i) // dims) for i in range(dims)))
  sizes += (1,) * (dims - len(sizes))
  while len(sizes) > dims and sizes[-1] == 1:
    sizes = sizes[:-1]
  return sizes if len(sizes) == dims and 0 not in sizes else None


def platform(target: str) -> str:
  """The lowering platform of a target: "cuda" or "tpu"."""
  return "cuda" if isinstance(chip(target), Gpu) else "tpu"


def environment(target: str) -> dict[str, str]:
  """Variables that a process that compiles for `target` must set before it imports JAX."""
  wanted = {"JAX_PLATFORMS": "cpu"}  # the plugins' own start looks for a chip
  if platform(target) == "tpu":
    wanted |= {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # libtpu locks the chip that it would run on. There is none, so let several compile.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  return wanted


@contextlib.contextmanager
def _environment_of(target):
  """Sets what `target` needs where it is unset, and takes it back.

  Processes started later would otherwise take this machine for a TPU host.
  """
  added = {key: value for key, value in environment(target).items() if key not in os.environ}
  os.environ.update(added)
  try:
    yield
  finally:
    for key in added:
      del os.environ[key]


def devices(target: str) -> list:
  """The compile-only devices of a target: one for a GPU, eight for "h100:8".

  Raises:
    AotError: an unknown target, or the compiler's wheel is not installed.
  """
  from jax.experimental import topologies

  what = chip(target)
  if isinstance(what, Gpu):
    count = re.fullmatch(r"\w+(?::([1-9]\d{0,3}))?", target)
    if not count:
      raise AotError(f"several GPUs are CHIP:COUNT, such as h100:8; got {target!r}")
    if not plugins.installed():
      raise missing_wheel("XLA's CUDA compiler", "'jax[cuda13-local]'")
    plugins.load()
    try:
      return list(topologies.get_topology_desc(
          platform="cuda", topology_name=target, target_config=target_config(what),
          topology=f"1x1x{count[1] or 1}").devices)
    except Exception as error:  # NotImplementedError: the plugin was not loaded.
      message = (f"XLA's CUDA compiler does not start for {target!r}; set JAX_PLATFORMS=cpu before "
                 f"jax is imported, as targets.environment says: {error!r}")
      raise AotError(message[:300]) from None

  if not importlib.util.find_spec("libtpu"):
    raise missing_wheel("the TPU compiler", "libtpu")
  options, name = {}, what.topology
  if ":" in target:
    written, star, slices = target.partition(":")[2].partition("*")
    shape = slice_shape(what, written)
    if not shape or star and not re.fullmatch("[1-9][0-9]{0,5}", slices):
      raise AotError(f"a TPU pod is written like {what.topology}, with *N for N slices; got "
                     f"{target!r}")
    name = f"{what.name}:{'x'.join(map(str, shape))}"
    if star:
      # A slice is joined to the others host by host; 2x2x1 chips make a host.
      options = {"num_slices": int(slices), "chips_per_host_bounds": (2, 2, 1)}
    if target.startswith("v4:"):
      options["chip_config_name"] = "megacore"  # both cores of a chip as one device
  try:
    with _environment_of(target):
      return list(topologies.get_topology_desc(
          platform="tpu", topology_name=name, **options).devices)
  except Exception as error:
    raise AotError(f"libtpu knows no topology {target!r}: {error}") from None
