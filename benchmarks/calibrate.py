"""Predicted times of programs that others timed, and the model's constants and error.

tokamax's wheel has the times of its loss kernel on TPUs, by problem and configuration. Each kernel
is compiled ahead of time, half of them fit the model's constants (kernels.aot.times), and the
other half judge it. Nothing is run. Needs `pip install tokamax`.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import pathlib
import re
import statistics

import numpy as np
import scipy.optimize

from palm_haiku.kernels import aot
from palm_haiku.kernels.aot import times
from palm_haiku.kernels.core import chips

from . import results, table

FOLDERS = {"v5p": "tpu_v5", "v6e": "tpu_v6_lite", "tpu7x": "tpu7x"}
FILE = "pallas_mosaic_tpu_linear_softmax_cross_entropy_loss.json"
# The chips whose peak does not give the clock of a core: it is fitted.
UNKNOWN_CLOCK = ("tpu7x",)
COLUMNS = {"chip": "chip", "half": "half", "kernels": "kernels", "rows": "timings",
           "median": "error: median %", "ninetieth": "90th percentile %", "worst": "worst %",
           "flops": "FLOPs alone: median %", "ranked": "configurations ranked right"}


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One program but for the length of its grid: operands' widths and blocks."""

  dtype: str  # of the states; weights are bfloat16
  dim: int
  blocks: tuple[int, int, int]  # of tokens, dim and vocabulary


@dataclasses.dataclass(frozen=True)
class Timing:
  """A published measurement."""

  kernel: Kernel
  tokens: int
  vocabulary: int
  seconds: float  # median of a call

  def steps(self, cores: int) -> int:
    """Of the grid, on the core with the most blocks of tokens."""
    tokens, dim, vocabulary = self.kernel.blocks
    return (-(-self.tokens // (tokens * cores)) * -(-self.kernel.dim // dim)
            * -(-self.vocabulary // vocabulary))

  @property
  def flops(self) -> float:
    return 2.0 * self.tokens * self.kernel.dim * self.vocabulary


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks calibrate", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--chip", choices=list(FOLDERS), help="default all")
  parser.add_argument("--kernels", type=int, metavar="N", help="compile the N that were timed most "
                      "often (default all)")
  parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="of tokamax's timings "
                      "(default: those of the installed package)")
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  args = parser.parse_args(argv)
  if args.kernels is not None and args.kernels < 4:
    raise ValueError(f"--kernels must be at least 4, two for each half; got {args.kernels}")
  folder, summaries = args.data or _installed(), []
  for chip in [args.chip] if args.chip else FOLDERS:
    timings = most_timed(published(folder / FOLDERS[chip] / FILE), args.kernels)
    cycles = {}
    for kernel in sorted({timing.kernel for timing in timings}, key=str):
      # With the longest grid its first and last turns count least.
      timing = max((t for t in timings if t.kernel == kernel), key=lambda t: t.tokens)
      report = aot.run(job(timing, chip))
      cycles[kernel] = cycles_of_step(report)
      print(f"{chip} {kernel}: {cycles[kernel]:.0f} cycles a step", flush=True)
    result = results.document("calibration", device=chip) | {"compiler": report.versions}
    model, result["rows"], halves = judged(timings, cycles, chip)
    result["model"], result["halves"] = dataclasses.asdict(model), halves
    summaries += halves
    path = results.save(result, args.out)
    _plot(result["rows"], chip, path.with_suffix(".png"))
    print(model, path, sep="\n")
  print(table.text(COLUMNS, summaries))
  return 0


def _installed() -> pathlib.Path:
  spec = importlib.util.find_spec("tokamax")
  if spec is None or not spec.submodule_search_locations:
    raise ValueError("calibrate needs the timings and kernels of tokamax: pip install tokamax")
  return pathlib.Path(spec.submodule_search_locations[0]) / "data/autotuning"


def published(path: pathlib.Path) -> list[Timing]:
  """The timings of a file of tokamax's, forward passes without residuals."""
  found = []
  for problem, tried in json.loads(path.read_text()).items():
    problem = json.loads(problem)
    if problem["return_residuals"]:
      continue
    dtype, tokens, dim = re.fullmatch(r"(\w+)\[(\d+),(\d+)\]", problem["x"]).groups()
    vocabulary = int(re.fullmatch(r"bf16\[\d+,(\d+)\]", problem["w"])[1])
    for config, measured in tried.items():
      config = json.loads(config)
      kernel = Kernel(dtype, int(dim), tuple(config[f"{axis}_block_size"] for axis in "bhv"))
      found.append(Timing(kernel, int(tokens), vocabulary,
                          statistics.median(measured["evaluation_times_ms"]) / 1e3))
  return found


def most_timed(timings: list[Timing], number: int | None) -> list[Timing]:
  """The timings of the kernels that have the most of them."""
  count = {kernel: sum(t.kernel == kernel for t in timings) for kernel in
           {t.kernel for t in timings}}
  kept = sorted(count, key=lambda kernel: (-count[kernel], str(kernel)))[:number]
  return [timing for timing in timings if timing.kernel in kept]


def program(*, dtype, tokens, dim, vocabulary, blocks):
  """(function, arguments) of tokamax's kernel, in the process that compiles it."""
  import jax

  kernels = importlib.import_module(
      "tokamax._src.ops.linear_softmax_cross_entropy_loss.pallas_mosaic_tpu_kernel")

  def loss(x, labels, weights):
    b, h, v = blocks
    return kernels.linear_softmax_cross_entropy_loss_fwd_pallas_mosaic_tpu(
        x, labels, weights, b_block_size=b, h_block_size=h, v_block_size=v, reduction="sum")[0]

  array = jax.ShapeDtypeStruct
  return loss, (array((tokens, dim), dtype), array((tokens,), "int32"),
                array((dim, vocabulary), "bfloat16"))


def job(timing: Timing, chip: str) -> aot.Job:
  """The compilation of a timing's kernel."""
  kernel = timing.kernel
  parts = -(-kernel.dim // kernel.blocks[1])
  # Of a product's steps one begins the sums, the others add; the last makes the loss of them.
  steps = aot.Steps(active=(1 / parts, 1 - 1 / parts) if parts > 1 else 1.0, edge=1 / parts)
  return aot.job("benchmarks.calibrate:program", target=chip, steps={"lce_fwd": steps},
                 dtype={"bf16": "bfloat16", "f32": "float32"}[kernel.dtype], tokens=timing.tokens,
                 dim=kernel.dim, vocabulary=timing.vocabulary, blocks=kernel.blocks)


def cycles_of_step(report: aot.Report) -> float:
  """Bundles of a step of the grid, in the mean."""
  kernel, = report.kernels_named("lce_fwd")
  turns, cycles = kernel.schedule.grid
  return cycles / turns


def fit(timings: list[Timing], cycles: dict[Kernel, float], chip: str) -> times.Model:
  """The constants with the least squares of relative errors, none of them negative."""
  tpu = chips.tpu(chip)
  cores = tpu.cores // tpu.devices
  rows, wanted = [], []
  for timing in timings:
    steps = timing.steps(cores)
    bundles = steps * cycles[timing.kernel]
    known = 0.0 if chip in UNKNOWN_CLOCK else bundles / tpu.clock
    row = [steps, 1.0] + [bundles] * (chip in UNKNOWN_CLOCK)
    rows.append(np.array(row) / timing.seconds)
    wanted.append(1 - known / timing.seconds)
  scale = np.max(rows, 0)
  step, launch, *inverse = scipy.optimize.nnls(np.array(rows) / scale, np.array(wanted))[0] / scale
  clock = 1 / inverse[0] if inverse else tpu.clock
  return times.Model(float(clock), float(step), float(launch), math.nan, math.nan)


def judged(timings, cycles, chip) -> tuple[times.Model, list[dict], list[dict]]:
  """(the model, a row for each timing, a summary of each half); halves share no kernel."""
  kernels = sorted(cycles, key=str)
  fitted = set(kernels[::2])
  model = fit([t for t in timings if t.kernel in fitted], cycles, chip)
  tpu = chips.tpu(chip)
  cores = tpu.cores // tpu.devices
  peak = tpu.tflops * 1e12 / tpu.devices
  rows = []
  for t in timings:
    steps = t.steps(cores)
    seconds = model.seconds(steps * cycles[t.kernel], steps)
    rows.append({
        "half": "fitted" if t.kernel in fitted else "held out",
        "shape": f"{t.tokens}x{t.kernel.dim}x{t.vocabulary}", "dtype": t.kernel.dtype,
        "blocks": "/".join(map(str, t.kernel.blocks)), "ms": float(f"{1e3 * seconds:.4g}"),
        "error": float(f"{seconds / t.seconds - 1:.3g}"),
        "flops_error": float(f"{t.flops / peak / t.seconds - 1:.3g}")})
  halves = []
  for half in ("fitted", "held out"):
    own = [row for row in rows if row["half"] == half]
    errors = np.abs([row["error"] for row in own])
    percent = lambda x: round(100 * float(x), 1)
    halves.append({
        "chip": chip, "half": half, "rows": len(own),
        "kernels": len({(row["dtype"], row["shape"].split("x")[1], row["blocks"]) for row in own}),
        "median": percent(np.median(errors)), "ninetieth": percent(np.quantile(errors, 0.9)),
        "worst": percent(errors.max()),
        "flops": percent(np.median(np.abs([row["flops_error"] for row in own])))})
  halves[1]["ranked"] = _ranked(rows)
  error, ninetieth = (round(halves[1][name] / 100, 4) for name in ("median", "ninetieth"))
  return dataclasses.replace(model, error=error, ninetieth=ninetieth), rows, halves


def _ranked(rows) -> str:
  """The number of pairs of one problem's configurations that are predicted in the right order."""
  right = every = 0
  for i, a in enumerate(rows):
    for b in rows[:i]:
      if (a["shape"], a["dtype"]) == (b["shape"], b["dtype"]) and a["blocks"] != b["blocks"]:
        measured = [row["ms"] / (1 + row["error"]) for row in (a, b)]
        every += 1
        right += (measured[0] < measured[1]) == (a["ms"] < b["ms"])
  return f"{right} of {every}"


def _plot(rows, chip, path):
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(6, 5))
  for half, color in (("fitted", "#7f7f7f"), ("held out", "#d62728")):
    own = [row for row in rows if row["half"] == half]
    axes.loglog([row["ms"] / (1 + row["error"]) for row in own], [row["ms"] for row in own], "o",
                markersize=4, color=color, label=half)
  low, high = axes.get_xlim()
  axes.plot((low, high), (low, high), color="black", linewidth=0.8)
  axes.set(title=f"loss kernels of tokamax on a {chip}", xlabel="measured, ms",
           ylabel="predicted, ms")
  axes.legend()
  figure.savefig(path, dpi=100, bbox_inches="tight")
  plt.close(figure)
