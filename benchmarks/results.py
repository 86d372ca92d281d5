"""Results as dated JSON: written whole or not at all, with what they were measured on."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess

FOLDER = pathlib.Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "libtpu", "jax-triton", "triton", "tokamax",
             "dm-haiku", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13")


def document(benchmark: str, device: str | None = None) -> dict:
  """A result without rows.

  Args:
    benchmark: such as "attention".
    device: what the rows are about; None: the device of this machine, which is asked.
  """
  if device is None:
    import jax

    chip = jax.devices()[0]
    device = chip.device_kind if chip.platform != "cpu" else _processor()
  return {
      "benchmark": benchmark, "device": device,
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "commit": _commit(), "python": platform.python_version(), "driver": _driver(),
      "versions": {name: version for name in _PACKAGES if (version := _version(name))},
      "rows": []}


def path(result: dict, out: pathlib.Path | str | None = None) -> pathlib.Path:
  """Where a result goes: DATE-DEVICE-BENCHMARK.json, in `out` or benchmarks/results."""
  device = "".join(c if c.isalnum() else "-" for c in result["device"].lower()).strip("-")
  name = f"{result['date'][:10]}-{device}-{result['benchmark']}.json"
  return pathlib.Path(out or FOLDER) / name


def resume(result: dict, out: pathlib.Path | str | None = None) -> dict:
  """The rows of an earlier result of the same day, device, benchmark, versions and commit, too."""
  try:
    earlier = json.loads(path(result, out).read_text())
  except (OSError, json.JSONDecodeError):
    return result
  same = all(earlier.get(key) == result[key] for key in ("versions", "commit", "driver"))
  return result | {"rows": earlier["rows"]} if same else result


def add(result: dict, rows: list[dict]) -> None:
  """Adds rows in the place of those that name the same case."""
  identity = lambda row: tuple(row.get(key) for key in (
      "implementation", "shape", "dtype", "variant", "pass"))
  new = {identity(row) for row in rows}
  result["rows"] = [row for row in result["rows"] if identity(row) not in new] + rows


def save(result: dict, out: pathlib.Path | str | None = None) -> pathlib.Path:
  """Writes a result, replacing an earlier one of the same day, device and benchmark."""
  where = path(result, out)
  where.parent.mkdir(parents=True, exist_ok=True)
  part = where.with_suffix(f".{os.getpid()}.part")
  part.write_text(json.dumps(result, indent=1) + "\n")
  part.replace(where)
  return where


def load(folder: pathlib.Path | str | None = None) -> list[dict]:
  """All results of a folder, oldest first."""
  found = [json.loads(file.read_text()) for file in pathlib.Path(folder or FOLDER).glob("*.json")]
  found = [_flat(result) for result in found if "benchmark" in result]
  return sorted(found, key=lambda result: result["date"])


def newest(benchmark: str, folder=None) -> dict | None:
  """The last result of a benchmark that has rows."""
  found = [r for r in load(folder) if r["benchmark"] == benchmark and r["rows"]]
  return found[-1] if found else None


def _flat(result):
  """The whole model's results keep every measurement, by shape; here, one row of medians each."""
  if "rows" in result:
    return result
  rows, device = [], None
  for measured in result["results"]:
    shape = measured["shape"]
    for row in measured["rows"]:
      device = device or row.get("device")
      about = {"implementation": row["implementation"], "dtype": row["dtype"], "pass": "train step",
               "variant": row["dtype"], "shape": "x".join(str(n) for n in shape.values())}
      if "absent" in row:
        rows.append(about | {"absent": row["absent"]})
        continue
      step = statistics.median(row["step_seconds"])
      rows.append(about | {
          "step": step, "trained": shape["batch"] * shape["seq"] / step,
          "peak_gb": row["peak_bytes"] / 1e9,
          "compile": statistics.median(row["compile_seconds"][str(shape["depth"])]),
          "sampled": statistics.median(row["tokens_per_second"])})
  return result | {"device": device or result["platform"], "rows": rows,
                   "timing": "implementations in turns, medians"}


def _version(name):
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _commit():
  here = pathlib.Path(__file__).parent

  def git(*command):
    return subprocess.run(("git", "-C", str(here), *command), capture_output=True, text=True,
                          check=False).stdout.strip()

  commit = git("rev-parse", "--short=12", "HEAD")
  # Results written a moment ago do not make the code another one.
  changed = git("status", "--porcelain", "-uno", "--", ":/", ":(exclude)results")
  return commit + ("-dirty" if commit and changed else "") or None


def _driver():
  try:
    done = subprocess.run(
        ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        capture_output=True, text=True, check=False)
  except FileNotFoundError:
    return None
  return done.stdout.strip().split("\n")[0] or None


def _processor():
  try:
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith("model name"):
        return f"{line.partition(':')[2].strip()} x {os.cpu_count()}"
  except OSError:
    pass
  return f"{platform.machine()} x {os.cpu_count()}"
