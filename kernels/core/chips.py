"""Facts about chips, each with its source: the only table of them.

A new chip is one entry here and its block sizes in the ops' `configs.py`. All speeds are nominal.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Network:
  """Links of one chip."""

  inside: float  # bytes/s out of one chip, within a slice or node, over all its links
  between: float  # bytes/s out of one chip, between slices or nodes
  dims: int  # of the torus; each has two of a chip's links. 1 for a switch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """A chip that programs are compiled for."""

  name: str  # as ops, `aot` and `plan` take it
  kind: str  # JAX's name of it
  variants: tuple[str, ...] = ()  # beginnings of the names of others that take its block sizes
  like: str | None = None  # the chip whose block sizes it takes where it has none of its own
  tflops: float  # published, dense bfloat16 with sums in float32, of the chip; NaN of a family
  bandwidth: float  # of the memory, bytes/s, published
  memory: float  # bytes that a program may use; NaN of a family
  network: Network | None  # None where nothing is planned for it

  def entry(self, table: Mapping[Any, Any], *more) -> Any:
    """Its block sizes of a table by (chip, *more), or by chip: else those of what it is like."""
    keys = [(name, *more) if more else name for name in (self.name, self.like or self.name)]
    return table[keys[0] if keys[0] in table else keys[1]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
  """An NVIDIA GPU."""

  capability: tuple[int, int]  # CUDA's compute capability
  multiprocessors: int
  shared_memory: int  # bytes that one block of threads may have
  l2: int  # bytes
  clock: float  # Hz, boost
  device_memory: int  # bytes, as the driver reports it; XLA's memory planning starts from it
  lanes: int = 128  # float32 lanes of a multiprocessor
  threads: int = 2048  # of a multiprocessor

  @property
  def architecture(self) -> str:
    major, minor = self.capability
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
  """A TPU chip."""

  vmem: int  # MiB of one core
  topology: str  # the smallest one that exists
  mxus: int  # of a core
  mxu_dim: int
  mxu_rows: int  # rows of the left operand that an MXU takes in a cycle, bfloat16
  cores: int  # of a chip
  devices: int = 1  # of JAX, in a chip
  delay_slots: int  # bundles after a branch that still run; seen in the compiler's dumps

  @property
  def flops_per_cycle(self) -> int:
    """Of one core."""
    return 2 * self.mxus * self.mxu_dim**2 * self.mxu_rows

  @property
  def clock(self) -> float:
    """Hz: the clock at which the published peak comes out."""
    return self.tflops * 1e12 / (self.flops_per_cycle * self.cores)


# Peak, memory, bandwidth and NVLink, half of both directions: NVIDIA's data sheets of the A100 SXM
# 80 GB, H100 SXM, H200 SXM and HGX B200, and, of the RTX 4090, the white paper of its Ada
# architecture, appendix A; it has no NVLink, but PCIe 4.0 with 16 lanes. Capability and shared
# memory: the table of compute capabilities in the CUDA C++ Programming Guide. Multiprocessors, L2
# cache, clock and the driver's memory: NVIDIA's white papers of Ampere, Ada and Hopper, and XLA's
# descriptions of devices (xla/tools/hlo_opt/gpu_specs). Between nodes one port for a GPU of
# 400 Gb/s (of an A100 200 Gb/s, as in a DGX A100; of an RTX 4090 100 Gb/s): an assumption.
_GPUS = (
    Gpu(name="a100", kind="NVIDIA A100-SXM4-80GB", variants=("NVIDIA A100",),
        capability=(8, 0), multiprocessors=108, shared_memory=166_912, lanes=64,
        tflops=312, bandwidth=2.039e12, clock=1.41e9, l2=40 * 2**20, memory=80e9,
        device_memory=80 * 2**30, network=Network(300e9, 200e9 / 8, 1)),
    Gpu(name="rtx4090", kind="NVIDIA GeForce RTX 4090",
        capability=(8, 9), multiprocessors=128, shared_memory=101_376, threads=1536,
        tflops=165.2, bandwidth=1.008e12, clock=2.52e9, l2=72 * 2**20, memory=24e9,
        device_memory=24 * 2**30, network=Network(31.5e9, 100e9 / 8, 1)),
    Gpu(name="h100", kind="NVIDIA H100 80GB HBM3", variants=("NVIDIA H100",),
        capability=(9, 0), multiprocessors=132, shared_memory=232_448, tflops=989,
        bandwidth=3.35232e12, clock=1.98e9, l2=50 * 2**20, memory=80e9, device_memory=80 * 2**30,
        network=Network(450e9, 400e9 / 8, 1)),
    Gpu(name="h200", kind="NVIDIA H200",
        capability=(9, 0), multiprocessors=132, shared_memory=232_448, tflops=989,
        bandwidth=4.8e12, clock=1.98e9, l2=60 * 2**20, memory=141e9,
        device_memory=150_000_000_000, network=Network(450e9, 400e9 / 8, 1)),
    Gpu(name="b200", kind="NVIDIA B200",
        capability=(10, 0), multiprocessors=148, shared_memory=232_448, tflops=2250,
        bandwidth=8e12, clock=1.965e9, l2=132_644_864, memory=180e9,
        device_memory=190_000_000_000, network=Network(900e9, 400e9 / 8, 1)),
)

# Peak, bandwidth and links: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. Those pages give what
# a chip sends and receives together; half of it is here. A v4's links are from "TPU v4: An
# Optically Reconfigurable Supercomputer" (arXiv:2304.01433), six of 50 GB/s; between slices it has
# the 50 Gb/s of a v5p, an assumption; a v5e two 100 Gb/s ports for eight chips. Memory: what XLA's
# compiler lets a program use; compared with its own limit on a v4 alone. MXUs: the same pages.
# VMEM, what an MXU takes in a cycle and delay slots: libtpu's limits and dumps. No plan is made for
# a tpu7x, whose chips are two devices each.
_TPUS = (
    Tpu(name="v4", kind="TPU v4", vmem=16, topology="v4:2x2x1",
        mxus=4, mxu_dim=128, mxu_rows=1, cores=2, delay_slots=1, tflops=275, bandwidth=1.228e12,
        memory=30.75 * 2**30, network=Network(300e9, 50e9 / 8, 3)),
    Tpu(name="v5e", kind="TPU v5 lite", variants=("TPU v5e",), vmem=128,
        topology="v5e:2x2", mxus=4, mxu_dim=128, mxu_rows=1, cores=1, delay_slots=4, tflops=197,
        bandwidth=0.819e12, memory=15.75 * 2**30, network=Network(200e9, 25e9 / 8, 2)),
    Tpu(name="v5p", kind="TPU v5", vmem=64, topology="v5p:2x2x1",
        mxus=4, mxu_dim=128, mxu_rows=1, cores=2, delay_slots=4, tflops=459, bandwidth=2.765e12,
        memory=95.74 * 2**30, network=Network(600e9, 50e9 / 8, 3)),
    Tpu(name="v6e", kind="TPU v6 lite", variants=("TPU v6e",), vmem=128,
        topology="v6e:2x2", mxus=2, mxu_dim=256, mxu_rows=2, cores=1, delay_slots=4, tflops=918,
        bandwidth=1.64e12, memory=31.25 * 2**30, network=Network(400e9, 100e9 / 8, 2)),
    Tpu(name="tpu7x", kind="TPU7x", variants=("TPU v7x",), vmem=64,
        topology="tpu7x:2x2x1", mxus=2, mxu_dim=256, mxu_rows=2, cores=2, devices=2, delay_slots=6,
        tflops=2307, bandwidth=7.38e12, memory=192 * 2**30, network=None),
)

CHIPS: dict[str, Gpu | Tpu] = {chip.name: chip for chip in (*_GPUS, *_TPUS)}

# A GPU without an entry takes the block sizes of one whose tensor cores Triton programs alike and
# whose shared memory is no larger: that of the CUDA guide's table is 99 KiB for 8.6, 8.9 and 12.x,
# 163 KiB for 8.0 and 8.7, 227 KiB for 9.0 to 11.0. The consumer Blackwell of 12.x has neither
# tcgen05 nor wgmma, so that it is programmed like 8.9. Before 8.0 there is no bfloat16 for tensor
# cores, and Triton compiles for none of them.
_FAMILIES = {
    (8, 0): "a100",  # A30
    (8, 6): "rtx4090",  # RTX 3090, A10, A40, RTX A6000
    (8, 7): "a100",  # Orin
    (8, 9): "rtx4090",  # L4, L40S, RTX 4080, RTX 6000 Ada
    (9, 0): "h100",  # GH200
    (10, 0): "b200",  # GB200
    (10, 3): "b200",  # B300, GB300
    (11, 0): "b200",  # Thor
    (12, 0): "rtx4090",  # RTX 5090, RTX PRO 6000 Blackwell
    (12, 1): "rtx4090",  # GB10
}


def _family(capability: tuple[int, int], like: Gpu) -> Gpu:
  """Any GPU of a compute capability: what is not known of it is as of the one that it is like."""
  name = "sm_{}{}".format(*capability)
  return dataclasses.replace(
      like, name=name, kind=f"NVIDIA {name}", variants=(), like=like.name,
      capability=capability, tflops=math.nan, memory=math.nan, network=None)


FAMILIES: dict[str, Gpu] = {
    gpu.name: gpu for gpu in (
        _family(capability, gpu) for gpu in _GPUS for capability, like in _FAMILIES.items()
        if like == gpu.name)}

# All that a program can be compiled for.
ALL: dict[str, Gpu | Tpu] = CHIPS | FAMILIES
GPUS: dict[str, Gpu] = {name: chip for name, chip in ALL.items() if isinstance(chip, Gpu)}
TPUS: dict[str, Tpu] = {name: chip for name, chip in ALL.items() if isinstance(chip, Tpu)}
HOPPER = tuple(name for name, gpu in GPUS.items() if gpu.capability == (9, 0))


def gpu(chip: str | None) -> Gpu:
  """A GPU by its name; for None, the one with the least shared memory, whose kernels fit any."""
  return GPUS[chip or "rtx4090"]


def hopper(chip: str | None) -> Gpu:
  """A Hopper GPU by its name; an h200 for None."""
  return GPUS[chip or "h200"]


def tpu(chip: str | None) -> Tpu:
  """A TPU by its name; for None a v4, which has the least VMEM."""
  return TPUS[chip or "v4"]


def name(kind: str, capability: str | None = None) -> str | None:
  """Our name of a chip.

  Args:
    kind: JAX's name of it.
    capability: JAX's compute capability of a GPU, such as "8.6", if it is known.

  Returns:
    A name in CHIPS; for another GPU that of its compute capability, such as "sm_86", be it in
    FAMILIES or not; or None.
  """
  known = [(len(variant), chip.name) for chip in CHIPS.values()
           for variant in (chip.kind, *chip.variants)
           if kind.lower().startswith(variant.lower())]
  if known:
    return max(known)[1]
  for family in FAMILIES.values():  # where one is compiled for that is not there
    if kind == family.kind:
      return family.name
  numbers = re.fullmatch(r"(\d+)\.(\d+)", capability or "")  # not AMD's "gfx942"
  return f"sm_{numbers[1]}{numbers[2]}" if numbers else None


def peak(kind: str) -> float | None:
  """Published FLOP/s of one JAX device, by JAX's name of it; those of a variant are others."""
  chip = next((chip for chip in CHIPS.values() if chip.kind == kind), None)
  return chip and chip.tflops * 1e12 / (chip.devices if isinstance(chip, Tpu) else 1)
