"""Scores in lm-evaluation-harness, beside float64 computations of the same from the text alone."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from palm_haiku import PaLMConfig, data
from palm_haiku.recipe import TrainConfig
from palm_haiku.rundir import RunDirectory
from palm_haiku.train_step import init
from tests import numpy_palm

pytestmark = pytest.mark.full
pytest.importorskip("lm_eval", reason="pip install 'palm-haiku[lm-eval]'")

LENGTH = 24
CONFIG = PaLMConfig(num_tokens=256, dim=16, depth=2, heads=2, dim_head=8, ff_mult=2)

CHOICES = [dict(query=query, choices=choices, gold=1) for query, choices in (
    ("2 times 3 is", ["five", "six", "6.5"]), ("a", ["b", "cde"]),
    ("the context of this one is much longer than what it can read", ["x", "long"]))]
TEXTS = [dict(text="short"), dict(text="to be or not to be, " * 4), dict(text="x" * LENGTH)]
PROMPTS = [dict(query="ab"), dict(query="a longer prompt than the model can take"),
           dict(query="abc")]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
KINDS = {
    "choose": (CHOICES, """
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
"""),
    "roll": (TEXTS, """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""),
    "continue": (PROMPTS, """
output_type: generate_until
doc_to_text: "{{query}}"
doc_to_target: "x"
generation_kwargs: {max_gen_toks: 6, until: ["\\n\\n"], do_sample: false}
metric_list: [{metric: exact_match}]
"""),
}


def imported(path, config, seed=0):
  """A run's directory with random weights that were trained at LENGTH, so to say."""
  settings = TrainConfig(model=config, seq_len=LENGTH, seed=seed)
  params = jax.tree.map(lambda x: 1.5 * x, init(settings).params)
  RunDirectory(path).checkpoints.save(1, {"params": params}, {
      "config": dataclasses.asdict(settings), "data_fingerprint": "x",
      "tokenizer_fingerprint": "bytes", "step": 1})
  return params


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("harness")
  params = imported(folder / "run", CONFIG)
  for name, (docs, rest) in KINDS.items():
    file = folder / f"{name}.json"
    file.write_text("\n".join(map(json.dumps, docs)))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file) + rest)
  return folder, params


def logp(params, context, continuation):
  """Log-probabilities of the tokens of a continuation, and whether each is the likeliest."""
  tokens = np.array([*context, *continuation])[-(LENGTH + 1):]
  logits = numpy_palm.palm(params, tokens[:-1], CONFIG)[-len(continuation):]
  probabilities = numpy_palm.softmax(logits)
  targets = tokens[-len(continuation):]
  return (np.log(probabilities[np.arange(len(targets)), targets]),
          bool((logits.argmax(-1) == targets).all()))


@pytest.fixture(scope="module")
def results(run):
  import datasets  # pyright: ignore[reportMissingImports]
  import lm_eval  # pyright: ignore[reportMissingImports]
  from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

  from palm_haiku import lm_eval as module  # noqa: F401  (registers the model)
  folder, _ = run
  datasets.config.HF_DATASETS_CACHE = folder / "cache"
  return lm_eval.simple_evaluate(
      model="palm-haiku", model_args=dict(path=str(folder / "run"), batch_size=2),
      tasks=list(KINDS), task_manager=TaskManager(include_path=str(folder), include_defaults=False),
      bootstrap_iters=0, log_samples=True)


def test_multiple_choice(run, results):
  right = []
  for doc, sample in zip(CHOICES, results["samples"]["choose"]):
    want = [logp(run[1], doc["query"].encode(), b" " + choice.encode())
            for choice in doc["choices"]]
    got = [response for (response,) in sample["resps"]]
    np.testing.assert_allclose([score for score, _ in got], [x.sum() for x, _ in want], rtol=1e-5)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in want]
    right.append(np.argmax([x.sum() for x, _ in want]) == doc["gold"])
  assert results["results"]["choose"]["acc,none"] == pytest.approx(np.mean(right))


def test_rolling_perplexity(run, results):
  total = 0.0
  for doc, sample in zip(TEXTS, results["samples"]["roll"]):
    tokens, want, done = [0, *doc["text"].encode()], 0.0, 0
    while done < len(tokens) - 1:  # the last window ends with the text, and is full
      count = min(LENGTH, len(tokens) - 1 - done)
      end = done + count + 1
      want += logp(run[1], tokens[max(0, end - LENGTH - 1):end - count], tokens[end - count:end]
                   )[0].sum()
      done += count
    assert sample["resps"][0][0] == pytest.approx(want, rel=1e-5)
    total += want
  size = sum(len(doc["text"]) for doc in TEXTS)
  got = results["results"]["roll"]
  assert got["bits_per_byte,none"] == pytest.approx(-total / size / np.log(2), rel=1e-5)


def test_generation(run, results):
  for doc, sample in zip(PROMPTS, results["samples"]["continue"]):
    tokens = [*doc["query"].encode()][-(LENGTH - 6):]
    drawn = []
    while len(drawn) < 6 and 0 not in drawn:
      drawn.append(int(numpy_palm.palm(run[1], np.array(tokens + drawn), CONFIG)[-1].argmax()))
    text = data.ByteTokenizer().decode([x for x in drawn if x]).split("\n\n")[0]
    assert sample["resps"][0][0] == text


class Asked:
  def __init__(self, *args):
    self.args = args


@pytest.mark.parametrize("fields, options", [
    (dict(position="alibi", shared_kv=True), {}), (dict(window=5, global_every=2), {}),
    (dict(kv_heads=2), dict(weights="int8")), ({}, dict(dtype="bfloat16"))])
def test_shared_contexts_score_as_contexts_apart(fields, options, tmp_path):
  from palm_haiku.lm_eval import PaLMHaiku
  imported(tmp_path / "run", PaLMConfig(**{
      **dict(num_tokens=256, dim=16, depth=2, heads=2, dim_head=8, ff_mult=2), **fields}))
  model = PaLMHaiku(str(tmp_path / "run"), batch_size=3, **options)
  asked = [Asked(context, continuation) for context in ("abc def ghi", "xy", "")
           for continuation in (" one", " seven", " to be", " 2")]
  together = model.loglikelihood(asked, disable_tqdm=True)
  apart = [model.loglikelihood([one], disable_tqdm=True)[0] for one in asked]
  np.testing.assert_allclose([x for x, _ in together], [x for x, _ in apart],
                             rtol=3e-2 if options else 1e-5)
  assert model.loglikelihood([Asked("a", "")], disable_tqdm=True) == [(0.0, True)]


def test_limits_are_told_once(run, caplog, monkeypatch):
  from palm_haiku.lm_eval import PaLMHaiku
  path = str(run[0] / "run")
  model = PaLMHaiku(path)
  long = Asked("x" * 30, " y")
  model.loglikelihood([long, long, Asked("x" * 40, "z")], disable_tqdm=True)
  model.loglikelihood_rolling([Asked("two\nlines")], disable_tqdm=True)
  for _ in range(2):
    model.generate_until([Asked("x" * 30, {"max_gen_toks": 4})] * 2, disable_tqdm=True)
  assert [record.message[:41] for record in caplog.records] == [
      "palm-haiku: requests are cut to the end t", "palm-haiku: contexts are cut to the end t"]
  assert "the first from 32 to 25 tokens" in caplog.messages[0]
  assert "the first from 30 to 20 tokens" in caplog.messages[1]
  caplog.clear()
  model = PaLMHaiku(path, max_length=LENGTH + 1)
  (said,) = caplog.messages
  assert f"trained at {LENGTH} tokens and {LENGTH + 1} are asked for" in said
  monkeypatch.setattr(data.ByteTokenizer, "keeps_newlines", False)
  for _ in range(2):
    model.loglikelihood_rolling([Asked("two\nlines"), Asked("a\n\nb")], disable_tqdm=True)
  assert [text.split(":")[1] for text in caplog.messages[1:]] == [" bytes drops line breaks"]


def test_the_command(run, monkeypatch, capsys, tmp_path):
  from palm_haiku import lm_eval
  folder, _ = run

  def command(path, *more):
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "palm-haiku", "--model_args",
                                      f"path={path}", "--tasks", "choose", "--include_path",
                                      str(folder), *more])
    return lm_eval.main(), capsys.readouterr()

  status, captured = command(folder / "run", "--batch_size", "4")
  assert status == 0 and "|choose|" in captured.out
  status, captured = command(tmp_path / "nothing")
  assert status == 2
  assert captured.err.splitlines()[-1] == (
      f"palm_haiku.lm_eval: error: {tmp_path}/nothing holds no checkpoint, for there is no such "
      "directory")


def test_what_is_refused(run):
  from palm_haiku.lm_eval import PaLMHaiku
  path = str(run[0] / "run")
  with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
    PaLMHaiku(path, dtype="float64")
  with pytest.raises(ValueError, match="weights must be int8"):
    PaLMHaiku(path, weights="int4")
  with pytest.raises(ValueError, match="must be at least 1"):
    PaLMHaiku(path, batch_size=0)
  model = PaLMHaiku(path, max_length=8)
  with pytest.raises(ValueError, match="a continuation of 9 tokens is longer than .* 8"):
    model.loglikelihood([Asked("a", "123456789")])
  with pytest.raises(ValueError, match="max_gen_toks = 8 must be less than the model's length, 8"):
    model.generate_until([Asked("a", {"max_gen_toks": 8})])
