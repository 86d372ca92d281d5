"""Meshes and remat policies of one run on one machine: compiled side by side, and ranked."""

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from palm_haiku.plan.estimate import plan
from palm_haiku.plan.machine import Machine, PlanError, check
from palm_haiku.recipe import TrainConfig

REMATS = ("full", "attention", "none")


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to run."""

  mesh: str
  remat: str


def candidates(config: TrainConfig, machine: Machine, *, meshes: Sequence[str] = (),
               remats: Sequence[str] = REMATS) -> Iterator[Candidate]:
  """Candidates of a sweep, those first that send least over slow links or need least memory.

  Args:
    config: of the run; its mesh and remat are not used.
    meshes: to try; none for all products of data, fsdp and model that the chips, the batch and
      the model's sizes allow. Positions are divided over no axis.

  Copies of the parameters cost memory, so the fewest come first, then the fewest parts of a layer.
  """
  if not meshes:
    axes = ((data, model) for data, model in itertools.product(
        _divisors(machine.chips), _divisors(config.model.heads))
            if machine.chips % (data * model) == 0)
    meshes = [f"data={data},fsdp={machine.chips // data // model},model={model}"
              for data, model in axes]
  for mesh in meshes:
    try:
      check(dataclasses.replace(config, mesh=mesh), machine)
    except ValueError:
      continue
    for remat in remats:
      yield Candidate(mesh, remat)


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def sweep(config: TrainConfig, machine: Machine, tried: Sequence[Candidate], *, workers: int = 2,
          timeout: float = 1800,
          on_row: Callable[[dict[str, Any]], None] = lambda row: None) -> list[dict[str, Any]]:
  """Plans of all candidates, ranked.

  Args:
    workers: compilers at one time; each takes some GB of memory.
    timeout: seconds, of each compiler.
    on_row: called with each row when it is there.

  Returns:
    Rows {mesh, remat, error, seconds} and, where error is None, all that `plan` returns.
  """
  def one(candidate):
    start = time.perf_counter()
    row = dataclasses.asdict(candidate) | {"error": None}
    try:
      row |= plan(dataclasses.replace(config, **dataclasses.asdict(candidate)), machine,
                  timeout=timeout)
    except (PlanError, ValueError) as error:
      row["error"] = str(error)
    row["seconds"] = time.perf_counter() - start
    return row

  pool = concurrent.futures.ThreadPoolExecutor(workers)
  try:
    rows = []
    for done in concurrent.futures.as_completed([pool.submit(one, c) for c in tried]):
      rows.append(done.result())
      on_row(rows[-1])
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
  return rank(rows)


def rank(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Rows that fit by their time, then those that do not by their size, then those that failed.

  Of two that take as long, because products limit both, the one whose networks are less busy.
  """
  def key(row):
    if row["error"] is not None:
      return 2, 0.0, 0.0
    if not row["fits"]:
      return 1, float(row["hbm_per_chip_bytes"]), 0.0
    return 0, round(row["step_seconds"], 6), sum(row["network_seconds"].values())

  return sorted(rows, key=key)
