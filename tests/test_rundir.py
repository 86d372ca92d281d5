import dataclasses
import hashlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import rich.console
import sentencepiece

from palm_haiku import PaLMConfig, array_files, cli, data, generate, recipe, rundir, runlog, train
from palm_haiku.checkpoint import CheckpointError
from palm_haiku.evaluate.command import held_out
from palm_haiku.recipe import TrainConfig
from palm_haiku.rundir import RunDirectory
from tests import numpy_peers
from tests.short_runs import TEXT, run

CONFIG = TrainConfig(model=PaLMConfig(300, 16, 1, 2, 8), data="t.txt", eval_fraction=0.0, steps=4,
                     batch_size=2, seq_len=16, log_every=1, checkpoint_every=2)
PIECES = dataclasses.replace(CONFIG, tokenizer="a.model")


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
  """A directory with a text, two tokenizers, and a run on bytes and one on pieces."""
  folder = tmp_path_factory.mktemp("origin")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    (folder / "t.txt").write_text(TEXT)
    for name, kind in (("a", "unigram"), ("b", "bpe")):
      sentencepiece.SentencePieceTrainer.train(
          input="t.txt", model_prefix=name, model_type=kind, vocab_size=64, minloglevel=2,
          hard_vocab_limit=False)
    run(CONFIG, "bytes")
    run(PIECES, "pieces")
  return folder


@pytest.fixture
def place(origin, tmp_path, monkeypatch):
  """A copy of it, where paths in the settings lead."""
  folder = shutil.copytree(origin, tmp_path / "place")
  monkeypatch.chdir(folder)
  return folder


def contents(folder):
  return {path: path.read_bytes() for path in folder.rglob("*")
          if path.is_file() and path.name != "lock"}


def call(capsys, *argv):
  """Exit status, standard output and standard error of a command."""
  status = cli.main(list(map(str, argv)))
  captured = capsys.readouterr()
  return status, captured.out, captured.err


def refuse(config, out, message, resume=True, error=ValueError):
  with pytest.raises(error, match=message) as raised:
    run(config, out, resume=resume)
  assert "\n" not in str(raised.value)


def test_data_are_known_by_their_fingerprint(place, capsys):
  (place / "new").mkdir()
  (place / "t.txt").rename("new/other.txt")
  before = contents(place)
  refuse(CONFIG, "bytes", "no file matches t.txt; if the data have moved, name their place")
  (place / "t.txt").write_text(TEXT.replace("7", "8"))
  refuse(CONFIG, "bytes", "trained on other data than t.txt holds now")
  (place / "t.txt").unlink()
  assert contents(place) == before
  status, out, _ = call(capsys, "train", "--resume", "--out", "bytes", "--data", "new/other.txt")
  assert status == 0 and "resuming from step 4" in out
  assert json.loads((place / "bytes/config.json").read_text())["data"] == "new/other.txt"


def test_a_run_keeps_its_tokenizer(place, capsys):
  original = (place / "a.model").read_bytes()
  assert (place / "pieces/tokenizer.model").read_bytes() == original
  (place / "a.model").rename("tok.model")
  for name in ("a.model", "tok.model"):  # The second is another name of the same.
    assert run(dataclasses.replace(PIECES, tokenizer=name), "pieces", resume=True)[0].step == 4
  # A model that is named again is compared with the vocabulary of what it kept.
  assert ("was trained with num_tokens = 300, not 256, dim = 16, not 128"
          in call(capsys, "train", "--resume", "--out", "pieces", "--model", "palm-tiny")[2])
  # Another vocabulary under the old name is not taken for it; under a new name it is refused.
  shutil.copy("b.model", "a.model")
  directory = RunDirectory("pieces")
  metadata = directory.settings()
  assert directory.tokenizer("a.model", metadata).serialized == original
  for name in ("b.model", "bytes"):
    refuse(dataclasses.replace(PIECES, tokenizer=name), "pieces",
           f"{name} is not the tokenizer that pieces was trained with; name its new place")
  refuse(dataclasses.replace(CONFIG, tokenizer="b.model"), "bytes", "b.model is not the tokenizer")
  # Of its copy and the file that was named, the one that fits.
  (place / "pieces/tokenizer.model").write_bytes(b"damaged")
  refuse(PIECES, "pieces", "a.model is not the tokenizer")
  (place / "a.model").write_bytes(original)
  assert directory.tokenizer("a.model", metadata).serialized == original
  (place / "a.model").unlink()
  refuse(PIECES, "pieces", "no SentencePiece model at a.model; name its new place with --tokenizer")


def test_a_run_that_kept_no_tokenizer_has_the_one_that_is_named(place):
  (place / "pieces/tokenizer.model").unlink()
  metadata = {"config": dataclasses.asdict(PIECES)}  # as runs left it that had no fingerprint
  directory = RunDirectory("pieces")
  assert directory.tokenizer("a.model", metadata).name == "a.model"
  (place / "a.model").rename("tok.model")
  with pytest.raises(ValueError, match="no SentencePiece model at a.model; name its new place"):
    directory.tokenizer("a.model", metadata)
  assert directory.tokenizer("tok.model", metadata).name == "tok.model"


@pytest.fixture
def generated(monkeypatch):
  """Prompts and numbers of tokens that generation is asked for, instead of it."""
  asked = []
  monkeypatch.setattr(generate, "generate", lambda params, config, prompt, length, **_:
                      asked.append((list(prompt), length)))
  return asked


@pytest.mark.full
def test_generation_goes_with_the_run(place, capsys, generated):
  tokens = list(data.load_tokenizer("a.model").encode("7 times 8"))
  (place / "a.model").rename("tok.model")
  shutil.copy("b.model", "a.model")
  command = ["generate", "pieces", "--prompt", "7 times 8", "--length", 2]
  (place / "bytes/tokenizer.model").write_bytes(b"of nobody")
  for more in ([], ["--tokenizer", "tok.model"], ["--draft", "pieces"]):
    assert call(capsys, *command, *more)[0] == 0
  assert generated == [(tokens, 2)] * 3
  status, _, err = call(capsys, *command, "--tokenizer", "b.model")
  assert status == 2 and "b.model is not the tokenizer" in err
  # A draft is compared by what its tokenizer is, not by its name.
  status, _, err = call(capsys, *command, "--draft", "bytes")
  assert status == 2 and "the draft must have the tokenizer of the model" in err
  shutil.copytree("pieces", "twin")
  metadata = place / "twin/checkpoints/4/metadata/metadata"
  manifest = place / "twin/checkpoints/4/manifest.json"
  changed = metadata.read_text().replace("a.model", "elsewhere.model")
  metadata.write_text(changed)
  names = json.loads(manifest.read_text())
  names["metadata/metadata"] = hashlib.sha256(changed.encode()).hexdigest()
  manifest.write_text(json.dumps(names))
  assert call(capsys, *command, "--draft", "twin")[0] == 0


def test_imported_weights_keep_their_tokenizer(place, capsys, generated):
  array_files.write_arrays(place / "in.npz", numpy_peers.random_arrays(
      "palm-jax", num_tokens=64, dim=12, depth=1, heads=1, dim_head=6, ff_mult=2))
  command = ["convert", "--from", "palm-jax", "in.npz", "--heads", 1, "--tokenizer", "a.model"]
  assert call(capsys, *command, "--out", "imported")[0] == 0
  tokens = list(data.load_tokenizer("a.model").encode("7 times"))
  (place / "a.model").unlink()
  assert call(capsys, "generate", "imported", "--prompt", "7 times", "--length", 1)[0] == 0
  assert generated == [(tokens, 1)]


@pytest.mark.parametrize("length, warns", [(8, False), (9, True)])
def test_generating_beyond_the_trained_length_warns_once(place, capsys, generated, recwarn,
                                                         monkeypatch, length, warns):
  status, _, err = call(capsys, "generate", "bytes", "--prompt", "123456789", "--length", length)
  said = [str(w.message) for w in recwarn] + err.splitlines()
  said = [line for line in said if "trained at 16 tokens and 17 are asked for" in line]
  assert status == 0 and len(said) == warns
  # ALiBi has no such length, and of imported weights it is not known.
  for change in (dict(position="alibi"), {}):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **change))
    metadata = {"config": dataclasses.asdict(config), "data_fingerprint": change and "x" or None,
                "tokenizer_fingerprint": "bytes"}
    monkeypatch.setattr(RunDirectory, "load", lambda self, *_, metadata=metadata: (metadata, {}))
    recwarn.clear()
    assert call(capsys, "generate", "bytes", "--prompt", "1", "--length", 99)[2] == ""
    assert not len(recwarn)


def test_a_tokenizer_that_drops_line_breaks_is_told_once(place):
  said = run(PIECES, "pieces", resume=True)[1]
  assert said.count("a.model drops line breaks") + said.count("tokenizer.model drops line") == 1
  assert "line breaks" not in run(CONFIG, "bytes", resume=True)[1]
  sentencepiece.SentencePieceTrainer.train(
      input="t.txt", model_prefix="identity", vocab_size=64, minloglevel=2, byte_fallback=False,
      hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
      user_defined_symbols=["\n"])
  for name, loses in (("a.model", True), ("identity.model", False), ("bytes", False)):
    tokenizer = data.load_tokenizer(name)
    assert data.load_corpus("t.txt", tokenizer, 0.1).loses_newlines == loses
  with pytest.warns(UserWarning, match="a.model drops line breaks"):
    held_out(place, None, "t.txt", data.load_tokenizer("a.model"))
  (place / "line.txt").write_text("one line")
  assert not data.load_corpus("line.txt", data.load_tokenizer("a.model"), 0.1).loses_newlines


HOLD = """
import fcntl, sys, time
stream = open(sys.argv[1], "a")
fcntl.flock(stream, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(100)
"""


def test_one_process_at_a_time_trains_in_a_directory(place, capsys, monkeypatch):
  command = [sys.executable, "-c", HOLD, "bytes/lock"]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
    try:
      assert other.stdout.readline() == b"held\n"
      before = contents(place)
      refuse(CONFIG, "bytes", f"bytes is in use: process {os.getpid()} on .* trains there; wait")
      refuse(CONFIG, "bytes", "bytes is in use", resume=False)
      status, _, err = call(capsys, "train", "--resume", "--out", "bytes")
      assert status == 2 and "bytes is in use" in err and err.count("\n") == 1
      assert contents(place) == before
      os.utime("bytes/lock", (0, 0))
    finally:
      other.send_signal(signal.SIGKILL)
      other.wait()
  assert run(CONFIG, "bytes", resume=True)[0].step == 4  # The killed run is not in the way.

  # Within one process as well, from the first step on.
  batch, tried = train._Run._batch, []

  def another(self, step):
    tried.append(step)
    refuse(CONFIG, "new", f"new is in use: process {os.getpid()} on ", resume=step % 2 == 0)
    return batch(self, step)

  monkeypatch.setattr(train._Run, "_batch", another)
  run(CONFIG, "new")
  assert tried == [0, 1, 2, 3]
  assert [row["step"] for row in runlog.read_metrics(place / "new/metrics.jsonl")] == [1, 2, 3, 4]


def test_of_two_that_begin_one_is_refused(tmp_path):
  one, two, three = (RunDirectory(tmp_path / "out") for _ in range(3))
  tokenizer = data.ByteTokenizer()
  assert one.open(False) is two.open(False) is three.open(True) is None
  assert not (tmp_path / "out").exists()
  with one:
    one.begin(dataclasses.asdict(CONFIG), tokenizer)
    with pytest.raises(ValueError, match="is in use"):
      two.begin(dataclasses.asdict(PIECES), tokenizer)
  with three, pytest.raises(ValueError, match="another process has begun a run in .* meanwhile"):
    three.begin(dataclasses.asdict(PIECES), tokenizer)
  assert RunDirectory(tmp_path / "out").settings() == {"config": dataclasses.asdict(CONFIG)}


def test_where_there_are_no_locks_a_warning_is_all(tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(37, "No locks available")

  monkeypatch.setattr(rundir.fcntl, "flock", fail)
  said = []
  with RunDirectory(tmp_path, said.append) as directory:
    directory.begin(dataclasses.asdict(CONFIG), data.ByteTokenizer())
  assert len(said) == 1 and "without locks (No locks available)" in said[0]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("path, content, message", [
    ("config.json", b'{"mine": 1}', "does not hold the settings of a run; choose another --out"),
    ("config.json", b'{"model": "gpt2"}', "config.json does not hold the settings of a run"),
    ("config.json", b'{"model": {"dim": 8}}', "config.json does not hold the settings of a run"),
    ("config.json", b'["a"]', "config.json does not hold the settings of a run"),
    ("config.json", b"{", "config.json does not hold the settings of a run"),
    ("config.json", b"\xff", "config.json does not hold the settings of a run"),
    ("notes.txt", b"", "holds notes.txt and is no run's directory"),
    ("lock", b"mine", "holds lock and is no run's directory"),
    (".git/HEAD", b"", "holds .git and is no run's directory"),
    ("checkpoints/epoch1.pt", b"", "holds checkpoints and is no run's directory"),
    ("metrics.jsonl", b"{}", "the metrics of a run, but neither a checkpoint nor config.json"),
    (".", b"", "out is no directory; choose another --out"),
    ("..", b"", "is no directory; choose another --out"),
])
def test_what_is_somebody_elses_is_left_alone(origin, tmp_path, monkeypatch, path, content, message,
                                              resume):
  monkeypatch.chdir(origin)
  out = tmp_path / "parent" / "out"
  (out / path).resolve().parent.mkdir(parents=True, exist_ok=True)
  (out / path).resolve().write_bytes(content)
  before = sorted(tmp_path.rglob("*"))
  refuse(CONFIG, out, message, resume)
  assert sorted(tmp_path.rglob("*")) == before and (out / path).resolve().read_bytes() == content


def test_what_systems_leave_makes_no_directory_somebody_elses(tmp_path):
  for name in (".DS_Store", "._x", "Thumbs.db", ".nfs01", "desktop.ini", "lost+found", "lock",
               "config.json.draft", "@eaDir", ".gitkeep", ".config.json.swp", "notes.txt~",
               "#a#", ".#a", "~$a.docx", "Icon\r", ".fuse_hidden01", ".directory"):
    (tmp_path / name).write_bytes(b"")
  for resume in (False, True):
    assert RunDirectory(tmp_path).open(resume) is None


def test_home_directories(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert RunDirectory("~/run").path == tmp_path / "run"


@pytest.mark.parametrize("change, message", [
    (dict(learning_rate=0.01), "with learning_rate = 0.003, not 0.01, and keeps that; for anoth"),
    (dict(batch_size=4, seq_len=8), "with batch_size = 2, not 4, seq_len = 16, not 8, and keeps"),
    (dict(optimizer="palm"), "optimizer = 'adamw', not 'palm', learning_rate = 0.003, not 0.01,"),
    (dict(eval_fraction=0.2), "eval_fraction = 0.0, not 0.2.*; for another, begin a new run"),
    (dict(steps=3), "the run is at step 4 already, beyond --steps 3; name more steps than 4"),
])
def test_what_a_run_keeps(place, change, message):
  before = contents(place)
  refuse(dataclasses.replace(CONFIG, **change), "bytes", message)
  assert contents(place) == before


def test_what_may_change(place):
  for change in (dict(learning_rate=0.003), dict(steps=4, eval_every=7, log_every=9, spike=2.0,
                                                 accumulate=2, remat="full")):
    config = dataclasses.replace(CONFIG, **change)
    assert run(config, "bytes", resume=True)[0].step == 4
    assert json.loads((place / "bytes/config.json").read_text()) == dataclasses.asdict(config)


def test_another_number_of_steps_moves_the_cosine_and_says_so():
  before = dataclasses.replace(CONFIG, steps=200)
  line = recipe.change_of_rate(dataclasses.replace(before, steps=600), before, 200)
  assert line == ("600 steps instead of 200 move the learning rate's cosine: from step 200 on it "
                  "is 0.0026, where it was to be 0.0003")
  for now, step in ((before, 100), (dataclasses.replace(before, steps=100), 100),
                    (dataclasses.replace(before, steps=600, optimizer="palm"), 200)):
    assert recipe.change_of_rate(now, dataclasses.replace(before, optimizer=now.optimizer),
                                 step) is None


def test_that_line_comes_before_the_first_step(place, monkeypatch):
  class Stop(Exception):
    pass

  def stop(self, step):
    raise Stop

  stream = io.StringIO()
  monkeypatch.setattr(train._Run, "_batch", stop)
  with pytest.raises(Stop):
    train.train(dataclasses.replace(CONFIG, steps=40), "bytes", resume=True,
                console=rich.console.Console(file=stream, width=300))
  assert stream.getvalue().count("warning: 40 steps instead of 4 move the learning") == 1


def test_what_was_trained_is_never_begun_anew(place, capsys):
  for step in (2, 4):
    (place / f"bytes/checkpoints/{step}/params/_METADATA").write_bytes(b"damaged")
  before = contents(place)
  refuse(CONFIG, "bytes", "no checkpoint in .* is usable .4: params/_METADATA is corrupt; 2: par",
         error=CheckpointError)
  refuse(CONFIG, "bytes", "holds another run", resume=False)
  for command in (["train", "--resume", "--out"], ["generate"]):
    status, _, err = call(capsys, *command, "bytes")
    assert status == 1 and "no checkpoint in" in err and err.count("\n") == 1
  assert contents(place) == before
  shutil.rmtree(place / "bytes/checkpoints")
  refuse(CONFIG, "bytes", "was trained up to step 4, but its checkpoints are gone")


@pytest.mark.parametrize("content", [b"", b'{"mine": 1}', b"\xff{"])
def test_checkpoints_have_the_settings_that_a_damaged_file_lost(place, content):
  config = place / "bytes/config.json"
  config.write_bytes(content)
  refuse(CONFIG, "bytes", "holds another run", resume=False)
  result, said = run(CONFIG, "bytes", resume=True)
  assert result.step == 4 and "config.json is damaged; it is kept as config.json.damaged" in said
  assert json.loads(config.read_text()) == dataclasses.asdict(CONFIG)
  assert config.with_name("config.json.damaged").read_bytes() == content


def test_the_table_says_of_each_setting_what_may_become_of_it():
  rows = (pathlib.Path(__file__).parents[1] / "docs" / "training.md").read_text().splitlines()
  kept, = (row for row in rows if "| refused:" in row)
  free = "".join(row for row in rows if row.startswith("| `--") and row != kept)
  options = {field.name: f"`--{field.name.replace('_', '-')}`"
             for field in dataclasses.fields(TrainConfig) if field.name != "model"}
  assert {name for name in options if options[name] in free} == recipe.FREE_ON_RESUME
  assert {name for name in options if options[name] in kept} == (
      options.keys() - recipe.FREE_ON_RESUME)
