"""Writes the docs' tables from the results, so that no number is typed by hand.

A table stands between `<!-- benchmarks:NAME -->` and `<!-- /benchmarks:NAME -->`, where NAME is a
benchmark (attention, block, static, ...), or NAME@DEVICE, such as static@v6e, for the newest result
of a device whose name contains DEVICE.
"""

import argparse
import pathlib
import re

from palm_haiku.kernels import aot

from . import generate, measure, plan, results, table
from .static import attention as static

_TRAIN = {"implementation": "implementation", "dtype": "dtype", "shape": "shape",
          "step": "train step s", "trained": "tokens/s", "peak_gb": "peak GB",
          "compile": "compile s", "sampled": "sampled tokens/s"}
_DOCS = pathlib.Path(__file__).parent.parent / "docs"


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("files", nargs="*", type=pathlib.Path, help="default docs/*.md")
  parser.add_argument("--results", metavar="DIR", help="default benchmarks/results")
  parser.add_argument("--check", action="store_true",
                      help="write nothing; fail if a table is not what the results say")
  args = parser.parse_args(argv)
  stale = 0
  for file in args.files or sorted(_DOCS.glob("*.md")):
    before = file.read_text()
    after = fill(before, results.load(args.results))
    if before == after:
      print(f"{file}: nothing to change")
    elif args.check:
      stale += 1
      print(f"{file}: its tables are not what the results say")
    else:
      file.write_text(after)
      print(f"{file}: written")
  return int(bool(stale))


def fill(text: str, found: list[dict]) -> str:
  """The text with its tables filled in.

  Raises:
    ValueError: a marker is not closed, or names a benchmark without results.
  """
  def replace(match):
    name, device = match[1], match[2] or ""
    here = [r for r in found if r["benchmark"] == name and r["rows"]
            and device.lower() in r["device"].lower()]
    if not here:
      raise ValueError(f"no result is called {name}{'@' + device if device else ''}")
    tag = match[1] + (f"@{device}" if device else "")
    return f"<!-- benchmarks:{tag} -->\n{markdown(here[-1])}\n<!-- /benchmarks:{tag} -->"

  opened = re.findall(r"<!-- benchmarks:(\S+) -->", text)
  closed = re.findall(r"<!-- /benchmarks:(\S+) -->", text)
  if opened != closed:
    raise ValueError(f"markers {opened} are closed by {closed}")
  return re.sub(r"<!-- benchmarks:([^\s@]+)(?:@(\S+))? -->.*?<!-- /benchmarks:\S+ -->", replace,
                text, flags=re.DOTALL)


def markdown(result: dict) -> str:
  """A result's table, and below it what it was measured on."""
  rows = [row for row in result["rows"] if not {"absent", "failed"} & row.keys()]
  columns = _columns(result)
  used = {key: head for key, head in columns.items() if any(row.get(key) for row in rows)}
  versions = ", ".join(f"{k} {v}" for k, v in (result.get("compiler")
                                               or result["versions"]).items())
  how = result.get("timing") or "compiled ahead of time, not timed"
  lines = [table.markdown(used, rows), "",
           f"<sub>{result['device']}, {result['date'][:10]}, commit {result['commit']}; {how}; "
           f"{versions}.</sub>"]
  missing = {}
  for row in result["rows"]:
    reason = row.get("absent") or row.get("failed")
    if reason:
      missing.setdefault(reason.split(";")[0], set()).add(row["implementation"])
  for reason, names in missing.items():
    lines.append(f"<sub>No row for {', '.join(sorted(names))}: {reason[:160]}.</sub>")
  return "\n".join(lines)


def _columns(result):
  if result["benchmark"] == "static":
    gpu = isinstance(aot.chip(result["device"]), aot.Gpu)
    return static.GPU_COLUMNS if gpu else static.TPU_COLUMNS
  if result["benchmark"] == "masks-static":
    return static.MASK_COLUMNS
  if result["benchmark"] == "train":
    return _TRAIN
  if result["benchmark"] == "plan":
    return plan.COLUMNS
  if result["benchmark"] == "generate":
    return generate.COLUMNS
  case = {"shape": "shape", "pass": "pass"}
  return case | {k: v or "variant" for k, v in measure.COLUMNS.items() if k != "spread"}
