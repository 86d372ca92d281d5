import json

import haiku as hk
import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from palm_haiku import PaLM, PaLMConfig, cli, data, hub, runlog
from palm_haiku.evaluate import Text, evaluate, num_batches, num_windows, prepare
from palm_haiku.evaluate.command import held_out
from palm_haiku.recipe import TrainConfig
from tests import numpy_palm
from tests.short_runs import TEXT, run

SIZES = dict(num_tokens=32, dim=16, depth=2, heads=2, dim_head=8, ff_mult=2)
TOKENS = np.random.default_rng(0).integers(0, 32, 27).astype(np.uint8)


def model(config, scale=1.0):
  """Random parameters, of losses that are far from uniform."""
  init = hk.transform(lambda: PaLM.from_config(config)(np.zeros(1, np.int32))).init
  return jax.tree.map(lambda x: scale * x, jax.jit(init)(jax.random.key(1)))


def losses(params, config, seq_len, stride):
  """The right `Evaluation.nats` and `.tokens`, token by token in float64."""
  nats, count = np.zeros(seq_len), np.zeros(seq_len, int)
  counted, start = 0, 0
  while counted < len(TOKENS) - 1:
    window = TOKENS[start: start + seq_len + 1]
    logits = numpy_palm.palm(params, window[:-1], config)
    for position in range(counted - start, len(window) - 1):
      nats[position] -= np.log(numpy_palm.softmax(logits[position]))[window[position + 1]]
      count[position] += 1
    counted, start = start + len(window) - 1, start + stride
  return nats, count


@settings(max_examples=50)
@given(st.integers(2, 60), st.data())
def test_every_token_is_counted_once(num_tokens, draw):
  seq_len = draw.draw(st.integers(1, num_tokens - 1))
  stride = draw.draw(st.integers(1, seq_len))
  batch_tokens = draw.draw(st.integers(1, 100))
  batch_size = min(num_windows(num_tokens, seq_len, stride), max(1, batch_tokens // seq_len))
  batches = list(data.eval_batches(
      np.arange(num_tokens), batch_size=batch_size, seq_len=seq_len, stride=stride))
  assert len(batches) == num_batches(num_tokens, seq_len, stride, batch_tokens)
  tokens, weights = (np.concatenate([batch[name] for batch in batches])
                     for name in ("tokens", "weights"))
  assert set(np.unique(weights)) <= {0, 1}
  row, position = np.nonzero(weights)
  targets = tokens[row, position + 1]
  np.testing.assert_array_equal(np.sort(targets), np.arange(1, num_tokens))
  # From as many tokens as the length and the stride leave, and from those before it.
  assert (position >= np.where(targets > seq_len, seq_len - stride, targets - 1)).all()
  np.testing.assert_array_equal(tokens[row, position], targets - 1)
  assert weights.any(1).sum() == num_windows(num_tokens, seq_len, stride)


@pytest.mark.parametrize("position, seq_len, stride", [
    ("rotary", 8, 8), ("alibi", 8, 3), pytest.param("alibi", 26, 26, marks=pytest.mark.full),
    pytest.param("rotary", 5, 1, marks=pytest.mark.full)])
def test_losses_against_float64(position, seq_len, stride):
  config = PaLMConfig(**SIZES, position=position, shared_kv=position == "alibi")
  params = model(config, 1.5)
  nats, count = losses(params, config, seq_len, stride)
  one = evaluate(prepare(params, config), config, Text("", TOKENS, 2.0), seq_len=seq_len,
                 stride=stride, batch_tokens=2 * seq_len)
  np.testing.assert_allclose(one.nats, nats, rtol=1e-5)
  np.testing.assert_array_equal(one.tokens, count)
  assert one.nats_per_token == pytest.approx(nats.sum() / 26, rel=1e-5)
  assert one.bits_per_byte == pytest.approx(one.nats_per_token / np.log(2) / 2)
  for per_octave in (1, 4):
    rows = one.by_position(per_octave)
    assert sum(row["tokens"] for row in rows) == 26 and rows[-1]["last"] == seq_len
    assert all(a["last"] < b["first"] for a, b in zip(rows, rows[1:]))
    total = sum(row["tokens"] * row["nats_per_token"] for row in rows)
    assert total / 26 == pytest.approx(one.nats_per_token)


@pytest.mark.full
def test_int8_against_float64():
  config = PaLMConfig(**SIZES)
  params = model(config, 1.5)
  weights = prepare(params, config, "int8")
  plain = lambda matrix: np.asarray(matrix.values * matrix.scales)
  layers = {name: np.asarray(x) for name, x in params["palm/layers/parallel_block"].items()}
  for i, layer in enumerate(weights.layers):
    query, key, value, gate, up = np.split(plain(layer.into[0]), [16, 24, 32, 64], 1)
    for name, x in dict(query=query, key=key, value=value, gate=gate, up=up,
                        attn_out=plain(layer.out[0])[:16], ff_out=plain(layer.out[0])[16:]).items():
      layers[name] = np.array(layers[name])
      layers[name][i] = x.reshape(layers[name][i].shape)
  rounded = {"palm": params["palm"] | {"embedding": plain(weights.embedding).T},
             "palm/layers/parallel_block": layers}
  nats, _ = losses(rounded, config, 8, 3)
  one = evaluate(weights, config, Text("", TOKENS, 1.0), seq_len=8, stride=3)
  np.testing.assert_allclose(one.nats, nats, rtol=1e-5)
  assert abs(losses(params, config, 8, 3)[0] / nats - 1).max() > 1e-4  # and they are rounded
  in_bfloat16 = evaluate(weights, config, Text("", TOKENS, 1.0), seq_len=8, dtype="bfloat16")
  assert in_bfloat16.nats_per_token == pytest.approx(nats.sum() / 26, rel=0.1)


@pytest.mark.full
def test_documents_apart():
  config = PaLMConfig(**SIZES)
  params = model(config)
  text = Text("", np.where(np.arange(27) % 9 == 8, 0, TOKENS), 1.0)
  apart = text._replace(eod=0)
  nats = {}
  for weights in (None, "int8"):
    prepared = prepare(params, config, weights)
    nats[weights] = [evaluate(prepared, config, one, seq_len=13).nats_per_token
                     for one in (text, apart)]
    assert abs(nats[weights][0] - nats[weights][1]) > 1e-3
  np.testing.assert_allclose(nats["int8"], nats[None], rtol=2e-2)


@pytest.mark.parametrize("options, message", [
    (dict(seq_len=27), "27 tokens, fewer than one sequence of seq_len \\+ 1 = 28"),
    (dict(seq_len=0), "seq_len must be at least 1"),
    (dict(seq_len=8, stride=9), "stride must be from 1 to seq_len = 8; got 9"),
    (dict(seq_len=8, stride=0), "stride must be from 1"),
    (dict(seq_len=8, batch_tokens=0), "batch_tokens must be at least 1")])
def test_what_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    evaluate({}, PaLMConfig(**SIZES), Text("", TOKENS, 1.0), **options)


@pytest.mark.full
def test_a_loss_that_is_not_finite_is_an_error():
  config = PaLMConfig(**SIZES)
  with pytest.raises(FloatingPointError, match="the loss at length 8 is not finite"):
    evaluate(prepare(model(config, np.inf), config), config, Text("", TOKENS, 1.0), seq_len=8)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Directories of a rotary and an ALiBi model, trained at 16 tokens with documents apart."""
  folder = tmp_path_factory.mktemp("runs")
  for name, text in (("a", TEXT[:3000]), ("b", TEXT[3000:6000])):
    (folder / name).write_text(text)
  for position, dtype in (("rotary", "float32"), ("alibi", "bfloat16")):
    sizes = SIZES | {"num_tokens": 256, "depth": 1}
    run(TrainConfig(model=PaLMConfig(**sizes, position=position), data=str(folder / "[ab]"),
                    eval_fraction=0.6, steps=2, batch_size=3, seq_len=16, dtype=dtype,
                    mask_documents=True), folder / position)
  return folder


def call(capsys, *argv):
  """Exit status, standard output and standard error of a command."""
  status = cli.main([str(arg) for arg in argv])
  captured = capsys.readouterr()
  return status, captured.out, captured.err


@pytest.mark.full
def test_eval_of_runs(runs, capsys, tmp_path):
  picture = tmp_path / "losses.png"
  status, out, err = call(capsys, "eval", runs / "rotary", runs / "alibi", "--seq-len", "16,64",
                          "--json", "--plot", picture)
  assert status == 0 and picture.read_bytes()[:4] == b"\x89PNG"
  fields = json.loads(out)
  assert {"jax", "jaxlib"} <= fields["versions"].keys()
  for number, name in enumerate(("rotary", "alibi")):
    short, long = fields["results"][2 * number: 2 * number + 2]
    metrics = runlog.read_metrics(runs / name / runlog.METRICS)
    # Training's own figure, of the run's dtype and with documents apart.
    assert short["nats_per_token"] == pytest.approx(metrics[-1]["eval_loss"], rel=1e-6)
    assert short["trained_seq_len"] == 16 and short["position"] == name
    assert short["tokens"] == long["tokens"] == 3600  # of 6,000 bytes, an end between documents
    assert long["positions"][-1]["last"] == long["seq_len"] == 64
    assert long["nats_per_token"] != short["nats_per_token"]


@pytest.mark.full
def test_eval_of_the_hub_and_of_other_text(runs, capsys, tmp_path):
  (tmp_path / "text").write_text(TEXT[6000:7001])
  hub.save(tmp_path / "hub", *cli._pretrained(runs / "rotary")[:3])
  options = ["--data", tmp_path / "text", "--seq-len", 32, "--stride", 8]
  status, out, _ = call(capsys, "eval", tmp_path / "hub", *options, "--weights", "int8")
  assert status == 0
  cells = out.splitlines()[1].split()
  assert cells[-5:-2] == ["32", "8", "1,000"]  # all of the text, for no run held any of it out
  # Of other text than its own a run has held nothing out, either.
  status, out, _ = call(capsys, "eval", runs / "rotary", *options)
  assert status == 0 and "1,000" in out and "17 to 32" in out
  assert call(capsys, "eval", tmp_path / "hub")[::2] == (
      2, f"palm-haiku eval: error: {tmp_path / 'hub'} does not say what it was trained on; name a "
      "text with --data\n")


def test_the_text_of_a_run_on_a_mixture(tmp_path):
  for name in "ab":
    (tmp_path / name).write_text(f"text {name} " * 20)
  a, b = (str(tmp_path / name) for name in "ab")
  settings = TrainConfig(model=PaLMConfig(**SIZES | {"num_tokens": 256}), data=f"{a}:1,{b}:3",
                         eval_fraction=0.25)
  tokenizer = data.ByteTokenizer()
  with pytest.raises(ValueError, match="trained on a mixture; name one of its sources .*: .*a, "):
    held_out(tmp_path, (settings, "x"), None, tokenizer)
  assert len(held_out(tmp_path, (settings, "x"), b, tokenizer).tokens) == 35
  (tmp_path / "c").write_text("other text")
  assert len(held_out(tmp_path, (settings, "x"), str(tmp_path / "c"), tokenizer).tokens) == 10


@pytest.mark.full
def test_beyond_its_length_a_rotary_model_is_warned_of_once(runs, capsys):
  for name, times in (("rotary", 1), ("alibi", 0)):
    status, _, err = call(capsys, "generate", runs / name, "--prompt", "1", "--length", 20)
    assert status == 0
    assert err.count("the model was trained at 16 tokens and 20 are asked for") == times
    assert err.count("warning") == times
    status, _, err = call(capsys, "eval", runs / name, "--seq-len", "16,64,32")
    assert status == 0 and err.count("trained at 16 tokens and 64 are asked for") == times
    assert err.count("warning") == times


def imported(path, num_tokens):
  """The directory of a peer's weights, converted without a tokenizer."""
  from palm_haiku import array_files, interop
  config = PaLMConfig(**SIZES | {"num_tokens": num_tokens}, logits_scale=1.0)
  array_files.write_arrays(path / "peer.npz", interop.dump("palm-flax", config, model(config)))
  assert cli.main(["convert", "--from", "palm-flax", str(path / "peer.npz"), "--out",
                   str(path / "peer")]) == 0
  return path / "peer"


@pytest.mark.full
def test_eval_of_a_peer(capsys, tmp_path):
  (tmp_path / "text").write_text(TEXT[:100])
  path = imported(tmp_path, 300)
  status, _, err = call(capsys, "eval", path, "--data", tmp_path / "text", "--seq-len", 8)
  assert status == 2 and "was converted without a tokenizer, and its 300 tokens are no bytes" in err
  status, out, _ = call(capsys, "eval", path, "--data", tmp_path / "text", "--seq-len", 8,
                        "--tokenizer", "bytes")
  assert status == 0 and " 99 " in out
  status, _, err = call(capsys, "eval", tmp_path / "peer.npz", "--data", tmp_path / "text")
  assert status == 2 and err.count("\n") == 1 and "palm-haiku convert --from PEER" in err


@pytest.mark.full
@pytest.mark.parametrize("options, message", [
    (["--seq-len", "16,x"], "--seq-len must be positive numbers such as 256,512; got '16,x'"),
    (["--seq-len", "5000"], "the text has 3601 tokens, fewer than one sequence of seq_len + 1 = "
     "5001; name another --seq-len or --data"),
    (["--stride", "17"], "stride must be from 1 to seq_len = 16; got 17"),
    (["--batch-tokens", "0"], "batch_tokens must be at least 1; got 0"),
    (["--data", "nothing"], "nothing"), (["--plot", "nowhere/x.png"], "there is no directory"),
    (["--implementation", "cuda"], "cuda")])
def test_bad_input_of_eval_is_one_line(options, message, runs, capsys):
  status, out, err = call(capsys, "eval", runs / "rotary", *options)
  assert status == 2 and not out and err.count("\n") == 1 and message in err
