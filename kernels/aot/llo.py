"""LLO, the TPU compiler's last form: VLIW bundles, the loops they make, and the cycles they take.

One bundle issues per cycle, an empty one too. So the bundles of a loop's body times its trips are
the cycles of the core's issue slots. What waits for memory (DMA, instruction fetch, bank
conflicts) and what launches the kernel is not in them: they rank inner loops. `times` makes times
of them for the kinds of kernels that were calibrated.
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence

from .errors import UnknownDump
from .targets import Tpu

# The register allocator's output, before empty bundles are folded into delays.
_BUNDLES = re.compile(r"(\d+)-(.+)-\d+-packed-bundles-post-ra\.txt")
_SLOTS = re.compile(r"(\d+)-(.+)-\d+-pre-delay_hlo-static-per-bundle-utilization\.txt")

SLOTS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE",
         "VSTORE:SPILL", "SALU")
_MATMUL, _FILL, _SPILL = (SLOTS.index(s) for s in ("MATMUL", "VLOAD:FILL", "VSTORE:SPILL"))

_BUNDLE = re.compile(r" *(0x[0-9a-f]+|0) +(?:[A-Z]{2} *)?:")
_COMMENT = re.compile(r"/\*(?! loop exit test).*?\*/", re.DOTALL)
_BRANCH = re.compile(r"sbr\.rel\b *(\([^)]*\))? *target bundleno = (\d+)")
# A loop counts %next = %now + step, where %now = phi(start, %next), and ends at a limit.
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder (%\w+), (\d+) /\* loop exit test")
_DEFINITION = re.compile(r"(%s\w+) = (smov\.u32|sadd\.s32|sphi|sld) ([^;}/]*)")
# Registers may be spilled between; a store under a condition keeps it, and is followed no further.
_STORE = re.compile(r"= sst (\[smem:\[#\w+_spill\]\]) ((?:\(!?%\w+\), *)?%s\w+)")
# A guard this short only bumps a counter or skips a copy.
_SMALL, _TOLD, _LARGE = 6, 32, 64


@dataclasses.dataclass
class Region:
  """Bundles [first, end): a kernel, a loop, or what a branch may skip."""

  kind: str  # "kernel", "loop" or "if"
  first: int
  end: int
  parts: list["Region"] = dataclasses.field(default_factory=list)
  bundles: int = 0  # its own: those of its parts are not in it
  slots: tuple[int, ...] = ()  # its own, how often each of SLOTS is taken
  trips: int | None = None  # of a loop, if its counter begins and ends at constants
  runs: float = 1.0  # executions for each execution of what it is part of
  known: bool = True  # whether `runs` was found or given; else it is 1

  def __iter__(self) -> Iterator["Region"]:
    yield self
    for part in self.parts:
      yield from part

  def total(self, slot: int) -> int:
    return sum(region.slots[slot] for region in self)


@dataclasses.dataclass(frozen=True)
class Steps:
  """Trip counts of the parts of a kernel, where the program does not say.

  Attributes:
    grid: steps of the grid on one core, where its loop's counter does not say it. (A pipelined
      loop makes two trips more than its grid has steps, to fill and to drain.)
    active: the fraction of the steps in which a guard that holds matrix work runs; several
      guards, several fractions, in the order of their addresses.
    edge: the fraction of the steps that begin or end an output block: of guards without matrix
      work; several fractions are those of the guards of more than 32 bundles, likewise.
    inner: trips of those loops inside the grid's loop whose counters do not say them, in the order
      of their addresses; a mean where they differ from step to step.
    visited: the fraction of the steps in which the outermost guard runs that holds such guards; the
      other fractions and trips are then those of such a step. Several fractions are those of the
      guards that hold others, in the order of their addresses, each of what it is part of.
  """

  grid: int | None = None
  active: float | Sequence[float] = 1.0
  edge: float | Sequence[float] = 1.0
  inner: float | Sequence[float] | None = None
  visited: float | Sequence[float] = 1.0


@dataclasses.dataclass(frozen=True)
class Schedule:
  """One kernel as the compiler scheduled it."""

  name: str
  root: Region
  capacity: tuple[int, ...]  # how many of each of SLOTS one bundle has

  def set_runs(self, steps: Steps) -> bool:
    """Whether there were as many guards and loops as `steps` gives one by one."""
    return _set_runs(self.root, steps)

  @property
  def unknown(self) -> list[Region]:
    """The loops whose trips neither the program says nor `Steps` did: then cycles are too few."""
    return [region for region in self.root if not region.known]

  @property
  def cycles(self) -> float:
    return sum(runs * region.bundles for region, runs in _executed(self.root))

  @property
  def grid(self) -> tuple[float, float]:
    """(turns, cycles) of the outermost loop with matrix work, that over the grid.

    One turn of the whole kernel where there is none.
    """
    for region, times in _executed(self.root):
      if region.kind == "loop" and region.total(_MATMUL):
        inside = _executed(region, times / region.runs)
        return times, sum(runs * part.bundles for part, runs in inside)
    return 1.0, self.cycles

  def busy(self, slot: str) -> float:
    """The fraction of the kernel's cycles in which a kind of slot is taken, over all of its kind.

    Spills and fills are in VSTORE and VLOAD.
    """
    index = SLOTS.index(slot)
    taken = sum(runs * region.slots[index] for region, runs in _executed(self.root))
    return taken / (self.capacity[index] * self.cycles)

  @property
  def matmul_cycles(self) -> float:
    """Cycles that one MXU is busy, were the work spread evenly over all of them."""
    taken = sum(runs * region.slots[_MATMUL] for region, runs in _executed(self.root))
    return taken / self.capacity[_MATMUL]

  @property
  def body(self) -> Region:
    """The region that does most of the matrix work, or of all work where there is none."""
    return max(_executed(self.root), key=lambda x: (x[1] * x[0].slots[_MATMUL],
                                                    x[1] * x[0].bundles))[0]

  def fraction(self, region: Region, slot: str) -> float:
    index = SLOTS.index(slot)
    return region.slots[index] / (self.capacity[index] * region.bundles) if region.bundles else 0.0

  @staticmethod
  def spills(region: Region) -> tuple[int, int]:
    """(stores, loads) of vector registers that did not fit."""
    return region.slots[_SPILL], region.slots[_FILL]


def read(folder: pathlib.Path, chip: Tpu) -> list[Schedule]:
  """Every kernel that libtpu dumped into a folder, in the order of compilation.

  Raises:
    UnknownDump: files are missing or not of the known form.
  """
  bundles, slots = {}, {}
  for path in sorted(folder.iterdir()):
    for pattern, found in ((_BUNDLES, bundles), (_SLOTS, slots)):
      if match := pattern.fullmatch(path.name):
        found[match.groups()] = path
  kernels = [key for key in bundles
             if not key[1].startswith("<") and key[1] != "TLP"  # the program around the kernels
             and not key[1].endswith("schedule-analysis")]
  if not kernels:
    raise UnknownDump("libtpu dumped no *-packed-bundles-post-ra.txt of a kernel")
  schedules = []
  for key in kernels:
    if key not in slots:
      raise UnknownDump(f"libtpu dumped no utilization per bundle of {key[1]}")
    schedules.append(parse(key[1], bundles[key].read_text(errors="replace"),
                           slots[key].read_text(errors="replace"), chip))
  return schedules


def parse(name: str, bundles: str, utilization: str, chip: Tpu) -> Schedule:
  """A kernel from the two dumps: its bundles after register allocation, and the slots they take.

  Raises:
    UnknownDump: the dumps are not of the known form, or do not belong together.
  """
  code = _bundles(name, bundles)
  capacity, slots = _slots(name, utilization)
  if len(slots) != len(code):
    raise UnknownDump(f"{name}: {len(code)} bundles, but utilization of {len(slots)}")

  root = Region("kernel", 0, len(code))
  stack = [root]
  for region in _branches(code, chip.delay_slots):
    while region.first >= stack[-1].end:
      stack.pop()
    if region.kind == "if":
      region.end = min(region.end, stack[-1].end)
    elif region.end > stack[-1].end:
      raise UnknownDump(f"{name}: the loop at {region.first:#x} leaves the region around it")
    stack[-1].parts.append(region)
    stack.append(region)
  definitions = _definitions(code)
  for region in root:
    own = [i for i in range(region.first, region.end)
           if not any(part.first <= i < part.end for part in region.parts)]
    region.bundles = len(own)
    region.slots = tuple(sum(slots[i][s] for i in own) for s in range(len(SLOTS)))
    if region.kind == "loop":
      region.trips = _trips(code, region, own, definitions)
  return Schedule(name, root, capacity)


def _bundles(name, text) -> list[str]:
  """The text of each bundle without comments; a bundle's comments may run over lines."""
  code: list[str] = []
  for line in text.splitlines():
    if found := _BUNDLE.match(line):
      if int(found[1], 16) != len(code):
        raise UnknownDump(f"{name}: bundle {found[1]} follows bundle {len(code) - 1:#x}")
      code.append(line)
    elif code:
      code[-1] += "\n" + line
  if not code:
    raise UnknownDump(f"{name}: the dump of bundles holds none")
  return [_COMMENT.sub("", bundle) for bundle in code]


def _slots(name, text):
  head, _, body = text.partition("== UTILIZATION:\n")
  lines = head.splitlines()
  if len(lines) < 3 or tuple(lines[1].split(", ")) != SLOTS:
    raise UnknownDump(f"{name}: utilization has the columns {lines[1:2]}, not {', '.join(SLOTS)}")
  rows = [tuple(int(n) for n in line.split()) for line in body.splitlines() if line.strip()]
  if any(len(row) != len(SLOTS) for row in rows):
    raise UnknownDump(f"{name}: a row of utilization has not {len(SLOTS)} columns")
  return tuple(int(n) for n in lines[2].split()), rows


def _branches(code, delay_slots) -> list[Region]:
  """Loops and guards, outer ones before those inside them."""
  regions = []
  for address, bundle in enumerate(code):
    after = address + delay_slots + 1  # the first bundle that a taken branch skips
    for _, target in _BRANCH.findall(bundle):
      target = int(target)
      if target > len(code):
        raise UnknownDump(f"a branch at {address:#x} leaves the program for {target:#x}")
      if target <= address:
        regions.append(Region("loop", target, min(len(code), after)))
      elif target > after:
        regions.append(Region("if", after, target))
  return sorted(regions, key=lambda r: (r.first, -r.end))


def _definitions(code):
  """{register: (operation, operands)} of what a loop's counter is made of."""
  found = {name: (op, [a.strip() for a in args.split(",")])
           for bundle in code for name, op, args in _DEFINITION.findall(bundle)}
  stores = [store for bundle in code for store in _STORE.findall(bundle)]
  slots = [slot for slot, _ in stores]
  # A fill from a spill slot with a single store has the value of that store.
  return found | {slot: ("smov.u32", [value]) for slot, value in stores if slots.count(slot) == 1}


def _trips(code, loop, own, definitions) -> int | None:
  """A loop's trip count: None unless start, step and limit of its counter are constants."""
  exits = {exit for i in own for exit in _EXIT.findall(code[i])}
  if len(exits) != 1:
    return None
  (counter, limit), = exits

  def follow(value):
    while definitions.get(value, ("",))[0] in ("smov.u32", "sld"):
      # A move under a condition alone is that of whoever reaches the loop; of two values, neither.
      operands = [a for a in definitions[value][1] if not re.fullmatch(r"\(!?%\w+\)", a)]
      if len(operands) != 1 or operands[0].startswith("[") and operands[0] not in definitions:
        break
      value, = operands
    return value

  operation, operands = definitions.get(follow(counter), ("", ()))
  if operation != "sadd.s32" or not operands[0].isdigit():
    return None
  step, now = int(operands[0]), follow(operands[1])
  operation, operands = definitions.get(now, ("", ()))
  if operation == "sld":
    operands = _carried(now, operands[0], code, loop, own)
  elif operation != "sphi":
    return None
  if len(operands) != 2 or follow(operands[1]) != follow(counter):
    return None
  start = follow(operands[0])
  if not start.isdigit() or not 0 < step < 2**31:
    return None
  return max(1, -(-(int(limit) - int(start)) // step))


def _carried(register, slot, code, loop, own) -> list[str]:
  """Values that a loop's first bundles read from a spill slot: at its start, and after a turn.

  Empty unless each turn reads the slot before it writes it, and writes it without a condition.
  """
  writes = [(i, value) for i in range(loop.end) for written, value in _STORE.findall(code[i])
            if written == slot]
  before = [value for i, value in writes if i < loop.first]
  inside = [(i, value) for i, value in writes if i >= loop.first]
  read = next((i for i in own if f"{register} = sld" in code[i]), loop.end)
  if not before or not inside or read > inside[0][0] or not {i for i, _ in inside} <= set(own):
    return []
  return [before[-1], inside[-1][1]]


def _executed(region, times=1.0):
  """(region, executions in one call of the kernel)."""
  times *= region.runs
  yield region, times
  for part in region.parts:
    yield from _executed(part, times)


def _set_runs(root, steps):
  """Fills in `runs`.

  The first loop with matrix work is the grid's; where there is no matrix work, each outermost
  loop is. In it, the outermost guard with matrix work is the pipeline's "a step of the grid, not
  of the drain"; the innermost is the kernel's own "this block has something to do".
  """
  left = {name: list(value) if isinstance(value, Sequence) else None
          for name, value in dataclasses.asdict(steps).items()}
  if left["visited"] is None:
    left["visited"] = [steps.visited]
  fits = True
  matrix = lambda region: region.total(_MATMUL) > 0
  any_matrix = matrix(root)

  def take(name):
    nonlocal fits
    if left[name] is None:
      return getattr(steps, name)
    fits &= bool(left[name])
    return left[name].pop(0) if left[name] else None if name == "inner" else 1.0

  def edge(size):
    return 1.0 if left["edge"] is not None and size <= _TOLD else take("edge")

  def visit(region, grid, in_body, drained):
    for part in region.parts:
      size = part.end - part.first
      grid_of, body_of, drained_of = grid, in_body, drained
      part.runs, part.known = 1.0, True
      if part.kind == "loop":
        trips = part.trips
        if grid is None and (matrix(part) or not any_matrix):
          trips = trips or (steps.grid + 2 if steps.grid else None)
          grid_of = max(1, trips - 2) if trips else 1
        elif trips is None:
          trips = take("inner")
        part.runs, part.known = 1.0 if trips is None else float(trips), trips is not None
      elif in_body:
        if not matrix(part) and size > _LARGE:  # an initialisation inside the main body
          part.runs = edge(size)
      elif grid is not None and (matrix(part) or size > _SMALL):
        if not matrix(part):
          part.runs = edge(size) if any_matrix else 1.0
        elif not any(r.kind == "if" and matrix(r) for r in part if r is not part):
          part.runs = take("active")
          body_of = True
        elif drained:
          part.runs = take("visited")
        if not drained:
          part.runs *= grid / (grid + 2)
          drained_of = True
      visit(part, grid_of, body_of, drained_of)

  visit(root, None, False, False)
  return fits and not any(left.values())
