"""The parallel block's products on TPUs beside XLA's.

Useful is the share of a core's matrix units that the products' FLOPs take of the cycles of all
bundles that the compiler scheduled, each as often as the program runs it, copies that XLA makes
around a product among them; no wait for memory is in them. FLOP/byte counts what the kernel's
copies move by its grid. Memory / cycles is their time at the published bandwidth over that of the
kernel's cycles: below 1 memory keeps up.
"""

import argparse
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from palm_haiku.kernels import aot
from palm_haiku.kernels.aot import llo
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.parallel_block import mosaic_tpu, mosaic_tpu_plan, steps, xla
from palm_haiku.kernels.tpu import vmem

from .. import table
from ..block import Shape

VREG = 4096  # bytes of a vector register
SHAPES = ["4x2048x4096x16x256x4"]
ARCHITECTURES = {"layer": dict(norm="layer", rotary=True, values=True),
                 "rms": dict(norm="rms", rotary=False, values=False)}
COLUMNS = {"chip": "chip", "shape": "shape", "step": "step", "variant": "", "useful": "useful %",
           "busy": "MXU busy %", "us": "static us", "bundles": "bundles", "vmem": "VMEM MiB",
           "intensity": "FLOP/byte", "bound": "memory / cycles", "xla": "XLA useful %",
           "xla_us": "XLA static us"}


def program(*, step, shape, implementation, chip, norm="layer", rotary=True, values=True, keep=True,
            dtype="bfloat16"):
  """(function, arguments) of one step of the layer."""
  shape = Shape.parse(shape)
  tokens, dim, heads, dim_head = shape.batch * shape.length, shape.dim, shape.heads, shape.dim_head
  hidden, keys = shape.hidden, shape.kv_heads * dim_head
  array = lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct(sizes, dtype)
  x, act = array(tokens, dim), array(tokens, hidden)
  attended, key = array(tokens, heads, dim_head), array(tokens, keys)
  params = {name: array(*sizes, dtype="float32" if name == "norm" else dtype)
            for name, sizes in shape.weights.items() if values or name != "value"}
  own = implementation == "mosaic_tpu"
  side_by_side = lambda params: params | {
      name: params[name].reshape(dim, -1) for name in ("key", "value") if name in params}
  if step == "in_projection":
    rotation = (array(tokens, dim_head // 2, dtype="float32"),) * 2 if rotary else None

    def projections(x, params, rotation):
      if own:
        return mosaic_tpu.in_projection(
            x, side_by_side(params), rotation, norm=norm, eps=1e-5, keep=keep, chip=chip)
      query, key, value, gate, up = xla.in_projection(
          x, params, jnp.arange(tokens), norm=norm, norm_eps=1e-5, rotary=rotary,
          rope_theta=10_000.0, xpos_scale_base=None)
      return query, key, value, jax.nn.silu(gate) * up, *((gate, up) if keep else ())

    return projections, (x, params, rotation)
  if step == "out_projection":
    if own:
      function = lambda *a: mosaic_tpu.out_projection(*a, chip=chip)
    else:
      function = lambda x, attended, act, attn_out, ff_out: (
          x + steps.project(attended, attn_out, axes=2) + steps.project(act, ff_out))
    return function, (x, attended, act, params["attn_out"], params["ff_out"])
  if step == "swiglu_gradient":
    def plain_swiglu(dy, gate, up, ff_out):
      act, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
      return *pull(dy @ ff_out.T), act
    function = (lambda *a: mosaic_tpu.swiglu_gradient(*a, chip=chip)) if own else plain_swiglu
    return function, (x, act, act, params["ff_out"])

  def plain(dquery, dkey, dvalue, dgate, dup, params):
    params = side_by_side(params)
    dh = dquery.reshape(tokens, -1) @ params["query"].reshape(dim, -1).T
    dh += dkey @ params["key"].T + (0 if dvalue is None else dvalue @ params["value"].T)
    return dh + dgate @ params["gate"].T + dup @ params["up"].T

  function = plain
  if own:
    function = lambda *a: mosaic_tpu.input_gradient(*a[:-1], side_by_side(a[-1]), chip=chip)
  return function, (attended, key, key if values else None, act, act, params)


class Runs(NamedTuple):
  """Frequencies of a kernel's guards, as shares of the steps of its grid.

  Attributes:
    products: of those that multiply.
    others: of those that only compute.
    copies: for an operand or result, (bytes of the array, bytes of a block, share of the steps at
      which another block arrives or leaves).
  """

  products: tuple[float, ...]
  others: tuple[float, ...]
  copies: tuple[tuple[int, int, float], ...]


def about(step, shape, chip, values=True) -> tuple[float, mosaic_tpu_plan.Plan, Runs]:
  """FLOPs of a step, its plan, and how often the parts of its kernel run."""
  s = Shape.parse(shape)
  tokens, queries, hidden = s.batch * s.length, s.heads * s.dim_head, s.hidden
  plan = mosaic_tpu_plan.Sizes(
      tokens, s.dim, s.heads, s.kv_heads, s.dim_head, hidden, 2).plans(chip)[step]
  keys = s.kv_heads * s.dim_head * (1 + values)
  width = {"in_projection": queries + keys + 2 * hidden, "out_projection": queries + hidden,
           "swiglu_gradient": hidden, "input_gradient": queries + keys + 2 * hidden}[step]
  return 2.0 * tokens * s.dim * width, plan, runs(step, plan, s)


def runs(step, plan, s) -> Runs:
  tokens, queries, hidden = s.batch * s.length, s.heads * s.dim_head, s.hidden
  keys = s.kv_heads * s.dim_head
  copy = lambda array, block, share: (2 * math.prod(array), 2 * math.prod(block), share)
  if plan.depths:
    sizes = [queries, hidden] if step == "out_projection" else [queries, keys, hidden]
    counts = [size // depth for size, depth in zip(sizes, plan.depths, strict=True)]
    shares = [n / sum(counts) for n in counts]
    copies = [copy((tokens, s.dim), (plan.rows, plan.columns), 1 / sum(counts))]
    for size, depth, share in zip(sizes, plan.depths, shares, strict=True):
      copies += [copy((tokens, size), (plan.rows, depth), share),
                 copy((size, s.dim), (depth, plan.columns), share)]
    return Runs(tuple(shares), (1 / sum(counts),) * 2, tuple(copies))
  deep = s.dim // plan.depth
  ends = () if deep == 1 else (1 / deep,) * 2  # clear the sums, write them
  if step == "swiglu_gradient":
    return Runs((1.0,), ends, (
        copy((tokens, s.dim), (plan.rows, s.dim), plan.columns / hidden / deep),
        copy((tokens, hidden), (plan.rows, plan.columns), 1 / deep),
        copy((hidden, s.dim), (plan.columns, plan.depth), 1.0)))
  parts = [(keys, plan.key_columns), (queries, plan.query_columns), (hidden, plan.columns)]
  counts = [-(-size // columns) for size, columns in parts]
  shares = [n / sum(counts) for n in counts]
  once, table = 1 / sum(counts) / deep, 2 * max(s.dim_head // 2, 128)  # float32
  copies = [copy((tokens, s.dim), (plan.rows, s.dim), once),
            copy((tokens, table), (plan.rows, table), once)]
  for (size, columns), share in zip(parts, shares, strict=True):
    copies += [copy((s.dim, size), (plan.depth, columns), share),
               copy((tokens, size), (plan.rows, columns), share / deep)]
  return Runs(tuple(shares), (once, *ends * 3), tuple(copies))


def traffic(step, plan, shape, values=True, keep=True, rotary=True, **_) -> int:
  """Bytes that the kernel's copies move: a block is fetched again wherever its index changes."""
  s = Shape.parse(shape)
  tokens, queries, hidden = s.batch * s.length, s.heads * s.dim_head, s.hidden
  keys = s.kv_heads * s.dim_head * (1 + values)
  blocks = -(-tokens // plan.rows)
  if step == "in_projection":
    tables = 2 * rotary * tokens * max(s.dim_head // 2, 128) * 4
    out = queries + keys + (3 if keep else 1) * hidden
    return 2 * (tokens * (s.dim + out) + blocks * s.dim * (queries + keys + 2 * hidden)) + tables
  if step == "swiglu_gradient":
    return 2 * (tokens * (s.dim + 5 * hidden) + blocks * s.dim * hidden)
  depth = queries + hidden if step == "out_projection" else queries + keys + 2 * hidden
  turns = -(-s.dim // plan.columns)
  return 2 * (tokens * s.dim * (1 + (step == "out_projection")) + depth * (
      turns * tokens + blocks * s.dim))


def set_runs(schedule, runs, room) -> None:
  """Counts guards by `Runs`.

  XLA lays some operands into VMEM, and the kernel copies their blocks with vector instructions.
  Which one a guard copies shows in the block's bytes: where several arrays of at most `room` bytes
  have such blocks it counts as the one that changes most often, where none has, at every step.
  """
  schedule.set_runs(aot.Steps(active=runs.products))
  matrix, vector, load, store = (
      llo.SLOTS.index(name) for name in ("MATMUL", "VALU", "VLOAD", "VSTORE"))
  others = list(runs.others)
  for region in schedule.root:
    if region.kind != "if" or region.total(matrix):
      continue
    if region.total(vector) or region.total(store) > 2 * region.total(load):
      region.runs = others.pop(0)
    elif not any(part.kind == "if" for part in region.parts):
      moved = VREG * sum(part.slots[load] * (part.trips or 1) for part in region)
      region.runs = max((share for array, block, share in runs.copies
                         if block == moved and array <= room), default=region.runs)
  assert not others, f"{schedule.name}: guards are missing"


def figures(step, shape, chip, implementation="mosaic_tpu", **variant):
  """(share of the matrix units' FLOPs that is useful, its report, the plan) of one step.

  Loops that do not say how often they run are copies of XLA's, and count once.
  """
  flops, plan, runs = about(step, shape, chip, variant.get("values", True))
  report = aot.report("benchmarks.static.block:program", target=chip, step=step, shape=shape,
                      implementation=implementation, chip=chip, **variant)
  for kernel in report.kernels_named("block_" + step):
    set_runs(kernel.schedule, runs, vmem.limit(chip) - plan.vmem_bytes)
  cores = 2 if chip == "v5p" else 1  # of a device
  return flops / (cycles(report) * report.chip.flops_per_cycle * cores), report, plan


def cycles(report) -> float:
  return sum(kernel.cycles * kernel.calls for kernel in report.kernels)


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks static block", description=__doc__)
  parser.add_argument("--targets", nargs="+", default=list(chips.TPUS), choices=list(chips.TPUS),
                      metavar="CHIP", help=f"default {' '.join(chips.TPUS)}")
  parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxTxDxHxDhxM")
  parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
  parser.add_argument("--no-xla", action="store_true", help="this project's kernels alone")
  args = parser.parse_args(argv)
  rows = []
  for chip in args.targets:
    for shape in args.shapes:
      for step in args.steps:
        for name, variant in STEPS[step].items():
          try:
            rows.append(row(chip, shape, step, name, variant, not args.no_xla))
            print(*rows[-1].values(), flush=True)
          except aot.AotError as error:
            print(f"no row: {chip} {shape} {step} {name}: {str(error)[:300]}")
  print(table.text(COLUMNS, rows))
  return 0


STEPS = {
    "in_projection": {
        "layer, kept": ARCHITECTURES["layer"] | dict(keep=True),
        "layer": ARCHITECTURES["layer"] | dict(keep=False),
        "rms, kept": ARCHITECTURES["rms"] | dict(keep=True),
        "rms": ARCHITECTURES["rms"] | dict(keep=False)},
    "out_projection": {"": {}}, "swiglu_gradient": {"": {}}, "input_gradient": {"": {}}}


def row(chip, shape, step, name, variant, beside_xla) -> dict:
  useful, report, plan = figures(step, shape, chip, **variant)
  kernel, = report.kernels_named("block_" + step)
  clock, moved = report.chip.clock, traffic(step, plan, shape, **variant)
  # A device is one core of a v4 and of a tpu7x, and both of a v5p.
  bandwidth = report.chip.bandwidth / (2 if chip in ("v4", "tpu7x") else 1)
  found = dict(
      chip=chip, shape=shape, step=step, variant=name, useful=round(100 * useful, 1),
      busy=round(100 * kernel.schedule.busy("MATMUL"), 1),
      us=round(cycles(report) / clock * 1e6), bundles=kernel.schedule.root.end,
      vmem=round(plan.vmem_bytes / 2**20), intensity=round(about(
          step, shape, chip, variant.get("values", True))[0] / moved),
      bound=round(moved / bandwidth / (kernel.cycles / clock), 2))
  if beside_xla:
    plain, report, _ = figures(step, shape, chip, "xla", **variant)
    found |= dict(xla=round(100 * plain, 1), xla_us=round(cycles(report) / clock * 1e6))
  return found
