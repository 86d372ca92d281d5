"""Tokenised corpora: what is in them, however often the work was interrupted."""

import collections
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest

from palm_haiku import cli, data
from palm_haiku.corpus import arrange, build, shards, workers
from tests.test_data import pieces as pieces  # a fixture

RNG = random.Random(0)
WORDS = ["the dog", "sat on", "the cat", "fox\n"]
DOCUMENTS = [(" ".join(RNG.choices(WORDS, k=RNG.randrange(1, 30))) + f" {k % 150}").encode()
             for k in range(200)]
DOCUMENTS[170:180] = DOCUMENTS[3:13]  # duplicates


@pytest.fixture
def lines(tmp_path):
  path = tmp_path / "documents.jsonl"
  path.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in DOCUMENTS))
  return path


def make(source, out, tokenizer="bytes", workers=1, show=lambda progress: None, **settings):
  settings = {"unit_bytes": 2500} | settings
  return build.build(build.Settings((str(source),), **settings), str(tokenizer), out,
                     workers=workers, show=show)


def texts(out, split="train"):
  """The documents of a part, from the tokens."""
  tokens = shards.open_tokens(out, split)
  got = [bytes(part) for part in bytes(tokens[:]).split(b"\0")]
  assert got.pop() == b""
  assert got == [bytes(tokens.document(k))[:-1] for k in range(len(got))]
  return got


def is_held_out(text, share):
  return zlib.crc32(text) * 0x9E3779B97F4A7C15 % 2**64 < share * 2**64


def content(folder):
  return {path.relative_to(folder): path.read_bytes()
          for path in folder.rglob("*") if path.is_file()}


def test_documents_are_divided_by_their_hash(lines, tmp_path):
  index = make(lines, tmp_path / "out", held_out=0.3)
  for split, wanted in (("train", False), ("held_out", True)):
    part = [text for text in DOCUMENTS if is_held_out(text, 0.3) == wanted]
    assert texts(tmp_path / "out", split) == part and 20 < len(part) < 180
    assert index["totals"][split] == {
        "documents": len(part), "tokens": sum(map(len, part)) + len(part),
        "bytes": sum(map(len, part))}
    tokens = shards.open_tokens(tmp_path / "out", split)
    np.testing.assert_array_equal(tokens.lengths(), [len(text) + 1 for text in part])
    stream = tokens[:]
    assert len(tokens) == len(stream) and len(tokens.shards) > 5
    for start, stop in ((0, 1), (5, 3000), (len(stream) - 3, len(stream)), (7, 7), (3, 10**9)):
      np.testing.assert_array_equal(tokens[start:stop], stream[start:stop])
  assert not (tmp_path / "out" / "unfinished").exists()
  # Added documents change the split of no other.
  lines.write_text('{"text": "new"}\n' + lines.read_text() + '{"text": "newer"}\n')
  make(lines, tmp_path / "more", held_out=0.3)
  assert set(texts(tmp_path / "more", "held_out")) - {b"new", b"newer"} == set(
      texts(tmp_path / "out", "held_out"))


@pytest.mark.parametrize("chunk", [1, 40, 257])
def test_documents_of_any_length_beside_what_is_written_at_a_time(
    lines, tmp_path, monkeypatch, chunk):
  monkeypatch.setattr(shards, "_CHUNK", chunk)
  index = make(lines, tmp_path / "out", held_out=0, unit_bytes=20_000)
  assert texts(tmp_path / "out") == DOCUMENTS
  make(lines, tmp_path / "shuffled", held_out=0, shuffle=2, dedupe=True, unit_bytes=20_000)
  assert sorted(texts(tmp_path / "shuffled")) == sorted(set(DOCUMENTS))
  largest = [shard["max_token"] for shard in index["shards"]["train"]]
  assert max(largest) == max(map(max, DOCUMENTS))


def test_documents_much_alike_are_held_out_as_any():
  # A plain checksum's high bits are the same for many documents that differ in few places.
  texts = [b"".join(b"%d: %s, " % (k, (b"no", b"yes")[number >> k & 1]) for k in range(12))
           for number in range(4096)]
  for share in (0.01, 0.05, 0.3):
    count = sum(workers.is_held_out(text, int(share * 2**64)) for text in texts)
    assert abs(count - share * 4096) < 3 * (share * (1 - share) * 4096) ** 0.5


def test_pieces_are_tokens_of_each_document(lines, tmp_path, pieces):
  index = make(lines, tmp_path / "out", pieces, held_out=0)
  tokenizer = data.load_tokenizer(shards.tokenizer_name(tmp_path / "out", index))
  assert tokenizer.fingerprint == data.load_tokenizer(pieces).fingerprint
  want = np.concatenate([[*tokenizer.encode(text), tokenizer.eod] for text in DOCUMENTS])
  np.testing.assert_array_equal(shards.open_tokens(tmp_path / "out")[:], want)
  assert max(shard["max_token"] for shard in index["shards"]["train"]) == want.max()
  assert index["loses_newlines"] and not index["shards"]["held_out"]
  assert index["dtype"] == "uint8" and not len(shards.open_tokens(tmp_path / "out", "held_out"))


@pytest.mark.full
def test_dropped_line_breaks_are_told_once(lines, tmp_path, pieces, capsys):
  command = ["tokenize", "--data", str(lines), "--tokenizer", pieces, "--workers=2"]
  assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
  assert capsys.readouterr().err.count("drops line breaks") == 1
  (tmp_path / "line").write_text("one line")
  command[2] = str(tmp_path / "line")
  assert cli.main([*command, "--out", str(tmp_path / "other")]) == 0
  assert "line breaks" not in capsys.readouterr().err


def test_duplicates_are_dropped(lines, tmp_path, monkeypatch):
  monkeypatch.setattr(arrange, "_AT_ONCE", 30)  # so that hashes are sorted in parts
  make(lines, tmp_path / "out", dedupe=True, held_out=0.2)
  first = list(dict.fromkeys(DOCUMENTS))
  assert len(first) < len(DOCUMENTS)
  for split, wanted in (("train", False), ("held_out", True)):
    assert texts(tmp_path / "out", split) == [x for x in first if is_held_out(x, 0.2) == wanted]


def test_documents_are_shuffled_across_shards(lines, tmp_path):
  plain = make(lines, tmp_path / "plain")
  orders = []
  for seed in (0, 1):
    index = make(lines, tmp_path / f"{seed}", shuffle=seed)
    got = texts(tmp_path / f"{seed}")
    assert collections.Counter(got) == collections.Counter(texts(tmp_path / "plain"))
    assert sorted(texts(tmp_path / f"{seed}", "held_out")) == sorted(
        texts(tmp_path / "plain", "held_out"))
    assert index["totals"] == plain["totals"]
    orders.append([DOCUMENTS.index(text) for text in got])
    # From wherever they were to wherever they are.
    assert abs(np.corrcoef(orders[-1], range(len(got)))[0, 1]) < 0.25
  assert orders[0] != orders[1]
  make(lines, tmp_path / "both", shuffle=0, dedupe=True)
  assert sorted(texts(tmp_path / "both")) == sorted(set(texts(tmp_path / "plain")))


@pytest.mark.parametrize("settings", [{}, {"shuffle": 3, "dedupe": True}])
def test_interrupted_work_ends_in_the_same_bytes(lines, tmp_path, monkeypatch, settings):
  make(lines, tmp_path / "whole", held_out=0.2, **settings)
  rng, left = random.Random(1), 0
  real = workers.Worker.__init__

  def failing(self, job, report):
    def count(size):
      nonlocal left
      left -= 1
      if left == 0:
        raise KeyboardInterrupt
      report(size)

    real(self, job, count)

  monkeypatch.setattr(workers, "_REPORT_BYTES", 1)  # after each document
  monkeypatch.setattr(workers.Worker, "__init__", failing)
  kills = 0
  for _ in range(100):
    left = rng.randrange(10, 80)
    try:
      make(lines, tmp_path / "out", held_out=0.2, **settings)
      break
    except KeyboardInterrupt:
      kills += 1
      with pytest.raises(shards.DataError, match="is not whole.*give the same command again"):
        shards.open_tokens(tmp_path / "out")
  assert kills >= 3
  assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.full
def test_processes_make_the_same_corpus(lines, tmp_path):
  make(lines, tmp_path / "one", shuffle=3, held_out=0.2)
  seen = []
  make(lines, tmp_path / "two", shuffle=3, held_out=0.2, workers=2,
       show=lambda progress: seen.append(progress.done_bytes / progress.total_bytes))
  assert content(tmp_path / "one") == content(tmp_path / "two") and seen[-1] == 1
  lines.write_text(lines.read_text() + "no JSON")
  with pytest.raises(ValueError, match="line 201, is no JSON"):
    make(lines, tmp_path / "bad", workers=2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("options", [[], ["--shuffle=1", "--dedupe"]])
def test_killed_ten_times_at_random(lines, tmp_path, options):
  lines.write_text(lines.read_text() * 1000)
  command = [sys.executable, "-m", "palm_haiku", "tokenize", f"--data={lines}", "--shard-mb=0.6",
             "--workers=2", *options]
  subprocess.run([*command, f"--out={tmp_path / 'whole'}"], check=True)
  notes = lambda: len(list(tmp_path.glob("out/unfinished/*-*.json")))
  rng, kills = random.Random(0), 0
  while kills < 10:
    before = notes()
    process = subprocess.Popen([*command, f"--out={tmp_path / 'out'}"])
    while notes() == before and process.poll() is None:
      time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.1))
    assert process.poll() is None, "too few units for ten kills"
    process.send_signal(signal.SIGKILL)
    process.wait()
    kills += 1
  subprocess.run([*command, f"--out={tmp_path / 'out'}"], check=True)
  assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_is_there_already(lines, tmp_path):
  out = tmp_path / "out"
  index = make(lines, out)
  before = content(out)
  assert make(lines, out) == index and content(out) == before
  for other in ({"shuffle": 1}, {"held_out": 0.5}):
    with pytest.raises(ValueError, match="holds a corpus already, of other sources or settings"):
      make(lines, out, **other)
  # Other content of the same size under the same name.
  changed = lines.read_text().replace("a", "b")
  assert len(changed) == lines.stat().st_size and changed != lines.read_text()
  lines.write_text(changed)
  with pytest.raises(ValueError, match="holds a corpus already, of other sources or settings"):
    make(lines, out)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "note").touch()
  with pytest.raises(ValueError, match="holds note and is no corpus; choose another --out"):
    make(lines, tmp_path / "full")
  with pytest.raises(ValueError, match="is no directory"):
    make(lines, lines)
  # Beginnings of another corpus, and of this one in another process.
  (out / "index.json").unlink()
  (out / "unfinished").mkdir()
  plan = {"settings": {"shuffle": 1}, "tokenizer": "bytes", "files": []}
  (out / "unfinished" / "plan.json").write_text(json.dumps(plan))
  (out / "unfinished" / "encode-00000.json").write_text("{}")
  with pytest.raises(ValueError, match="beginning of another corpus: .*shuffle.*files changed"):
    make(lines, out)
  with build._exclusive(out / "unfinished" / "lock", ""):
    with pytest.raises(ValueError, match="is in use: another process tokenises there"):
      make(lines, out)


def test_an_attempt_that_failed_at_once_stands_in_no_ones_way(lines, tmp_path):
  with pytest.raises(ValueError, match="no field 'txt'"):
    build.build(build.Settings((str(lines),), field="txt"), "bytes", tmp_path / "out")
  assert make(lines, tmp_path / "out") == make(lines, tmp_path / "other")
  assert content(tmp_path / "out") == content(tmp_path / "other")


def test_a_corpus_within_its_source_is_no_part_of_it(lines, tmp_path):
  for _ in range(2):
    index = build.build(build.Settings((str(tmp_path),), held_out=0), "bytes", tmp_path / "out")
    assert index["totals"]["train"]["documents"] == len(DOCUMENTS)


@pytest.mark.parametrize("settings, message", [
    ({"held_out": 1.0}, "held_out must be in"), ({"held_out": float("nan")}, "held_out must be in"),
    ({"shuffle": -1}, "shuffle must be from 0"), ({"unit_bytes": 0}, "unit_bytes must be")])
def test_bad_settings(settings, message):
  with pytest.raises(ValueError, match=message):
    build.Settings(("pydoc",), **settings)


def test_pydoc_is_no_file_of_the_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert make("pydoc", ".", unit_bytes=10**8)["totals"]["train"]["documents"] > 30


def test_corpora_of_nothing_leave_nothing(tmp_path):
  (tmp_path / "t").write_text("one document")
  with pytest.raises(ValueError, match="every document of .* is held out; name a smaller share"):
    make(tmp_path / "t", tmp_path / "out", held_out=0.999999)
  (tmp_path / "t").write_text("")
  with pytest.raises(ValueError, match="t is empty"):
    make(tmp_path / "t", tmp_path / "out")
  assert not content(tmp_path / "out")
  (tmp_path / "t").write_text("another")
  assert make(tmp_path / "t", tmp_path / "out")["totals"]["train"]["documents"] == 1


@pytest.mark.parametrize("damage, message", [
    (lambda out: (out / "train-00002.npy").unlink(), "train-00002.npy is missing"),
    (lambda out: (out / "train-00002.documents.npy").unlink(), "documents.npy is missing"),
    (lambda out: os.truncate(out / "train-00002.npy", 500), "train-00002.npy is damaged: .* 500 "),
    (lambda out: (out / "index.json").write_text("{"), "index.json is damaged"),
    (lambda out: (out / "index.json").write_text('{"format": 3}'), "has another format, 3"),
    (lambda out: (out / "index.json").unlink(), "is no tokenised corpus: there is no index.json"),
])
def test_damage_is_named(lines, tmp_path, damage, message):
  make(lines, tmp_path / "out")
  damage(tmp_path / "out")
  with pytest.raises(shards.DataError, match=message):
    shards.open_tokens(tmp_path / "out")


@pytest.mark.parametrize("name", ["train-00003.npy", "train-00003.documents.npy"])
def test_changed_bytes_are_told_by_their_hash(lines, tmp_path, name):
  index = make(lines, tmp_path / "out")
  shards.check_hashes(tmp_path / "out", index)
  path = tmp_path / "out" / name
  changed = bytearray(path.read_bytes())
  changed[-5] ^= 1
  path.write_bytes(changed)
  key = "documents_sha256" if "documents" in name else "sha256"
  want = next(x for x in index["shards"]["train"] if x["name"] == "train-00003")[key][:16]
  got = hashlib.sha256(changed).hexdigest()[:16]
  with pytest.raises(shards.DataError,
                     match=f"{name} is damaged: its sha256 is {got}..., not {want}..."):
    shards.check_hashes(tmp_path / "out", index)


def test_a_full_disk_leaves_nothing_that_is_taken_for_whole(
    lines, tmp_path, capsys, limit_files):
  command = ["tokenize", "--data", str(lines), "--out", str(tmp_path / "out"), "--workers=1",
             "--shard-mb=0.0025"]
  limit_files(2000)
  assert cli.main(command) == 1
  limit_files(None)
  error = capsys.readouterr().err
  assert "train-00000.npy.draft: File too large" in error and error.count("\n") == 1
  with pytest.raises(shards.DataError, match="is not whole"):
    shards.open_tokens(tmp_path / "out")
  assert cli.main(command) == 0
  make(lines, tmp_path / "whole")
  files = [content(tmp_path / name) for name in ("out", "whole")]
  assert files[0] == files[1]


def test_the_command(lines, tmp_path, capsys):
  assert cli.main(["tokenize", "--data", str(lines), "--out", str(tmp_path / "out"),
                   "--workers=1", "--held-out=0.2"]) == 0
  out = capsys.readouterr().out
  train = shards.read_index(tmp_path / "out")["totals"]["train"]
  assert f"train     {train['documents']} documents, {train['tokens']:,} tokens, 0.9" in out
  for option, message in (("--workers=0", "--workers must be"), ("--shard-mb=0", "--shard-mb must"),
                          ("--tokenizer=absent", "no SentencePiece model")):
    assert cli.main(["tokenize", "--data", str(lines), "--out", str(tmp_path / "bad"), option]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_the_description_of_a_corpus(lines, tmp_path, capsys):
  index = make(lines, tmp_path / "out", held_out=0.3)
  assert cli.main(["data", str(tmp_path / "out"), "--samples=2", "--check",
                   f"--plot={tmp_path / 'lengths.png'}"]) == 0
  out = capsys.readouterr().out
  lengths = [len(text) + 1 for text in texts(tmp_path / "out")]
  for k in range(2, 8):
    count = sum(2**k <= length < 2 ** (k + 1) for length in lengths)
    want = [str(2**k), "to", str(2 ** (k + 1) - 1), str(count)]
    assert count == 0 or any(line.split()[:4] == want for line in out.splitlines()), (k, out)
  assert f"train     {index['totals']['train']['documents']} documents" in out
  shown = [line.partition(" tokens: ") for line in out.splitlines() if " tokens: " in line]
  whole = [" ".join(map(str.strip, text.decode().splitlines())) for text in texts(tmp_path / "out")]
  assert len(shown) == 2 and all(
      any(text.startswith(line[2].removesuffix("...")) for text in whole) for line in shown)
  assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
  (tmp_path / "out" / "train-00000.npy").unlink()
  assert cli.main(["data", str(tmp_path / "out")]) == 2
  assert "train-00000.npy is missing" in capsys.readouterr().err
