"""The training loop against plain restatements of what it is for."""

import collections
import dataclasses
import itertools
import math
import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from palm_haiku import PaLM, PaLMConfig, checkpoint, data, optim, recipe, runlog, train, train_step
from palm_haiku.kernels.core import chips
from palm_haiku.loss import next_token_loss
from palm_haiku.recipe import TrainConfig
from tests.short_runs import run

MODEL = PaLMConfig(128, 16, 1, 2, 8)


def restated(config, train_tokens, eval_tokens, batches):
  """Metrics of each step, and the held-out loss after it, from logits of four sequences a time."""
  model = hk.without_apply_rng(hk.transform(
      lambda tokens, ids: PaLM.from_config(config.model)(tokens, segment_ids=ids)))

  @jax.jit
  def gradient(params, tokens):
    def total(params):
      ends = tokens[:, :-1] == 0
      logits = model.apply(params, tokens[:, :-1], ends.cumsum(-1) - ends)
      nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)[..., 0]
      loss = next_token_loss(logits, tokens[:, 1:], z_loss=config.z_loss)
      return loss.total, (loss, nll)

    return jax.grad(total, has_aux=True)(params)

  def held_out(params):
    total = 0
    starts = list(range(0, len(eval_tokens) - 1, config.seq_len))
    for first in range(0, len(starts), 4):
      rows = np.zeros((4, config.seq_len + 1), int)
      for row, start in zip(rows, starts[first: first + 4]):
        piece = eval_tokens[start: start + config.seq_len + 1]
        row[: len(piece)] = piece
      nll = np.asarray(gradient(params, rows)[1][1])
      for row, start in zip(nll, starts[first: first + 4]):
        total += row[: len(eval_tokens) - 1 - start].sum()
    return total / (len(eval_tokens) - 1)

  windows = data.windows(train_tokens, seq_len=config.seq_len, seed=config.seed)
  params = jax.jit(model.init)(jax.random.key(config.seed), np.zeros((1, 16), int),
                               np.zeros((1, 16), int))
  optimizer = optim.adamw(config.learning_rate, steps=config.steps)
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  for numbers in batches:
    tokens = np.stack([windows[number]["tokens"] for number in numbers]).reshape(-1, 4, 17)
    grads, (loss, _) = jax.tree.map(lambda *parts: sum(parts) / len(parts), *[
        gradient(params, part) for part in tokens])
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
    yield {"loss": loss.nll, "log_z_squared": loss.log_z_squared,
           "grad_norm": optax.tree.norm(grads), "eval_loss": held_out(params)}


@pytest.mark.full
def test_a_run_is_its_restatement(tmp_path, monkeypatch):
  """With a ramp, a skipped batch, parts of a batch, documents, and evaluation on held-out text."""
  for n in range(60):
    (tmp_path / f"{n:02}.txt").write_text(f"{n} times {n % 7} is {n * (n % 7)}.\n"[: 7 + n % 13])
  config = TrainConfig(
      model=MODEL, data=str(tmp_path / "*.txt"), mask_documents=True, steps=5, batch_size=4,
      batch_ramp="2:8", skip_batches="1:2", accumulate=2, seq_len=16, learning_rate=1e-2,
      z_loss=1e-2, seed=5, log_every=1, eval_every=2)
  # A second passes between two looks at the clock, and so in each step.
  clock = types.SimpleNamespace(perf_counter=itertools.count().__next__)
  monkeypatch.setattr(train, "time", clock)
  result, _ = run(config, tmp_path / "out")
  text = b"\0".join(path.read_bytes() for path in sorted(tmp_path.glob("*.txt")))
  corpus = data.load_corpus(config.data, data.ByteTokenizer(), 0.1)
  assert text.startswith(bytes(corpus.train)) and text.endswith(bytes(corpus.eval))
  # Batch 0 and the skipped one hold four sequences each, those from the third on eight.
  batches = [range(4), *(range(8 * n, 8 * n + 8) for n in range(1, 5))]
  rows = runlog.read_metrics(tmp_path / "out" / runlog.METRICS)
  assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
  assert [row.get("tokens_per_second") for row in rows] == [None] + [8 * 16] * 4
  metadata = checkpoint.Checkpoints(tmp_path / "out" / "checkpoints").metadata(5)
  assert metadata == {"config": dataclasses.asdict(config), "step": 5,
                      "data_fingerprint": corpus.fingerprint, "tokenizer_fingerprint": "bytes"}
  for row, want in zip(rows, restated(config, corpus.train, corpus.eval, batches), strict=True):
    assert ("eval_loss" in row) == (row["step"] in (2, 4, 5))
    for name, x in want.items():
      assert row.get(name, float(x)) == pytest.approx(float(x), rel=2e-5), (row["step"], name)
  assert result.train == train._score(rows[-1]["loss"], corpus.train_bytes_per_token)
  assert result.held_out == train._score(rows[-1]["eval_loss"], corpus.eval_bytes_per_token)


def part_of_a_run(config, **parts):
  """A run that has the given parts alone."""
  whole = object.__new__(train._Run)
  for name, part in dict(config=config, **parts).items():
    setattr(whole, name, part)
  return whole


class Toy:
  """A model in closed form: nll = (a t + b s) / 100 and log Z = c x, of target, segment, token."""

  init = staticmethod(lambda key, tokens, targets: {"key": jax.random.key_data(key)})

  @staticmethod
  def apply(params, tokens, targets, segment_ids=None):
    segments = 0 if segment_ids is None else params["b"] * segment_ids
    return (params["a"] * targets + segments) / 100, params["c"] * tokens


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_its_formula(accumulate):
  config = TrainConfig(model=MODEL, z_loss=0.01, accumulate=accumulate)
  tokens = np.arange(20).reshape(4, 5) % 7
  batch = {"tokens": tokens, "segment_ids": tokens // 3}
  x, t, s = tokens[:, :-1], tokens[:, 1:], tokens[:, :-1] // 3
  params, velocity = {"a": 1.0, "b": -2.0, "c": 0.5}, dict.fromkeys("abc", 0.0)
  optimizer = optax.sgd(0.1, momentum=0.5)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(TrainConfig, "build_model", lambda self: Toy)
    patch.setattr(TrainConfig, "build_optimizer", lambda self: optimizer)
    state = train_step.TrainState(jax.tree.map(jnp.float32, params), optimizer.init(params))
    for _ in range(2):
      state, metrics = train_step.train_step(config, state, batch)
      loss = (params["a"] * t + params["b"] * s).mean() / 100
      log_z_squared = params["c"] ** 2 * (x**2).mean()
      grads = {"a": t.mean() / 100, "b": s.mean() / 100,
               "c": 0.01 * 2 * params["c"] * (x**2).mean()}
      assert {name: float(x) for name, x in metrics.items()} == pytest.approx({
          "loss": loss, "log_z_squared": log_z_squared,
          "grad_norm": sum(g**2 for g in grads.values()) ** 0.5}, rel=1e-5)
      velocity = {name: 0.5 * velocity[name] + grads[name] for name in grads}
      params = {name: params[name] - 0.1 * velocity[name] for name in grads}
      assert {name: float(x) for name, x in state.params.items()} == pytest.approx(params, rel=1e-5)
    weights = np.linspace(0, 1, 16).reshape(4, 4)
    total, count = train_step.eval_step(config, params, batch | {"weights": weights})
    assert float(total) == pytest.approx(
        (weights * (params["a"] * t + params["b"] * s)).sum() / 100, rel=1e-5)
    assert float(count) == pytest.approx(8)
    patch.setattr(TrainConfig, "build_optimizer", lambda self: optax.identity())
    for seed in (0, 3):
      start = train_step.init(dataclasses.replace(config, seed=seed))
      assert start.params["key"].tolist() == jax.random.key_data(jax.random.key(seed)).tolist()


def test_steps_read_the_batches_that_are_their_turn():
  config = TrainConfig(model=MODEL, batch_size=4, batch_ramp="3:8", skip_batches="1:2", seq_len=2)
  windows = [{"tokens": np.full(3, n), "segment_ids": np.full(3, -n)} for n in range(40)]
  whole = part_of_a_run(config, windows=windows, eod=0,
                        program=types.SimpleNamespace(batch_sharding=None))
  for step, numbers in enumerate((range(4), range(8, 12), range(12, 20), range(20, 28))):
    batch = whole._batch(step)
    np.testing.assert_array_equal(batch["tokens"], np.array([[n] * 3 for n in numbers]))
    np.testing.assert_array_equal(batch["segment_ids"], -batch["tokens"])


def test_evaluation_is_the_mean_over_held_out_tokens():
  """Whatever the batches, of which the last one has fewer targets."""
  tokens = np.random.default_rng(0).integers(0, 99, 43)
  evaluate = lambda params, batch: (
      params * (batch["tokens"][:, 1:] * batch["weights"]).sum(), batch["weights"].sum())
  whole = part_of_a_run(
      TrainConfig(model=MODEL, batch_size=2, seq_len=4), eod=None,
      state=train_step.TrainState(0.5, None),
      program=types.SimpleNamespace(batch_sharding=None, evaluate=evaluate))
  assert whole._evaluate_on(tokens) == pytest.approx(0.5 * tokens[1:].mean(), rel=1e-6)


def test_bits_per_byte():
  assert train._score(3.0, 2.5) == (3.0, 3.0 / 2.5 / math.log(2))


def test_utilisation_is_of_all_chips(monkeypatch):
  monkeypatch.setattr(chips, "peak", {jax.devices()[0].device_kind: 1e9}.get)
  config = TrainConfig(model=MODEL, seq_len=32, remat="full")
  flops = MODEL.train_flops_per_token(32), MODEL.train_flops_per_token(32, "full")
  for where, devices in ((None, 1), ("a mesh", jax.device_count())):
    speed = part_of_a_run(config, program=types.SimpleNamespace(batch_sharding=where))._speed(50.0)
    assert speed == {"tokens_per_second": 50.0, "mfu": pytest.approx(50 * flops[0] / 1e9 / devices),
                     "hfu": pytest.approx(50 * flops[1] / 1e9 / devices)}


def test_a_spike_is_above_the_median_of_recent_losses(monkeypatch):
  monkeypatch.setattr(train, "RECENT", 4)
  whole = part_of_a_run(TrainConfig(model=MODEL, spike=0.5))
  recent = collections.deque(maxlen=4)
  spike = lambda loss, **more: whole._is_spike({"step": 1, "loss": loss, **more}, recent)
  # Until there are enough of them, nothing is one; then above 0.5 more than 1.5, the median.
  assert [spike(loss) for loss in (9.0, 1.0, 1.5, 1.5)] == [False] * 4
  assert spike(2.001) and not spike(2.0) and list(recent) == [1.0, 1.5, 1.5, 2.0]
  assert spike(2.001) and spike(math.inf) and spike(1.0, grad_norm=math.nan)
  assert list(recent) == [1.0, 1.5, 1.5, 2.0]
  assert not spike(1.9) and list(recent) == [1.5, 1.5, 2.0, 1.9]


def test_recent_losses_are_those_up_to_the_step(tmp_path, monkeypatch):
  monkeypatch.setattr(train, "RECENT", 3)
  rows = "".join(f'{{"step": {n}, "loss": {n}}}\n' for n in range(1, 9))
  (tmp_path / runlog.METRICS).write_text(rows)
  whole = part_of_a_run(TrainConfig(model=MODEL, spike=9.0), out=tmp_path)
  assert list(whole._recent(5)) == [3, 4, 5] and not whole._recent(0)


def test_a_run_goes_back_far_enough():
  checkpoints = types.SimpleNamespace(
      steps=lambda: [100, 200, 300, 400], problem=lambda step: "damaged" if step == 200 else None)
  whole = part_of_a_run(TrainConfig(model=MODEL), checkpoints=checkpoints)
  # 100 steps before, or the oldest; not a damaged one.
  before = {step: whole._before(step) for step in (150, 299, 300, 399, 400, 499, 500)}
  assert before == {150: 100, 299: 100, 300: 100, 399: 100, 400: 300, 499: 300, 500: 400}
  checkpoints.steps = list
  assert whole._before(500) is None


@pytest.mark.parametrize("spike, end", [(301, 503), (499, 503), (503, 503), (504, 504)])
def test_batches_up_to_the_spike_are_left_out(spike, end):
  """At least 200 from where the run goes on, those skipped before not counted."""
  restored, forgotten = [], []
  whole = part_of_a_run(
      TrainConfig(model=MODEL, skip_batches="7:10"),
      checkpoints=types.SimpleNamespace(forget_after=forgotten.append))
  whole.state = "before"
  whole._restore = lambda step: restored.append(step) or "state"
  whole._go_back(300, spike - 3, 9.0, None)
  assert whole.config.skip_batches == f"7:10,303:{end}" and whole.state == "state"
  assert restored == forgotten == [300]


OTHER = dict(
    data="other", tokenizer="other", eval_fraction=0.2, mask_documents=True, steps=99, batch_size=8,
    packing="best-fit", batch_ramp="50:32", accumulate=4, seq_len=128, optimizer="palm",
    learning_rate=0.5, z_loss=1e-3, seed=1, dtype="bfloat16", remat="full",
    implementation="xla", mesh="fsdp", shard_residual=True, init="other",
    lora_rank=2, skip_batches="9:10", spike=1.0,
    log_every=3, eval_every=3, checkpoint_every=3, eval_tokens=9)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
def test_what_decides_the_weights_cannot_change_on_resume(name):
  config = TrainConfig(model=MODEL, init="models/one", lora_rank=1)
  model = dataclasses.replace(MODEL, norm_eps=1e-6)
  other = dataclasses.replace(config, **({"model": model} if name == "model" else
                                         {name: OTHER[name]}))
  if name in ("data", "tokenizer",  # They are known by what they hold.
              "steps", "accumulate", "remat", "implementation", "mesh", "shard_residual",
              "skip_batches", "spike", "log_every", "eval_every", "eval_tokens",
              "checkpoint_every"):
    assert recipe.resumed(other, config, 5) == other
  else:
    changed = "norm_eps" if name == "model" else name
    with pytest.raises(ValueError, match=f"was trained with {changed} ="):
      recipe.resumed(other, config, 5)


def test_another_run_is_not_resumed(tmp_path):
  (tmp_path / "t").write_text("text")
  config, raised = TrainConfig(model=MODEL, data=str(tmp_path / "t")), None
  try:
    train._corpus(config, data.ByteTokenizer(), {"data_fingerprint": "g"})
  except ValueError as error:
    raised = str(error)
  assert raised and "trained on other data" in raised


def test_the_papers_numbers():
  """Section 5: the z-loss; section 5.1: back about 100 steps, 200 to 500 batches left out."""
  assert TrainConfig(model=MODEL).z_loss == 1e-4
  assert (train.GO_BACK, train.SKIP) == (100, 200)
  assert TrainConfig(model=MODEL).eval_fraction == 0.1
