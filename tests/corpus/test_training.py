"""Training on tokenised corpora and mixtures: what is read, when, and what is refused."""

import dataclasses
import json
from fractions import Fraction

import numpy as np
import pytest

from palm_haiku import cli, data, prefetch, runlog
from palm_haiku.config import PaLMConfig
from palm_haiku.corpus import build, mixture, shards, verify
from palm_haiku.recipe import TrainConfig
from palm_haiku.train import train
from tests.short_runs import TEXT, run
from tests.test_data import pieces as pieces  # a fixture

BYTES = data.ByteTokenizer()
CONFIG = TrainConfig(PaLMConfig(128, 16, 1, 2, 8), steps=6, batch_size=4, seq_len=32, log_every=1,
                     eval_every=3, checkpoint_every=3, optimizer="palm")


def tokenise(path, out, tokenizer="bytes", **settings):
  build.build(build.Settings((str(path),), **{"unit_bytes": 2000} | settings), str(tokenizer), out)
  return str(out)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
  """Two directories of shards, and the lines that they were made of."""
  folder = tmp_path_factory.mktemp("corpora")
  texts = [TEXT[k: k + 200] for k in range(0, len(TEXT), 200)]
  for name, part in (("a", texts[:40]), ("b", [text.upper() for text in texts[40:]])):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in part))
    tokenise(folder / f"{name}.jsonl", folder / name, held_out=0.2)
  return folder


def rows(out):
  return {row["step"]: (row["loss"], row.get("eval_loss"))
          for row in runlog.read_metrics(out / "metrics.jsonl")}


def test_shards_give_the_sequences_of_an_array(corpora):
  tokens = shards.open_tokens(corpora / "a")
  read, held = (data.windows(source, seq_len=16, seed=3, eod=0) for source in (tokens, tokens[:]))
  assert len(tokens.shards) > 2
  for k in range(0, 3 * len(tokens) // 16, 7):
    for name in ("tokens", "segment_ids"):
      np.testing.assert_array_equal(read[k][name], held[k][name])


@pytest.mark.full
def test_a_run_on_shards_is_that_on_their_tokens(corpora, tmp_path, monkeypatch):
  config = dataclasses.replace(CONFIG, data=str(corpora / "a"), mask_documents=True)
  run(config, tmp_path / "shards")
  text = bytes(shards.open_tokens(corpora / "a")[:-1])
  held = bytes(shards.open_tokens(corpora / "a", "held_out")[:])
  want = data.Corpus("", np.frombuffer(text + b"\0", np.uint8), np.frombuffer(held, np.uint8), 0,
                     1.0, 1.0, "", False, 127)
  monkeypatch.setattr(data, "load_corpus", lambda *_: want)
  run(config, tmp_path / "memory")
  assert rows(tmp_path / "shards") == rows(tmp_path / "memory")
  assert len(rows(tmp_path / "shards")) == 6
  row = runlog.read_metrics(tmp_path / "shards" / "metrics.jsonl")[-1]
  assert 0 <= row["data_wait"] <= 1


@pytest.mark.full
def test_a_mixture_goes_on_where_it_stopped(corpora, tmp_path):
  source = f"{corpora / 'a'}:0.7,{corpora / 'b'}:0.3"
  config = dataclasses.replace(CONFIG, data=source)
  run(config, tmp_path / "whole")
  run(dataclasses.replace(config, steps=3), tmp_path / "parts")
  moved = corpora.rename(corpora.with_name("moved"))
  try:
    with pytest.raises(ValueError, match="if the data have moved, name their place with --data"):
      run(config, tmp_path / "parts", resume=True)
    for other in (f"{moved / 'a'}:0.6,{moved / 'b'}:0.4", f"{moved / 'b'}:0.7,{moved / 'a'}:0.3",
                  str(moved / "a")):
      with pytest.raises(ValueError, match="was trained on other data"):
        run(dataclasses.replace(config, data=other), tmp_path / "parts", resume=True)
    there = f"{moved / 'a'}:7,{moved / 'b'}:3"
    run(dataclasses.replace(config, data=there), tmp_path / "parts", resume=True)
  finally:
    moved.rename(corpora)
  assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


@pytest.mark.parametrize("proportions", [[1], [7, 3], [1, 1, 1], [997, 2, 1], [3, 1, 5, 7]])
def test_shares_are_exact_and_even(proportions):
  total = sum(proportions)
  seen = [0] * len(proportions)
  for k in range(3 * total):
    number, place = mixture.turn(k, proportions)
    assert place == seen[number]  # each sequence's own, one after the other
    seen[number] += 1
    for share, count in zip(proportions, seen):
      assert abs(count - share * (k + 1) / total) <= len(proportions)
    if (k + 1) % total == 0:
      assert seen == [share * (k + 1) // total for share in proportions]
  far = 10**15 * total
  number, place = mixture.turn(far, proportions)
  assert place == 10**15 * proportions[number]


def test_a_mixtures_epochs_have_every_window_once(corpora):
  whole = mixture.load(f"{corpora / 'a'}:0.7,{corpora / 'b'}:0.3", BYTES, 0.1)
  windows = whole.windows(seq_len=16, seed=0)
  counts = [(len(corpus.train) - 1) // 16 for corpus, _ in whole.parts]
  seen = [[], []]
  for k in range(2 * sum(counts)):
    number, _ = mixture.turn(k, [7, 3])
    seen[number].append(bytes(windows[k]["tokens"].astype(np.uint8)))
  for (corpus, _), count, got in zip(whole.parts, counts, seen):
    alone = data.windows(corpus.train, seq_len=16, seed=0)
    assert len(got) >= count
    assert got == [bytes(alone[k]["tokens"].astype(np.uint8)) for k in range(len(got))]
  # 1,000 batches of 16 are right to 1%.
  share = sum(mixture.turn(k, [7, 3])[0] for k in range(16_000)) / 16_000
  assert share == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("source, want", [
    ("pydoc", [("pydoc", 1)]), ("a:0.7,b:0.3", [("a", Fraction(7, 10)), ("b", Fraction(3, 10))]),
    ("a:1, b:1,c:2", [("a", Fraction(1, 4)), ("b", Fraction(1, 4)), ("c", Fraction(1, 2))]),
    ("a:1/3,x:y:2/3", [("a", Fraction(1, 3)), ("x:y", Fraction(2, 3))]), ("a,b", [("a,b", 1)]),
    ("c:*.txt", [("c:*.txt", 1)])])
def test_mixtures_are_read(source, want):
  assert mixture.parse(source) == want


@pytest.mark.parametrize("source, message", [
    ("a:0,b:1", "the weight of a must be positive and finite; got 0"),
    ("a:1,b:-0.5", "the weight of b must be positive and finite; got -0.5"),
    ("a:nan,b:1", "the weight of a must"), ("a:1/0,b:1", "the weight of a must"),
    ("a:0.5,b", "a mixture is written SOURCE:WEIGHT"), ("a:1,b:", "a mixture is written")])
def test_bad_mixtures_are_named(source, message):
  with pytest.raises(ValueError, match=message):
    mixture.parse(source)


def test_what_is_held_out_is_a_mean_by_share(corpora):
  whole = mixture.load(f"{corpora / 'a'}:3,{corpora / 'b'}:1", BYTES, 0.1, 50)
  assert [len(corpus.eval) for corpus, _ in whole.held_out] == [50, 50]
  sizes = {id(corpus): size for (corpus, _), size in zip(whole.parts, (1.0, 5.0))}
  assert whole.mean_held_out(lambda corpus: sizes[id(corpus)]) == 2.0
  only = mixture.Mixture(((whole.parts[0][0], Fraction(3, 4)), (
      dataclasses.replace(whole.parts[1][0], eval=np.zeros(0)), Fraction(1, 4))))
  assert only.mean_held_out(lambda corpus: sizes.get(id(corpus), 0)) == 1.0


def test_bytes_per_token_of_what_is_evaluated(tmp_path, pieces):
  (tmp_path / "t.jsonl").write_text("".join(
      json.dumps({"text": "the dog sat " * (1 + k % 5)}) + "\n" for k in range(40)))
  out = tokenise(tmp_path / "t.jsonl", tmp_path / "out", pieces, held_out=0.5, unit_bytes=300)
  tokenizer = data.load_tokenizer(pieces)
  held = shards.open_tokens(out, "held_out")
  texts = [held.document(k) for k in range(len(held.lengths()))]
  count = sum(map(len, texts[:4]))
  got = data.load_corpus(out, tokenizer, 0.1, count)
  want = sum(len(tokenizer.decode(text[:-1])) + 1 for text in texts[:4])  # the last space is lost
  assert got.eval_bytes_per_token * count == pytest.approx(want, rel=0.05)
  assert data.load_corpus(out, tokenizer, 0.1).eval_bytes_per_token == pytest.approx(
      shards.read_index(out)["totals"]["held_out"]["bytes"] / len(held))


def test_bad_corpora_are_one_line_before_a_run_begins(corpora, tmp_path, pieces, capsys):
  def error(*options, source=None):
    status = cli.main(["train", f"--data={source}", f"--out={tmp_path / 'run'}", "--dim=16",
                       "--depth=1", "--heads=2", "--dim-head=8", "--steps=1", *options])
    line = capsys.readouterr().err
    assert status in (1, 2) and line.count("\n") == 1 and not (tmp_path / "run").exists()
    return line

  out = tokenise(corpora / "a.jsonl", tmp_path / "out")
  assert "was tokenised with another tokenizer" in error(f"--tokenizer={pieces}", source=out)
  assert "weight of" in error(source=f"{out}:0,pydoc:1")
  path = tmp_path / "out" / "train-00001.npy"
  content = bytearray(path.read_bytes())
  path.write_bytes(content[:200] + b"!" + content[201:])
  assert f"{path} is damaged: its sha256 is" in error(source=out)
  path.unlink()
  assert f"{path} is missing" in error(source=out)
  (tmp_path / "out" / "index.json").unlink()
  (tmp_path / "out" / "unfinished").mkdir()
  assert "is not whole" in error(source=out)


@pytest.mark.full
def test_a_corpus_brings_its_tokenizer(tmp_path, pieces, capsys):
  (tmp_path / "t").write_text("the dog sat on the fox. " * 100)
  out = tokenise(tmp_path / "t", tmp_path / "out", pieces, held_out=0)
  assert cli.main(["train", f"--data={out}", f"--out={tmp_path / 'run'}", "--dim=16", "--depth=1",
                   "--heads=2", "--dim-head=8", "--steps=2", "--seq-len=16", "--batch-size=2"]) == 0
  assert json.loads((tmp_path / "run" / "config.json").read_text())["tokenizer"] == str(
      tmp_path / "out" / "tokenizer.model")
  assert (tmp_path / "run" / "tokenizer.model").read_bytes() == (
      tmp_path / "out" / "tokenizer.model").read_bytes()


def test_damage_is_noticed_beside_a_run_on_much(corpora, tmp_path, monkeypatch):
  monkeypatch.setattr(verify, "_BEFORE", 0)
  out = tokenise(corpora / "a.jsonl", tmp_path / "out")
  path = tmp_path / "out" / "train-00001.npy"
  path.write_bytes(path.read_bytes()[:-1] + b"!")
  config = dataclasses.replace(CONFIG, data=out, steps=10**6, eval_every=10**6)
  with pytest.raises(shards.DataError, match="train-00001.npy is damaged"):
    train(config, tmp_path / "run")


def test_batches_are_read_ahead_until_the_last():
  read = []
  with prefetch.Prefetch(lambda step: read.append(step) or step, 6) as batches:
    assert batches(0) == 0 and batches(1) == 1
    batches.forget()
    assert [batches(step) for step in (4, 5)] == [4, 5] and batches.waited > 0
  assert set(read) <= {0, 1, 2, 3, 4, 5} and {4, 5} <= set(read)

  def fail(step):
    raise OSError("gone")

  with prefetch.Prefetch(fail, 6) as batches, pytest.raises(OSError, match="gone"):
    batches(0)
