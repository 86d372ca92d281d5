"""Times implementations of one op against each other.

Each implementation becomes one program that calls it `n` times, each call waiting for the last, and
is started once: what the host takes to start it is spread over `n`. `n` is a constant of the
program, for XLA on GPUs asks the host after each trip of a loop whose end it does not know. It is
chosen so that twice the time that the chip needs at its best adds up to `CHAIN_SECONDS`. (XLA for
CPUs would take the calls out of the loop; there the program is started for each.)

All implementations of a case are started in turns, round after round, so that what else the machine
does hits them alike; medians are compared.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from palm_haiku.kernels.core import chips, dispatch
from palm_haiku.kernels.explain import OPS

from . import results, table
from .peers import Absent

CHAIN_SECONDS = 0.05
CPU_CALLS = 3
ROUNDS = 5
METHOD = "chained calls in one program, wall clock"
CPU_METHOD = "calls one by one, wall clock"
COLUMNS = {
    "implementation": "implementation", "variant": "", "ms": "ms", "spread": "min-max",
    "tflops": "TFLOP/s", "tflops_full": "TFLOP/s full", "gbs": "GB/s", "peak": "% of peak",
    "memory": "MiB", "compile": "compile s", "error": "error"}


@dataclasses.dataclass(frozen=True)
class Case:
  """One op on one shape.

  Attributes:
    about: what names the case: shape, dtype, pass ("forward", "backward"), variant.
    arrays: the arguments.
    implementations: name -> a function of the arguments. Called to see whether it is `Absent`.
    flops, flops_full: useful FLOPs of a call; as the PaLM paper counts attention, causal or not.
    bytes: that a call must move at least.
    error: of a function's result, as a fraction of the largest value that was expected.
  """

  about: dict
  arrays: tuple
  implementations: dict[str, Callable]
  flops: float
  flops_full: float
  bytes: float
  error: Callable[[object], float]


class Chain:
  """`calls` calls of a function, `chained` in one program or one by one."""

  def __init__(self, function, arrays, calls, chained=True):
    self.arrays, self.calls, self.starts = arrays, calls, 1 if chained else calls
    start = time.perf_counter()
    self.program = jax.jit(lambda arrays: repeat(function, calls // self.starts, arrays)).lower(
        arrays).compile()
    self.compile_seconds = time.perf_counter() - start
    memory = self.program.memory_analysis()
    self.bytes = sum(getattr(memory, f"{kind}_size_in_bytes") for kind in
                     ("argument", "output", "temp"))

  def __call__(self):
    """The last call's result."""
    return self.program(self.arrays)

  def seconds(self) -> float:
    """One measurement of one call."""
    start = time.perf_counter()
    for _ in range(self.starts):
      out = self()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / self.calls


def repeat(function, calls: int, arrays):
  """The last of `calls` calls, made one after the other."""
  out = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, *arrays))

  def call(_, carry):
    arrays, _ = carry
    # The next call's arguments wait for this call's result, and are no loop invariants.
    return jax.lax.optimization_barrier((arrays, function(*arrays)))

  return jax.lax.fori_loop(0, calls, call, (arrays, out))[1]


def run(result: dict, cases: list[Callable[[], Case]], out=None, rounds: int = ROUNDS,
        deadline: float | None = None) -> int:
  """Measures the cases, prints a table of each and saves `result` after each.

  Args:
    result: a document of `results`, which gets the rows.
    cases: functions that make a case's arrays only when its turn has come.
    deadline: of time.monotonic(), after which no case begins and no round either.

  Returns:
    How many implementations failed (being absent is no failure).
  """
  result = results.resume(result, out)
  cpu = jax.default_backend() == "cpu"
  result["timing"] = CPU_METHOD if cpu else METHOD
  print(f"{result['device']}: {result['timing']}; medians of up to {rounds} interleaved rounds")
  if cpu:
    print("There is no accelerator here, so XLA's rows alone run; a CPU's times say nothing about "
          "the kernels.")
    result["note"] = "no accelerator: XLA's rows alone"
  failed, slower, judged = 0, [], 0
  for make in cases:
    if deadline and time.monotonic() > deadline:
      print("out of time: the rest is left out")
      break
    case = make()
    print("\n" + " ".join(f"{key} {value}" for key, value in case.about.items() if value))
    rows = _measure(case, rounds, deadline)
    failed += sum("failed" in row for row in rows)
    pair = {row["implementation"]: row for row in rows if "ms" in row}
    if {"auto", "xla"} <= pair.keys():
      judged += 1
      if pair["auto"]["low"] > pair["xla"]["high"]:
        slower.append(" ".join(str(value) for value in case.about.values() if value))
    results.add(result, rows)
    results.save(result, out)
    print(table.text(COLUMNS, [row for row in rows if "ms" in row]))
    for row in rows:
      for kind in ("absent", "failed"):
        if kind in row:
          print(f"{kind}: {row['implementation']}: {row[kind]}")
  if judged:
    print("\nauto is " + (f"slower than xla in every round of: {'; '.join(slower)}" if slower else
                          f"nowhere slower than xla beyond noise ({judged} compared)"))
  print(f"\n{results.save(result, out)}")
  return failed


def _calls(case) -> int:
  chip = chips.CHIPS.get(dispatch.target().chip)
  if not chip:
    return CPU_CALLS
  at_best = max(case.flops / (chip.tflops * 1e12), case.bytes / chip.bandwidth)
  return min(1000, max(1, round(CHAIN_SECONDS / (2 * at_best))))


def _measure(case, rounds, deadline) -> list[dict]:
  chains, rows, calls = {}, {}, _calls(case)
  for name, function in case.implementations.items():
    about = case.about | {"implementation": name}
    try:
      chain = Chain(function, case.arrays, calls, jax.default_backend() != "cpu")
      error = case.error(chain())
    except Absent as absent:
      rows[name] = about | {"absent": str(absent)}
      continue
    except Exception as error:  # a peer's failure is a result, and the others still run
      lines = str(error).strip().splitlines() or [""]
      rows[name] = about | {"failed": f"{type(error).__name__}: {lines[0][:300]}"}
      continue
    chains[name] = chain
    rows[name] = about | {
        "calls": chain.calls, "memory": round(chain.bytes / 2**20, 2),
        "compile": round(chain.compile_seconds, 2), "error": float(f"{error:.2g}")}
  times = {name: [] for name in chains}
  for _ in range(rounds):
    for name, chain in chains.items():
      times[name].append(chain.seconds())
    if deadline and time.monotonic() > deadline:
      break
  peak = peak_tflops()
  for name, seconds in times.items():
    median = statistics.median(seconds)
    rows[name] |= {
        "ms": float(f"{median * 1e3:.4g}"), "rounds": len(seconds),
        "low": float(f"{min(seconds) * 1e3:.4g}"), "high": float(f"{max(seconds) * 1e3:.4g}"),
        "spread": f"{min(seconds) * 1e3:.3g}-{max(seconds) * 1e3:.3g}",
        "tflops": float(f"{case.flops / median / 1e12:.4g}"),
        "tflops_full": float(f"{case.flops_full / median / 1e12:.4g}"),
        "gbs": float(f"{case.bytes / median / 1e9:.4g}"),
        "peak": round(100 * case.flops / median / 1e12 / peak, 1) if peak else None}
  return [rows[name] for name in case.implementations]


def own(op: str) -> list[str]:
  """This project's backends of an op that this machine could run."""
  platform = {"mosaic_gpu": "gpu", "triton": "gpu", "mosaic_tpu": "tpu"}
  here = dispatch.target().platform
  return [name for name in (OPS[op].backends if op in OPS else ()) if platform[name] == here]


def peak_tflops() -> float | None:
  """The published bf16 peak of this machine's chip."""
  chip = chips.CHIPS.get(dispatch.target().chip)
  return chip and chip.tflops
