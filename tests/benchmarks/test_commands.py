"""The commands as they are typed, on this machine's CPU."""

import json
import re
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
  __main__ as command,
  attention,
  block,
  decode,
  generate,
  loss,
  loss_training,
  measure,
  peers,
  suite,
)
from benchmarks.shapes import Attention
from benchmarks.static import attention as static
from palm_haiku.kernels import aot
from tests.kernels.parallel_block.test_fused import PlainBackend


@pytest.mark.parametrize("chained", [True, False])
def test_a_chain_makes_every_call(chained):
  calls = []

  def function(x):
    jax.debug.callback(lambda: calls.append(1))
    return x * 2

  chain = measure.Chain(function, (jnp.arange(4.0),), 7, chained)
  np.testing.assert_array_equal(chain(), [0, 2, 4, 6])
  jax.effects_barrier()
  assert len(calls) == (7 if chained else 1)
  assert chain.seconds() > 0 and chain.bytes >= 32
  jax.effects_barrier()
  assert len(calls) == (14 if chained else 8)


@pytest.mark.full
@pytest.mark.parametrize("target", ["h200", "v5e"])
def test_no_compiler_takes_a_call_out_of_its_chain(target):
  def chain(x):
    return measure.repeat(lambda x: jnp.tanh(x @ x), 100, (x,))

  text = aot.compile(chain, jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16),
                     target=target).as_text()
  body = re.search(r" while\(.*body=%([\w.]+)", text)[1]
  inside = text.partition(f"\n%{body} (")[2].partition("\n}")[0]
  assert re.search(r"(gemm|dot|convolution|tanh)\S* = bf16\[2048,2048\]\S* fusion", inside)
  outside = text.partition("\nENTRY")[2]
  assert not re.search(r"(gemm|dot|convolution)\S* = ", outside)


def test_attention(tmp_path, capsys):
  arguments = ["attention", "--shapes", "1x80x4x1x32", "--rounds", "2", "--out", str(tmp_path)]
  assert command.main(arguments) == 0
  out = capsys.readouterr().out
  assert "no accelerator here" in out
  path, = tmp_path.glob("*-attention.json")
  result = json.loads(path.read_text())
  rows = {(r["implementation"], r["variant"], r["pass"]) for r in result["rows"]}
  assert rows == {(i, v, p) for i in ("xla", "jax-nn-xla") for v in ("alibi", "plain")
                  for p in ("forward", "backward")}
  for row in result["rows"]:
    assert row["ms"] > 0 and row["error"] < 0.02 and row["rounds"] == 2
    assert row["tflops_full"] > row["tflops"]


@pytest.mark.parametrize("alibi", [False, True])
def test_the_reference_sees_what_is_wrong(alibi, monkeypatch):
  case = attention.case(Attention(2, 96, 4, 2, 32), alibi, True, "float32", ["xla"])
  query, key, value, cotangent = case.arrays
  run = jax.jit(case.implementations["xla"])
  out = jax.device_get(run(query, key, value, cotangent))
  assert case.error(out) < 2e-5
  assert case.error(run(query, key * 1.1, value, cotangent)) > 1e-3
  for wrong in range(4):
    assert case.error([x * (1.01 if i == wrong else 1) for i, x in enumerate(out)]) > 1e-3, wrong
  if alibi:
    monkeypatch.setattr(peers.kernels, "flash_attention",
                        lambda *a, alibi_slopes, f=peers.kernels.flash_attention, **k: f(*a, **k))
    jax.clear_caches()
    assert case.error(run(query, key, value, cotangent)) > 1e-2


@pytest.mark.parametrize(
    "architecture", ["palm", pytest.param("palm-lite", marks=pytest.mark.full)])
@pytest.mark.parametrize("step", block.STEPS)
@pytest.mark.parametrize("backward", [False, True])
def test_block_against_its_formula(architecture, step, backward):
  case = block.case(block.Shape(1, 80, 64, 4, 16, 4), backward, "float32", ["xla"], step=step,
                    architecture=architecture)
  out, *rest = jax.jit(case.implementations["xla"])(*case.arrays)
  assert case.error((out, *rest)) < 2e-5
  assert case.error((jax.tree.map(lambda x: x * 1.01, out), *rest)) > 1e-3
  assert case.flops > 0 and case.bytes > 0


@pytest.mark.full
def test_the_steps_of_a_block_are_what_its_op_does(monkeypatch):
  """The rows of this project's kernels, with a backend in plain JAX."""
  module = PlainBackend()
  monkeypatch.setitem(block.fused.OP.backends, "mosaic_gpu", lambda: module)
  for step in block.STEPS[1:]:
    for backward in (False, True):
      case = block.case(block.Shape(2, 8, 16, 2, 8, 2), backward, "float32", ["xla", "mosaic_gpu"],
                        step=step)
      got, want = (jax.jit(case.implementations[name])(*case.arrays)
                   for name in ("mosaic_gpu", "xla"))
      if backward and step == "out_projection":
        got[1][2].pop("act")  # whose gradient is that of gate and up
        want[1][2].pop("act")
      chex.assert_trees_all_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_decoding_against_its_formula(cache_dtype):
  case = decode.case(decode.Shape(2, 40, 4, 16), "float32", cache_dtype, True, ["xla"])
  query, keys, *rest = case.arrays
  np.testing.assert_array_equal(rest[1], [20, 40])
  attend = jax.jit(case.implementations["xla"])
  out = attend(query, keys, *rest)
  assert case.error(out) < 2e-5
  assert case.error(out * 1.01) > 1e-3
  assert case.error(attend(query, 2 * keys, *rest)) > 1e-3


@pytest.mark.full
def test_generation_has_rows_without_the_peer(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(generate, "absent", lambda name: "not installed")
  # One sequence really is generated; several would be as many programs again.
  of_one = generate.generate
  monkeypatch.setattr(generate, "generate", lambda params, model, prompt, *args, **options: of_one(
      params, model, prompt[:1], *args, **options))
  assert generate.main(["--shape", "16x1x2x8", "--length", "6", "--batch", "3", "--rounds", "2",
                        "--out", str(tmp_path)]) == 0
  capsys.readouterr()
  result = json.loads(next(tmp_path.glob("*-generate.json")).read_text())
  assert {(row["implementation"], row["batch"]) for row in result["rows"]} >= {
      ("float32", 1), ("float32", 3), ("int8 weights", 1), ("float32, itself as draft", 3)}
  assert all(len(row["rates"]) == 2 and row["rate"] > 0 for row in result["rows"])


def test_loss_against_its_formula():
  case = loss.case(loss.Shape(70, 32, 300), True, "float32", ["xla", "logits"])
  for function in case.implementations.values():
    out = jax.jit(function)(*case.arrays)
    assert case.error(out) < 2e-5
    assert case.error((out[0] * 1.01, *out[1:])) > 1e-3
    assert case.error((out[0], out[1] * 1.01, out[2])) > 1e-3


def test_failures_and_absences_are_rows():
  def absent(x):
    raise peers.Absent("not here")

  def broken(x):
    raise RuntimeError("out of luck\nmore")

  case = measure.Case({"shape": "s"}, (jnp.ones(3),), {"a": absent, "b": broken, "c": jnp.sin},
                      1.0, 1.0, 1.0, lambda out: 0.0)
  a, b, c = measure._measure(case, 1, None)
  assert a["absent"] == "not here" and b["failed"] == "RuntimeError: out of luck" and c["ms"] > 0


def test_what_does_not_exist_is_said_in_a_line(capsys):
  assert command.main(["attention", "--shapes", "1x2"]) == 2
  assert len(capsys.readouterr().err.splitlines()) == 1
  assert command.main(["nonsense"]) == 2
  assert "attention" in capsys.readouterr().err


@pytest.mark.full
def test_a_killed_suite_leaves_its_results(tmp_path):
  process = subprocess.Popen(
      [sys.executable, "-m", "benchmarks", "suite", "--budget", "240", "--out", str(tmp_path)],
      stdout=subprocess.PIPE, text=True)
  end = time.monotonic() + 200
  while not list(tmp_path.glob("*-attention.json")) and time.monotonic() < end:
    time.sleep(0.1)
  process.send_signal(signal.SIGKILL)
  out, _ = process.communicate()
  path, = tmp_path.glob("*-attention.json")
  result = json.loads(path.read_text())
  assert result["rows"] and all(row["ms"] > 0 for row in result["rows"])
  assert "no accelerator" in result["note"] and "no accelerator" in out
  plan = json.loads((tmp_path / "suite.json").read_text())
  assert plan["platform"] == "cpu" and plan["stages"][0]["status"] == "running"
  # The stage dies with it.
  time.sleep(0.5)
  running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
  assert not re.search(rf"benchmarks attention .*{re.escape(str(tmp_path))}", running.stdout)


def test_a_suite_without_time_leaves_everything_out(tmp_path, capsys):
  assert suite.main(["--budget", "1", "--out", str(tmp_path)]) == 0
  plan = json.loads((tmp_path / "suite.json").read_text())
  assert {s["status"] for s in plan["stages"]} == {"left out: no time"}
  capsys.readouterr()


def test_all_stages_parse():
  for name, arguments in suite.STAGES:
    for at, word in enumerate(arguments):
      parse = {"attention": Attention, "block": block.Shape, "loss": loss.Shape,
               "decode": decode.Shape}.get(name)
      if parse and word[0].isdigit():
        assert str(parse.parse(word)) == word, arguments[at]


@pytest.mark.full
def test_the_static_table_reproduces_known_figures(tmp_path, capsys):
  options = ["--dims", "128", "--lengths", "2048", "--out", str(tmp_path), "--targets", "v6e",
             "--implementations", "jax-splash"]
  assert static.main(options) == 0
  capsys.readouterr()
  path, = tmp_path.glob("*-v6e-static.json")
  result = json.loads(path.read_text())
  assert "libtpu" in result["compiler"]
  found = {(r["implementation"], r["pass"]): (r["us"], r["busy"], r["useful"])
           for r in result["rows"]}
  # Measured with libtpu 0.0.52 and jax 0.12.0.1: static microseconds, MXU busy %, useful %.
  known = {("jax-splash", "forward"): (117, 48.1, 16.0),
           ("jax-splash", "backward"): (173, 81.0, 27.0)}
  if jax.__version__ == "0.11.2":  # whose splash attention is another
    known["jax-splash", "forward"] = (121.1, 46.4, 15.5)
  assert found.keys() == known.keys()
  for key, figures in known.items():
    assert found[key] == pytest.approx(figures, rel=0.03), key


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_cost_of_documents_reproduces_known_figures(tmp_path, capsys):
  assert static.main(["--dims", "128", "--masks", "documents", "--targets", "v6e", "--out",
                      str(tmp_path)]) == 0
  assert "cost / unmasked" in capsys.readouterr().out
  path, = tmp_path.glob("*-v6e-masks-static.json")
  found = {row["pass"]: (row["useful"], row["cost"], row["causal"])
           for row in json.loads(path.read_text())["rows"]}
  # libtpu 0.0.52 and jax 0.12.0.1.
  assert found.keys() == {"forward", "backward"}
  assert found["forward"] == pytest.approx((37.1, 1.16, 1.15), rel=0.02)
  assert found["backward"] == pytest.approx((47.3, 1.09, 1.08), rel=0.02)


def test_causal_steps_count_blocks():
  shape = Attention(1, 2048, 16, 1, 128)
  steps = static.causal_steps("tokamax-tpu", shape, (512, 1024, 512), "v6e")
  visible = np.tril(np.ones((2048, 2048), bool)).reshape(4, 512, 2, 1024).any((1, 3))
  whole = np.tril(np.ones((2048, 2048), bool)).reshape(4, 512, 2, 1024).all((1, 3))
  forward = steps["_fwd_"]
  assert forward.grid == visible.sum() * 16
  assert forward.active == pytest.approx((whole.sum() / visible.sum(),
                                          1 - whole.sum() / visible.sum()))
  assert static.causal_steps("jax-splash", shape, (512, 1024, 512), "v6e")["dkv"].active == (
      visible.mean())


@pytest.mark.slow
def test_the_loss_compiled_for_a_chip_that_is_not_here(tmp_path, capsys):
  arguments = ["static", "loss", "--targets", "v6e", "--shapes", "1024x256x14336", "--out",
               str(tmp_path)]
  assert command.main(arguments) == 0
  path, = tmp_path.glob("*-v6e-loss-static.json")
  rows = json.loads(path.read_text())["rows"]
  assert [row["pass"] for row in rows] == ["forward", "backward", "backward"]
  for row in rows:
    assert row["implementation"] == "mosaic_tpu" and row["logits"] == ""
    assert 0 < row["useful"] < row["busy"] + 0.1 < 100
    assert row["memory"] < 1024 * 14336 * 2 / 2**20


@pytest.mark.full
def test_a_training_step_with_and_without_the_logits(monkeypatch):
  ours, full = loss_training.compare("2x64x2000", 1, depth=1)
  assert ours["memory"] <= full["memory"] and "seconds" in ours and "seconds" in full
  # Memory alone, of steps that would fail if they ran.
  fail = lambda config, state, batch: (state, {"loss": jax.pure_callback(
      lambda squares: 1 / 0, jax.ShapeDtypeStruct((), jnp.float32), batch["tokens"] ** 2)})
  monkeypatch.setattr(loss_training.train_step, "train_step", fail)
  for row in loss_training.compare("2x64x2000", 0, depth=1):
    assert row["share"] == 1 and "seconds" not in row
