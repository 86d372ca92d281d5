"""Attention kernels of this project beside those of its peers.

GPU: registers, spills and the main loop's instructions, from the machine code. TPU: cycles of the
bundles that the compiler scheduled, times how often they run; no wait for memory is in them, so
they rank kernels and are no times.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
import re
import sys

import jax
import jax.numpy as jnp

from palm_haiku.kernels import aot
from palm_haiku.kernels.core import chips

from .. import peers, results, table
from ..shapes import Attention
from . import attention_steps

GPUS = ("h200",)
TPUS = ("v6e", "v5e", "v5p")
DIMS = (64, 128, 256)

GPU_COLUMNS = {
    "implementation": "kernels of", "variant": "", "pass": "pass", "dim_head": "dim_head",
    "kernel": "kernel", "registers": "registers", "spills": "spilled bytes",
    "shared": "shared KiB", "loop": "main loop", "tensor": "HGMMA", "per_tensor": "per HGMMA",
    "serialized": "serialized", "square": "T x S buffer"}
TPU_COLUMNS = {
    "implementation": "kernels of", "variant": "", "pass": "pass", "dim_head": "dim_head",
    "length": "T", "blocks": "blocks", "body": "body bundles", "mxu": "MXU %", "valu": "VALU %",
    "eup": "EUP %", "spills": "spills/fills", "us": "static us", "busy": "MXU busy %",
    "useful": "useful %", "square": "T x S buffer"}

MASK_COLUMNS = {
    "variant": "mask", "pass": "pass", "dim_head": "dim_head", "length": "T", "pairs": "pairs %",
    "us": "static us", "useful": "useful %", "cost": "cost / unmasked", "causal": "cost / causal",
    "square": "T x S buffer"}

# Causal masks that hide more: (T, what they are). The window's left end is a diagonal of blocks.
MASKS = {
    "window": (32768, attention_steps.Mask(window=(1024, 0))),
    "documents": (8192, attention_steps.Mask(segment_ids=attention_steps.documents(8192, 512))),
    "ragged": (8192, attention_steps.Mask(segment_ids=attention_steps.drawn_documents(8192, 16)))}


# ---- programs, built in the process that compiles them


def attention(*, implementation, chip, shape, dtype, alibi, gradient=False, options=()):
  """(function, arguments) of an attention by name, or of the gradient of its sum."""
  shape = Attention.parse(shape)
  function, arguments = _forward(implementation, chip, shape, dtype, alibi, options)
  if not gradient:
    return function, arguments
  return jax.grad(lambda *a: function(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2)), arguments


def _forward(implementation, chip, shape, dtype, alibi, options):
  if implementation == "tokamax-gpu":
    # It asks the default device what it is, not the mesh.
    jax.config.update("jax_default_device", aot.devices(chip)[0])
  if implementation in ("tokamax-tpu", "jax-splash", "jax-flash"):
    return _tpu_peer(implementation, shape, dtype, dict(options)["blocks"])
  function = peers.PEERS.get(implementation)
  if not function:
    function = functools.partial(peers.ours, implementation=implementation)
  rows = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.heads, shape.dim_head), dtype)
  keys = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.kv_heads, shape.dim_head), dtype)
  options = dict(options)
  ids = (jax.ShapeDtypeStruct((shape.batch, shape.length), "int32"),) * options.pop("ids", False)
  return functools.partial(function, alibi=alibi, **options), (rows, keys, keys, *ids)


def _tpu_peer(name, shape, dtype, blocks):
  """In the kernel's own layout: transposing around it changes where XLA puts its operands."""
  array = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
  heads, length, dim = shape.heads, shape.length, shape.dim_head
  if name == "jax-flash":
    return peers.jax_flash_kernel(dim, blocks), (array(1, heads, length, dim),) * 3
  arrays = (array(heads, length, dim), array(length, dim), array(length, dim))
  if name == "jax-splash":
    return peers.jax_splash_kernel(length, heads, blocks), arrays
  return peers.tokamax_splash_kernel(length, blocks), arrays


def matmul(*, implementation, m, k, n, dtype):
  """(function, arguments) of a matrix product, to have a scale."""
  arrays = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((k, n), dtype)
  if implementation == "jax-mosaic-gpu":
    from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu
    config = hopper_matmul_mgpu.TuningConfig(
        tile_m=128, tile_n=128, tile_k=64, max_concurrent_steps=4)
    return lambda a, b: hopper_matmul_mgpu.matmul(a, b, None, config), arrays
  return jnp.matmul, arrays


# ---- what to compile


def own(platform: str) -> list[str]:
  """This project's backends for a platform that have a file."""
  names = {"gpu": ("mosaic_gpu", "triton"), "tpu": ("mosaic_tpu",)}[platform]
  return [name for name in names
          if importlib.util.find_spec(f"palm_haiku.kernels.attention.{name}")]


def gpu_jobs(target, implementations, dims, dtype, length=2048):
  """[(what it is, Job)]: forward, forward and backward, with and without ALiBi."""
  jobs = []
  for name in implementations:
    for dim in dims:
      shape = Attention(1, length, 16, 1, dim)
      for variant in ("", "alibi"):
        for backward in (False, True):
          if name == "jax-mosaic-gpu" and (variant or backward):
            continue
          options = {"is_causal": False} if name == "jax-mosaic-gpu" else {}
          jobs.append(_job(name, target, shape, "float16" if name == "jax-mosaic-gpu" else dtype,
                           variant, backward, options, label="float16, not causal" * bool(options)))
  if "jax-mosaic-gpu" in implementations:
    about = dict(implementation="jax-mosaic-gpu", variant="matmul 4096^3, float16",
                 **{"pass": "forward"}, dim_head=None)
    jobs.append((about, aot.job(
        "benchmarks.static.attention:matmul", target=target, implementation="jax-mosaic-gpu",
        m=4096, k=4096, n=4096, dtype="float16")))
  return jobs


def tpu_jobs(target, implementations, dims, dtype, lengths=(2048, 8192)):
  jobs = []
  for name in implementations:
    for dim in dims:
      for length in lengths:
        shape = Attention(1, length, 16, 1, dim)
        for variant in ("alibi", "") if name not in peers.PEERS else ("",):
          for backward in (False, True):
            blocks = best_blocks(name, target, dim, length, backward)
            options = {"blocks": blocks} if blocks else {}
            jobs.append(_job(name, target, shape, dtype, variant, backward, options,
                             causal_steps(name, shape, blocks, target) if blocks
                             else own_steps(name, shape, target, dtype, backward,
                                            variant == "alibi")))
  return jobs


def mask_jobs(target, masks, dims, dtype):
  """Of this project's TPU kernels, both passes in one program."""
  jobs = []
  for dim in dims:
    for name in masks:
      length, mask = MASKS[name]
      options = {"window": mask.window, "ids": mask.segment_ids is not None}
      jobs.append(_job("mosaic_tpu", target, Attention(1, length, 16, 1, dim), dtype, "alibi",
                       True, options))
      jobs[-1][0].update(variant=name, dtype=dtype)
  return jobs


def _job(name, target, shape, dtype, variant, backward, options, steps=None, label=""):
  about = dict(implementation=name, variant=variant or label,
               **{"pass": "backward" if backward else "forward"}, dim_head=shape.dim_head,
               length=shape.length, blocks="/".join(map(str, options.get("blocks", ()))))
  flops = shape.flops(True) - shape.flops(False) if backward else shape.flops(False)
  return about, aot.job(
      "benchmarks.static.attention:attention", target=target, flops=flops,
      square=(shape.length, shape.length), steps=steps or {}, implementation=name, chip=target,
      gradient=backward, shape=str(shape), dtype=dtype, alibi=variant == "alibi",
      options=tuple(options.items()))


def best_blocks(name, target, dim, length, backward):
  """The peers' best block sizes found by static cycles (libtpu 0.0.52), q, kv, kv_compute."""
  if name not in ("jax-flash", "jax-splash", "tokamax-tpu"):
    return None
  if target == "v6e":
    longer = name == "tokamax-tpu" and dim <= 128 and length > 2048 and not backward
    return (1024, 1024) if name == "jax-flash" else (1024, 1024, 512 if longer else 1024)
  if name == "jax-flash":
    large = backward and dim <= 128 and (target != "v5e" or length <= 2048)
    return (1024, 1024) if large else (512, 512)
  if backward or dim > 128:
    return 512, 512, 512
  if name == "jax-splash":
    return 512, 1024, 512
  return (1024, 1024, 512) if target == "v5e" and length > 2048 else (512, 512, 512)


def causal_steps(name, shape, blocks, target) -> dict[str, aot.Steps]:
  """Trip counts of the parts of the peers' kernels, by the blocks that the causal mask leaves."""
  block_q, block_kv = blocks[:2]
  rows, columns = shape.length // block_q, shape.length // block_kv
  pairs = rows * columns
  visible = sum(min(columns, ((i + 1) * block_q - 1) // block_kv + 1) for i in range(rows))
  whole = sum(min(columns, (i * block_q + 1) // block_kv) for i in range(rows))
  if name == "tokamax-tpu":  # one body for whole blocks, one for masked ones; no empty blocks
    return {
        "_fwd_": aot.Steps(grid=visible * shape.heads // aot.chip(target).cores,
                           edge=rows / visible,
                           active=(whole / visible, 1 - whole / visible)),
        "_dkv_": aot.Steps(active=(whole / pairs, (visible - whole) / pairs), edge=1 / rows)}
  by_query = aot.Steps(active=visible / pairs, edge=1 / columns)
  return {"dkv": aot.Steps(active=visible / pairs, edge=1 / rows), "dq": by_query, "": by_query}


def own_steps(name, shape, target, dtype, backward, alibi) -> dict[str, aot.Steps]:
  """The same for this project's TPU kernel, from its plan of the problem."""
  if name != "mosaic_tpu":
    return {}
  plan = attention_steps.plan_of(shape, target, dtype, backward)
  return {"": attention_steps.steps(plan, shape, target, backward, alibi=alibi)}


# ---- the table


def row(about: dict, report: aot.Report) -> list[dict]:
  """The rows of a compiled program: GPU one for each kernel, TPU one for all of a pass."""
  square = ", ".join(str(b) for b in report.square)
  if isinstance(report.chip, aot.Gpu):
    return [_gpu_row(about, kernel, square) for kernel in report.kernels
            if kernel.source != "xla"] or [about | {"kernel": "XLA's own", "square": square}]
  backward = about["pass"] == "backward"
  found = [k for k in report.kernels if k.matrix and bool(re.search("dq|dkv|bwd|backward", k.name))
           == backward]
  if not found:
    return [about | {"absent": "no kernel of this pass was found"}]
  return [about | _tpu_figures(report, found) | {"square": square}]


def mask_rows(about: dict, report: aot.Report) -> list[dict]:
  """Both passes of a sparse mask: what it costs over its share of what all pairs cost.

  The denominator is the same program's, on a mask that hides nothing, and on the causal one.
  """
  length, mask = MASKS[about["variant"]]
  shape = Attention(1, length, 16, 1, about["dim_head"])
  nothing, causal = attention_steps.Mask(is_causal=False), attention_steps.Mask()
  share = mask.share(length)
  rows = []
  for backward, name in enumerate(("forward", "backward")):
    kernel, = report.kernels_named("attention_" + name)
    plan = attention_steps.plan_of(shape, report.target, about["dtype"], backward)

    def cycles(met):
      found = []  # of each core, the slower of which counts
      for core in range(plan.cores):
        steps = attention_steps.steps(plan, shape, report.target, backward, met, mask, core=core)
        # The loop over the steps of a block of rows mostly says its trips, but not always.
        inner = steps.inner  # a list of `attention_steps`
        around = dataclasses.replace(steps, inner=[plan.steps, *inner])  # pyright: ignore[reportGeneralTypeIssues]
        fits = kernel.schedule.set_runs(steps) or kernel.schedule.set_runs(around)
        found.append(kernel.cycles * kernel.calls if fits else math.nan)
      return max(found)

    took = cycles(mask)
    if math.isnan(took):
      rows.append(about | {"pass": name, "absent": "the program has other guards than its plan"})
      continue
    cores = 2 if report.target == "v5p" else 1  # of a device
    flops = (5 if backward else 2) / 2 * shape.flops(False, causal=False) * share
    rows.append(about | {
        "pass": name, "pairs": round(100 * share, 2),
        "us": round(took / report.chip.clock * 1e6, 1),
        "useful": round(100 * flops / (took * report.chip.flops_per_cycle * cores), 1),
        "cost": round(took / (cycles(nothing) * share), 2),
        "causal": round(took / cycles(causal) * causal.share(length) / share, 2),
        "square": ", ".join(map(str, report.square))})
  return rows


def _gpu_row(about, kernel, square):
  loops = kernel.code.tensor_loops
  loop = "/".join(str(loop.instructions) for loop in loops)
  tensor = "/".join(str(loop.tensor) for loop in loops)
  return about | {
      "kernel": kernel.name, "registers": kernel.resources.registers,
      "spills": f"{kernel.resources.spill_stores}/{kernel.resources.spill_loads}",
      "shared": None if kernel.shared_memory is None else kernel.shared_memory // 1024,
      "loop": loop, "tensor": tensor,
      "per_tensor": round(min(
          (one.instructions / one.tensor for one in loops), default=0), 1) or None,
      "serialized": kernel.resources.serialized, "square": square}


def _tpu_figures(report, kernels):
  cycles = sum(k.cycles * k.calls for k in kernels)
  unknown = any(k.schedule.unknown for k in kernels)
  seconds = cycles / report.chip.clock
  percent = lambda x: round(100 * x, 1)
  join = lambda values: "+".join(str(v) for v in values)
  bodies = [(k.schedule, k.schedule.body) for k in kernels]
  figures = {
      "body": join(body.bundles for _, body in bodies),
      "mxu": join(round(100 * s.fraction(b, "MATMUL")) for s, b in bodies),
      "valu": join(round(100 * s.fraction(b, "VALU")) for s, b in bodies),
      "eup": join(round(100 * s.fraction(b, "EUP")) for s, b in bodies),
      "spills": join("{}/{}".format(*s.spills(b)) for s, b in bodies)}
  if unknown:
    return figures | {"absent": "how often a loop runs is not known"}
  busy = sum(k.schedule.matmul_cycles * k.calls for k in kernels) / cycles
  return figures | {
      "us": round(seconds * 1e6, 1), "busy": percent(busy),
      "useful": percent(report.flops / (seconds * report.chip.tflops * 1e12))}


def _earlier_peers(result, measured, out):
  """The last rows of peers that are not compiled now: they depend on the compilers alone."""
  found = [earlier for earlier in results.load(out) if earlier["benchmark"] == result["benchmark"]
           and all(earlier[key] == result[key] for key in ("device", "versions"))]
  return [row for row in found[-1]["rows"]
          if row["implementation"] in peers.PEERS.keys() - measured] if found else []


def _once(rows):
  """Leaves out the forward kernels that a backward pass's program has too."""
  key = lambda r: (r["implementation"], r["variant"], r["dim_head"], r.get("kernel"))
  forward = {key(r) for r in rows if r["pass"] == "forward"}
  return [r for r in rows if r["pass"] == "forward" or "kernel" not in r or key(r) not in forward]


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks static attention",
                                   description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--targets", nargs="+", default=[*GPUS, *TPUS], choices=list(chips.ALL),
                      metavar="CHIP", help=f"of {', '.join(chips.ALL)}; "
                      f"default {' '.join(GPUS + TPUS)}")
  parser.add_argument("--implementations", nargs="+", metavar="NAME",
                      help="of mosaic_gpu, mosaic_tpu, triton, xla, "
                      f"{', '.join(peers.PEERS)}; default all kernels")
  parser.add_argument("--dims", nargs="+", type=int, metavar="DIM_HEAD",
                      help="default 64 128 256 on GPUs, 128 256 on TPUs")
  parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192], metavar="T",
                      help="on TPUs; default 2048 8192")
  parser.add_argument("--masks", nargs="+", choices=["causal", *MASKS], default=["causal"],
                      help="causal: this table. Others: what a sparse mask costs this project's "
                      "TPU kernels over its share, in a table of its own")
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--timeout", type=float, default=600, help="seconds for one compilation")
  parser.add_argument("--workers", type=int, help="compilers at a time, default one for each core")
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  args = parser.parse_args(argv)

  failed = 0
  for target in args.targets:
    gpu = isinstance(aot.chip(target), aot.Gpu)
    platform = "gpu" if gpu else "tpu"
    names = [name for name in (*own(platform), *peers.PEERS, "xla")
             if platform in peers.PLATFORMS.get(name, (platform,))
             and name not in ("xla", "jax-nn-xla", "cudnn")]  # no kernels of their own
    if args.implementations:
      names = [n for n in args.implementations if platform in peers.PLATFORMS.get(n, (platform,))
               and (n in peers.PEERS or n == "xla" or n in own(platform))]
    if "causal" in args.masks:
      jobs = (gpu_jobs(target, names, args.dims or DIMS, args.dtype) if gpu else
              tpu_jobs(target, names, args.dims or DIMS[1:], args.dtype, args.lengths))
      failed += table_of(target, jobs, args)
    masks = [mask for mask in args.masks if mask in MASKS]
    if gpu and masks:
      print(f"benchmarks static: sparse masks are counted for TPUs alone; no table for {target}")
    elif masks:
      jobs = mask_jobs(target, masks, args.dims or DIMS[1:], args.dtype)
      failed += table_of(target, jobs, args, "masks-static", MASK_COLUMNS, mask_rows)
  return 1 if failed else 0


def table_of(target, jobs, args, benchmark="static", columns=None, rows_of=row) -> int:
  """Compiles the jobs, prints and saves their table; how many did not compile."""
  result = results.document(benchmark, device=target)
  kept = _earlier_peers(result, {about["implementation"] for about, _ in jobs}, args.out)
  about_of = {id(job): (order, about) for order, (about, job) in enumerate(jobs)}
  rows, failed = {}, 0
  for done, report in aot.run_all((job for _, job in jobs), args.timeout, args.workers):
    order, about = about_of[id(done)]
    if isinstance(report, aot.AotError):
      absent = re.search(r"Absent: (.*)", str(report))
      failed += not absent
      rows[order] = [about | {"absent": absent[1] if absent else str(report)}]
    else:
      rows[order] = rows_of(about, report)
      result["compiler"] = report.versions
    result["rows"] = _once([r for i in sorted(rows) for r in rows[i]]) + kept
    results.save(result, args.out)
    print(f"\r{len(rows)} of {len(jobs)} programs for {target}", end="", file=sys.stderr)
  print(file=sys.stderr)
  print(f"{target}, compiled ahead of time: "
        + ", ".join(f"{k} {v}" for k, v in result.get("compiler", {}).items()))
  if columns is None:
    columns = GPU_COLUMNS if isinstance(aot.chip(target), aot.Gpu) else TPU_COLUMNS
  print(table.text(columns, [r for r in result["rows"] if "absent" not in r]))
  for r in result["rows"]:
    if "absent" in r:
      keys = ("implementation", "variant", "pass", "dim_head", "length")
      where = " ".join(str(r[key]) for key in keys if r.get(key))
      print(f"no row: {where}: {r['absent'][:200]}")
  return failed
