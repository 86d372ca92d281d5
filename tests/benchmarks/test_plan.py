import math

import pytest

from benchmarks import plan, results
from palm_haiku.hardware import ACHIEVED


@pytest.mark.full
def test_published_runs_are_planned_within_15_percent_by_one_constant_for_a_chip():
  compiled = {(row["implementation"], row["shape"]): row["compiled"]
              for row in results.newest("plan")["rows"]}
  needed = {}
  for run in plan.RUNS:
    row = plan.row(run, compiled[run.implementation, plan._machine(run)])
    assert abs(row["off"]) < 15 and row["room"] > 0
    assert row["published"] < row["most"]  # else the roofline is wrong
    needed.setdefault(run.machine.chip, []).append(row["needs"] / 100)
  assert needed.keys() == ACHIEVED.keys()
  for chip, shares in needed.items():
    assert ACHIEVED[chip] == pytest.approx(math.prod(shares) ** (1 / len(shares)), abs=1e-3)
