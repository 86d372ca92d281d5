"""Gathers of weights that pass while TPUs compute, and those that they wait for.

A stack of layers, as a scan, is compiled ahead of time for a slice, with weights divided over the
fsdp axis. In the scheduled program a gather either stands alone, and the chip waits for it, or it
has a start and a done with work between them. On a v5e this work carries the transfer: XLA puts its
steps into products of its own and, with `--overlap`, into kernels; a kernel whose results nobody
reads was then computed for the transfer's sake, a second time. On a v6e a SparseCore carries it.
"""

import argparse
import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from palm_haiku import kernels, sharding
from palm_haiku.kernels.aot import hlo, targets

from .. import table
from ..block import Shape

# Flags that overlap transfers with kernels. A v5e's XLA then forgets a kernel's limit of VMEM.
OVERLAP = {
    "v5e": {"xla_tpu_enable_async_collective_fusion_with_mosaic_custom_call": "true",
            "xla_tpu_scoped_vmem_limit_kib": "65536"},
    "v6e": {"xla_tpu_enable_sparse_core_collective_offload_all_gather": "true"}}
MIB = 2**20
COLUMNS = {"computation": "loop", "waits": "waits, MiB", "passes": "passes, MiB",
           "products": "in pieces, MiB", "carriers": "under", "twice": "computed twice"}


def compiled(target, mesh, shape, *, implementation, layers, unroll, backward, options) -> str:
  """The scheduled program of a stack of layers, or of its gradient with full remat, as HLO."""
  shape, mesh = Shape.parse(shape), sharding.make_mesh(mesh, targets.devices(target))
  stack = {name: jax.ShapeDtypeStruct((layers, *sizes), "float32")
           for name, sizes in shape.weights.items()}
  where = sharding.params_shardings({"palm/layers/parallel_block": stack}, mesh)
  weights = jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), stack,
      *where.values())
  x = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.dim), "bfloat16",
                           sharding=NamedSharding(mesh, P("fsdp")))

  def layer(x, weights):
    y = kernels.parallel_attention_ffn(x, weights, implementation=implementation)
    return sharding.constrain(y, ("batch", "sequence", "residual"), sharding.Rules()), None

  def total(weights, x):
    once = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable,
                          prevent_cse=False)
    return jax.lax.scan(once, x, weights, unroll=unroll)[0].astype(jnp.float32).sum()

  function = jax.jit(total)
  if backward:
    function = jax.jit(jax.grad(total), out_shardings=jax.tree.map(lambda x: x.sharding, weights))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = function.trace(weights, x).lower(lowering_platforms=("tpu",))
  return lowered.compile(compiler_options=options).as_text() or ""


def rows(text: str) -> list[dict]:
  """The fate of the gathers in each loop of a scheduled program that has any."""
  every, inside = list(hlo.instructions(text)), {}
  for one in every:
    inside.setdefault(one.computation, []).append(one)
  called = {one.name: re.search(r" fusion\(.*calls=%?([\w.<>\-]+)", one.line) for one in every}

  def within(one):
    """The instruction and, of a fusion, all that it is made of."""
    parts = inside.get(called[one.name][1], []) if called[one.name] else []
    return [one, *(part for inner in parts for part in within(inner))]

  others = {match[1] for match in called.values() if match} | set(re.findall(
      r'^%([\w.<>\-]+) \((?:(?!^%).)*?^\}, execution_thread="sparsecore"$', text, re.M | re.S))
  is_kernel = lambda parts: any('"tpu_custom_call"' in part.line for part in parts)
  found = []
  for computation, body in inside.items():
    if computation in others:
      continue
    row = dict(computation=computation, waits=0, passes=0, products=0, carriers=[], twice=[])
    places = {one.name: place for place, one in enumerate(body)}
    for one in body:
      parts = within(one)
      gathered = sum(part.arrays[0].bytes for part in parts if part.opcode == "all-gather")
      text_of = " ".join(part.line for part in parts)
      if one.opcode == "collective-permute-start":
        row["products"] += one.arrays[0].bytes
      elif one.opcode == "custom-call-done" and one.name.startswith("all-gather"):
        # A SparseCore's.
        begin = places[re.search(r"-done\(%?([\w.\-]+)", one.line)[1]]
        under = [other.name for other in body[begin:places[one.name]] if is_kernel(within(other))]
        row["passes" if under else "waits"] += one.arrays[0].bytes
        row["carriers"] += under
      elif one.opcode == "all-gather":
        row["waits"] += gathered
      elif '"AsyncCollectiveStart"' in text_of:
        row["passes"] += gathered
      elif gathered and '"AsyncCollectiveDone"' not in text_of:
        row["carriers"].append(one.name)
      if gathered and is_kernel(parts) and not re.search(
          rf"get-tuple-element\([^()]*%{re.escape(one.name)}\), index=0\b", text):
        row["twice"].append(one.name)
    if row["waits"] + row["passes"] + row["products"]:
      found.append({name: round(value / MIB, 2) if isinstance(value, int) else value
                    for name, value in row.items()})
  return found


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks static gathers",
                                   description=__doc__.partition("\n")[0])
  parser.add_argument("--target", default="v5e:2x2", help="a TPU slice (default v5e:2x2)")
  parser.add_argument("--mesh", default="fsdp=4", help="default fsdp=4")
  parser.add_argument("--shape", default="8x1024x1024x8x128x4",
                      help="batch x length x dim x heads x dim_head x ff_mult")
  parser.add_argument("--implementation", default="mosaic_tpu")
  parser.add_argument("--layers", type=int, default=4)
  parser.add_argument("--unroll", type=int, default=1, help="layers in the body of the loop")
  parser.add_argument("--backward", action="store_true", help="the gradient, with full remat")
  parser.add_argument("--overlap", action="store_true", help="let transfers pass under kernels")
  parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                      help="more for the compiler")
  parser.add_argument("--json", action="store_true")
  args = parser.parse_args(argv)
  chip = args.target.partition(":")[0]
  if args.overlap and chip not in OVERLAP:
    parser.error(f"known for {' and '.join(OVERLAP)} alone; got {chip}")
  options = (OVERLAP[chip] if args.overlap else {}) | dict(o.split("=", 1) for o in args.option)
  found = rows(compiled(
      args.target, args.mesh, args.shape, implementation=args.implementation, layers=args.layers,
      unroll=args.unroll, backward=args.backward, options=options))
  if args.json:
    print(json.dumps(found))
  else:
    print(table.text(COLUMNS, [row | {name: ", ".join(row[name]) for name in (
        "carriers", "twice")} for row in found]))
  return 0
