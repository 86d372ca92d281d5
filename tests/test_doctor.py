import dataclasses
import json
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from benchmarks import results
from palm_haiku import cli, distributed, kernels
from palm_haiku.config import PaLMConfig
from palm_haiku.doctor import cases, check, child, command, first_use
from palm_haiku.doctor.cases import Case
from palm_haiku.doctor.worker import Worker
from palm_haiku.hardware import MEASURED
from palm_haiku.kernels.attention import mosaic_tpu
from palm_haiku.kernels.core import chips, dispatch
from palm_haiku.kernels.explain import OPS

LOSS = Case("linear_cross_entropy", "mosaic_tpu",
            dict(tokens=20, dim=128, vocabulary=40), interpreted=True)
ATTENTION = Case("flash_attention", "mosaic_tpu",
                 dict(batch=1, length=20, heads=2, kv_heads=1, dim_head=64), interpreted=True)


def scripted(tmp_path, *answers):
  """The command of a process that does one thing for each request."""
  script = tmp_path / "child.py"
  script.write_text("import sys, time, os, json\nfor line in sys.stdin:\n"
                    "  request = json.loads(line)\n  exec(request['do'])\n  sys.stdout.flush()\n")
  return sys.executable, str(script)


def test_a_check_that_hangs_or_dies_is_a_result_and_the_next_one_runs(tmp_path):
  with Worker(scripted(tmp_path)) as worker:
    fine = {"do": "print(json.dumps({'status': 'passed'}))"}
    assert worker.ask(fine, 30) == {"status": "passed"}
    hung = worker.ask({"do": "time.sleep(1000)"}, 0.5)
    assert hung["status"] == "hung" and "0 s" in hung["why"]
    assert worker.ask(fine, 30) == {"status": "passed"}
    died = worker.ask({"do": "os.kill(os.getpid(), 11)"}, 30)
    assert died["status"] == "died" and "SIGSEGV" in died["why"]
    ended = worker.ask({"do": "sys.exit('no device')"}, 30)
    assert ended["status"] == "died" and "status 1: no device" in ended["why"]
    assert worker.ask(fine, 30) == {"status": "passed"}


@pytest.mark.full
def test_a_kernel_passes_and_a_broken_one_fails(monkeypatch):
  found = check.run(ATTENTION)
  assert found["status"] == "passed" and found["implementation"] == "mosaic_tpu"
  assert 0 < found["ulps"]["out"] <= found["allowed"]["out"]
  forward = mosaic_tpu.forward

  def broken(query, *arrays, **options):
    out, lse = forward(query, *arrays, **options)
    return out.at[0, 0, 0, 0].add(0.1), lse

  monkeypatch.setattr(mosaic_tpu, "forward", broken)
  jax.clear_caches()
  found = check.run(ATTENTION)
  assert found["status"] == "failed" and "out is" in found["why"], found
  monkeypatch.setattr(mosaic_tpu, "forward", lambda *_, **__: 1 / 0)
  jax.clear_caches()
  found = check.run(ATTENTION)
  assert found == dict(status="failed", why="ZeroDivisionError: division by zero")
  jax.clear_caches()


def test_what_cannot_run_is_no_failure(monkeypatch):
  assert check.run(dataclasses.replace(LOSS, implementation="auto"))["status"] == "xla"
  unfit = dataclasses.replace(ATTENTION, implementation="mosaic_gpu", dtype="float32")
  assert check.run(unfit)["status"] == "unfit"
  monkeypatch.setattr(mosaic_tpu, "forward", lambda *_, **__: __import__("no_such_package"))
  jax.clear_caches()
  found = check.run(ATTENTION)
  assert found["status"] == "absent" and "no_such_package" in found["why"]
  jax.clear_caches()


def test_every_kernel_of_a_machine_is_checked_in_both_passes():
  for platform, chip, names in (("tpu", "v6e", {"mosaic_tpu"}), ("gpu", "a100", {"triton"}),
                                ("gpu", "h200", {"mosaic_gpu", "triton"})):
    checked = {(c.op, c.implementation, c.backward, c.label)
               for c in cases.all_for(platform, chip)}
    assert checked == {(op, name, backward, label) for op in OPS for name in names
                       if name in OPS[op].backends for backward in (False, True)
                       if not backward or op != "decode_attention" for label in ("small", "real")}
  on_cpu = {(c.op, c.implementation) for c in cases.all_for("cpu", None)}
  assert on_cpu == {(op, name) for op in OPS for name in ("xla", *OPS[op].backends)}


@pytest.mark.parametrize("chip", ["h200", "a100", "v6e", "v5e", "tpu7x"])
def test_the_kernels_of_a_chip_take_the_cases(chip):
  target = dispatch.Target("tpu" if chip in chips.TPUS else "gpu", chip)
  for case in cases.all_for(*target):
    choice = dispatch.choose(OPS[case.op], case.implementation, *cases.operands(case), on=target)
    assert choice.implementation == case.implementation


@pytest.mark.full  # it starts a process, which imports JAX
def test_the_command_on_a_machine_of_few_checks(monkeypatch, capsys):
  few = [LOSS, dataclasses.replace(LOSS, interpreted=False)]
  monkeypatch.setattr(cases, "all_for", lambda platform, chip: few)
  assert cli.main(["doctor", "--json", "--seconds", "200"]) == 1
  report = json.loads(capsys.readouterr().out)
  assert [c["status"] for c in report["checks"]] == ["passed", "failed"]
  assert report["platform"] == "cpu" and report["versions"]["jax"] == jax.__version__
  assert report["auto"].keys() == OPS.keys()
  problem, = report["problems"]
  assert problem.startswith("linear_cross_entropy mosaic_tpu")
  assert 'implementation="xla"' in problem
  command._show(command.terminal.Console(), report)
  assert "problem: linear_cross_entropy" in capsys.readouterr().out


@pytest.mark.full
def test_the_command_is_told_where_jax_does_not_start(monkeypatch, capsys):
  monkeypatch.setenv("JAX_PLATFORMS", "no_such_platform")
  assert cli.main(["doctor"]) == 1
  out, err = capsys.readouterr()
  assert "no_such_platform" in err and len(err.splitlines()) == 1 and not out
  assert cli.main(["doctor", "--limit", "0"]) == 2


def test_time_runs_out_before_a_check(monkeypatch):
  class Answering(Worker):
    def ask(self, request, seconds):
      assert request == {"machine": True}
      return dict(platform="gpu", chip="h200")

  monkeypatch.setattr(command, "Worker", Answering)
  report = command.examine(seconds=1e-9)
  assert {c["status"] for c in report["checks"]} == {"not run"} and not report["problems"]


MODEL = PaLMConfig(num_tokens=64, dim=128, depth=1, heads=2, dim_head=64, position="alibi")
KIND = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  return tmp_path / "cache/palm-haiku/checks.json"


def choices():
  """The choices of `auto` on an H100."""
  return {op: dispatch.choose(OPS[op], "auto", on=dispatch.Target("gpu", "h100")).implementation
          for op in OPS}


def test_the_first_run_on_an_unknown_chip_falls_back_where_a_kernel_fails(cache):
  asked, said = [], []

  def ask(case):
    asked.append(case.op)
    bad = case.op == "flash_attention"
    return dict(status="failed", why="wrong") if bad else dict(status="passed")

  before = choices()
  assert before["flash_attention"] == before["linear_cross_entropy"] == "mosaic_gpu"
  model = cases.of_model(MODEL, "bfloat16", training=True)
  with first_use.checked(model, said.append, kind=KIND, ask=ask):
    assert choices() == before | {"flash_attention": "xla"}
    reason = dispatch.choose(OPS["flash_attention"], "auto",
                             on=dispatch.Target("gpu", "h100")).reason
    assert "failed its check" in reason
    assert dispatch.choose(OPS["flash_attention"], "mosaic_gpu",  # by name, it is taken
                           on=dispatch.Target("gpu", "h100")).implementation == "mosaic_gpu"
  assert choices() == before
  assert asked == ["flash_attention", "parallel_attention_ffn", "linear_cross_entropy"]
  assert any("flash_attention takes xla" in line and "wrong" in line for line in said)
  # Once: the second run knows.
  said.clear()
  with first_use.checked(model, said.append, kind=KIND, ask=ask):
    assert choices()["flash_attention"] == "xla"
  assert len(asked) == 3 and len(said) == 1
  # Another chip, other versions and other kernels are checked anew.
  with first_use.checked(model, said.append, kind="NVIDIA H200", ask=ask):
    pass
  assert len(asked) == 6


def test_a_check_that_takes_the_process_with_it_is_known_the_next_time(cache):
  class Killed(BaseException):
    pass

  def ask(case):
    raise Killed

  model = cases.of_model(MODEL, "bfloat16", training=False)
  with pytest.raises(Killed), first_use.checked(model, print, kind=KIND, ask=ask):
    pass
  said = []
  with first_use.checked(model, said.append, kind=KIND, ask=lambda case: dict(status="passed")):
    assert choices()["flash_attention"] == "xla" and choices()["decode_attention"] == "mosaic_gpu"
  assert "the process that checked it ended" in said[-1]


def test_a_check_in_this_process_ends_it_where_it_hangs(monkeypatch, capsys):
  ended = threading.Event()
  monkeypatch.setattr(first_use.os, "_exit", lambda status: ended.set())
  monkeypatch.setattr(check, "run", lambda case: dict(status="passed", ended=ended.wait(0.02)))
  assert first_use._ask_here(LOSS) == dict(status="passed", ended=False)
  monkeypatch.setattr(first_use, "CHECK_SECONDS", 0.01)
  monkeypatch.setattr(check, "run", lambda case: dict(status="passed", ended=ended.wait(30)))
  assert first_use._ask_here(LOSS)["ended"]
  assert "start the command again" in capsys.readouterr().err


def test_train_and_generate_check_what_auto_takes(monkeypatch):
  asked = []
  monkeypatch.setattr(first_use, "checked", lambda of, say: asked.extend(of))
  cli._first_use("mosaic_tpu", MODEL, "bfloat16", training=True)
  assert not asked
  cli._first_use("auto", dataclasses.replace(MODEL, window=8), "bfloat16", training=True)
  assert {(c.op, c.backward) for c in asked} == {
      ("flash_attention", True), ("parallel_attention_ffn", True), ("linear_cross_entropy", True)}
  assert all(c.alibi and c.window == 8 and c.implementation == "auto" for c in asked)
  asked.clear()
  cli._first_use("auto", dataclasses.replace(MODEL, position="rotary"), "float32", training=False)
  assert {(c.op, c.backward) for c in asked} == {
      ("flash_attention", False), ("parallel_attention_ffn", False), ("decode_attention", False)}
  assert not any(c.alibi for c in asked) and {c.dtype for c in asked} == {"float32"}


def test_results_count_for_the_versions_that_they_were_found_with(cache, monkeypatch):
  memory = first_use.Memory(KIND)
  memory.put(LOSS, dict(status="passed"))
  assert first_use.Memory(KIND).get(LOSS) == dict(status="passed")
  for name in ("versions", "_source"):
    with monkeypatch.context() as patch:
      patch.setattr(child if name == "versions" else first_use, name, lambda: "others")
      assert first_use.Memory(KIND).get(LOSS) is None
  for damaged in ("", "[]", '{"a": '):
    cache.write_text(damaged)
    assert first_use.Memory(KIND).get(LOSS) is None
  cache.unlink()
  cache.parent.rmdir()
  cache.parent.write_text("not a folder")
  memory = first_use.Memory(KIND)
  memory.put(LOSS, dict(status="passed"))
  assert memory.get(LOSS) == dict(status="passed")


def test_nothing_is_checked_on_a_cpu_or_where_the_chip_was_measured(cache, monkeypatch):
  never = lambda case: pytest.fail("checked")
  with first_use.checked([LOSS], never, ask=never):
    pass
  monkeypatch.setattr(first_use, "MEASURED", {KIND})
  with first_use.checked([LOSS], never, kind=KIND, ask=never):
    pass
  assert not cache.exists()


def test_a_failed_op_is_plain_jax_on_platforms_that_are_not_known_yet():
  q = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)

  def exported():
    traced = jax.jit(lambda q: kernels.flash_attention(q, q[:, :, :1], q[:, :, :1]))
    return "tpu_custom_call" in jax.export.export(traced, platforms=["tpu"])(q).mlir_module()

  assert exported()
  with dispatch.failed(frozenset({"flash_attention"})):
    assert not exported()


def test_measured_chips_are_those_of_the_results():
  kinds = {r["device"] for r in results.load() if r["benchmark"] in (
      "attention", "block", "loss", "decode")}
  assert kinds & {chip.kind for chip in chips.CHIPS.values()} == MEASURED


def test_a_machine_without_jax_says_so(monkeypatch):
  ends = sys.executable, "-c", "raise SystemExit(3)"
  monkeypatch.setattr(command, "Worker", lambda: Worker(ends))
  with pytest.raises(distributed.StartError, match="status 3"):
    command.examine()
