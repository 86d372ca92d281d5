"""The decode kernel for TPUs: its cycles beside its bytes.

Cycles are those of the bundles that the compiler schedules; what the copies take is their bytes
at the published bandwidth, on a chip of two cores half of it. The kernel starts copies two blocks
ahead, so that the longer of the two is what a block takes.
"""

import argparse

import jax

from palm_haiku import kernels
from palm_haiku.kernels import aot
from palm_haiku.kernels.aot import llo
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.decode import mosaic_tpu

from .. import table

_MATMUL, _SPILL = (llo.SLOTS.index(name) for name in ("MATMUL", "VSTORE:SPILL"))
SHAPES = [dict(heads=heads, dim=dim, cache=cache) for dim in (128, 256) for heads in (16, 48)
          for cache in ("bfloat16", "int8")]
COLUMNS = {
    "chip": "chip", "dim": "dim_head", "heads": "heads", "cache": "cache", "size": "block",
    "cycles": "cycles", "copies": "of its copies", "share": "cycles / copies",
    "ragged": "lengths 1 to 8192", "short": "length 1024", "spills": "spills"}


def arguments(*, batch, length, heads, dim, cache, num_queries=1, kv_heads=1, dtype="bfloat16"):
  """The arrays of `decode_attention`: query, both caches, lengths, slopes, both scales."""
  array = jax.ShapeDtypeStruct
  keys = array((batch, length, kv_heads, dim), cache)
  scales = array(keys.shape[:-1], "float32") if cache == "int8" else None
  return (array((batch, num_queries, heads, dim), dtype), keys, keys,
          array((batch,), "int32"), array((heads,), "float32"), scales, scales)


def program(**shape):
  """(function, arguments) of `decode_attention` by the TPU kernel."""
  def decode(query, key, value, lengths, slopes, key_scales, value_scales):
    return kernels.decode_attention(
        query, key, value, lengths, alibi_slopes=slopes, key_scales=key_scales,
        value_scales=value_scales, implementation="mosaic_tpu")
  return decode, arguments(**shape)


class Figures:
  """A report's figures of the kernel.

  Attributes:
    plan: the kernel's.
    steps: {positions computed on: cycles of a turn}.
    finish: cycles more where a sequence ends.
    spills: vector registers stored in all steps.
  """

  def __init__(self, target: str, report: aot.Report, shape: dict):
    query, key, value, *_ = arguments(**shape)
    self.plan = mosaic_tpu.fit(query, key, value, target)
    self._chip, self._key = report.chip, key
    kernel, = report.kernels_named("decode_attention")
    *_, loop = (r for r in kernel.schedule.root if r.kind == "loop" and r.total(_MATMUL))
    steps = [part for part in loop.parts if part.total(_MATMUL)]
    assert len(steps) == len(self.plan.parts)
    every = lambda region: sum(r.bundles for r in region)
    # The guards before the steps fetch and wait. Inside a fetch the first turns may clear a slot.
    turn = loop.bundles + sum(
        part.bundles + sum(every(p) for p in part.parts if p.end - p.first <= 64)
        for part in loop.parts if part.first < steps[0].first)
    self.steps = {n: turn + every(step) for n, step in zip(self.plan.parts, steps, strict=True)}
    self.finish = sum(every(part) for part in loop.parts if part.first > steps[-1].first)
    self.spills = sum(step.total(_SPILL) for step in steps)

  def copies(self, positions: int) -> float:
    """Cycles of one core in which its share of the bandwidth brings so much of the cache."""
    row = 2 * (self._key.shape[-1] * self._key.dtype.itemsize
               + (4 if self._key.dtype.itemsize == 1 else 0))
    bandwidth = self._chip.bandwidth / self._chip.cores
    return positions * row * self._key.shape[2] / bandwidth * self._chip.clock

  def share(self, lengths) -> float:
    """Cycles over those of the copies for sequences of these lengths on one core."""
    size = self.plan.size
    blocks = [min(n - begin, size) for n in lengths for begin in range(0, n, size)]
    part = lambda n: next(p for p in self.plan.parts if n <= p)
    turns = [part(max(now, then)) for now, then in zip([0, *blocks], [*blocks, 0])]
    cycles = sum(self.steps[p] for p in turns) + len(lengths) * self.finish
    return cycles / self.copies(sum(lengths))


def figures(target: str, **shape) -> Figures:
  shape = dict(batch=8, length=32768) | shape
  return Figures(target, aot.report("benchmarks.static.decode:program", target=target, **shape),
                 shape)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks static decode", description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--targets", nargs="+", default=list(chips.TPUS), choices=list(chips.TPUS),
                      metavar="CHIP", help=f"default {' '.join(chips.TPUS)}")
  rows = []
  for target in parser.parse_args(argv).targets:
    for shape in SHAPES:
      try:
        found = figures(target, **shape)
      except aot.AotError as error:
        print(f"no row: {target} {shape}: {str(error)[:200]}")
        continue
      size = found.plan.size
      rows.append(shape | dict(
          chip=target, size=size, cycles=found.steps[size], copies=round(found.copies(size)),
          share=round(found.steps[size] / found.copies(size), 2),
          ragged=round(found.share([1 + 8191 * i // 63 for i in range(64)]), 2),
          short=round(found.share([1024] * 64), 2), spills=found.spills))
  print(table.text(COLUMNS, rows))
  return 0
