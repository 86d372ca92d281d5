import dataclasses
import functools
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from palm_haiku import (
  PaLMConfig,
  array_files,
  checkpoint,
  cli,
  configs,
  data,
  distributed,
  interrupts,
  runlog,
  train,
)
from tests import numpy_peers
from tests.short_runs import TEXT

TINY = ["--dim", "16", "--depth", "1", "--heads", "2", "--dim-head", "8", "--ff-mult", "2",
        "--seq-len", "16", "--batch-size", "2", "--steps", "3"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "text"
  path.write_text("To be, or not to be, that is the question. " * 20)
  return str(path)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
  """The directory of a finished run."""
  out = tmp_path_factory.mktemp("trained") / "out"
  assert cli.main(["train", *TINY, "--data", text, "--out", str(out)]) == 0
  return out


def call(capsys, *argv):
  """Exit status, standard output and standard error of a command."""
  try:
    status = cli.main([str(arg) for arg in argv])
  except SystemExit as exit:
    status = exit.code
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def test_help_in_a_process_of_its_own():
  done = subprocess.run([sys.executable, "-m", "palm_haiku", "--help"], capture_output=True,
                        text=True, timeout=100)
  assert done.returncode == 0
  for command in ("train", "tokenize", "data", "generate", "eval", "plan", "convert", "info"):
    assert command in done.stdout


@pytest.mark.parametrize(
    "command", ["train", "tokenize", "data", "generate", "eval", "plan", "convert", "info"])
def test_help_of_each_command(capsys, command):
  status, out, _ = call(capsys, command, "--help")
  assert status == 0 and command in out


def test_training_leaves_metrics_and_says_how_it_did(trained, text, capsys):
  rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1, 3]
  assert {"step", "loss", "eval_loss"} <= rows[-1].keys()
  # --resume needs nothing else, and goes on with the settings of the run.
  status, out, _ = call(capsys, "train", "--resume", "--out", trained)
  assert status == 0
  for name in ("train loss", "held-out loss"):
    line = next(line for line in out.splitlines() if line.startswith(name))
    assert "nats per token" in line and "bits per byte" in line
  assert f"{rows[-1]['eval_loss']:.4f} nats" in out and "loss.png" in out


@pytest.mark.full
def test_options_reach_the_run(text, tmp_path, capsys):
  out = tmp_path / "out"
  status, _, _ = call(
      capsys, "train", *TINY, "--num-tokens", 300, "--position", "alibi", "--norm", "rms",
      "--shared-kv", "--data", text, "--out", out, "--steps", 1, "--eval-fraction", 0.2,
      "--optimizer", "palm", "--learning-rate", 0.02, "--seed", 5, "--log-every", 1,
      "--eval-every", 1, "--checkpoint-every", 1, "--resume", "--implementation", "xla",
      "--dtype", "bfloat16", "--accumulate", 2, "--remat", "full", "--mask-documents",
      "--packing", "best-fit")
  assert status == 0
  config = checkpoint.Checkpoints(out / "checkpoints").metadata(1)["config"]
  want = dict(data=text, steps=1, eval_fraction=0.2, optimizer="palm", learning_rate=0.02, seed=5,
              log_every=1, eval_every=1, checkpoint_every=1, implementation="xla",
              dtype="bfloat16", accumulate=2, remat="full", mask_documents=True,
              packing="best-fit")
  assert {name: config[name] for name in want} == want
  want = dict(num_tokens=300, dim=16, position="alibi", norm="rms", shared_kv=True)
  assert {name: config["model"][name] for name in want} == want


def test_options_without_a_size_change_the_default_model(text, tmp_path, capsys, monkeypatch):
  seen = []
  monkeypatch.setattr(train, "train", lambda config, *_, **__: seen.append(config.model) or
                      train.Result(1, train.Score(1.0, 1.0), None, None))
  for options in (["--position", "alibi", "--norm", "rms", "--ff-mult", 2], ["--num-tokens", 300]):
    assert call(capsys, "train", "--data", text, "--out", tmp_path / "out", *options)[0] == 0
  assert seen == [dataclasses.replace(configs["palm-tiny"], **change) for change in (
      dict(position="alibi", norm="rms", ff_mult=2), dict(num_tokens=300))]


@pytest.mark.full
def test_the_same_command_resumes_with_pieces_and_a_named_model(tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(configs, "small", PaLMConfig(256, 16, 1, 2, 8))
  (tmp_path / "text").write_text(TEXT)
  # More pieces than the model's 256 tokens.
  sentencepiece.SentencePieceTrainer.train(
      input=str(tmp_path / "text"), model_prefix=str(tmp_path / "m"), vocab_size=300,
      byte_fallback=True, minloglevel=2)
  command = ["train", "--model", "small", "--data", tmp_path / "text", "--tokenizer",
             tmp_path / "m.model", "--seq-len", 16, "--batch-size", 2, "--steps", 1,
             "--out", tmp_path / "out"]
  assert call(capsys, *command)[0] == 0
  status, out, err = call(capsys, *command, "--resume")
  assert status == 0 and "resuming from step 1" in out, err
  command = [*command[:5], *command[7:], "--resume"]  # The tokenizer is the run's.
  assert call(capsys, *command)[0] == 0


@pytest.mark.full
def test_resuming_before_the_first_checkpoint_begins_with_the_same_settings(
    trained, text, tmp_path, capsys):
  out = shutil.copytree(trained, tmp_path / "out")
  config = json.loads((out / "config.json").read_text())
  rows = [row["loss"] for row in runlog.read_metrics(out / "metrics.jsonl")]
  for options, change in (([], {}), (["--eval-fraction", 0.2], {"eval_fraction": 0.2})):
    shutil.rmtree(out / "checkpoints")
    status, said, _ = call(capsys, "train", "--resume", "--out", out, *options)
    assert status == 0 and f"no checkpoint in {out}: beginning anew" in said
    assert json.loads((out / "config.json").read_text()) == config | change
    again = [row["loss"] for row in runlog.read_metrics(out / "metrics.jsonl")]
    assert (again == rows) == (not change)
  shutil.rmtree(out / "checkpoints")
  (out / "config.json").write_text('{"model": {}, "stepz": 3}')
  left = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
  status, _, err = call(capsys, "train", "--resume", "--out", out)
  assert status == 2 and "config.json does not hold the settings of a run" in err
  assert err.count("\n") == 1
  (out / "config.json").unlink()
  status, _, err = call(capsys, "train", "--resume", "--out", out)
  assert status == 2 and err.count("\n") == 1
  assert "the metrics of a run, but neither a checkpoint nor config.json" in err
  del left[out / "config.json"]
  assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == left


def test_sampling_from_a_directory_alone(trained, capsys):
  status, greedy, timing = call(capsys, "generate", trained, "--prompt", "To be", "--length", 20,
                                "--temperature", 0)
  assert status == 0 and greedy.startswith("To be") and "a second" in timing


@pytest.mark.full
def test_options_of_sampling(trained, capsys, monkeypatch):
  # No longer than what the model was trained at: five tokens, and one that is not read again.
  _, _, err = call(capsys, "generate", trained, "--prompt", "To be")
  assert err.startswith("12 tokens, ")
  draws = [call(capsys, "generate", trained, "--prompt", "To be", "--length", 20, "--top-p", 0.9,
                "--seed", seed)[1] for seed in (1, 1, 2)]
  assert draws[0] == draws[1] != draws[2]
  seen = {}
  monkeypatch.setattr(sys.modules["palm_haiku.generate"], "generate",
                      lambda params, config, prompt, length, **options: seen.update(
                          options, length=length))
  assert call(capsys, "generate", trained, "--length", 20, "--temperature", 0.5, "--top-k", 3,
              "--top-p", 0.9, "--dtype", "bfloat16", "--cache-dtype", "int8", "--weights", "int8",
              "--draft", trained, "--draft-length", 3, "--implementation", "xla")[0] == 0
  want = dict(length=20, temperature=0.5, top_k=3, top_p=0.9, dtype="bfloat16", cache_dtype="int8",
              weights="int8", draft_length=3, implementation="xla")
  assert {name: seen[name] for name in want} == want
  _, config = seen["draft"]
  assert config.dim == 16


@pytest.mark.full
@pytest.mark.parametrize("end", ["SIGINT", "SIGPIPE"])
def test_a_sample_ends_when_nobody_wants_more(trained, end):
  with subprocess.Popen(
      [sys.executable, "-m", "palm_haiku", "generate", str(trained), "--prompt", "To be",
       "--length", "100000", "--temperature", "0"],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
    try:
      assert process.stdout.read(10).startswith(b"To be")  # These five come before XLA works.
      if end == "SIGINT":
        process.send_signal(signal.SIGINT)
      else:
        process.stdout.close()
      assert process.wait(timeout=100) == -getattr(signal, end)
      assert process.stderr.read() == b""
    finally:
      process.kill()


def test_a_backend_that_does_not_start_is_one_line(trained, tmp_path, capsys, monkeypatch):
  def fail(problem):
    raise problem

  for problem in (RuntimeError("Unable to initialize backend 'nope': it is not\nthere"),
                  AssertionError()):  # of a plugin that could not be loaded
    monkeypatch.setattr(distributed.jax, "devices", functools.partial(fail, problem))
    for command in (["train", *TINY, "--out", tmp_path / "new"], ["generate", trained],
                    ["convert", "--to", "palm-jax", trained, "--out", tmp_path / "new"]):
      for wanted in ("nope", None):
        if wanted:
          monkeypatch.setenv("JAX_PLATFORMS", wanted)
        else:
          monkeypatch.delenv("JAX_PLATFORMS")
        status, _, err = call(capsys, *command)
        assert status == 1 and err.count("\n") == 1
        assert "JAX_PLATFORMS=cpu runs on the CPU" in err
        assert ("JAX_PLATFORMS=nope asks for" in err) == bool(wanted)
  assert not (tmp_path / "new").exists()


@pytest.mark.full
def test_printed_commands_can_be_pasted(text, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = ["[lr=3e-3] it's :car:", "-out"]
  for name in names:
    argument = [f"--out={name}"]
    status, out, err = call(capsys, "train", *TINY, "--data", text, *argument)
    assert status == 0, err
    command = shlex.split(next(line for line in out.splitlines() if line.startswith("sample")))
    assert command[1:3] == shlex.split(cli.typed("generate"))
    status, out, err = call(capsys, *command[2:-1], "To", "--length", 2)
    assert status == 0 and out.startswith("To"), err


@pytest.mark.full
def test_training_whose_output_nobody_reads_is_saved(text, tmp_path, capsys, monkeypatch):
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    out = tmp_path / "[x] y"
    status = cli.main(["train", *TINY, "--data", text, "--out", str(out), "--log-every", "1"])
  err = capsys.readouterr().err
  assert status == 141 and err.count("\n") == 1
  assert "(Broken pipe): stopped before the first step" in err
  assert f"palm-haiku train --resume --out {shlex.quote(str(out))}\n" in err


@pytest.mark.full
def test_a_prompt_of_which_nothing_is_left_begins_a_document(trained, capsys, monkeypatch):
  monkeypatch.setattr(data.ByteTokenizer, "encode", lambda self, text: np.zeros(0, np.uint8))
  status, out, err = call(capsys, "generate", trained, "--prompt", "  ", "--length", 1)
  assert status == 0 and out.startswith("  ")
  assert "warning: the tokenizer leaves nothing of the prompt '  '" in err
  assert "warning" not in call(capsys, "generate", trained, "--length", 1)[2]


TRAIN = ["train", *TINY]


@pytest.mark.parametrize("argv, message", [
    ([*TRAIN, "--model", "palm-80b"], "no model is called 'palm-80b'; did you mean palm-8b?"),
    ([*TRAIN, "--stepz", "3"], "unrecognized arguments: --stepz 3; did you mean --steps?"),
    ([*TRAIN, "--optimizer", "sgd"], "invalid choice: 'sgd'"),
    ([*TRAIN, "--steps", "many"], "invalid int value: 'many'"),
    ([*TRAIN, "--seq-len", "0"], "seq_len must be at least 1; got 0"),
    ([*TRAIN, "--data", "/absent/text"], "no file matches /absent/text"),
    ([*TRAIN, "--data", "TEXT", "--seq-len", "5000"], "fewer than one sequence"),
    ([*TRAIN, "--data", "TEXT", "--num-tokens", "100"], "outside the model's vocabulary of 100"),
    ([*TRAIN, "--dim-head", "7"], "rotary positions need an even dim_head; got 7"),
    ([*TRAIN, "--heads", "0"], "heads must be a positive integer; got 0"),
    (["train", "--dim", "16"], "a model without --model needs --depth, --heads"),
    ([*TRAIN, "--implementation", "cuda"], "implementation must be one of"),
    ([*TRAIN, "--tokenizer", "/absent.model"], "no SentencePiece model at /absent.model"),
    ([*TRAIN, "--eval-fraction", "1"], "eval_fraction must be in [0, 1); got 1.0"),
    (["generate", "RUN", "--prompt", "a\udcff"], "cannot be encoded as UTF-8"),
    (["generate", "RUN", "--length", "0"], "length must be at least 1; got 0"),
    (["generate", "RUN", "--length", str(2 * 10**10)], "fewer than 2^31 positions; got 1 and 2000"),
    (["generate", "RUN", "--length", str(2**31 - 300)], "out of memory (keys and values of 21474"),
    (["generate", "RUN", "--length", "2e10"], "invalid int value: '2e10'"),
    (["generate", "RUN", "--seed", str(2**64)], "--seed must be from 0 to 2^32 - 1; got 1844"),
    (["generate", "RUN", "--seed", "-1"], "--seed must be from 0 to 2^32 - 1; got -1"),
    ([*TRAIN, "--seed", str(2**64)], "seed must be from 0 to 2^32 - 1; got 1844"),
    ([*TRAIN, "--num-tokens", str(10**20)], "num_tokens must be less than 2^31"),
    ([*TRAIN, "--batch-ramp", "\u00b2:4"], "batch_ramp must be written"),
    ([*TRAIN, "--option\nof two lines"], "unrecognized arguments"),
    (["generate", "RUN", "--temperature", "-1"], "temperature must not be negative"),
    (["generate", "RUN", "--top-p", "2"], "top_p must be in (0, 1]"),
    (["generate", "/absent"], "/absent holds no checkpoint"),
    (["convert", "--from", "palm-torch", "TEXT", "--out", "NEW"], "no peer is called 'palm-torch'"),
    (["convert", "--from", "palm-jax", "TEXT", "--out", "NEW"], "is not an .npz file"),
    (["generate", "RUN", "--top-k", "0"], "top_k must be at least 1; got 0"),
    ([*TRAIN, "--learning-rate", "inf"], "learning_rate must be positive and finite; got inf"),
    ([*TRAIN, "--z-loss", "nan"], "z_loss must be at least 0 and finite; got nan"),
    ([*TRAIN, "--mesh", "data=--1"], "a mesh is written like"),
    (["convert", "--to", "palm-jax-lite", "RUN", "--out", "NEW"], "has position = 'alibi'"),
    (["convert", "--to", "palm-jax", "RUN", "--out", "TEXT"], "exists already"),
    (["info", "--model", "palm-9b"], "did you mean palm-8b?"),
    (["info", "--position", "alibi", "--no-shared-kv"],
     "--position, --shared-kv need --model, or --dim, --depth and --heads"),
    (["plan", "--topology", "v5e:2x2", "--batch-size", "8", "--num-tokens", "300"],
     "--num-tokens needs --model, or"),
    (["trian"], "invalid choice: 'trian'"),
])
def test_bad_input_is_one_line_and_changes_nothing(argv, message, trained, text, tmp_path, capsys):
  new = tmp_path / "new"
  names = {"TEXT": text, "RUN": str(trained), "NEW": str(new)}
  argv = [names.get(arg, arg) for arg in argv]
  argv += ["--out", str(new)] if argv[0] == "train" else []
  before = sorted(trained.rglob("*"))
  capsys.readouterr()
  status, _, err = call(capsys, *argv)
  assert status not in (0, None)
  assert message in err and err.count("\n") == 1 and "Traceback" not in err
  assert not new.exists() and sorted(trained.rglob("*")) == before


def test_another_runs_directory_is_left_alone(trained, text, capsys):
  before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
  for options, message in (([], "holds another run"),
                           (["--resume", "--seed", 1], "was trained with seed = 0, not 1"),
                           (["--resume", "--dim", 32], "was trained with dim = 16, not 32")):
    status, _, err = call(capsys, "train", *TINY, "--data", text, "--out", trained, *options)
    assert status == 2 and message in err and err.count("\n") == 1
  assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "peer", ["palm-jax", pytest.param("palm-pytorch-lite", marks=pytest.mark.full)])
def test_converting_to_and_fro(peer, tmp_path, capsys):
  arrays = numpy_peers.random_arrays(
      peer, num_tokens=256, dim=12, depth=2, heads=3, dim_head=6, ff_mult=2)
  array_files.write_arrays(tmp_path / "in.npz", arrays)
  status, out, _ = call(capsys, "convert", "--from", peer, tmp_path / "in.npz", "--out",
                        tmp_path / "run", "--heads", 3)
  assert status == 0 and "palm-haiku generate" in out
  status, _, _ = call(capsys, "convert", "--to", peer, tmp_path / "run", "--out",
                      tmp_path / "out.npz")
  assert status == 0
  back = array_files.read_arrays(tmp_path / "out.npz")
  assert back.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(back[name], array)
  status, _, err = call(capsys, "train", "--resume", "--out", tmp_path / "run")
  assert status == 2 and "holds imported weights" in err


def test_info(capsys):
  status, out, _ = call(capsys, "info", "--model", "palm-540b")
  assert status == 0 and "540,356,474,880" in out and "3.278e+12" in out
  status, out, _ = call(capsys, "info")
  assert status == 0 and all(name in out for name in configs)
  status, out, _ = call(capsys, "info", "--model", "palm-lite", "--depth", 1)
  assert status == 0 and "3,834,880" in out


@pytest.mark.parametrize("name, handler, during", [
    ("/bin/palm-haiku", signal.default_int_handler, signal.SIG_DFL),
    ("-m palm_haiku", signal.default_int_handler, signal.SIG_DFL),
    ("-m other", signal.default_int_handler, signal.default_int_handler),
    ("/bin/palm-haiku", signal.SIG_IGN, signal.SIG_IGN),
    ("/bin/python", signal.default_int_handler, signal.default_int_handler)])
def test_an_interrupt_while_a_command_is_imported(monkeypatch, capsys, name, handler, during):
  monkeypatch.setattr(sys, "argv", name.split()[:1])
  monkeypatch.setattr(sys, "orig_argv", ["python", *name.split()])
  before = signal.signal(signal.SIGINT, handler)
  try:
    importlib.reload(interrupts)
    assert signal.getsignal(signal.SIGINT) is during
    assert cli.main(["info"]) == 0
    assert signal.getsignal(signal.SIGINT) is handler
  finally:
    signal.signal(signal.SIGINT, before)
    monkeypatch.undo()
    importlib.reload(interrupts)
