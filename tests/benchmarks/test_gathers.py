import json
import os
import subprocess
import sys

import pytest

from benchmarks.static import gathers
from palm_haiku.kernels.aot import targets

# Of a scheduled program: a gather that waits, one that a kernel carries, and a product of pieces.
PROGRAM = """\
%fused.1 (p: bf16[4,8]) -> (bf16[16,8], u32[]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), dimensions={0}
  ROOT %start = (u32[]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%inner (p: bf16[8,8]) -> bf16[8,8] {
  %p.1 = bf16[8,8]{1,0} parameter(0)
  ROOT %kernel.9 = bf16[8,8]{1,0} custom-call(%p.1), custom_call_target="tpu_custom_call"
}

%fused.2 (p: bf16[8,8], q: bf16[4,8]) -> (bf16[8,8], bf16[16,8]) {
  %p.2 = bf16[8,8]{1,0} parameter(0)
  %q = bf16[4,8]{1,0} parameter(1)
  %kernel.8 = bf16[8,8]{1,0} fusion(%p.2), kind=kCustom, calls=%inner
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%q), dimensions={0}
  ROOT %both = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) tuple(%kernel.8, %all-gather.2)
}

%fused.3 (q: bf16[4,8]) -> bf16[16,8] {
  %q.1 = bf16[4,8]{1,0} parameter(0)
  %all-gather.3 = bf16[16,8]{1,0} all-gather(%q.1), dimensions={0}
  ROOT %done = bf16[16,8]{1,0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: bf16[8,8], w: bf16[4,8]) -> bf16[8,8] {
  %x = bf16[8,8]{1,0} parameter(0)
  %w = bf16[4,8]{1,0} parameter(1)
  %all-gather.4 = bf16[16,8]{1,0} all-gather(%w), dimensions={0}
  %piece = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%w), channel_id=1
  %begin = (bf16[16,8]{1,0}, u32[]) fusion(%w), kind=kCustom, calls=%fused.1
  %kernel.1 = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) fusion(%x, %w), kind=kCustom, calls=%fused.2
  %end = bf16[16,8]{1,0} fusion(%w), kind=kCustom, calls=%fused.3
  ROOT %y = bf16[8,8]{1,0} get-tuple-element(%kernel.1), index=READ
}
"""


@pytest.mark.parametrize("read, twice", [("0", []), ("1", ["kernel.1"])])
def test_what_waits_and_what_passes(monkeypatch, read, twice):
  monkeypatch.setattr(gathers, "MIB", 1)
  whole, part = 2 * 16 * 8, 2 * 4 * 8
  assert gathers.rows(PROGRAM.replace("READ", read)) == [dict(
      computation="main", waits=whole, passes=whole, products=part, carriers=["kernel.1"],
      twice=twice)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_gathers_pass_under_the_kernels_of_two_layers():
  pytest.importorskip("libtpu", reason="the compiler for TPUs is in libtpu")
  row, = json.loads(subprocess.run(
      [sys.executable, "-m", "benchmarks", "static", "gathers", "--overlap", "--unroll=2",
       "--json"],
      check=True, capture_output=True, text=True,
      env=os.environ | targets.environment("v5e")).stdout.splitlines()[-1])
  # Three of six large ones, where without estimates of cost it is one.
  assert row["passes"] >= 24 and row["waits"] + row["passes"] == 57 and not row["twice"]


def test_what_a_sparse_core_gathers(monkeypatch):
  monkeypatch.setattr(gathers, "MIB", 1)
  program = """\
%sparse (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (w: bf16[4,8]) -> bf16[8,8] {
  %w = bf16[4,8]{1,0} parameter(0)
  %all-gather.2-update = ((bf16[4,8]{1,0}), bf16[16,8]{1,0}) custom-call-update(%w)
  %all-gather.2-done = bf16[16,8]{1,0} custom-call-done(%all-gather.2-update)
  %all-gather.3-update = ((bf16[4,8]{1,0}), bf16[16,8]{1,0}) custom-call-update(%w)
  %kernel.1 = bf16[8,8]{1,0} custom-call(%all-gather.2-done), custom_call_target="tpu_custom_call"
  %all-gather.3-done = bf16[16,8]{1,0} custom-call-done(%all-gather.3-update)
}
"""
  assert gathers.rows(program) == [dict(
      computation="main", waits=256, passes=256, products=0, carriers=["kernel.1"], twice=[])]
