"""Packed sequences: what is in them, that nothing else counts, and that a step is right on them."""

import dataclasses
import functools
import itertools
import json
import types

import chex
import hypothesis
import jax
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from palm_haiku import data, distributed, runlog, sharding, train, train_step
from palm_haiku.config import PaLMConfig
from palm_haiku.corpus import build, mixture, packing, shards
from palm_haiku.recipe import TrainConfig
from tests.short_runs import TEXT, run

MODEL = PaLMConfig(128, 16, 1, 2, 8)
RNG = np.random.default_rng(0)
LENGTHS = [*RNG.integers(1, 12, 150), 1, 15, 16, 17, 31, 32, 33, 64, 100, *RNG.integers(1, 70, 60)]
DOCUMENTS = [RNG.integers(1, 128, length - 1) for length in LENGTHS]
STREAM = np.concatenate([[*document, 0] for document in DOCUMENTS]).astype(np.uint8)


@hypothesis.given(st.integers(1, 30).flatmap(
    lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=60))))
def test_best_fit_is_that_of_one_document_after_the_other(case):
  room, sizes = case
  rooms = []
  for size in sorted(sizes, reverse=True):
    fitting = [left for left in rooms if left >= size]
    tightest = min(fitting, default=room)
    if fitting:
      rooms.remove(tightest)
    rooms.append(tightest - size)
  counts, left = np.bincount(sizes, minlength=room + 1).astype(int), []
  for sequences, parts in packing.best_fit(counts, room):
    for size, times in parts:
      counts[size] -= sequences * times
    left += [room - sum(size * times for size, times in parts)] * sequences
  assert not counts.any() and sorted(left) == sorted(rooms)


def packed(tokens=STREAM, seed=3, mask=True, seq_len=16):
  return packing.Packed(tokens, seq_len=seq_len, seed=seed, eod=0, mask=mask)


@pytest.fixture
def many_groups(monkeypatch):
  monkeypatch.setattr(packing, "_CHUNK", 4)
  monkeypatch.setattr(packing, "_GROUP", 40)


def pieces(row):
  """Targets of a sequence, by document: those that count, and what comes before them."""
  ends = np.flatnonzero(np.diff(row["segment_ids"])) + 1
  for tokens, weights in zip(np.split(row["tokens"], ends),
                             np.split(np.append(0, row["weights"]), ends)):
    if weights.any():
      first = int(np.argmax(weights))
      assert weights[first:].all()
      yield tuple(map(int, tokens[first:])), tuple(map(int, tokens[:first]))


@pytest.mark.parametrize("seq_len", [1, 5, 16, 200])
def test_each_document_is_in_an_epoch_once_and_whole_if_it_fits(many_groups, seq_len):
  sequences, wanted = packed(seq_len=seq_len), []
  for document in DOCUMENTS:
    whole = (*map(int, document), 0)
    wanted += [(whole[k: k + seq_len], whole[k - 1: k] if k else ())
               for k in range(0, len(whole), seq_len)]
  seen = []
  for epoch in range(2):
    rows = [sequences[epoch * len(sequences) + k] for k in range(len(sequences))]
    got = [piece for row in rows for piece in pieces(row)]
    # A first piece that fills a sequence alone has the end of another document before it.
    assert sorted(got) == sorted(wanted)
    assert sum(row["weights"].sum() for row in rows) == len(STREAM)
    for row in rows:
      assert row["tokens"].shape == (seq_len + 1,) and row["weights"].shape == (seq_len,)
      assert not row["tokens"][1 + np.flatnonzero(row["weights"])[-1] + 1:].any()  # padding
    seen.append([row["tokens"].tobytes() for row in rows])
  assert seq_len == 1 or seen[0] != seen[1]
  assert sequences.padding == pytest.approx(1 - len(STREAM) / (len(rows) * seq_len))


def test_other_documents_go_together_in_the_next_epoch():
  sequences = packed(seq_len=100)
  first, second = ({sequences[epoch * len(sequences) + k]["tokens"].tobytes()
                    for k in range(len(sequences))} for epoch in range(2))
  assert len(first & second) < len(first) / 4 and 0 < sequences.padding < 0.05


def test_a_sequence_depends_on_its_number_alone(many_groups):
  one, other = packed(), packed(mask=False)
  numbers = np.random.default_rng(0).permutation(3 * len(one))[:40].tolist()
  later = {k: other[k] for k in sorted(numbers)}
  for k in numbers:
    row = one[k]
    row.pop("segment_ids")
    chex.assert_trees_all_equal(row, later[k])
  assert any((packed(seed=4)[k]["tokens"] != packed()[k]["tokens"]).any() for k in range(3))
  with pytest.raises(ValueError, match="have no tokens"):
    packed(STREAM[:0])


def test_shards_are_packed_as_their_tokens(tmp_path, monkeypatch):
  (tmp_path / "t.jsonl").write_text("".join(
      json.dumps({"text": TEXT[k * 7: k * 7 + n]}) + "\n" for k, n in enumerate(LENGTHS)))
  build.build(build.Settings((str(tmp_path / "t.jsonl"),), held_out=0, unit_bytes=2000), "bytes",
              tmp_path / "out")
  tokens = shards.open_tokens(tmp_path / "out")
  assert len(tokens.shards) > 3
  got, want = packed(tokens), packed(tokens[:])
  for k in range(2 * len(want)):
    chex.assert_trees_all_equal(got[k], want[k])
  # In several groups, whose chunks end where shards do.
  monkeypatch.setattr(packing, "_CHUNK", 4)
  monkeypatch.setattr(packing, "_GROUP", 40)
  got, want = (sorted(piece for k in range(len(sequences)) for piece in pieces(sequences[k]))
               for sequences in (packed(tokens), want))
  assert got == want
  path = tmp_path / "out" / "train-00001.documents.npy"
  content = path.read_bytes()
  for place in (128, len(content) - 16):  # where the first and the last document end
    path.write_bytes(content[:place] + b"\xff\xff" + content[place + 2:])
    with pytest.raises(shards.DataError, match="train-00001.documents.npy is damaged: its doc"):
      packed(tokens)


def batch(size=8, **options):
  sequences = packed(**options)
  # The last, of little and of much padding, after full ones.
  ranked = sorted(range(len(sequences)), key=lambda k: -sequences[k]["weights"].sum())
  rows = [sequences[k] for k in (*ranked[: size // 2], *ranked[-(size // 2):])]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def stepped(config, batch, devices=None):
  mesh = sharding.make_mesh(config.mesh, devices) if config.mesh else None
  with sharding.in_context(mesh):
    program = train_step.program(config, mesh)
    state, metrics = program.step(program.init(), {
        name: distributed.place(x, program.batch_sharding) for name, x in batch.items()})
  return {name: float(x) for name, x in metrics.items()}, jax.device_get(state.params)


@pytest.mark.full
def test_padding_counts_nowhere(monkeypatch):
  """Whatever stands there, in parts of a batch of which one has more, and over devices."""
  # Not an optimizer that divides gradients by their size, and so their rounding errors.
  monkeypatch.setattr(TrainConfig, "build_optimizer", lambda self: optax.sgd(1.0))
  train_step._program.cache_clear()
  config = TrainConfig(MODEL, seq_len=16, batch_size=8, z_loss=1e-2)
  rows = batch()
  count = rows["weights"].sum()
  assert 60 < count < 0.9 * rows["weights"].size
  metrics, params = stepped(config, rows)
  other = rows | {"tokens": rows["tokens"].copy()}
  padding = np.cumsum(rows["weights"][:, ::-1], 1)[:, ::-1] == 0
  other["tokens"][:, 1:][padding] = 77
  for change in ({}, dict(accumulate=2, mesh="data=2,model=2")):
    got, updated = stepped(dataclasses.replace(config, **change), other, jax.devices()[:4])
    assert got == pytest.approx(metrics, rel=1e-5)
    chex.assert_trees_all_close(updated, params, atol=2e-6)
  parts = [rows["weights"][k::2].sum() for k in range(2)]
  assert metrics["targets"] == count and parts[0] != parts[1]
  # The mean is that of the targets one by one.
  state = jax.jit(functools.partial(train_step.init, config))()
  nll, log_z = jax.jit(config.build_model().apply)(
      state.params, rows["tokens"][:, :-1], rows["tokens"][:, 1:], rows["segment_ids"][:, :-1])
  counts = rows["weights"] > 0
  assert metrics["loss"] == pytest.approx(float(nll[counts].mean()), rel=1e-5)
  assert metrics["log_z_squared"] == pytest.approx(float((log_z[counts] ** 2).mean()), rel=1e-5)
  train_step._program.cache_clear()


@pytest.mark.full
def test_a_run_on_a_packed_mixture(tmp_path, monkeypatch):
  for name, texts in (("a", TEXT[:4000]), ("b", TEXT[4000:].upper())):
    (tmp_path / f"{name}.jsonl").write_text("".join(
        json.dumps({"text": texts[k: k + 20 + k % 90]}) + "\n" for k in range(0, len(texts), 60)))
    build.build(build.Settings((str(tmp_path / f"{name}.jsonl"),), unit_bytes=2000), "bytes",
                tmp_path / name)
  source = f"{tmp_path / 'a'}:0.7,{tmp_path / 'b'}:0.3"
  config = TrainConfig(MODEL, data=source, steps=3, batch_size=4, seq_len=32, log_every=2,
                       optimizer="palm", packing="best-fit")
  # A second passes between two looks at the clock.
  monkeypatch.setattr(train, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
  _, text = run(config, tmp_path / "out")
  corpus = mixture.load(source, data.ByteTokenizer(), 0.1)
  sequences = corpus.windows(seq_len=32, seed=0, packing="best-fit")
  assert f"packing leaves {sequences.padding:.2%} of the targets empty" in text
  rows = runlog.read_metrics(tmp_path / "out" / "metrics.jsonl")
  counts = [sum(sequences[4 * step + k]["weights"].sum() for k in range(4)) for step in range(3)]
  assert [row.get("tokens_per_second") for row in rows] == [None, *counts[1:]]
  assert min(counts[1:]) < 4 * 32 and "targets" not in rows[-1]
