"""Memory of a compiled program, and the trip counts of its parts, from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from .errors import UnknownDump

_COMPUTATION = re.compile(r"(?:(ENTRY) )?%?([\w.<>\-]+) \(.*\) -> .* \{$")
# Attributes that run over lines begin one with a brace too. A SparseCore's computation says so.
_END = re.compile(r'\}(, execution_thread="\w+")?')
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.<>\-]+) = ((?:\(.*?\)|\S+)) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^{}]*)\})?")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
# Other names for a buffer that something else already holds.
_ALIASES = ("bitcast", "get-tuple-element", "tuple", "while", "conditional", "call", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Buffer:
  name: str
  dtype: str
  shape: tuple[int, ...]
  opcode: str
  space: int = 0  # 0 for the device's memory; others are faster and on the chip

  @property
  def bytes(self) -> int:
    if self.dtype in _BITS:
      return math.prod(self.shape) * _BITS[self.dtype] // 8
    return math.prod(self.shape) * int(re.search(r"\d+", self.dtype)[0]) // 8

  def __str__(self):
    return f"{self.dtype}[{','.join(map(str, self.shape))}] of {self.name}"


class Instruction(NamedTuple):
  """One line of a computation."""

  computation: str
  name: str
  arrays: tuple[Buffer, ...]  # of its result
  opcode: str
  line: str


def instructions(text: str) -> Iterator[Instruction]:
  """The instructions of all computations of a program, in order.

  Raises:
    UnknownDump: the text has no entry computation, or an instruction of unknown form.
  """
  inside, entry = None, False
  for line in text.splitlines():
    if inside is None:
      if start := _COMPUTATION.match(line):
        inside, entry = start[2], entry or start[1] is not None
    elif _END.fullmatch(line.rstrip()):
      inside = None
    elif match := _INSTRUCTION.match(line):
      name, shapes, opcode = match.groups()
      arrays = tuple(
          Buffer(name, dtype, tuple(int(d) for d in dims.split(",") if d), opcode, _space(layout))
          for dtype, dims, layout in _ARRAY.findall(shapes))
      yield Instruction(inside, name, arrays, opcode, line.strip())
    elif re.match(r"\s+(ROOT )?%\S+ = ", line):
      # The compiler's own attributes may run over lines; a result always has " = ".
      raise UnknownDump(f"an HLO instruction of unknown form: {line.strip()[:200]}")
  if not entry:
    raise UnknownDump("the HLO text has no ENTRY computation")


def _space(layout: str) -> int:
  found = re.search(r"S\((\d+)\)", layout)
  return int(found[1]) if found else 0


def traffic(text: str) -> int:
  """Bytes that the instructions of a program read from the device's memory and write to it.

  Each operand and each result of an instruction counts once, as if caches held nothing between
  two of them; a fusion and a kernel are one instruction. Of an operand of which only a slice is
  used the whole counts, but for copies to faster memory.
  """
  inside = {name for line in text.splitlines() if " while(" not in line and " call(" not in line
            for name in _CALLED.findall(line)}
  every = list(instructions(text))
  results, (times, _) = {one.name: one.arrays for one in every}, calls(text)
  total = 0
  for one in every:
    if one.computation in inside or one.opcode in (*_ALIASES, "parameter", "constant"):
      continue
    if one.opcode.endswith(("-done", "-update")):
      continue
    operands = re.search(rf" {one.opcode}\((.*?)\)(?:,|$)", one.line)
    read = [array for name in re.findall(r"%?([\w.\-]+)", operands[1] if operands else "")
            for array in results.get(name, ())]
    written = one.arrays
    if one.opcode.endswith("-start"):
      # Its result is (destination, source, ...) of a copy, ((sources), destination, ...) of others.
      written = one.arrays[:1] if one.opcode == "copy-start" else one.arrays[len(read):][:1]
      read = [dataclasses.replace(written[0], space=source.space) for source in read[:1]]
    moved = sum(array.bytes for array in (*read, *written) if array.space == 0)
    total += times.get(one.name, 1) * moved
  return total


def buffers(text: str) -> list[Buffer]:
  """Every array that the program may hold in memory: all results but those inside fusions.

  Raises:
    UnknownDump: the text has no entry computation, or an instruction of unknown form.
  """
  fused = {name for line in text.splitlines() if " fusion(" in line
           for name in re.findall(r"calls=%?([\w.<>\-]+)", line)}
  # The last: copies to faster memory, as bytes.
  return [array for one in instructions(text)
          if one.computation not in fused and one.opcode not in _ALIASES
          and not one.opcode.endswith(("-start", "-update", "-done"))
          for array in one.arrays]


def square(found: list[Buffer], rows: int, columns: int) -> list[Buffer]:
  """The buffers that are as large as rows x columns, such as attention's scores.

  One dimension is a multiple of `rows` and another of `columns`, as given or padded to a tile of
  8 or 128; or one is a multiple of their product. So choose a length that divides no other
  dimension of the program.
  """
  def padded(n):
    return {n, -(-n // 8) * 8, -(-n // 128) * 128}

  def is_square(shape):
    for t in padded(rows):
      for s in padded(columns):
        if any(d and d % (t * s) == 0 for d in shape):
          return True
        if any(a and b and a % t == 0 and b % s == 0
               for i, a in enumerate(shape) for j, b in enumerate(shape) if i != j):
          return True
    return False

  unique = {}
  for buffer in found:
    if is_square(buffer.shape):
      unique.setdefault((buffer.dtype, buffer.shape), buffer)
  return list(unique.values())


_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.<>\-]+)")
_EXIT = re.compile(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")


def calls(text: str) -> tuple[dict[str, int], bool]:
  """Executions of each instruction, by name, and whether all loops around them are known.

  A loop is known if it counts from one constant to another in steps of a third, as JAX's do; any
  other counts once.
  """
  computations, inside, entry = {}, None, None
  for line in text.splitlines():
    if inside is None:
      if start := _COMPUTATION.match(line):
        inside = start[2]
        computations[inside] = {}
        entry = inside if start[1] else entry
    elif _END.fullmatch(line.rstrip()):
      inside = None
    elif instruction := _INSTRUCTION.match(line):
      computations[inside][instruction[1]] = line.strip()
  counts, known = {}, True

  def visit(computation, times):
    nonlocal known
    for name, line in computations.get(computation, {}).items():
      counts[name] = counts.get(name, 0) + times
      trips = 1
      if " while(" in line:
        # XLA for GPUs writes it down.
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        trips = int(noted[1]) if noted else _trips(computations, computations[computation], line)
        known, trips = known and trips is not None, trips or 1
      for called in _CALLED.findall(line):
        visit(called, times * trips)

  visit(entry, 1)
  return counts, known


def calls_of(kernels: list[str], text: str) -> dict[str, int]:
  """TPU: how often each of the compiled kernels runs, by name.

  The compiler makes one kernel of instructions that differ in nothing but names.
  """
  counts, _ = calls(text)
  form = {one.name: re.sub(r"%[\w.<>\-]+", "%", re.sub(
      r", metadata=\{.*?\}", "", one.line.removeprefix("ROOT "))) for one in instructions(text)}
  first = {form[name]: name for name in reversed(kernels) if name in form}
  found = {name: counts.get(name, 1) for name in kernels}
  for name in form.keys() - found.keys():
    if form[name] in first and " fusion(" in form[name]:
      found[first[form[name]]] += counts.get(name, 1)
  return found


def _trips(computations, around, line) -> int | None:
  named = {part: computations.get(re.search(part + r"=%?([\w.<>\-]+)", line)[1], {})
           for part in ("condition", "body")}
  exits = [found for found in map(_EXIT.search, named["condition"].values()) if found]
  if len(exits) != 1:
    return None
  counter, limit = (named["condition"].get(name, "") for name in exits[0].groups())
  index, limit = re.search(r"index=(\d+)", counter), _constant(limit)
  if index is None or limit is None:
    return None
  start = around.get(re.search(r" while\(%?([\w.\-]+)\)", line)[1], "")
  root = next((line for line in named["body"].values() if line.startswith("ROOT ")), "")
  # One whose first turns were peeled off, to overlap transfers with products, starts later.
  begin = _constant(_operand(around, start, int(index[1])))
  turn = re.search(r" add\(%?([\w.\-]+), %?([\w.\-]+)\)",
                   _operand(named["body"], root, int(index[1])))
  # Products that a ring of devices shares count in twos, one for each direction.
  steps = [_constant(named["body"].get(name, "")) for name in turn.groups()] if turn else []
  step = next(filter(None, steps), None)
  return None if begin is None or step is None else -(-(limit - begin) // step)


def _operand(computation, line, index) -> str:
  """The instruction that computes an element of a tuple, past copies."""
  operands = re.search(r" tuple\((.*?)\)", re.sub(r"/\*.*?\*/", "", line))
  found = computation.get(operands[1].split(",")[index].strip().lstrip("%"), "") if operands else ""
  while copied := re.search(r" copy\(%?([\w.\-]+)\)", found):
    found = computation.get(copied[1], "")
  return found


def _constant(line) -> int | None:
  found = re.search(r" constant\((\d+)\)", line)
  return int(found[1]) if found else None


def product_steps(text: str) -> dict[str, int]:
  """TPU: how many steps XLA's own matrix products make for a tile of their result, by name."""
  found = {}
  for line in text.splitlines():
    bounds = re.search(r'"kernel_window_bounds":\["\d.*?"iteration_bounds":\[(.*?)\]', line)
    if bounds and (instruction := _INSTRUCTION.match(line)):
      found[instruction[1]] = int(bounds[1].split(",")[-1].strip('"'))
  return found
