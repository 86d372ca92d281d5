"""The chips that a program can be compiled for without having one."""

import dataclasses
import importlib.util
import os
import re

from .errors import AotError, missing_wheel


@dataclasses.dataclass(frozen=True)
class Gpu:
  """An NVIDIA GPU as XLA's target configuration describes it."""

  name: str
  capability: tuple[int, int]
  multiprocessors: int
  shared_per_block: int  # bytes, opted in
  l2: int  # bytes
  bandwidth: float  # bytes/s, published
  clock: float  # Hz, boost
  memory: int  # bytes
  tflops: float  # published, dense bf16
  lanes: int = 128  # float32 lanes per multiprocessor

  @property
  def architecture(self) -> str:
    major, minor = self.capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")

  def target_config(self) -> str:
    """XLA's `GpuTargetConfigProto` in text form."""
    major, minor = self.capability
    # The driver keeps 1 KiB of a multiprocessor's shared memory for itself.
    fields = dict(
        threads_per_block_limit=1024, threads_per_warp=32, shared_memory_per_block=49152,
        shared_memory_per_core=self.shared_per_block + 1024,
        shared_memory_per_block_optin=self.shared_per_block, threads_per_core_limit=2048,
        core_count=self.multiprocessors, fpus_per_core=self.lanes,
        block_dim_limit_x=2**31 - 1, block_dim_limit_y=65535, block_dim_limit_z=65535,
        memory_bandwidth=int(self.bandwidth), l2_cache_size=self.l2,
        clock_rate_ghz=self.clock / 1e9, device_memory_size=self.memory,
        registers_per_core_limit=65536, registers_per_block_limit=65536)
    body = "\n".join(f"  {key}: {value}" for key, value in fields.items())
    return (f"gpu_device_info {{\n{body}\n"
            f"  cuda_compute_capability {{ major: {major} minor: {minor} }}\n}}\n"
            'platform_name: "CUDA"\n'
            "dnn_version_info { major: 9 minor: 10 }\n"
            f'device_description_str: "{self.name}"\n')


@dataclasses.dataclass(frozen=True)
class Tpu:
  """A TPU chip: what its compiler schedules for, and the peak that utilisation is counted from."""

  topology: str  # the smallest one that exists
  mxus: int  # per core
  mxu_dim: int
  mxu_rows: int  # rows of the left operand that an MXU takes per cycle, bfloat16
  cores: int  # per chip
  delay_slots: int  # bundles after a branch that still run; seen in the compiler's dumps
  tflops: float  # published, bf16, per chip
  bandwidth: float  # bytes/s, published

  @property
  def flops_per_cycle(self) -> int:
    """Of one core."""
    return 2 * self.mxus * self.mxu_dim**2 * self.mxu_rows

  @property
  def clock(self) -> float:
    """Hz: the clock at which the published peak comes out."""
    return self.tflops * 1e12 / (self.flops_per_cycle * self.cores)


TARGETS: dict[str, Gpu | Tpu] = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 41943040, 2.039e12, 1.41e9,
                85899345920, 312, lanes=64),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 52428800, 3.35232e12, 1.98e9,
                85899345920, 989),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 232448, 62914560, 4.8e12, 1.98e9, 150000000000, 989),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 232448, 132644864, 8e12, 1.965e9, 190000000000, 2250),
    "v4": Tpu("v4:2x2x1", 4, 128, 1, 2, 1, 275, 1.228e12),
    "v5e": Tpu("v5e:2x2", 4, 128, 1, 1, 4, 197, 0.819e12),
    "v5p": Tpu("v5p:2x2x1", 4, 128, 1, 2, 4, 459, 2.765e12),
    "v6e": Tpu("v6e:2x2", 2, 256, 2, 1, 4, 918, 1.64e12),
    "tpu7x": Tpu("tpu7x:2x2x1", 2, 256, 2, 2, 6, 2307, 7.38e12),
}


def chip(target: str) -> Gpu | Tpu:
  """What `TARGETS` holds for the chip of a target's name ("v4:12x16x16*2" names a v4)."""
  name = target.partition(":")[0]
  if name not in TARGETS:
    raise AotError(f"no target is called {target!r}; there are {', '.join(TARGETS)}, "
                   "and TPU pods such as v5e:16x16 or v4:12x16x16*2 (two slices)")
  return TARGETS[name]


def platform(target: str) -> str:
  """The lowering platform of a target: "cuda" or "tpu"."""
  return "cuda" if isinstance(chip(target), Gpu) else "tpu"


def environment(target: str) -> dict[str, str]:
  """What a process that compiles for `target` needs in its environment before it imports JAX."""
  wanted = {"JAX_PLATFORMS": "cpu"}  # the plugins' own start looks for a chip
  if platform(target) == "tpu":
    wanted |= {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        # libtpu locks the chip that it would run on. There is none, so let several compile.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
  return wanted


def devices(target: str) -> list:
  """The compile-only devices of a target, one for a GPU.

  Raises:
    AotError: an unknown target, or the compiler's wheel is not installed.
  """
  from jax.experimental import topologies

  what = chip(target)
  if isinstance(what, Gpu):
    if not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13)
               if importlib.util.find_spec("jax_plugins")):
      raise missing_wheel("XLA's CUDA compiler", "'jax[cuda13-local]'")
    try:
      return list(topologies.get_topology_desc(
          platform="cuda", topology_name=target, target_config=what.target_config(),
          topology="1x1x1").devices)
    except Exception as error:  # NotImplementedError: the plugin was not loaded.
      raise AotError(f"XLA's CUDA compiler does not start for {target!r}: {error!r}"[:300]) from None

  if not importlib.util.find_spec("libtpu"):
    raise missing_wheel("the TPU compiler", "libtpu")
  for key, value in environment(target).items():
    os.environ.setdefault(key, value)
  options, name = {}, what.topology
  if ":" in target:
    shape = re.fullmatch(r"\w+:(\d+(?:x\d+)*)(?:\*(\d+))?", target)
    if not shape:
      raise AotError(f"a TPU pod is CHIP:AxB or CHIP:AxBxC, with *N for N slices; got {target!r}")
    name = target.partition("*")[0]
    if shape[2]:
      # A slice is joined to the others host by host; 2x2x1 chips make a host.
      options = {"num_slices": int(shape[2]), "chips_per_host_bounds": (2, 2, 1)}
    if target.startswith("v4:"):
      options["chip_config_name"] = "megacore"  # both cores of a chip as one device
  try:
    return list(topologies.get_topology_desc(
        platform="tpu", topology_name=name, **options).devices)
  except Exception as error:
    raise AotError(f"libtpu knows no topology {target!r}: {error}") from None
