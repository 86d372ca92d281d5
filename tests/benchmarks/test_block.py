"""Frequencies of a kernel's guards in the static figures of the parallel block."""

import pytest

from benchmarks.static import block
from palm_haiku.kernels.aot import llo

ZEROS = (0,) * len(llo.SLOTS)


def test_copies_of_blocks_count_where_a_block_changes():
  def region(kind, *parts, **slots):
    return llo.Region(kind, 0, 1000, list(parts), 10, tuple(map(slots.get, llo.SLOTS, ZEROS)),
                      2 if kind == "loop" else None)

  def guard(vregs):
    return region("if", region("loop", VLOAD=vregs, VSTORE=vregs))  # a loop of two turns

  small, large, unknown = guard(256), guard(512), guard(100)
  first, last = region("if", VALU=1), region("if", VSTORE=9)
  products = region("if", MATMUL=1)
  grid = region("loop", region("if", small, large, unknown), first, products, last)
  root = region("kernel", grid)
  mib = 2**20
  runs = block.Runs((1.0,), (0.25, 0.5), (
      (8 * mib, 2 * mib, 0.1), (16 * mib, 2 * mib, 0.3),  # the worse of two that it may be
      (64 * mib, 2 * mib, 0.9),  # too large to lie in VMEM
      (4 * mib, 4 * mib, 0.2)))
  block.set_runs(llo.Schedule("block", root, (1,) * len(llo.SLOTS)), runs, room=32 * mib)
  assert [r.runs for r in (small, large, unknown, first, last)] == [0.3, 0.2, 1, 0.25, 0.5]


def test_how_often_blocks_change():
  # 4 blocks of rows. A step takes 256 columns of keys, or 512 of queries, or 256 of gate and up.
  *_, runs = block.about("in_projection", "4x2048x4096x32x128x4x8x14336", "v5e")
  shares = {(array // 2, size // 2): 68 * share for array, size, share in runs.copies}
  assert shares[8192 * 4096, 2048 * 4096] == pytest.approx(1)  # x
  assert shares[4096 * 1024, 4096 * 256] == pytest.approx(4)  # key
  assert shares[4096 * 4096, 4096 * 512] == pytest.approx(8)  # query
  assert shares[4096 * 14336, 4096 * 256] == pytest.approx(56)  # gate


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("chip, percent", [("v5e", 96.0), ("v5p", 95.4), ("v6e", 91.1)])
def test_the_figures_of_grouped_heads(chip, percent):
  pytest.importorskip("libtpu", reason="the compiler for TPUs is in libtpu")
  useful, *_ = block.figures("in_projection", "4x2048x4096x32x128x4x8x14336", chip,
                             **block.STEPS["in_projection"]["layer, kept"])
  assert 100 * useful > percent
