"""The command line: palm-haiku doctor."""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

import rich.table

from palm_haiku import distributed, terminal
from palm_haiku.doctor import cases, child
from palm_haiku.doctor.worker import Worker

SECONDS = {"cpu": 60.0}  # for all checks; else two minutes
START_SECONDS = 90.0
CHECK_SECONDS = 60.0
WRONG = ("failed", "hung", "died")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """All options."""
  parser.add_argument("--json", action="store_true", help="print one object instead of tables, to "
                      "send with a report")
  parser.add_argument("--seconds", type=float, metavar="N", help="begin no check after so long "
                      "(default 120; on a CPU 60)")
  parser.add_argument("--limit", type=float, default=CHECK_SECONDS, metavar="N",
                      help=f"seconds that a check may take (default {CHECK_SECONDS:.0f})")


def run(args: argparse.Namespace) -> int:
  """Looks at the machine, checks its kernels, prints; 1 if a check failed."""
  for name in ("seconds", "limit"):
    value = getattr(args, name)
    if value is not None and not 0 < value < 1e6:
      raise ValueError(f"--{name} must be positive; got {value}")
  console = terminal.Console(quiet=args.json)
  report = examine(args.seconds, args.limit, lambda report: _show_machine(console, report),
                   lambda line: print(line, file=sys.stderr))
  if args.json:
    print(json.dumps(report))
  else:
    _show(console, report)
  return int(bool(report["problems"]))


def examine(seconds: float | None = None, limit: float = CHECK_SECONDS,
            on_machine=lambda report: None, on_check=lambda line: None) -> dict[str, Any]:
  """The whole report, of plain values.

  Args:
    seconds: after which no check begins; None for what the platform takes.
    limit: seconds of one check.
    on_machine: called with the report before the checks.
    on_check: called with a line about each check before it begins.

  Raises:
    StartError: JAX does not start.
  """
  with Worker() as worker:
    report = worker.ask({"machine": True}, START_SECONDS)
    if why := report.get("error") or report.get("why"):
      raise distributed.StartError(why if "error" in report else f"JAX does not start: {why}")
    on_machine(report)
    end = time.monotonic() + (seconds or SECONDS.get(report["platform"], 120.0))
    report["checks"] = []
    for case in cases.all_for(report["platform"], report["chip"]):
      if time.monotonic() > end:
        answer = dict(status="not run", why="out of time; --seconds gives more")
      else:
        on_check(case.name)
        begin = time.monotonic()
        answer = worker.ask(child.request(case), limit)
        answer["seconds"] = round(time.monotonic() - begin, 1)
      report["checks"].append({**dataclasses.asdict(case), **answer})
  report["problems"] = [_problem(check) for check in report["checks"] if check["status"] in WRONG]
  return report


def _problem(check) -> str:
  name = cases.Case(**{f.name: check[f.name] for f in dataclasses.fields(cases.Case)}).name
  way = "" if check["implementation"] == "xla" else (
      "; implementation=\"xla\" (--implementation xla) is the way round")
  return f"{name}: {check['why']}{way}"


def _show_machine(console, report):
  versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
  terminal.say(console, f"{report['devices']} x {report['kind']} ({report['platform']}, "
               f"{report['chip'] or 'of no known name'}), {report['system']}\n{versions}\n")
  table = rich.table.Table("op", "auto takes", "because", box=None, padding=(0, 1, 0, 0))
  for op, choice in report["auto"].items():
    table.add_row(op, choice["implementation"], choice["reason"])
  console.print(table)
  terminal.say(console)


def _show(console, report):
  table = rich.table.Table("op", "implementation", "size", "pass", "result", "ulps", "XLA's", "ms",
                           "XLA's", box=None, padding=(0, 1, 0, 0))
  number = lambda x: "" if x is None else f"{x:.3g}"
  for c in report["checks"]:
    worst = max(c.get("ulps", {}).values(), default=None)
    table.add_row(
        c["op"], c["implementation"], "interpreted" if c["interpreted"] else c["label"],
        "both" if c["backward"] else "forward", c["status"], number(worst),
        number(max(c.get("xla_ulps", {}).values(), default=None)), number(c.get("ms")),
        number(c.get("xla_ms")))
  console.width = max(console.width, 96)  # rather than cut words
  console.print(table)
  counts: dict[str, int] = {}
  for c in report["checks"]:
    counts[c["status"]] = counts.get(c["status"], 0) + 1
    if c["status"] in ("absent", "unfit"):
      terminal.say(console, f"{c['op']} {c['implementation']}: {c['why']}")
  terminal.say(console, "\n" + ", ".join(f"{n} {status}" for status, n in counts.items())
               + " (ulps: of the largest value, the worst of a check's results)")
  for problem in report["problems"]:
    terminal.say(console, f"problem: {problem}", style="red")
