"""The command line: palm-haiku plan."""

import argparse
import dataclasses
import json
import pathlib
import time

import rich.progress
import rich.table

from palm_haiku import plan, terminal
from palm_haiku.config import PaLMConfig
from palm_haiku.plan import draw
from palm_haiku.plan.sweep import REMATS
from palm_haiku.recipe import TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """All options but those of the model and of the kernels."""
  parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="of a TPU slice, "
                      "such as v5p:4x4x4 or v5e:8, or a node's GPUs, such as h200:8")
  parser.add_argument("--slices", type=int, default=1, metavar="N", help="or nodes (default 1)")
  parser.add_argument("--mesh", metavar="AXES", help="as for train (default fsdp)")
  parser.add_argument("--batch-size", type=int, required=True, help="sequences per step")
  parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="as for train")
  parser.add_argument("--seq-len", type=int, default=2048, help="default 2048")
  parser.add_argument("--optimizer", choices=("adamw", "palm"), default="adamw")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16",
                      help="default bfloat16")
  parser.add_argument("--remat", choices=("none", "attention", "full"), help="default full")
  parser.add_argument("--shard-residual", action="store_true", help="as for train")
  parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS",
                      help="of a compiler (default 1800)")
  group = parser.add_argument_group("many plans")
  group.add_argument("--sweep", action="store_true", help="try meshes and remat policies, or those "
                     "of the one that --mesh or --remat names, and rank them")
  group.add_argument("--limit", type=int, default=24, metavar="N", help="try the first N (default "
                     "24)")
  group.add_argument("--workers", type=int, default=2, metavar="N", help="compilers at one time, "
                     "of some GB each (default 2)")
  group = parser.add_argument_group("output")
  group.add_argument("--json", action="store_true", help="one object instead of tables")
  group.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the time of a "
                     "step and the memory of a chip")


def run(args: argparse.Namespace, model: PaLMConfig | None) -> int:
  """Plans, and prints; errors of the user are ValueErrors."""
  if model is None:
    raise ValueError("plan needs --model, or --dim, --depth and --heads")
  for name in ("limit", "workers"):
    if getattr(args, name) < 1:
      raise ValueError(f"--{name} must be at least 1; got {getattr(args, name)}")
  if args.plot and not args.plot.parent.is_dir():
    raise ValueError(f"--plot: there is no directory {args.plot.parent}")
  machine = plan.Machine(args.topology, args.slices)
  config = TrainConfig(
      model=model, implementation=args.implementation or "auto", mesh=args.mesh or "fsdp",
      remat=args.remat or "full", **{name: getattr(args, name) for name in (
          "batch_size", "accumulate", "seq_len", "optimizer", "dtype", "shard_residual")})
  title = (f"{args.model or 'a model'} on {args.slices} x {args.topology}" if args.slices > 1 else
           f"{args.model or 'a model'} on {args.topology}")
  return (_sweep if args.sweep else _one)(args, config, machine, title)


def _one(args, config, machine, title):
  found = plan.plan(config, machine, timeout=args.timeout)
  if args.json:
    print(json.dumps(found))
  else:
    _show(terminal.Console(), found, machine)
  _draw(draw.one, found, f"{title}, {config.mesh}, batch {config.batch_size}", args.plot)
  return 0


def _draw(picture, what, title, path):
  """Draws to a file, if one is asked for, after all else is told."""
  if path is None:
    return
  terminal.flush()
  try:
    picture(what, title, path)
  except Exception as error:  # Of any type: Matplotlib's settings and fonts, its writers, the disk.
    raise ValueError(f"{path} could not be drawn: {terminal.one_line(error)}") from error


def _show(console, found, machine):
  terminal.say(console, f"{found['params']:,} parameters on {found['chips']:,} {machine.chip}, "
               f"compiled in {found['compile_seconds']:.0f} s")
  room = found["hbm_limit_bytes"] - found["hbm_per_chip_bytes"]
  table = rich.table.Table("memory of a chip", "", box=None)
  for name, size in (("parameters, optimizer, batch", found["state_bytes"]),
                     ("activations, temporaries", found["temporary_bytes"]),
                     ("program", found["code_bytes"]), ("all", found["hbm_per_chip_bytes"]),
                     ("room" if found["fits"] else "too much", abs(room))):
    table.add_row(name, terminal.size(size))
  console.print(table)
  table = rich.table.Table("op", "runs", "because", box=None)
  for op, choice in found["implementations"].items():
    table.add_row(op, choice["implementation"], choice["reason"])
  console.print(table)
  table = rich.table.Table("transfer", "axis", "times a step", "GB", "GB sent by a chip", box=None)
  for one in found["collectives"]:
    table.add_row(one["kind"], one["axis"], f"{one['count']:,}", f"{one['bytes'] / 1e9:.3g}",
                  f"{one['sent_bytes'] / 1e9:.3g}")
  console.print(table)
  table = rich.table.Table("at least", "seconds", box=None)
  for name, seconds in (("products", found["compute_seconds"]), ("memory", found["memory_seconds"]),
                        ("network inside", found["network_seconds"]["inside"]),
                        ("network between", found["network_seconds"]["between"]),
                        ("step", found["least_seconds"])):
    table.add_row(name, f"{seconds:.3g}")
  console.print(table)
  terminal.say(console, _forecast(found))
  if not found["loops_known"]:
    terminal.say(console, "the length of a loop is not known: transfers inside count once")


def _forecast(found) -> str:
  rates = f"MFU {found['mfu']:.1%}, HFU {found['hfu']:.1%}"
  if found["achieved"] == 1:
    return f"at most: {rates} (no published run of this chip to go by)"
  doubt = _doubt(found)
  return (f"forecast: {found['step_seconds']:.3g} s, {rates} (products at {found['achieved']:.0%} "
          "of the peak, as published runs on this chip)" + (f"; {doubt}" if doubt else ""))


def _doubt(found) -> str:
  if found["achieved"] == 1 or found["params"] >= 3e9:
    return ""
  return ("those runs have 30 billion parameters and more, and products as small as this model's "
          "are slower than that")


def _sweep(args, config, machine, title):
  meshes = (args.mesh,) if args.mesh else ()
  if args.mesh:
    plan.check(config, machine)  # so that a mistake in the one mesh is told
  tried = list(plan.candidates(config, machine, meshes=meshes,
                               remats=(args.remat,) if args.remat else REMATS))
  if not tried:
    raise ValueError("no mesh of data, fsdp and model divides these chips, this batch and model")
  left = len(tried) - args.limit
  console = terminal.Console(stderr=args.json)
  start = time.perf_counter()
  with rich.progress.Progress(
      rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn("{task.fields[status]}", markup=False),
      rich.progress.TimeElapsedColumn(), console=console,
      disable=not console.is_terminal) as progress:
    task = progress.add_task("compiling", total=min(len(tried), args.limit), status="")

    def on_row(row):
      progress.update(task, advance=1, status=f"{row['mesh']} {row['remat']}: {_word(row)}")

    rows = plan.sweep(config, machine, tried[:args.limit], workers=args.workers,
                      timeout=args.timeout, on_row=on_row)
  best = rows[0] if rows[0]["error"] is None and rows[0]["fits"] else None
  if args.json:
    print(json.dumps({"machine": dataclasses.asdict(machine), "chips": machine.chips,
                      "seconds": time.perf_counter() - start, "left_out": max(0, left),
                      "best": best and {"mesh": best["mesh"], "remat": best["remat"]},
                      "rows": rows}))
  else:
    _show_ranking(console, rows, left, len(tried), best)
  _draw(draw.ranking, rows, title, args.plot)
  return 0 if best else 1


def _show_ranking(console, rows, left, num_tried, best):
  table = rich.table.Table("mesh", "remat", "step s", "MFU", "of a chip", "network s", "compiled",
                           "", box=None)
  for row in rows:
    if row["error"] is not None:
      table.add_row(row["mesh"], row["remat"], "", "", "", "", f"{row['seconds']:.0f} s",
                    row["error"])
      continue
    table.add_row(row["mesh"], row["remat"], f"{row['step_seconds']:.3g}", f"{row['mfu']:.1%}",
                  terminal.size(row["hbm_per_chip_bytes"]),
                  f"{sum(row['network_seconds'].values()):.3g}", f"{row['seconds']:.0f} s",
                  "" if row["fits"] else "does not fit")
  console.print(table)
  found = next((row for row in rows if row["error"] is None), None)
  if found and found["achieved"] == 1:
    terminal.say(console, "steps take at least so long: no published run of this chip to go by")
  elif found and (doubt := _doubt(found)):
    terminal.say(console, f"steps are forecast from published runs on this chip; {doubt}")
  if left > 0:
    terminal.say(console, f"{left} more were left out; --limit {num_tried} tries all")
  terminal.say(console, f"best: --mesh {best['mesh']} --remat {best['remat']}" if best
               else "none of them fits")


def _word(row) -> str:
  if row["error"] is not None:
    return "failed"
  return f"{row['step_seconds']:.3g} s" if row["fits"] else "does not fit"
