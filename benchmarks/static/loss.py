"""The loss: its memory, and how busy it keeps a chip.

Memory is XLA's own count for the whole program. TPU cycles are those of the scheduled bundles, of
this project's kernels and of XLA's products, each as often as the program runs it; no wait for
memory is in them.
"""

import argparse
import math

import jax
import jax.numpy as jnp

from palm_haiku import kernels
from palm_haiku.kernels import aot
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.cross_entropy import configs

from .. import results, table

TARGETS = ["h200", "v5p", "v6e", "v5e"]
SHAPES = ["16384x4096x256000"]
COLUMNS = {
    "pass": "pass", "shape": "tokens x dim x vocabulary", "dtype": "embedding",
    "implementation": "kernels of", "memory": "MiB of temporaries",
    "logits": "logits in memory", "us": "static us", "busy": "MXU busy %", "useful": "useful %",
    "kernels": "registers, spilled bytes"}


def program(*, tokens, dim, vocabulary, embedding, gradient, implementation):
  """(function, arguments) of the loss, or of the loss with the gradients of both matrices."""
  def losses(x, table, targets):
    return kernels.linear_cross_entropy(x, table, targets, z_loss=1e-4, scale=dim**-0.5,
                                        implementation=implementation)[0]

  def both(x, table, targets):
    out, pull = jax.vjp(lambda x, table: losses(x, table, targets), x, table)
    return out, *pull(jnp.ones_like(out))

  return (both if gradient else losses), (
      jax.ShapeDtypeStruct((tokens, dim), "bfloat16"),
      jax.ShapeDtypeStruct((vocabulary, dim), embedding),
      jax.ShapeDtypeStruct((tokens,), "int32"))


def jobs(target, shape, implementation) -> list:
  """[(what it is, Job)]: forward, both passes, and both with a float32 embedding."""
  sizes = dict(zip(("tokens", "dim", "vocabulary"), map(int, shape.split("x")), strict=True))
  found = []
  for backward, embedding in ((False, "bfloat16"), (True, "bfloat16"), (True, "float32")):
    about = {"pass": "backward" if backward else "forward", "shape": shape, "dtype": embedding,
             "implementation": implementation}
    found.append((about, aot.job(
        "benchmarks.static.loss:program", target=target, steps=_steps(target, sizes),
        flops=(3 if backward else 1) * 2 * math.prod(sizes.values()),
        square=(sizes["tokens"], sizes["vocabulary"]), embedding=embedding, gradient=backward,
        implementation=implementation, **sizes)))
  return found


def _steps(target, sizes) -> dict[str, aot.Steps]:
  """The number of times that a TPU kernel begins and ends a block of tokens."""
  if isinstance(aot.chip(target), aot.Gpu):
    return {}
  from palm_haiku.kernels.cross_entropy import fused, mosaic_tpu
  blocks = configs.mosaic_tpu(target)
  plan = lambda n, rows: mosaic_tpu.fit(blocks[n], target, sizes["tokens"], rows, sizes["dim"], 2)
  # The gradient's kernel has two sizes; the shorter begins more often.
  rest = sizes["vocabulary"] % fused.MOST_ROWS or fused.MOST_ROWS
  return {"cross_entropy_gradient": aot.Steps(edge=1 / plan(1, rest).row_blocks),
          "cross_entropy_forward": aot.Steps(
              edge=1 / plan(0, min(sizes["vocabulary"], fused.MOST_ROWS)).row_blocks)}


def row(about: dict, report: aot.Report) -> dict:
  figures = about | {
      "memory": round(report.memory["temp"] / 2**20, 1),
      "logits": ", ".join(map(str, report.square))}
  if isinstance(report.chip, aot.Gpu):
    own = [k for k in report.kernels if k.source != "xla"]
    return figures | {"kernels": "; ".join(
        f"{k.name} {k.resources.registers}, {k.resources.spill_stores}"
        + " serialized" * k.resources.serialized for k in own)}
  seconds = report.seconds()
  if seconds is None or report.loops:
    return figures | {"kernels": "how often a loop runs is not known"}
  cycles = sum(k.cycles * k.calls for k in report.kernels)
  matmul = sum(k.schedule.matmul_cycles * k.calls for k in report.kernels)
  return figures | {"us": round(seconds * 1e6, 1), "busy": round(100 * matmul / cycles, 1),
                    "useful": round(100 * report.utilization(), 1)}


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks static loss", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--targets", nargs="+", default=TARGETS, choices=list(chips.ALL),
                      metavar="CHIP", help=f"default {' '.join(TARGETS)}")
  parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxDxV",
                      help=f"tokens, dim, vocabulary; default {' '.join(SHAPES)}")
  parser.add_argument("--implementations", nargs="+", metavar="NAME",
                      choices=["xla", "mosaic_gpu", "mosaic_tpu", "triton"],
                      help="default the chip's kernels")
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  args = parser.parse_args(argv)
  failed = 0
  for target in args.targets:
    gpu = isinstance(aot.chip(target), aot.Gpu)
    fused = {True: ("mosaic_gpu", "triton") if target in ("h100", "h200") else ("triton",),
             False: ("mosaic_tpu",)}[gpu]
    result = results.document("loss-static", device=target)
    wanted = [pair for shape in args.shapes for name in args.implementations or fused
              for pair in jobs(target, shape, name)]
    for about, job in wanted:
      try:
        report = aot.run(job)
      except aot.AotError as error:
        failed += 1
        print(f"no row: {about}: {str(error)[:300]}")
        continue
      result["rows"].append(row(about, report))
      result["compiler"] = report.versions
      results.save(result, args.out)
    print(f"{target}, compiled ahead of time: "
          + ", ".join(f"{k} {v}" for k, v in result.get("compiler", {}).items()))
    print(table.text(COLUMNS, result["rows"]))
  return int(bool(failed))
