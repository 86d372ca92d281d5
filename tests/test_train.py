import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys

import chex
import haiku as hk
import jax
import numpy as np
import optax
import pytest

from palm_haiku import PaLM, PaLMConfig, checkpoint, data, rundir, runlog, train, train_step
from palm_haiku.checkpoint import CheckpointError
from palm_haiku.recipe import TrainConfig
from tests.short_runs import TEXT, compilations, run

MODEL = PaLMConfig(128, 16, 2, 2, 8)
# Columns of a row that depend on the machine.
MEASURED = ("tokens_per_second", "data_wait", "memory_bytes")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "text"
  path.write_text(TEXT)
  return TrainConfig(model=MODEL, data=str(path), steps=21, batch_size=4, seq_len=32,
                     log_every=4, eval_every=16, checkpoint_every=7)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """The directory of a run of `config` that nothing disturbed."""
  out = tmp_path_factory.mktemp("whole") / "out"
  run(config, out)
  return out


def losses(out):
  """Every number of every row that does not depend on the clock."""
  return [{name: x for name, x in row.items() if name not in MEASURED}
          for row in runlog.read_metrics(out / "metrics.jsonl")]


@pytest.fixture(scope="module")
def long(config, tmp_path_factory):
  """A longer run that nothing disturbed: its config, its directory, its result and its output."""
  out = tmp_path_factory.mktemp("long") / "out"
  config = dataclasses.replace(config, learning_rate=1e-2, steps=150, log_every=1)
  return config, out, *run(config, out)


def test_a_short_training(long):
  config, out, result, text = long
  rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == list(range(1, 151))
  # Near log(128) at the start; the text has 17 characters, mostly digits and words between.
  assert 4 < rows[0]["loss"] < 7
  assert rows[-1]["loss"] < 2 and rows[-1]["eval_loss"] < 2.2
  for row in rows:
    assert row.keys() - {"eval_loss", *MEASURED} == {
        "step", "loss", "log_z_squared", "grad_norm"}
    assert ("eval_loss" in row) == (row["step"] % 16 == 0 or row["step"] == 150)
    assert ("tokens_per_second" in row) == ("data_wait" in row) == (row["step"] > 1)
    assert 0 <= row.get("data_wait", 0) <= 1
  assert result.step == 150 and result.interrupted_by is None
  assert result.train.nats_per_token == rows[-1]["loss"]
  assert result.held_out.nats_per_token == rows[-1]["eval_loss"]
  assert result.held_out.bits_per_byte == pytest.approx(rows[-1]["eval_loss"] / np.log(2), rel=0.01)
  assert (out / "loss.png").exists() and list((out / "tensorboard").iterdir())
  assert checkpoint.Checkpoints(out / "checkpoints").steps() == [140, 147, 150]
  assert "step 150/150" in text

  # Another resume has nothing to do and says how it went.
  again, _ = run(config, out, resume=True)
  assert again == result and losses(out) == [
      {k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def test_steps_that_are_logged_and_evaluated(whole):
  rows = losses(whole)
  assert [row["step"] for row in rows] == sorted({1, *range(4, 22, 4), 16, 21})
  assert [row["step"] for row in rows if "eval_loss" in row] == [16, 21]


def test_evaluation_counts_every_token_once(config):
  config = dataclasses.replace(config, mask_documents=True)
  state = jax.jit(lambda: train_step.init(config))()
  tokens = data.load_corpus(config.data, data.ByteTokenizer(), 0.01).eval
  score = jax.jit(functools.partial(train_step.eval_step, config))
  sums = [score(state.params, batch) for batch in data.eval_batches(
      tokens, batch_size=2, seq_len=32, eod=0)]
  nll, count = np.sum(np.array(sums), 0)
  assert count == len(tokens) - 1
  model = hk.without_apply_rng(hk.transform(lambda tokens: PaLM.from_config(MODEL)(tokens)))
  want, apply = 0.0, jax.jit(model.apply)
  for start in range(0, len(tokens) - 1, 32):
    piece = tokens[start: start + 33].astype(int)
    logits = apply(state.params, piece[:-1])
    want -= jax.nn.log_softmax(logits)[np.arange(len(piece) - 1), piece[1:]].sum()
  np.testing.assert_allclose(nll, want, rtol=1e-5)


@pytest.mark.full
def test_accumulation_is_the_same_step(config, monkeypatch):
  # Not by an optimizer that divides gradients by their size, and so their rounding errors.
  monkeypatch.setattr(TrainConfig, "build_optimizer", lambda self: optax.sgd(1.0))
  tokens = np.random.default_rng(0).integers(0, 128, (4, 33))
  state = jax.jit(lambda: train_step.init(config))()
  (once, whole), (parts, sums) = (jax.jit(lambda state: train_step.train_step(
      dataclasses.replace(config, accumulate=n), state, {"tokens": tokens}))(state)
                                  for n in (1, 4))
  chex.assert_trees_all_close(whole, sums, rtol=1e-5)
  chex.assert_trees_all_close(once.params, parts.params, atol=1e-6)


@pytest.mark.full
def test_bfloat16_trains_float32_parameters_without_held_out_text(config, tmp_path):
  result, _ = run(dataclasses.replace(config, dtype="bfloat16", steps=12, optimizer="palm",
                                      eval_fraction=0), tmp_path / "out")
  rows = runlog.read_metrics(tmp_path / "out" / "metrics.jsonl")
  assert result.train.nats_per_token < rows[0]["loss"]
  assert result.held_out is None and "eval_loss" not in rows[-1]


# The signal comes from within: another process may not get a turn before the run is over.
COMMAND = """
import json, os, sys, threading
from palm_haiku import runlog, train
config, out, number, progress, delay = json.loads(sys.argv[1])
write = runlog.RunLog.write

def write_and_signal(self, row):
  write(self, row)
  if row["step"] == progress:
    send = lambda: os.kill(os.getpid(), number)
    threading.Timer(delay, send).start() if delay else send()

runlog.RunLog.write = write_and_signal
train.train(train.load_config({"config": config}), out, resume=True)
"""


def interrupt(config, out, number, progress, delay=0.0):
  """A run in a process of its own that is sent a signal after a step: its status and output."""
  job = json.dumps([dataclasses.asdict(config), str(out), number, progress, delay])
  done = subprocess.run([sys.executable, "-c", COMMAND, job], stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, env=os.environ | {"JAX_PLATFORMS": "cpu"},
                        text=True, timeout=250)
  return done.returncode, done.stdout


def test_killed_and_resumed_is_undisturbed(long, tmp_path):
  config, undisturbed, *_ = long
  out = tmp_path / "out"
  status, text = interrupt(config, out, signal.SIGKILL, random.Random(9).randrange(20, 120))
  assert status == -signal.SIGKILL and losses(out)[-1]["step"] < 150, text
  result, text = run(config, out, resume=True)
  assert result.step == 150 and "resuming from step" in text
  assert losses(out) == losses(undisturbed)


def test_interrupted_and_resumed_is_undisturbed(long, tmp_path, monkeypatch):
  config, undisturbed, *_ = long
  out = tmp_path / "out"
  write, last = runlog.RunLog.write, 0
  for number, progress in ((signal.SIGTERM, 37), (signal.SIGINT, 101)):
    def write_and_signal(self, row):
      write(self, row)
      if row["step"] == progress:
        signal.raise_signal(number)

    with monkeypatch.context() as patch:
      patch.setattr(runlog.RunLog, "write", write_and_signal)
      result, text = run(config, out, resume=bool(last))
    assert not last or f"resuming from step {last}" in text
    last = checkpoint.Checkpoints(out / "checkpoints").steps()[-1]
    assert result.interrupted_by == number and progress <= result.step < 150
    assert last == losses(out)[-1]["step"] == result.step
  result, text = run(config, out, resume=True)
  assert result.step == 150 and f"resuming from step {last}" in text
  assert losses(out) == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_killed_again_and_again(long, tmp_path, seed):
  config, undisturbed, *_ = long
  draw = random.Random(seed)
  out = tmp_path / "out"
  for _ in range(4):
    number = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    done = len(runlog.read_metrics(out / "metrics.jsonl"))
    interrupt(config, out, number, draw.randrange(done + 1, done + 35), draw.uniform(0, 0.05))
  run(config, out, resume=True)
  assert losses(out) == losses(undisturbed)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(config, whole, tmp_path):
  out = shutil.copytree(whole, tmp_path / "out")
  victim = max((out / "checkpoints" / "21").rglob("*"), key=lambda path: path.stat().st_size)
  victim.write_bytes(victim.read_bytes()[:-100])
  with compilations() as compiled:
    _, text = run(config, out, resume=True)
  assert not compiled  # The step is that of the run before, wherever its arrays come from.
  assert f"checkpoint {out / 'checkpoints' / '21'} is refused" in text
  assert "resuming from step 14" in text
  assert losses(out) == losses(whole)


def test_a_run_is_on_the_default_device(config, tmp_path):
  device = jax.devices()[1]
  with jax.default_device(device):
    state = train_step.program(config).init()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    leaf = jax.tree.leaves(state)[0]
    checkpoints.save(1, {"state": {"leaf": leaf}}, {})
    read = checkpoints.restore(1, {"state": {"leaf": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)}})
  assert leaf.devices() == read["state"]["leaf"].devices() == {device}


def test_resuming_nothing_begins(config, whole, tmp_path):
  result, text = run(config, tmp_path, resume=True)
  assert result.step == 21 and f"no checkpoint in {tmp_path}: beginning anew" in text
  assert losses(tmp_path) == losses(whole)


def test_settings_are_there_before_the_first_step(config, tmp_path, monkeypatch):
  class PowerCut(Exception):
    pass

  def die(*_):
    raise PowerCut

  monkeypatch.setattr(train._Run, "_batch", die)
  for now in (config, dataclasses.replace(config, seed=1)):
    with pytest.raises(PowerCut):
      run(now, tmp_path, resume=True)
    assert json.loads((tmp_path / "config.json").read_text()) == dataclasses.asdict(now)
    assert rundir.RunDirectory(tmp_path).settings() == {"config": dataclasses.asdict(now)}


def refuse(config, out, message, resume=False):
  before = sorted(out.rglob("*"))
  with pytest.raises(ValueError, match=message) as error:
    run(config, out, resume=resume)
  assert "\n" not in str(error.value)
  assert sorted(out.rglob("*")) == before


def test_what_does_not_fit_is_refused_before_anything_is_done(config, whole, tmp_path):
  out = tmp_path / "out"
  change = lambda **fields: dataclasses.replace(config, **fields)
  refuse(change(seq_len=len(TEXT)), out, "fewer than one sequence")
  refuse(change(data=str(tmp_path / "absent")), out, "no file matches")
  refuse(change(model=dataclasses.replace(MODEL, num_tokens=100)), out,
         "hold token 116, outside the model's vocabulary of 100")
  shutil.copytree(whole, out)
  refuse(config, out, "holds another run; continue it with --resume")
  refuse(change(seed=1), out, "was trained with seed = 0, not 1", resume=True)
  refuse(change(model=dataclasses.replace(MODEL, dim=32)), out, "dim = 16, not 32", resume=True)
  text = pathlib.Path(config.data)
  text.write_text(TEXT + "more")
  try:
    refuse(config, out, "was trained on other data", resume=True)
  finally:
    text.write_text(TEXT)


@pytest.mark.parametrize("change, message", [
    (dict(seq_len=0), "seq_len must be at least 1; got 0"),
    (dict(steps=0), "steps must be at least 1"),
    (dict(batch_size=6, accumulate=4), "accumulate must divide batch_size"),
    (dict(optimizer="sgd"), "optimizer must be adamw or palm"),
    (dict(learning_rate=0.0), "learning_rate must be positive"),
    (dict(learning_rate=float("nan")), "learning_rate must be positive"),
    (dict(dtype="int8"), "dtype must be float32 or bfloat16"),
])
def test_bad_settings_are_named(config, change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(config, **change)


@pytest.mark.full
def test_a_run_that_diverges_stops_and_keeps_what_was_good(config, tmp_path):
  out = tmp_path / "out"
  config = dataclasses.replace(config, learning_rate=1e30, log_every=100, checkpoint_every=1)
  with pytest.raises(FloatingPointError, match=r"is nan at step \d.*checkpoint \d is intact"):
    run(config, out)
  for step in checkpoint.Checkpoints(out / "checkpoints").steps():
    like = jax.eval_shape(lambda: train_step.init(config))._asdict()
    chex.assert_tree_all_finite(
        checkpoint.Checkpoints(out / "checkpoints").restore(step, like)["opt_state"])


def test_a_full_disk_loses_nothing(config, whole, tmp_path, monkeypatch, limit_files):
  before = checkpoint.Checkpoints.save

  def save(self, step, items, metadata):
    if step == 14:
      limit_files(20_000)
    before(self, step, items, metadata)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", save)
  with pytest.raises(CheckpointError, match="could not write.*checkpoint 7 is intact") as error:
    run(config, tmp_path)
  limit_files(None)
  assert "\n" not in str(error.value)
  monkeypatch.setattr(checkpoint.Checkpoints, "save", before)
  assert "resuming from step 7" in run(config, tmp_path, resume=True)[1]
  assert losses(tmp_path) == losses(whole)


def test_a_training_step_under_strict_promotion():
  config = TrainConfig(model=PaLMConfig(11, 4, 1, 1, 4), batch_size=2, seq_len=4)
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    program = train_step.program(config)
    state = jax.eval_shape(program.init)
    batch = {"tokens": np.zeros((2, 5), np.int32), "weights": np.ones((2, 4), np.float32)}
    jax.eval_shape(program.step, state, {"tokens": batch["tokens"]})
    jax.eval_shape(program.evaluate, state.params, batch)
