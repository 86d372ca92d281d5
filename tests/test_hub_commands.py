"""Models of the hub on the command line: generate, convert, fine-tune; tokenizers and adapters."""

import json

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import palm_haiku
from palm_haiku import PaLM, PaLMConfig, cli, data, hub, lora
from palm_haiku.hub import tokenizer as hub_tokenizer
from palm_haiku.recipe import TrainConfig
from tests import numpy_hub
from tests.short_runs import TEXT, run

FIELDS = numpy_hub.COHERE | dict(vocab_size=260, num_hidden_layers=2)


def call(*argv):
  return cli.main(list(map(str, argv)))


def byte_level(specials=("<s>", "</s>"), prefix=True):
  """A tokenizer.json of bytes and special tokens; a prompt begins with the first of these."""
  fields = json.loads(json.dumps(hub_tokenizer.from_bytes()._files["tokenizer.json"]))
  fields["added_tokens"] = [
      dict(id=256 + i, content=token, single_word=False, lstrip=False, rstrip=False,
           normalized=False, special=True) for i, token in enumerate(specials)]
  if prefix:
    fields["post_processor"] = dict(
        type="TemplateProcessing", pair=[], special_tokens={
            specials[0]: dict(id=specials[0], ids=[256], tokens=[specials[0]])},
        single=[dict(SpecialToken=dict(id=specials[0], type_id=0)),
                dict(Sequence=dict(id="A", type_id=0))])
  return fields


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("hub") / "model"
  numpy_hub.write(path, FIELDS, numpy_hub.tensors(FIELDS))
  (path / "tokenizer.json").write_text(json.dumps(byte_level()))
  (path / "tokenizer_config.json").write_text(json.dumps(dict(eos_token=dict(content="</s>"))))
  return path


def test_a_tokenizer_json(model):
  tokenizer = data.load_tokenizer(str(model))
  assert (tokenizer.num_tokens, tokenizer.eod) == (258, 257)
  text = "naïve 数字 🙂\n"
  np.testing.assert_array_equal(tokenizer.encode(text), list(text.encode()))
  np.testing.assert_array_equal(tokenizer.prompt(text), [256, *text.encode()])
  assert tokenizer.decode(tokenizer.prompt(text)) == text
  decoder = tokenizer.stream_decoder(tokenizer.prompt("na"))
  rest = [*"ïve 数字 🙂\n".encode()]
  assert "".join([*map(decoder.feed, rest), decoder.flush()]) == "ïve 数字 🙂\n"
  assert [decoder.feed(token) for token in "数".encode()[:2]] == ["", ""]
  assert "\ufffd" in decoder.flush() and decoder.feed(5000) == "\ufffd"
  with pytest.raises(ValueError, match="not valid UTF-8"):
    tokenizer.encode(b"\xff")


@pytest.mark.parametrize("fields, message", [
    (dict(), "no tokenizer at"), ({"tokenizer.json": "["}, "is not JSON"),
    ({"tokenizer.json": '{"model": 3}'}, "is no tokenizer.json"),
    ({"tokenizer.json": json.dumps(byte_level(("<a>", "<b>")))}, "names no token that ends")])
def test_tokenizers_that_are_refused(fields, message, tmp_path):
  for name, text in fields.items():
    (tmp_path / name).write_text(text)
  with pytest.raises(hub.HubError, match=message):
    data.load_tokenizer(str(tmp_path))


def test_generate_takes_a_directory_of_the_hub(model, capsys):
  assert call("generate", model, "--prompt", "ab", "--length", 5, "--temperature", 0) == 0
  config, params, tokenizer = palm_haiku.load_run(model)
  arrays, tokens = numpy_hub.tensors(FIELDS), [256, *b"ab"]
  for _ in range(5):
    tokens.append(int(numpy_hub.logits(FIELDS, arrays, np.array(tokens))[-1].argmax()))
  assert capsys.readouterr().out == tokenizer.decode(tokens) + "\n"


def test_what_a_directory_lacks_is_one_line(model, tmp_path, capsys):
  bare = tmp_path / "bare"
  numpy_hub.write(bare, FIELDS, numpy_hub.tensors(FIELDS))
  assert call("generate", bare, "--prompt", "ab") == 2
  assert capsys.readouterr().err == (f"palm-haiku generate: error: {bare} has no tokenizer.json; "
                                     "name its tokenizer with --tokenizer\n")
  small = FIELDS | dict(vocab_size=250)
  numpy_hub.write(tmp_path / "small", small, numpy_hub.tensors(small))
  assert call("generate", tmp_path / "small", "--tokenizer", model / "tokenizer.json") == 2
  assert "258 tokens, the model only 250" in capsys.readouterr().err
  assert call("train", "--init", model, "--dim", 8, "--out", tmp_path / "x") == 2
  assert "--init brings its own model; leave out --dim" in capsys.readouterr().err
  assert call("train", "--lora-rank", 2, "--out", tmp_path / "x") == 2
  assert "name it with init" in capsys.readouterr().err


@pytest.mark.full
def test_fine_tuning_starts_where_evaluation_says_and_resumes(model, tmp_path, monkeypatch):
  """From a model of the hub: all parameters, then adapters alone; converted back and forth."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "t.txt").write_text(TEXT)
  assert call("convert", "--from", "hub", model, "--out", "imported") == 0
  config, params, tokenizer = palm_haiku.load_run("imported")
  loaded = hub.load(model)
  assert config == loaded[0] and tokenizer.eod == 257
  jax.tree.map(np.testing.assert_array_equal, dict(params), dict(loaded[1]))

  options = dict(data="t.txt", steps=6, batch_size=4, seq_len=16, eval_every=3, log_every=1,
                 learning_rate=1e-3)
  # By the optimizer whose steps are the same program, however many there are.
  adapters = dict(lora_rank=2, optimizer="palm", learning_rate=0.03)
  corpus = data.load_corpus("t.txt", tokenizer, 0.1)
  model_fn = hk.without_apply_rng(hk.transform(lambda t: PaLM.from_config(config)(t)))

  def held_out(params):
    logits = jax.jit(model_fn.apply)(params, corpus.eval[None, :17].astype(np.int32))[0]
    return float(-jnp.mean(jax.nn.log_softmax(logits)[:-1][jnp.arange(16), corpus.eval[1:17]]))

  for name, init, more in (("tuned", "imported", {}),
                           ("adapted", str(model), adapters)):
    settings = TrainConfig(model=config, tokenizer=str(model), init=init, **options | more)
    run(settings, name)
    rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
    batch = data.windows(corpus.train, seq_len=16, seed=0)
    first = np.stack([batch[i]["tokens"] for i in range(4)])
    logits = jax.jit(model_fn.apply)(params, first[:, :-1])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), first[:, 1:, None], -1).mean()
    assert rows[0]["loss"] == pytest.approx(float(nll), rel=1e-5)
    assert rows[-1]["eval_loss"] < rows[2]["eval_loss"]

  _, adapted, _ = palm_haiku.load_run("adapted")
  changed = {name for name, x in adapted["palm/layers/parallel_block"].items()
             if np.any(x != params["palm/layers/parallel_block"][name])}
  assert changed == set(lora.IN_DIMS)
  np.testing.assert_array_equal(adapted["palm"]["embedding"], params["palm"]["embedding"])
  assert held_out(adapted) != held_out(params)
  settings = TrainConfig(model=config, tokenizer=str(model), init=str(model),
                         **options | adapters | dict(steps=8))
  assert "resuming from step 6" in run(settings, "adapted", resume=True)[1]
  assert call("convert", "--to", "hub", "adapted", "--out", "out") == 0
  again, written, out_tokenizer = palm_haiku.load_run("out")
  assert again == config and out_tokenizer.eod == 257
  merged = palm_haiku.load_run("adapted")[1]
  jax.tree.map(np.testing.assert_array_equal, dict(written), dict(merged))


@pytest.mark.parametrize("changes", [
    dict(kv_heads=2, window=5, global_every=2), pytest.param(dict(), marks=pytest.mark.full)],
    ids=str)
def test_adapters_begin_as_nothing_and_merge(changes):
  config = PaLMConfig(61, 64, 3, 4, 16, **changes)
  tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
  build = lambda rank: hk.without_apply_rng(hk.transform(
      lambda t: PaLM.from_config(config, lora_rank=rank)(t)))
  with_adapters, plain = build(2), build(0)
  params = jax.jit(with_adapters.init)(jax.random.key(0), tokens)
  trained, frozen = lora.split(params)
  apply = jax.jit(with_adapters.apply)
  np.testing.assert_array_equal(apply(params, tokens), jax.jit(plain.apply)(frozen, tokens))
  nudged = lora.join(jax.tree.map(lambda x: x + 0.05, trained), frozen)
  got, merged = apply(nudged, tokens), jax.jit(plain.apply)(lora.merge(nudged), tokens)
  np.testing.assert_allclose(got, merged, atol=1e-5 * np.abs(merged).max())
  assert np.abs(got - apply(params, tokens)).max() > 0.1
  large = jax.eval_shape(lambda: hk.transform(lambda t: PaLM.from_config(
      palm_haiku.configs["tiny-aya"], lora_rank=8)(t)).init(jax.random.key(0), tokens))
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert size(lora.split(large)[0]) < 0.02 * size(large)


def test_a_byte_model_is_saved_with_a_tokenizer_of_the_same_ids(tmp_path):
  config = PaLMConfig(256, 16, 1, 2, 8)
  params = jax.jit(hk.transform(lambda t: PaLM.from_config(config)(t)).init)(
      jax.random.key(0), jnp.zeros((1, 4), int))
  hub.save(tmp_path / "out", config, params, data.ByteTokenizer())
  again = data.load_tokenizer(str(tmp_path / "out"))
  text = "naïve 数字 🙂\n\t "
  np.testing.assert_array_equal(again.encode(text), data.ByteTokenizer().encode(text))
  assert again.eod == 0 and again.decode(again.encode(text)) == text
  assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 0


def test_adapters_are_drawn_in_one_order(monkeypatch):
  """Whatever the hash seed of a process: each draws the next key of the run's seed."""
  names = []
  monkeypatch.setattr(lora.hk, "get_parameter", lambda name, shape, init: (
      names.append(name), jnp.zeros(shape))[1])
  shapes = {name: (2,) * (1 + dims) for name, dims in lora.IN_DIMS.items()}
  lora.adapted({name: jnp.zeros(shapes[name]) for name in sorted(shapes)}, 1, ())
  assert names == [f"{name}_lora_{side}" for name in lora.IN_DIMS for side in "ab"]
