import dataclasses
import inspect
import json

import jax
import numpy as np
import pytest

from palm_haiku import PaLMConfig, checkpoint, configs, recipe, runlog, train, train_step
from palm_haiku.recipe import TrainConfig
from tests.short_runs import TEXT, run

MODEL = PaLMConfig(128, 16, 1, 2, 8)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "text"
  path.write_text(TEXT)
  return TrainConfig(model=MODEL, data=str(path), steps=24, batch_size=4, seq_len=16, log_every=1,
                     eval_every=1000, checkpoint_every=4, optimizer="palm", learning_rate=0.05)


def params(out, step):
  run = checkpoint.Checkpoints(out / "checkpoints")
  like = jax.eval_shape(lambda: train_step.init(recipe.load_config(run.metadata(step))))
  return run.restore(step, {"params": like.params})["params"]


def test_every_sequence_is_read_once_through_a_ramp():
  c = TrainConfig(model=MODEL, batch_size=4, batch_ramp="3:8,5:16")
  sizes = [len(c.sequences_of(batch)) for batch in range(7)]
  assert sizes == [4, 4, 4, 8, 8, 16, 16]
  assert [n for batch in range(7) for n in c.sequences_of(batch)] == list(range(sum(sizes)))


def test_skipped_batches():
  c = TrainConfig(model=MODEL, skip_batches="9:12,3:5,4:6")
  assert c.skipped == ((3, 6), (9, 12))
  assert [c.batch_of(step) for step in range(10)] == [0, 1, 2, 6, 7, 8, 12, 13, 14, 15]
  assert c.skipping("").skip_batches == c.skipping("3:6").skip_batches == "3:6,9:12"
  assert c.skipping("2:3,20:30").skip_batches == "2:6,9:12,20:30"


def test_the_model_and_the_optimizer_get_the_runs_settings(monkeypatch):
  calls = []

  class Model:

    @classmethod
    def from_config(cls, config, **options):
      calls.append((config, options))
      return cls()

    def loss(self, *inputs, **options):
      calls.append((inputs, options))

  monkeypatch.setattr(recipe, "PaLM", Model)
  c = TrainConfig(model=MODEL, dtype="bfloat16", remat="full", implementation="xla",
                  shard_residual=True, steps=77)
  c.build_model().apply({}, 1, 2, 3)
  assert calls == [
      (MODEL, dict(dtype=np.dtype("bfloat16"), remat="full", implementation="xla", lora_rank=0,
                   rules=recipe.sharding.SHARDED_RESIDUAL)), ((1, 2), dict(segment_ids=3))]
  for name in ("adamw", "palm"):
    real = inspect.signature(getattr(recipe.optim, name))
    monkeypatch.setattr(recipe.optim, name, lambda *values, name=name, real=real, **options: (
        name, real.bind(*values, **options).arguments))
  change = lambda **fields: dataclasses.replace(c, **fields).build_optimizer()
  assert change(learning_rate=0.5) == ("adamw", {"learning_rate": 0.5, "steps": 77})
  assert change(learning_rate=0.5, optimizer="palm") == ("palm", {"learning_rate": 0.5})
  for optimizer, rate in (("adamw", 3e-3), ("palm", 1e-2)):
    assert change(optimizer=optimizer)[1].get("learning_rate", rate) == rate


def test_runs_whose_steps_are_the_same_share_a_program():
  base = TrainConfig(model=MODEL)
  of_step = dict(
      steps=7, accumulate=2, seq_len=8, optimizer="palm", learning_rate=0.1, z_loss=0.0, seed=1,
      dtype="bfloat16", remat="full", implementation="xla", mesh="fsdp", shard_residual=True,
      init="other", model=dataclasses.replace(MODEL, depth=2))
  of_run = dict(
      data="text", tokenizer="pieces", eval_fraction=0.5, eval_tokens=9, mask_documents=True,
      packing="best-fit", batch_size=8, batch_ramp="5:8", skip_batches="3:4", spike=1.0,
      log_every=1, eval_every=1, checkpoint_every=1)
  fields = {field.name for field in dataclasses.fields(TrainConfig)}
  assert fields == {*of_step, *of_run, "lora_rank"}
  for name, value in (of_step | of_run).items():
    changed = dataclasses.replace(base, **{name: value}).of_step
    assert (changed == base.of_step) == (name in of_run), name
  constant = dataclasses.replace(base, optimizer="palm")
  assert dataclasses.replace(constant, steps=7).of_step == constant.of_step
  adapted = dataclasses.replace(base, init="other", lora_rank=2).of_step
  assert adapted != dataclasses.replace(base, init="other").of_step
  whole = dataclasses.replace(base, accumulate=4, batch_size=8, batch_ramp="5:12").of_step
  assert whole.accumulate == 4


@pytest.mark.parametrize("change, message", [
    (dict(batch_ramp="50000"), "batch_ramp must be written BATCH:SIZE, such as .*got '50000'"),
    (dict(batch_ramp="9:8,5:16"), "growing batches"),
    (dict(batch_ramp="5:6", accumulate=4), "accumulate must divide batch_size; got 4 and 6"),
    (dict(skip_batches="7:7"), "FIRST < END; got 7:7"),
    (dict(skip_batches="a:b"), "skip_batches must be written FIRST:END"),
    (dict(z_loss=-1e-4), "z_loss must be at least 0 and finite; got -0.0001"),
    (dict(z_loss=float("nan")), "z_loss must be at least 0 and finite; got nan"),
    (dict(batch_ramp="\u00b2:4"), "batch_ramp must be written"),
    (dict(skip_batches="1:\u2461"), "skip_batches must be written"),
    (dict(seed=-1), r"seed must be from 0 to 2\^32 - 1; got -1"),
    (dict(seed=2**64), r"seed must be from 0 to 2\^32 - 1; got 18446744073709551616"),
    (dict(steps=2**31), r"steps must be less than 2\^31; got 2147483648"),
    (dict(seq_len=10**20), r"seq_len must be less than 2\^31"),
    (dict(packing="best"), "packing must be end-to-end or best-fit; got 'best'"),
    (dict(spike=-1.0), "spike must not be negative; got -1"),
])
def test_bad_settings_are_named(change, message):
  with pytest.raises(ValueError, match=message):
    TrainConfig(model=MODEL, **change)


def test_settings_of_a_newer_version_are_named():
  fields = dataclasses.asdict(TrainConfig(model=MODEL))
  assert recipe.load_config({"config": fields}) == TrainConfig(model=MODEL)
  for newer in (fields | {"horizon": 3}, fields | {"model": fields["model"] | {"horizon": 3}}):
    with pytest.raises(ValueError, match="unknown here, because a newer version .*: horizon"):
      recipe.load_config({"config": newer})


@pytest.mark.full
def test_a_ramp_survives_an_interruption(config, tmp_path):
  config = dataclasses.replace(config, steps=8, batch_ramp="3:8")
  run(config, tmp_path / "whole")
  run(config, tmp_path / "parts")
  # As if it had died after the checkpoint before.
  checkpoint.Checkpoints(tmp_path / "parts" / "checkpoints").forget_after(4)
  run(config, tmp_path / "parts", resume=True)
  jax.tree.map(np.testing.assert_array_equal,
               params(tmp_path / "parts", 8), params(tmp_path / "whole", 8))


class PowerCut(Exception):
  pass


@pytest.fixture
def spiking(monkeypatch):
  """Batches of a run with a spike at step 16, and those at whose sight it dies."""
  monkeypatch.setattr(train, "GO_BACK", 6)
  monkeypatch.setattr(train, "SKIP", 9)
  monkeypatch.setattr(train, "RECENT", 5)
  seen, deadly, windows = [], set(), train.data.windows

  class Spiking:
    """The data; the sequences of batch 15 are no text."""

    def __init__(self, inner):
      self.inner = inner

    def __getitem__(self, number):
      if number // 4 in deadly:
        raise PowerCut
      seen.append(number // 4)
      row = self.inner[number]
      return row if number // 4 != 15 else {
          name: np.arange(x.size, dtype=x.dtype) * 37 % 128 for name, x in row.items()}

  monkeypatch.setattr(train.data, "windows", lambda *a, **k: Spiking(windows(*a, **k)))
  return seen, deadly


@pytest.mark.full
def test_a_spike_goes_back_and_leaves_batches_out(config, tmp_path, spiking):
  seen, _ = spiking
  config = dataclasses.replace(config, spike=0.6)
  out = tmp_path / "out"
  result, text = run(config, out)
  assert result.step == 24 and result.interrupted_by is None
  # The spike is at step 16; the newest checkpoint 6 steps before it is 8, which has read 0..7.
  # Batches are read ahead, 16 and 17 before the spike is seen.
  assert "at step 16 is a spike: going back to step 8 and leaving out batches 8 to 16" in text, text
  assert sorted(set(seen)) == [*range(33)] and [n for n in seen[::4] if n > 17] == [
      *range(18, 33)]
  assert [row["step"] for row in runlog.read_metrics(out / "metrics.jsonl")] == list(range(1, 25))
  assert json.loads((out / "config.json").read_text())["skip_batches"] == "8:17"

  # With those batches left out from the beginning: the same weights.
  by_hand = tmp_path / "by hand"
  run(dataclasses.replace(config, steps=24, spike=0.0, skip_batches="8:17"), by_hand)
  jax.tree.map(np.testing.assert_array_equal, params(out, 24), params(by_hand, 24))


@pytest.mark.full
def test_a_run_that_died_around_a_spike_goes_back_as_well(config, tmp_path, spiking):
  _, deadly = spiking
  config = dataclasses.replace(config, spike=0.6)
  run(config, tmp_path / "whole")
  out = tmp_path / "out"
  # After the checkpoint of step 12; and when it had gone back to step 8, before another one.
  for batch in (14, 19):
    deadly.add(batch)
    with pytest.raises(PowerCut):
      run(config, out, resume=True)
    deadly.clear()
  _, text = run(config, out, resume=True)
  assert "resuming from step 8" in text and "going back to step 8" in text
  jax.tree.map(np.testing.assert_array_equal, params(out, 24), params(tmp_path / "whole", 24))


@pytest.mark.full
def test_what_is_not_finite_is_gone_back_from_before_it_is_saved(config, tmp_path, monkeypatch):
  monkeypatch.setattr(train, "GO_BACK", 3)
  monkeypatch.setattr(train, "SKIP", 5)
  calls, program = [], train.program

  def failing(*args):
    whole = program(*args)

    def step(state, batch):
      state, metrics = whole.step(state, batch)
      calls.append(None)
      return state, metrics | {"grad_norm": np.nan} if len(calls) == 8 else metrics

    return whole._replace(step=step)

  monkeypatch.setattr(train, "program", failing)
  # Step 8 is saved, but would not be logged.
  config = dataclasses.replace(config, spike=0.6, log_every=5)
  result, text = run(config, tmp_path / "out")
  assert result.step == 24 and "at step 8 is a spike: going back to step 4" in text


@pytest.mark.full
def test_batches_that_were_trained_on_cannot_be_skipped(config, tmp_path):
  run(dataclasses.replace(config, steps=8), tmp_path / "out")
  more = dataclasses.replace(config, steps=12)
  with pytest.raises(ValueError, match="batches up to 7 were trained on already; skip later ones"):
    run(dataclasses.replace(more, skip_batches="5:6"), tmp_path / "out", resume=True)
  result, _ = run(dataclasses.replace(more, skip_batches="8:10"), tmp_path / "out", resume=True)
  assert result.step == 12
  # Batches skipped before need not be named again, and stay skipped.
  result, _ = run(dataclasses.replace(more, steps=14, skip_batches="20:21"), tmp_path / "out",
                  resume=True)
  metadata = checkpoint.Checkpoints(tmp_path / "out" / "checkpoints").metadata(14)
  assert result.step == 14 and metadata["config"]["skip_batches"] == "8:10,20:21"


def test_flops_of_recomputation():
  """Appendix B of the paper: 0.0550, 0.388 and 3.28 TFLOP a token; hardware does more."""
  for name, flops in (("palm-8b", 0.0550e12), ("palm-62b", 0.388e12), ("palm-540b", 3.28e12)):
    c = configs[name]
    assert c.train_flops_per_token(2048) == pytest.approx(flops, rel=0.02)
    assert (c.train_flops_per_token(2048) < c.train_flops_per_token(2048, "attention")
            < c.train_flops_per_token(2048, "full") < 8 / 6 * c.train_flops_per_token(2048))
