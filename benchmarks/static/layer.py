"""A layer as a whole: fused, and as XLA's products around attention.

"splash" is XLA's products with JAX's splash attention, "xla+attention" with this project's, "xla"
with attention in plain JAX. Time (TPUs) is that of all bundles that the compiler scheduled, each as
often as it runs, at the published clock: no wait for memory is in it. Traffic is what all of the
program's instructions read and write in the device's memory, a fusion or kernel being one
instruction.
"""

import argparse
import functools

import jax
import jax.numpy as jnp

from palm_haiku import kernels
from palm_haiku.kernels import aot
from palm_haiku.kernels.aot import targets
from palm_haiku.kernels.parallel_block import xla

from .. import block, peers, table
from ..shapes import Attention
from . import attention, block as products

SHAPE = "4x2048x4096x16x256x4"
IMPLEMENTATIONS = ("fused", "splash", "xla+attention", "xla")
COLUMNS = {"chip": "chip", "architecture": "architecture", "pass": "pass",
           "implementation": "implementation", "ms": "static ms", "useful": "useful %",
           "traffic": "traffic MiB", "temp": "temporaries MiB"}


def program(*, shape, architecture, implementation, chip):
  """(function, arguments) of a layer's forward pass."""
  shape = block.Shape.parse(shape)
  options = block.ARCHITECTURES[architecture]
  x = jax.ShapeDtypeStruct((shape.batch, shape.length, shape.dim), "bfloat16")
  params = {name: jax.ShapeDtypeStruct(sizes, "float32" if name == "norm" else "bfloat16")
            for name, sizes in shape.weights.items() if architecture == "palm" or name != "value"}
  slopes = None if options["rotary"] else jnp.asarray(kernels.alibi_slopes(shape.heads))
  if implementation in ("fused", "xla", "xla+attention"):
    own = {"tpu": "mosaic_tpu", "cuda": "mosaic_gpu"}[targets.platform(chip)]
    if implementation == "xla+attention":
      options = dict(options, implementation=own, norm_eps=1e-5, xpos_scale_base=None,
                     query_offset=0, kv_cache=None, is_causal=True, segment_ids=None,
                     local_window_size=None)
      op = xla.parallel_attention_ffn
    else:
      op = functools.partial(kernels.parallel_attention_ffn, implementation=(
          own if implementation == "fused" else "xla"))
    return functools.partial(op, alibi_slopes=slopes, **options), (x, params)

  def layer(x, params):
    query, key, value, gate, up = xla.in_projection(
        x, params, jnp.arange(shape.length), norm_eps=1e-5, xpos_scale_base=None, **options)
    attended = peers.jax_splash(
        query, key, value, alibi=slopes is not None,
        blocks=attention.best_blocks("jax-splash", chip, shape.dim_head, shape.length, True))
    return xla.out_projection(x, attended, gate, up, params)

  return layer, (x, params)


def row(chip, shape, architecture, implementation, backward) -> dict:
  sizes = block.Shape.parse(shape)
  problem = Attention(sizes.batch, sizes.length, sizes.heads, 1, sizes.dim_head)
  steps = {}
  if targets.platform(chip) == "tpu" and implementation != "xla":
    if implementation == "splash":
      found = attention.causal_steps(
          "jax-splash", problem,
          attention.best_blocks("jax-splash", chip, sizes.dim_head, sizes.length, True), chip)
      steps = {"splash.*dkv": found["dkv"], "splash": found[""]}
    else:
      own = functools.partial(attention.own_steps, "mosaic_tpu", problem, chip, "bfloat16",
                              alibi=not block.ARCHITECTURES[architecture]["rotary"])
      steps = {"attention_forward": own(False)[""], "attention_backward": own(True)[""]}
  report = aot.report("benchmarks.static.layer:program", target=chip, backward=backward,
                      steps=steps, shape=shape, architecture=architecture,
                      implementation=implementation, chip=chip)
  found = {
      "chip": chip, "architecture": architecture, "pass": "backward" if backward else "forward",
      "implementation": implementation, "traffic": round(report.traffic / 2**20),
      "temp": round(report.memory["temp"] / 2**20)}
  if targets.platform(chip) == "tpu":
    for step in products.STEPS:
      for kernel in report.kernels_named("block_" + step):
        *_, runs = products.about(step, shape, chip, architecture == "palm")
        products.set_runs(kernel.schedule, *runs)
    cycles, cores = products.cycles(report), 2 if chip == "v5p" else 1
    found |= {"ms": round(cycles / report.chip.clock * 1e3, 2), "useful": round(
        100 * sizes.flops(backward) / (cycles * report.chip.flops_per_cycle * cores), 1)}
  return found


def main(argv=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks static layer",
                                   description=__doc__)
  parser.add_argument("--targets", nargs="+", default=["v5e", "v5p", "v6e", "h200"], metavar="CHIP",
                      help="default v5e v5p v6e h200")
  parser.add_argument("--shape", default=SHAPE, metavar="BxTxDxHxDhxM")
  parser.add_argument("--architectures", nargs="+", default=["palm"],
                      choices=list(block.ARCHITECTURES))
  parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS),
                      choices=IMPLEMENTATIONS)
  parser.add_argument("--passes", nargs="+", default=["forward", "backward"],
                      choices=["forward", "backward"], help="backward: with the forward pass")
  args = parser.parse_args(argv)
  rows = []
  for chip in args.targets:
    for architecture in args.architectures:
      for what in args.passes:
        for name in args.implementations:
          if name == "splash" and (architecture != "palm" or targets.platform(chip) != "tpu"):
            continue  # it has no ALiBi
          try:
            rows.append(row(chip, args.shape, architecture, name, what == "backward"))
          except (aot.AotError, peers.Absent) as error:
            print(f"no row: {chip} {architecture} {what} {name}: {str(error)[:300]}")
  print(table.text(COLUMNS, rows))
  return 0
