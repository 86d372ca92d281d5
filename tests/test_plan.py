import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import jax
import pytest

from palm_haiku import PaLMConfig, cli, configs, plan, sharding
from palm_haiku.kernels.aot import hlo, targets
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.explain import OPS
from palm_haiku.plan import child, command, flops, machine, transfers
from palm_haiku.recipe import TrainConfig
from palm_haiku.train_step import program

TINY = ["--dim", "256", "--depth", "3", "--heads", "4", "--seq-len", "128"]
SMALL = ["plan", *TINY, "--topology", "v5e:2x2", "--mesh", "fsdp=2,model=2", "--batch-size", "8"]


@pytest.mark.parametrize("name, tera", [("palm-8b", 0.0550), ("palm-62b", 0.388),
                                        ("palm-540b", 3.28)])
def test_flops_of_the_paper(name, tera):
  counted = flops.model_flops_per_token(configs[name], 2048)
  assert counted / 1e12 == pytest.approx(tera, rel=0.02)
  assert counted == pytest.approx(configs[name].train_flops_per_token(2048), rel=1e-3)


def test_remat_is_counted_in_the_step():
  # Out-projections, whose results nothing needs again, are not computed again; the logits are.
  config = TrainConfig(model=configs["palm-540b"], seq_len=2048, dtype="bfloat16", remat="full")
  model, again = config.model, 2 * config.model.num_tokens * config.model.dim
  want = model.train_flops_per_token(2048, remat="full") + again
  counted = flops.flops_per_token(config)
  assert counted == pytest.approx(want, rel=0.005)
  none = dataclasses.replace(config, remat="none")
  assert flops.flops_per_token(none) < 0.85 * want


def test_remat_on_the_paper_s_mesh():
  # Twelve chips share a layer, and each has the one key and value head whole. The paper's 4.10 is
  # 57.8% of the peak at 238.3K tokens/s.
  config = TrainConfig(model=configs["palm-540b"], seq_len=2048, dtype="bfloat16", remat="full")
  assert flops.flops_per_token(config, 12) / 1e12 == pytest.approx(4.10, rel=0.02)
  divided = dataclasses.replace(config, shard_residual=True)
  one = flops.flops_per_token(config)
  assert one < flops.flops_per_token(divided, 12) < 1.01 * one


@pytest.mark.full
@pytest.mark.parametrize("remat, shard_residual", [("full", False), ("none", True)])
def test_flops_are_those_of_the_partitioned_program(remat, shard_residual):
  model = PaLMConfig(num_tokens=4096, dim=2048, depth=3, heads=16, dim_head=128)
  config = TrainConfig(model=model, seq_len=2048, batch_size=16, remat=remat, mesh="fsdp=2,model=4",
                       shard_residual=shard_residual, implementation="xla")
  mesh = sharding.make_mesh(config.mesh)
  run = program(config, mesh)
  batch = {"tokens": jax.ShapeDtypeStruct((16, 2049), "int32", sharding=run.batch_sharding)}
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = run.step.lower(run.state, batch).compile().as_text()
  calls, known = hlo.calls(text)
  shapes = {(one.computation, one.name): one.arrays[0].shape
            for one in hlo.instructions(text) if one.arrays}
  counted = 0
  for one in hlo.instructions(text):
    if one.opcode == "dot":
      left = re.search(r" dot\(.*?%([\w.\-]+)", one.line)[1]
      over = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.line)[1]
      depth = math.prod(shapes[one.computation, left][int(d)] for d in over.split(","))
      counted += calls[one.name] * 2 * math.prod(one.arrays[0].shape) * depth
  assert known
  assert 8 * counted / (16 * 2048) == pytest.approx(flops.flops_per_token(config, 4), rel=0.01)


HLO = """\
HloModule step

%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %g = bf16[64,32]{1,0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %k = s32[] get-tuple-element(%p), index=0
  %one.1 = s32[] constant(1)
  %next = s32[] add(%k, %one.1)
  ROOT %turn = (s32[], bf16[8]) tuple(%next, %y.1)
}

%cond (p: (s32[], bf16[8])) -> pred[] {
  %p = (s32[], bf16[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (a: f32[16]) -> f32[4] {
  %r.1 = f32[16]{0} all-reduce(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

ENTRY %main (a: f32[16]) -> f32[4] {
  %one = s32[] constant(1)
  %t = (s32[], bf16[8]) tuple(%one, %y)
  %w = (s32[], bf16[8]) while(%t), condition=%cond, body=%body
  %r.2 = f32[100]{0} all-reduce(%z), replica_groups=mesh['data'=2,'model'=4] {'data','model'}, to_apply=%add
  %c = (f32[10]{0}, f32[10]{0}, u32[]) collective-permute-start(%v), source_target_pairs={{1,2},{2,1}}
  ROOT %f = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_have_axes_bytes_and_turns():
  found, known = transfers.collectives(HLO, {"data": 2, "model": 4}, slice_size=4)
  rows = {(row["kind"], row["axis"]): row for row in found}
  assert known and len(rows) == 4
  gather = rows["all-gather", "data"]
  assert gather["count"] == 6  # the loop begins at 1: its first turn was peeled off
  assert gather["bytes"] == 6 * 64 * 32 * 2 and gather["sent_bytes"] == gather["bytes"] / 2
  assert gather["between"]
  scatter = rows["reduce-scatter", "model"]
  assert scatter["sent_bytes"] == 16 * 4 * 3 / 4 and not scatter["between"]
  assert rows["all-reduce", "dataxmodel"]["sent_bytes"] == 2 * 400 * 7 / 8
  assert rows["collective-permute", "model"]["bytes"] == 40


@pytest.mark.parametrize("written, group", [
    ("replica_groups=mesh['data'=2,'fsdp'=8,'model'=2] {'fsdp'}", list(range(0, 16, 2))),
    ("replica_groups=mesh['data'=2,'fsdp'=8,'model'=2] {'fsdp':(2)4}", [0, 2, 4, 6]),
    ("replica_groups=mesh['data'=2,'fsdp'=8,'model'=2] {'fsdp':(1)2,'model'}", [0, 1, 8, 9]),
    ("replica_groups=mesh['data'=2,'fsdp'=8,'model'=2] {'data','model'}", [0, 1, 16, 17]),
    ("source_target_pairs={{1,2},{2,1}}", [1, 2]), ("replica_groups={}", list(range(32))),
])
def test_replica_groups_are_understood(written, group):
  axes = {"data": 2, "fsdp": 8, "model": 2}
  assert transfers._group(f"%a = all-to-all(%b), {written}, dimensions={{0}}", axes) == group


def test_a_torus_carries_what_its_dimension_can():
  where = [(0, 0), (0, 1), (1, 0), (1, 1)] * 2  # two slices of 2 x 2
  found, _ = transfers.collectives(HLO, {"data": 2, "model": 4}, slice_size=4, coordinates=where)
  rows = {(row["kind"], row["axis"]): row for row in found}
  assert rows["reduce-scatter", "model"]["dims"] == [0, 1]
  assert rows["collective-permute", "model"]["dims"] == [0, 1]
  found = [dict(sent_bytes=60.0, between=False, dims=[0]),
           dict(sent_bytes=40.0, between=False, dims=[0, 1]),
           dict(sent_bytes=7.0, between=True, dims=[])]
  # 80 bytes go along the first dimension, which has half of the links.
  assert transfers.seconds(found, inside=10.0, between=7.0, dims=2) == {
      "inside": 16.0, "between": 1.0}
  assert transfers.seconds([], inside=10.0, between=7.0, dims=1) == {"inside": 0, "between": 0}


needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")


@functools.cache
def compiled_once(config, machine, timeout, compile_elsewhere=child.compile_elsewhere):
  return compile_elsewhere(config, machine, timeout)


@pytest.mark.full
@needs_libtpu
def test_a_small_plan(capsys, monkeypatch):
  monkeypatch.setattr(child, "compile_elsewhere", compiled_once)
  assert cli.main([*SMALL, "--implementation", "xla", "--json"]) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["chips"] == 4 and found["fits"] and found["loops_known"]
  # Three float32 copies of the parameters, over four chips; norms are whole.
  state = 12 * found["params"] / 4
  assert state <= found["state_bytes"] <= 1.1 * state
  assert found["hbm_per_chip_bytes"] >= found["state_bytes"]
  assert 0 < found["mfu"] < found["hfu"] <= 1 and found["compile_seconds"] > 0
  assert {"fsdp", "model"} <= {row["axis"] for row in found["collectives"]}
  assert found["implementations"]["flash_attention"]["implementation"] == "xla"
  assert found["kernels"] == 0


@needs_libtpu
def test_an_axis_may_be_a_part_of_a_row():
  mesh = sharding.make_mesh("fsdp=32,model=2", plan.Machine("v5p:4x4x4").devices())
  here, there = mesh.devices[0, 0, 0]
  assert sum(abs(a - b) for a, b in zip(here.coords, there.coords)) == 1  # neighbours


@needs_libtpu
def test_kernels_are_in_the_step(capsys, tmp_path, monkeypatch):
  monkeypatch.setenv("COLUMNS", "200")  # so that no cell of a table is broken into lines
  file = tmp_path / "plan.png"
  assert cli.main([*SMALL, "--plot", str(file)]) == 0
  out = capsys.readouterr().out
  assert "the fused kernel for v5e" in out and "flash_attention" in out and "forecast" in out
  assert file.read_bytes()[:4] == b"\x89PNG"


PLAN = ["plan", *TINY, "--batch-size", "8"]


@pytest.mark.parametrize("argv, message", [
    ([*PLAN, "--topology", "v9:2x2"], "no topology is called 'v9:2x2'"),
    ([*PLAN, "--topology", "v5e:two"], "is written like v5e:2x2 or v5e:16; got 'v5e:two'"),
    ([*PLAN, "--topology", "h200:2x4"], "is written like h200:8; got 'h200:2x4'"),
    ([*PLAN, "--topology", "v5e:2x2", "--slices", "0"], "slices must be at least 1; got 0"),
    ([*PLAN, "--topology", "v5e:2x2", "--mesh", "fsdp=8"], "is for 8 devices; there are 4"),
    ([*PLAN, "--topology", "v5e:4x4"], "batch_size must be a multiple of the mesh axes"),
    ([*PLAN, "--topology", "v5e:2x2", "--slices", "2"], "a multiple of the 2 slices; got 1"),
    (["plan", "--topology", "v5e:2x2", "--batch-size", "8"], "plan needs --model"),
    ([*PLAN, "--topology", "v5e:2x2", "--sweep", "--limit", "0"], "--limit must be at least 1"),
    ([*PLAN, "--topology", "v5e:2x2", "--sweep", "--mesh", "fsdp=8"], "is for 8 devices"),
    ([*PLAN, "--topology", "v5e:4x4", "--batch-size", "1", "--sweep"], "no mesh of data, fsdp and "
     "model divides"),
    ([*PLAN, "--topology", "v5e:2x2", "--plot", "no/where.png"], "there is no directory no"),
])
def test_bad_input_is_one_line(argv, message, capsys):
  assert cli.main(argv) == 2
  err = capsys.readouterr().err
  assert message in err and err.count("\n") == 1


@pytest.mark.parametrize("topology", ["v5e:2x2", "h200:8"])
def test_a_missing_compiler_names_its_wheel(topology, monkeypatch):
  monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(targets.AotError, match="libtpu|cuda13-local"):
    plan.Machine(topology).devices()


def test_a_compiler_that_dies_is_one_line(monkeypatch):
  monkeypatch.setattr(child.sys, "executable", "/bin/false")
  config = TrainConfig(model=configs["palm-tiny"], batch_size=4, mesh="fsdp")
  with pytest.raises(plan.PlanError, match="the compiler died .exit status 1.: without a word"):
    plan.plan(config, plan.Machine("v5e:2x2"))


CONFIG = TrainConfig(model=configs["palm-tiny"], batch_size=8, mesh="fsdp")


def test_a_compiler_that_takes_too_long_is_one_line():
  with pytest.raises(plan.PlanError, match="not compiled after 0 s"):
    plan.plan(CONFIG, plan.Machine("v5e:2x2"), timeout=0.1)


def test_a_program_too_large_is_one_line():
  assert child._out_of_memory(
      "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
      "Used 37.50G of 30.75G hbm. Exceeded hbm capacity by 6.75G.") == (
          "needs 37.50GiB of a chip's 30.75GiB")
  assert child._out_of_memory("RESOURCE_EXHAUSTED: no more ideas") is None


def test_a_compiler_ends_with_its_parent():
  # The child is ours to end by closing its stdin, which whatever ends a parent does.
  running = subprocess.Popen(
      [sys.executable, "-c", "import time\n"
       "from palm_haiku.plan import child\n"
       "child.compile_step = lambda *_: (print('compiling', flush=True), time.sleep(200))\n"
       "child.main()"],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      env=dict(os.environ, JAX_PLATFORMS="cpu"))
  try:
    running.stdin.write(json.dumps({"config": dataclasses.asdict(CONFIG),
                                    "machine": {"topology": "v5e:2x2"}}) + "\n")
    running.stdin.flush()
    assert running.stdout.readline() == "compiling\n"
    running.stdin.close()
    assert running.wait(100) == 1
  finally:
    running.kill()
    running.stdout.close()


def test_candidates_divide_chips_heads_and_batch():
  found = list(plan.candidates(CONFIG, plan.Machine("v5e:4x2")))
  meshes = list(dict.fromkeys(one.mesh for one in found))
  # Four heads; as few copies of the parameters as there can be, first.
  assert meshes[:3] == ["data=1,fsdp=8,model=1", "data=1,fsdp=4,model=2", "data=1,fsdp=2,model=4"]
  assert len(meshes) == 9 and len(found) == 27
  two = plan.candidates(CONFIG, plan.Machine("v5e:2x2", 2), remats=["full"])
  assert all(not one.mesh.startswith("data=1,") for one in two)
  odd = dataclasses.replace(CONFIG, batch_size=6)  # not over eight or four
  assert {one.mesh for one in plan.candidates(odd, plan.Machine("v5e:4x2"))} == {
      "data=1,fsdp=2,model=4", "data=2,fsdp=1,model=4"}


def test_a_sweep_ranks_what_fits_and_keeps_what_failed(monkeypatch):
  outcomes = {"full": dict(fits=True, step_seconds=2.0),
              "attention": dict(fits=True, step_seconds=1.0),
              "none": dict(fits=False, step_seconds=0.5)}

  def fake(config, machine, timeout):
    if config.mesh == "data=1,fsdp=4,model=1":
      raise plan.PlanError("the compiler died")
    return dict(hbm_per_chip_bytes=1, network_seconds={"inside": 0.1}) | outcomes[config.remat]

  monkeypatch.setattr(sys.modules["palm_haiku.plan.sweep"], "plan", fake)
  seen = []
  meshes = "data=1,fsdp=4,model=1", "data=1,fsdp=2,model=2"
  tried = [plan.Candidate(mesh, remat) for mesh in meshes for remat in outcomes]
  rows = plan.sweep(CONFIG, plan.Machine("v5e:2x2"), tried, on_row=seen.append)
  assert len(seen) == len(rows) == 6
  assert [row["remat"] for row in rows[:3]] == ["attention", "full", "none"]
  assert [row["error"] for row in rows] == [None] * 3 + ["the compiler died"] * 3


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_picture_that_fails_hides_no_result(capsys, tmp_path, monkeypatch, options):
  row = {"mesh": "fsdp=4", "remat": "full", "error": None, "fits": True, "step_seconds": 0.25,
         "mfu": 0.5, "hbm_per_chip_bytes": 1, "network_seconds": {"inside": 0.1}, "seconds": 1,
         "achieved": 0.8, "params": 2e6}
  command = sys.modules["palm_haiku.plan.command"]
  monkeypatch.setattr(command.plan, "sweep", lambda *_, **__: [row])
  monkeypatch.setattr(command.draw.plotting, "defaults", lambda: 1 / 0)
  path = tmp_path / "sweep.png"
  assert cli.main([*PLAN, "--topology", "v5e:2x2", "--sweep", "--plot", str(path), *options]) == 2
  told = capsys.readouterr()
  assert "fsdp=4" in told.out and (bool(options) or "slower than that" in told.out)
  assert told.err == (f"palm-haiku plan: error: {path} could not be drawn: division by zero\n")


@pytest.mark.full
@needs_libtpu
def test_a_small_sweep(capsys, tmp_path, monkeypatch):
  # Its one candidate is the plan above.
  monkeypatch.setattr(child, "compile_elsewhere", compiled_once)
  assert cli.main([*SMALL, "--implementation", "xla", "--sweep", "--limit", "1", "--json",
                   "--plot", str(tmp_path / "sweep.png")]) == 0
  found = json.loads(capsys.readouterr().out)
  row, = found["rows"]
  assert row["mesh"] == "fsdp=2,model=2" and row["remat"] == "full"
  assert found["best"] == {"mesh": row["mesh"], "remat": row["remat"]}
  assert found["left_out"] == 2 and row["error"] is None and row["fits"]
  assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_every_chip_that_is_planned_for_has_a_network():
  for name, chip in machine.PLANNED.items():
    assert chip.memory and chip.network.inside > chip.network.between
    assert chip.network.dims == {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}.get(name, 1)
    if isinstance(chip, chips.Tpu):
      assert len(targets.slice_shape(chip, "8")) == chip.network.dims


@pytest.mark.parametrize("written, shape", [
    ("v5e:1", (1, 1)), ("v5e:2", (1, 2)), ("v6e:4", (2, 2)), ("v5e:8", (2, 4)),
    ("v5e:256", (16, 16)),
    ("v5e:2x2", (2, 2)), ("v5e:2x4x1", (2, 4)), ("v5p:1", (1, 1, 1)), ("v4:4", (2, 2, 1)), ("v5p:8", (2, 2, 2)),
    ("v4:16", (2, 2, 4)), ("v5p:2x2", (2, 2, 1)), ("v4:12x16x16", (12, 16, 16)), ("h200:8", (8,))])
def test_topologies_may_be_numbers_of_chips(written, shape):
  machine = plan.Machine(written)
  assert machine.shape == shape
  assert machine.topology == written.partition(":")[0] + ":" + "x".join(map(str, shape))


@pytest.mark.parametrize("written, example", [
    *((text, "v5e:2x2 or v5e:16") for text in (
        "v5e:3", "v5e:0", "v5e:", "v5e", "v5e:²", "v5e:0x1", "v5e:2x2x2", "v5e:4x", "v5e:4*2")),
    ("v4:12", "v4:2x2x1 or v4:16"), ("h100", "h100:8"), ("h100:0", "h100:8"), ("h100:٨", "h100:8")])
def test_other_numbers_of_chips_need_a_shape(written, example):
  with pytest.raises(ValueError, match=f"is written like {example}; got '{written}'".replace(
      "*", r"[*]")):
    plan.Machine(written)


def test_a_forecast_of_a_small_model_says_its_doubt():
  found = dict(step_seconds=1.0, mfu=0.5, hfu=0.6, achieved=0.8, params=2e6)
  assert "slower than that" in command._forecast(found)
  assert "slower" not in command._forecast(found | dict(params=8e9))


def test_all_ops_are_listed():
  choices = child._choices(dataclasses.replace(CONFIG, implementation="xla"))
  assert choices.keys() == OPS.keys()
  assert choices["parallel_attention_ffn"]["implementation"] == "xla"
  assert choices["decode_attention"]["reason"] == "no part of training"
