"""SASS, NVIDIA's machine code as nvdisasm prints it: instructions and loops, by kind."""

import collections
import dataclasses
import functools
import re

from .errors import UnknownDump

# First match wins. An instruction is named by what stands before its first dot.
_CLASSES = [(name, re.compile(pattern)) for name, pattern in (
    ("HGMMA", r"[HQIB]GMMA"),  # Hopper's asynchronous tensor core
    ("UTCMMA", r"UTC\w*MMA"),  # Blackwell's
    ("HMMA", r"[HIQO]MMA"),  # the synchronous one, Ampere and on
    ("TMA", r"UTMA\w+|UBLKCP|UBLKRED"),
    ("WARPGROUP", r"WARPGROUP"),
    ("SYNCS", r"SYNCS"),  # mbarriers
    ("BAR", r"BAR"),
    ("MUFU", r"MUFU"),  # exp2, reciprocal
    ("FFMA", r"FFMA2?"), ("FMUL", r"FMUL2?"), ("FADD", r"FADD2?"), ("FMNMX", r"FMNMX3?"),
    ("SELECT", r"FSEL|SEL"), ("COMPARE", r"FSETP|ISETP"),
    ("F2F", r"F2F|F2FP"), ("I2F", r"I2F\w*|F2I\w*"),
    ("SHFL", r"SHFL"), ("MOV", r"MOV"),
    ("INT", r"IMAD|IADD3?|LOP3|SHF|LEA|VIADD|IABS|PRMT|VIMNMX|IMNMX|PLOP3"),
    ("LDGSTS", r"LDGSTS"), ("LDG", r"LDG"), ("STG", r"STG|REDG?|ATOMG?"),
    ("LDS", r"LDSM?"), ("STS", r"STSM?"), ("TMEM", r"LDTM|STTM"),
    ("LDL", r"LDL"), ("STL", r"STL"),  # local memory: spills, and arrays on the stack
    ("BRANCH", r"BRA|BRX|JMP|BSSY|BSYNC|EXIT|WARPSYNC|CALL|RET"), ("NOP", r"NOP"),
    ("UNIFORM", r"U[A-Z0-9]+|R2UR|S2UR"))]
TENSOR = ("HGMMA", "UTCMMA", "HMMA")

_INSTRUCTION = re.compile(
    r"\s*(?:[^\s:]+(?::[^\s:]+){4}\s+)?"  # the control columns that Mosaic asks for
    r"/\*([0-9a-f]{4,})\*/\s+"
    r"(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)\s*([^;]*);?\s*(?:/\*.*)?$")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_SECTION = re.compile(r"\s*\.text\.(\S+):$")
# Text between instructions without meaning here.
_IGNORED = re.compile(r"\s*(?:$|//|\.|[\w$.]+:\s*$|/\* 0x[0-9a-f]+ \*/\s*$)")
_JUMPS = ("BRA", "BRX", "JMP")
_ENDS = ("EXIT", "RET")
# A wait on an mbarrier is a loop too, of a few instructions.
_SPIN = 12


@dataclasses.dataclass(frozen=True)
class Instruction:
  address: int
  opcode: str
  operands: str
  predicate: str | None


@dataclasses.dataclass(frozen=True)
class Loop:
  """A natural loop: all that can reach its back edge without leaving through its header."""

  start: int  # address of the header
  instructions: int
  mix: dict[str, int]
  innermost: bool

  @property
  def tensor(self) -> int:
    return sum(self.mix.get(name, 0) for name in TENSOR)


@dataclasses.dataclass(frozen=True)
class Function:
  name: str
  instructions: int
  mix: dict[str, int]
  loops: tuple[Loop, ...]
  local_stores: int  # bytes that one thread stores to local memory, each STL counted once
  local_loads: int

  @property
  def main_loop(self) -> Loop | None:
    """The innermost loop with the most tensor-core instructions, or the longest one."""
    inner = [loop for loop in self.loops if loop.innermost]
    size = lambda loop: -loop.instructions if loop.tensor else loop.instructions
    return max(inner, key=lambda loop: (loop.tensor, size(loop)), default=None)

  @property
  def tensor_loops(self) -> tuple[Loop, ...]:
    return tuple(loop for loop in self.loops if loop.innermost and loop.tensor)


@functools.cache
def classify(opcode: str) -> str:
  if opcode.startswith("IMAD.MOV"):
    return "MOV"
  base = opcode.partition(".")[0]
  return next((name for name, pattern in _CLASSES if pattern.fullmatch(base)), "other")


def parse(text: str) -> list[Function]:
  """The functions of an `nvdisasm -c` listing.

  Raises:
    UnknownDump: a line that is neither an instruction nor one of the known directives, or no
      function at all.
  """
  functions, current = [], None
  for number, line in enumerate(text.splitlines(), 1):
    line = line.replace("{", " ").replace("}", " ")  # dual issue on old chips
    if section := _SECTION.match(line):
      current = (section[1], [], {})
      functions.append(current)
    elif current is None:
      continue
    elif label := _LABEL.match(line):
      current[2][label[1]] = len(current[1])
    elif found := _INSTRUCTION.match(line):
      current[1].append(Instruction(int(found[1], 16), found[3], found[4], found[2]))
    elif line.lstrip().startswith(".section"):
      current = None
    elif not _IGNORED.match(line):
      raise UnknownDump(f"SASS line {number} is not what nvdisasm used to print: {line.strip()!r}")
  functions = [f for f in functions if f[1]]
  if not functions:
    raise UnknownDump("nvdisasm printed no function")
  return [_function(*f) for f in functions]


def _function(name, code, labels):
  bodies = [(header, body) for header, body in _natural_loops(code, labels) if len(body) > _SPIN]
  loops = [
      Loop(code[header].address, len(body), _mix(code[i] for i in body),
           innermost=not any(other < body for _, other in bodies))
      for header, body in bodies]
  return Function(name, len(code), _mix(code), tuple(loops),
                  sum(_width(i) for i in code if classify(i.opcode) == "STL"),
                  sum(_width(i) for i in code if classify(i.opcode) == "LDL"))


def _mix(code) -> dict[str, int]:
  return dict(collections.Counter(classify(i.opcode) for i in code))


def _width(instruction) -> int:
  """Bytes per thread of a load or store."""
  for part in instruction.opcode.split(".")[1:]:
    if part in ("64", "128"):
      return int(part) // 8
    if part in ("U8", "S8", "U16", "S16"):
      return int(part[1:]) // 8
  return 4


def _natural_loops(code, labels):
  """[(index of the header, set of instruction indices)].

  Through dominators: mbarrier waits spin out of line, so a jump backwards is no sign of a loop.
  """
  starts, successors = _blocks(code, labels)
  ends = starts[1:] + [len(code)]
  predecessors = collections.defaultdict(list)
  for block, nexts in enumerate(successors):
    for following in nexts:
      predecessors[following].append(block)

  order = _reverse_postorder(successors)
  rank = {block: i for i, block in enumerate(order)}
  dominator = _immediate_dominators(order, rank, predecessors)

  def dominates(a, b):
    while rank[b] > rank[a]:
      b = dominator[b]
    return a == b

  loops: dict[int, set[int]] = {}
  for tail in order:
    for header in successors[tail]:
      if not dominates(header, tail):
        continue
      body, stack = loops.setdefault(header, {header}), [tail]
      while stack:
        block = stack.pop()
        if block not in body:
          body.add(block)
          stack.extend(p for p in predecessors[block] if p in rank)
  return [(starts[header], {i for block in body for i in range(starts[block], ends[block])})
          for header, body in sorted(loops.items())]


def _blocks(code, labels):
  leaders = {0} | {i for i in labels.values() if i < len(code)}
  leaders |= {i + 1 for i, ins in enumerate(code[:-1])
              if ins.opcode.partition(".")[0] in _JUMPS + _ENDS}
  starts = sorted(leaders)
  block_of = {start: block for block, start in enumerate(starts)}
  successors = []
  for block in range(len(starts)):
    last = code[(starts[block + 1] if block + 1 < len(starts) else len(code)) - 1]
    base = last.opcode.partition(".")[0]
    nexts = []
    conditional = last.predicate is not None
    if base in _JUMPS:
      target = re.search(r"\.L_\w+", last.operands)
      if target and labels.get(target[0], len(code)) < len(code):
        nexts.append(block_of[labels[target[0]]])
      # The condition may also be an operand: a uniform predicate, or a divergence test.
      conditional |= bool(re.match(r"!?U?P\d|UR\d", last.operands)) or ".DIV" in last.opcode
    if (base not in _JUMPS + _ENDS or conditional) and block + 1 < len(starts):
      nexts.append(block + 1)
    successors.append(nexts)
  return starts, successors


def _reverse_postorder(successors):
  seen, order, stack = {0}, [], [(0, iter(successors[0]))]
  while stack:
    block, rest = stack[-1]
    following = next((b for b in rest if b not in seen), None)
    if following is None:
      order.append(block)
      stack.pop()
    else:
      seen.add(following)
      stack.append((following, iter(successors[following])))
  return order[::-1]


def _immediate_dominators(order, rank, predecessors):
  """Cooper, Harvey and Kennedy, A Simple, Fast Dominance Algorithm."""
  dominator, changed = {order[0]: order[0]}, True
  while changed:
    changed = False
    for block in order[1:]:
      best = None
      for p in predecessors[block]:
        if p not in dominator:
          continue
        if best is None:
          best = p
          continue
        while best != p:
          while rank[best] > rank[p]:
            best = dominator[best]
          while rank[p] > rank[best]:
            p = dominator[p]
      if dominator.get(block) != best:
        dominator[block], changed = best, True
  return dominator
