"""Reports of compiled programs: figures per kernel, and the problems found."""

import dataclasses

from ..core.chips import Gpu, Tpu
from . import llo, ptxas, sass, times
from .hlo import Buffer
from .targets import chip


@dataclasses.dataclass(frozen=True)
class GpuKernel:
  """A kernel's resources and machine code; `source` is "xla", "mosaic_gpu" or "triton".

  For XLA's own kernels, which XLA assembles itself, spills are the bytes of local memory that the
  machine code stores and loads: for the others ptxas says the same figure.
  """

  name: str
  source: str
  resources: ptxas.Resources
  shared_memory: int | None  # bytes; None where the compiler did not say
  code: sass.Function

  @property
  def problems(self) -> list[str]:
    found = []
    if self.resources.spill_stores or self.resources.spill_loads:
      found.append(f"{self.name} spills {self.resources.spill_stores} bytes a thread "
                   f"(loads {self.resources.spill_loads})")
    if self.resources.serialized:
      found.append(f"{self.name} waits after every wgmma: ptxas serialized them")
    if self.resources.waits:
      found.append(f"{self.name} waits for a wgmma where ptxas put it (C7517)")
    return found

  def __str__(self):
    r, lines = self.resources, []
    lines.append(f"{self.name} [{self.source}] {r.registers} registers, "
                 f"spills {r.spill_stores}/{r.spill_loads} bytes, "
                 f"shared memory {'?' if self.shared_memory is None else self.shared_memory}, "
                 f"{r.barriers} barriers, {self.code.instructions} instructions"
                 + (", WGMMA SERIALIZED" if r.serialized else "")
                 + (", WAITS FOR WGMMA INJECTED" if r.waits else ""))
    lines.append(f"    all   {_mix(self.code.mix)}")
    main = self.code.main_loop
    for loop in self.code.tensor_loops or ([main] if main else []):
      mark = "main" if loop == main else "loop"
      lines.append(f"    {mark}  {loop.instructions} at {loop.start:#x}: {_mix(loop.mix)}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class TpuKernel:
  """A kernel's schedule, with how often its parts run as far as it is known.

  `cycles` are those of one call; the program makes `calls`.
  """

  name: str
  schedule: llo.Schedule
  calls: int = 1

  @property
  def cycles(self) -> float:
    return self.schedule.cycles

  @property
  def matrix(self) -> bool:
    """Whether it uses the matrix units at all."""
    return self.schedule.matmul_cycles > 0

  @property
  def problems(self) -> list[str]:
    return []

  def __str__(self):
    s = self.schedule
    lines = [f"{self.name} {f'{self.calls} times, ' if self.calls > 1 else ''}"
             f"{s.root.end} bundles, {'at least ' if s.unknown else ''}"
             f"{s.cycles:.0f} cycles, busy: "
             + " ".join(f"{slot} {100 * s.busy(slot):.1f}%" for slot in
                        ("MATMUL", "VALU", "EUP", "XLU", "VLOAD", "VSTORE"))]
    lines.append(f"    {'region':32}{'bundles':>8}{'runs':>9}{'MXU%':>7}{'VALU%':>7}{'EUP%':>7}"
                 f"{'XLU%':>7}{'spills':>8}{'fills':>8}")

    def show(region, depth):
      if region.bundles > 20 or region.parts:
        where = f"{'  ' * depth}{region.kind} {region.first:#x}-{region.end:#x}"
        uses = "".join(f"{100 * s.fraction(region, slot):7.1f}"
                       for slot in ("MATMUL", "VALU", "EUP", "XLU"))
        spills, fills = s.spills(region)
        lines.append(f"    {where:32}{region.bundles:8d}{region.runs:9.3f}{uses}{spills:8d}"
                     f"{fills:8d}" + ("  <- body" if region is s.body else "")
                     + ("" if region.known else "  <- TRIPS UNKNOWN, counted once"))
      for part in region.parts:
        show(part, depth + 1)

    show(s.root, 0)
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Report:
  """A program compiled for a chip that is not here.

  Attributes:
    target: the chip.
    versions: of jax and of the compilers.
    kernels: in the order of compilation.
    memory: bytes per device: "temp", "argument", "output".
    square: buffers of the size T x S, if that was asked for.
    flops: useful FLOPs of one call, if they were given.
    loops: whether the program has loops around its kernels of which it is not known how often
      they run: they are counted once. On a GPU, whether it has any.
    traffic: bytes that cross the device's memory in one call; see `hlo.traffic`.
  """

  target: str
  versions: dict[str, str]
  kernels: tuple[GpuKernel | TpuKernel, ...]
  memory: dict[str, int]
  square: tuple[Buffer, ...]
  flops: float | None = None
  loops: bool = False
  traffic: int = 0

  @property
  def chip(self) -> Gpu | Tpu:
    return chip(self.target)

  @property
  def problems(self) -> list[str]:
    """Problems that keep a kernel from shipping, one line each: spills, serialized wgmma, T x S."""
    found = [problem for kernel in self.kernels for problem in kernel.problems]
    return found + [f"{buffer} is as large as T x S ({buffer.bytes} bytes)"
                    for buffer in self.square]

  def kernels_named(self, part: str) -> list[GpuKernel | TpuKernel]:
    return [kernel for kernel in self.kernels if part in kernel.name]

  def seconds(self, part: str = "") -> float | None:
    """TPU: the issue cycles of the kernels whose name holds `part`, at the published clock.

    None where a kernel has a loop of unknown trips: say them with `Steps`.
    """
    kernels = [k for k in self.kernels_named(part) if isinstance(k, TpuKernel)]
    if not isinstance(self.chip, Tpu) or any(k.schedule.unknown for k in kernels):
      return None
    return sum(k.cycles * k.calls for k in kernels) / self.chip.clock

  def predicted(self, part: str = "") -> times.Prediction | None:
    """TPU: the time of the kernels with matrix work whose name holds `part`, with an error bar.

    None without such kernels, where the chip has no model of one's kind (`times.MODELS`), or where
    a loop's trips are not known.
    """
    seconds, errors = 0.0, []
    for kernel in self.kernels_named(part):
      if isinstance(kernel, TpuKernel) and kernel.matrix:
        model = times.model(self.chip.name, kernel.name)
        if model is None or kernel.schedule.unknown:
          return None
        seconds += model.seconds(kernel.cycles, kernel.schedule.grid[0]) * kernel.calls
        errors.append(model.ninetieth)
    return times.Prediction(seconds, max(errors)) if errors else None

  def utilization(self, part: str = "") -> float | None:
    """TPU: `flops` over what the whole chip could do in `seconds`."""
    seconds = self.seconds(part)
    if not (seconds and self.flops and self.chip.tflops):
      return None
    return self.flops / (seconds * self.chip.tflops * 1e12)

  def __str__(self):
    versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
    lines = [f"{self.target}: {versions}", *map(str, self.kernels)]
    lines.append("memory per device: " + ", ".join(
        f"{kind} {size / 2**20:.2f} MiB" for kind, size in self.memory.items())
                 + f"; {self.traffic / 2**20:.2f} MiB read and written")
    if isinstance(self.chip, Tpu):
      seconds = self.seconds()
      text = f"static estimate: {seconds * 1e6:.1f} us" if seconds else "no estimate"
      if utilization := self.utilization():
        text += f", {100 * utilization:.1f}% of the chip's peak does useful work"
      if not seconds:
        text += ": say how often the loops marked above run (Steps)"
      elif self.loops:
        text += " with loops counted once that the program does not count itself"
      lines.append(text + " (issue cycles only: no wait for memory is in it)" * bool(seconds))
      if predicted := self.predicted():
        lines.append(f"predicted time of the kernels with matrix work: {predicted}")
    lines += [f"PROBLEM: {problem}" for problem in self.problems]
    return "\n".join(lines)


def _mix(mix):
  return " ".join(f"{name} {count}" for name, count in
                  sorted(mix.items(), key=lambda item: (item[0] not in sass.TENSOR, -item[1])))
