"""Plans of published training runs, against the MFU that was measured.

Models are dense PaLMs with the width, depth, heads and batch of the run on as many chips; their
feed-forward branch is a whole multiple of the width, such that there are as many parameters. The
share of the peak that a chip's products achieve is one constant for its generation: the geometric
mean of what each of its runs needs (`palm_haiku.hardware.ACHIEVED` holds them).
"""

import argparse
import concurrent.futures
import dataclasses
import math

from palm_haiku import configs, plan
from palm_haiku.config import PaLMConfig
from palm_haiku.hardware import ACHIEVED
from palm_haiku.plan import child
from palm_haiku.recipe import TrainConfig

from . import results, table

_MAXTEXT = "MaxText, src/maxtext/configs/tpu/%s/README.md"


@dataclasses.dataclass(frozen=True)
class Run:
  """A training run that someone measured."""

  implementation: str  # its name; what a row is known by
  machine: plan.Machine
  model: PaLMConfig
  mesh: str
  batch_size: int
  published: float  # MFU
  source: str
  remat: str = "full"
  seq_len: int = 2048
  note: str = ""  # how it differs from what is planned


def _model(dim, depth, heads, ff_mult, dim_head=128):
  return PaLMConfig(num_tokens=32_000, dim=dim, depth=depth, heads=heads, dim_head=dim_head,
                    ff_mult=ff_mult)


RUNS = (
    Run("PaLM 540B", plan.Machine("v4:12x16x16", 2), configs["palm-540b"],
        "data=2,fsdp=256,model=12", 2048, 0.462, "PaLM (arXiv:2204.02311), section 4.1"),
    Run("MaxText 52B", plan.Machine("v4:4x4x12", 2), _model(12_288, 32, 32, 3, 256),
        "data=2,fsdp=192", 2688, 0.589, _MAXTEXT % "v4",
        note="the published one of two slices, which is faster than that of one, 56.0%"),
    Run("MaxText 32B", plan.Machine("v5e:16x16"), _model(8192, 32, 64, 4), "fsdp=256", 1024, 0.669,
        _MAXTEXT % "v5e"),
    Run("MaxText 32B", plan.Machine("v5p:4x4x4"), _model(8192, 32, 64, 4), "fsdp=16,model=4", 384,
        0.715, _MAXTEXT % "v5p", remat="none"),
    Run("MaxText 512B", plan.Machine("v5p:8x8x8"), _model(16_384, 128, 128, 4), "fsdp=64,model=8",
        1024, 0.640, _MAXTEXT % "v5p"),
    Run("MaxText 1024B", plan.Machine("v5p:8x16x16"), _model(16_384, 128, 256, 8),
        "fsdp=128,model=16", 4096, 0.648, _MAXTEXT % "v5p"),
    Run("Llama 2 70B", plan.Machine("v5p:8x8x8"), _model(8192, 80, 64, 4), "fsdp=512", 2048, 0.654,
        "MaxText, docs/reference/models/tiering.md", remat="attention", seq_len=4096,
        note="it keeps all products but the in-projection of its feed-forward branch"),
)

COLUMNS = {"implementation": "run", "shape": "machine", "variant": "mesh, remat", "batch": "batch",
           "billions": "B parameters", "published": "published MFU, %",
           "forecast": "planned MFU, %", "off": "off by, %", "most": "at most, %",
           "needs": "share of peak it needs, %", "limit": "limited by", "gib": "GiB of a chip",
           "room": "room"}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks plan", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  parser.add_argument("--only", metavar="TEXT", default="", help="of a run's name or machine")
  parser.add_argument("--again", action="store_true", help="estimate anew what the newest result "
                      "compiled")
  parser.add_argument("--workers", type=int, default=1, help="compilers at one time (default 1)")
  parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS")
  args = parser.parse_args(argv)
  result = results.document("plan", "TPUs of published runs")
  if args.again or args.only:
    earlier = results.newest("plan", args.out)
    if args.again and not earlier:
      raise ValueError("no result to estimate anew")
    result["rows"] = earlier["rows"] if earlier else []
  wanted = [run for run in RUNS if args.only in f"{run.implementation} {run.machine.topology}"]
  before = {(row["implementation"], row["shape"]): row.get("compiled") for row in result["rows"]}

  def compiled(run):
    if args.again:
      return before.get((run.implementation, _machine(run)))
    return child.compile_elsewhere(_config(run), run.machine, args.timeout)

  with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
    for run, future in [(run, pool.submit(compiled, run)) for run in wanted]:
      try:
        answer = future.result()
      except plan.PlanError as error:
        results.add(result, [_named(run) | {"failed": str(error)}])
      else:
        if answer:
          results.add(result, [row(run, answer)])
      print(table.text(COLUMNS, [r for r in result["rows"] if "failed" not in r]), flush=True)
      results.save(result, args.out)
  for chip in dict.fromkeys(run.machine.chip for run in RUNS):
    needed = [r["needs"] / 100 for r in result["rows"] if r["shape"].startswith(chip + ":")
              and "needs" in r]
    if needed:
      print(f"{chip}: {math.prod(needed) ** (1 / len(needed)):.3f} is the mean of "
            f"{', '.join(f'{n:.3f}' for n in needed)}; hardware.ACHIEVED has {ACHIEVED.get(chip)}")
  print(results.save(result, args.out))
  return 0


def row(run: Run, compiled: dict) -> dict:
  """A run's plan beside what was published, in %."""
  found = plan.estimate(_config(run), run.machine, compiled)
  busy = {"products": found["compute_seconds"] / found["achieved"],
          "memory": found["memory_seconds"],
          "network inside": found["network_seconds"]["inside"],
          "network between": found["network_seconds"]["between"]}
  most = found["mfu"] * found["step_seconds"] / found["least_seconds"]
  needs = run.published * found["compute_seconds"] / (found["mfu"] * found["step_seconds"])
  return _named(run) | {
      "batch": run.batch_size, "billions": run.model.num_params / 1e9,
      "published": 100 * run.published, "forecast": 100 * found["mfu"],
      "off": round(100 * (found["mfu"] / run.published - 1), 1), "most": 100 * most,
      "needs": 100 * needs,
      "limit": max(busy, key=busy.get),
      "gib": found["hbm_per_chip_bytes"] / 2**30,
      "room": (found["hbm_limit_bytes"] - found["hbm_per_chip_bytes"]) / 2**30,
      "source": run.source, "note": run.note, "compiled": compiled}


def _named(run):
  return {"implementation": run.implementation, "shape": _machine(run),
          "variant": f"{run.mesh}, {run.remat}"}


def _machine(run):
  return f"{run.machine.topology}" + (f" x {run.machine.slices}" if run.machine.slices > 1 else "")


def _config(run):
  return TrainConfig(
      model=run.model, mesh=run.mesh, batch_size=run.batch_size, seq_len=run.seq_len,
      remat=run.remat, dtype="bfloat16", shard_residual="model" in run.mesh,
      optimizer="palm" if run.model is configs["palm-540b"] else "adamw")
