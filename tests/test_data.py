import gzip
import zipfile

import numpy as np
import pytest
import sentencepiece

from palm_haiku import data

BYTES = data.ByteTokenizer()


def corpus_of(path, text, eval_fraction=0.1, tokenizer=BYTES):
  path.write_bytes(text)
  return data.load_corpus(str(path), tokenizer, eval_fraction)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
  """A SentencePiece model of a few words."""
  folder = tmp_path_factory.mktemp("pieces")
  lines = ["the quick brown fox jumps over the lazy dog", "the dog sat on the cat"]
  (folder / "text").write_text("\n".join(lines * 20))
  sentencepiece.SentencePieceTrainer.train(
      input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=60,
      hard_vocab_limit=False, minloglevel=2)
  return str(folder / "m.model")


def test_bytes():
  text = "naïve ≠ 数"
  tokens = BYTES.encode(text)
  assert tokens.dtype == np.uint8 and bytes(tokens) == text.encode()
  assert BYTES.decode(tokens) == text
  assert BYTES.decode([0x61, 300]) == "a\ufffd" and BYTES.decode([]) == ""
  assert BYTES.eod == 0 and BYTES.num_tokens == 256
  with pytest.raises(ValueError, match="cannot be encoded as UTF-8.*position 1"):
    BYTES.encode("a\udcff")


def test_streamed_bytes_are_whole_characters():
  decoder = BYTES.stream_decoder()
  seen = [decoder.feed(token) for token in "é数".encode()]
  assert seen == ["", "é", "", "", "数"]
  assert decoder.feed(0xE6) == "" and decoder.flush() == "\ufffd"
  assert decoder.feed(300) == "\ufffd"  # of a model with a larger vocabulary
  first, *rest = "数".encode()
  assert "".join(map(BYTES.stream_decoder([first]).feed, rest)) == "数"


def test_pieces(pieces):
  tokenizer = data.load_tokenizer(pieces)
  text = "the dog sat on the cat"
  tokens = tokenizer.encode(text)
  assert len(tokens) < len(text) and tokens.max() < tokenizer.num_tokens <= 60
  assert tokenizer.decode(tokens) == text
  decoder = tokenizer.stream_decoder()
  assert "".join([decoder.feed(token) for token in tokens] + [decoder.flush()]) == text
  # A piece that begins a word keeps its space behind a prompt.
  prompt = tokenizer.encode("the dog")
  decoder = tokenizer.stream_decoder(prompt)
  rest = [decoder.feed(token) for token in tokens[len(prompt):]]
  assert "".join([*rest, decoder.flush()]) == " sat on the cat"
  with pytest.raises(ValueError, match="not valid UTF-8"):
    tokenizer.encode(b"\xff")
  with pytest.raises(ValueError, match="not valid UTF-8"):
    tokenizer.encode("a\udcff")


def test_tokens_beyond_the_pieces_are_replaced(pieces):
  tokenizer = data.load_tokenizer(pieces)
  before = tokenizer.encode("the dog")
  tokens = [*before, tokenizer.num_tokens, *tokenizer.encode("sat")]
  assert tokenizer.decode(tokens) == "the dog\ufffd sat"
  decoder = tokenizer.stream_decoder(before)
  assert decoder.feed(tokenizer.num_tokens) + decoder.flush() == "\ufffd"


def test_pieces_count_bytes(pieces, tmp_path):
  tokenizer = data.load_tokenizer(pieces)
  text = b"the dog sat on the fox " * 100
  corpus = corpus_of(tmp_path / "t", text, 0.25, tokenizer)
  assert corpus.eval_bytes_per_token * len(corpus.eval) == pytest.approx(len(text) / 4, rel=0.01)
  assert corpus.eval_bytes_per_token > 1.2


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.99])
def test_text_is_divided_without_loss_or_overlap(tmp_path, fraction):
  text = bytes(range(65, 102))
  corpus = corpus_of(tmp_path / "t", text, fraction)
  assert len(corpus.eval) == int(37 * fraction)
  assert bytes(corpus.train) + bytes(corpus.eval) == text


def test_bytes_per_token_are_those_of_each_part(pieces, tmp_path):
  text = b"the dog sat on the fox " * 30 + b"the quick brown fox jumps over the lazy cat " * 10
  corpus = corpus_of(tmp_path / "t", text, 0.4, data.load_tokenizer(pieces))
  held_out = int(len(text) * 0.4)
  assert corpus.eval_bytes_per_token == held_out / len(corpus.eval)
  assert corpus.train_bytes_per_token == (len(text) - held_out) / len(corpus.train)
  assert corpus.train_bytes_per_token != corpus.eval_bytes_per_token


def test_the_fingerprint_is_of_all_tokens_and_their_division(tmp_path):
  texts = (b"a" * 16 + b"b" * 4, b"a" * 16 + b"c" * 4, b"c" * 16 + b"b" * 4)
  prints = [corpus_of(tmp_path / "t", text, fraction).fingerprint
            for text in texts for fraction in (0.0, 0.2, 0.25)]
  assert len(set(prints)) == 9


def test_bad_tokenizers_are_named(tmp_path):
  with pytest.raises(ValueError, match="no SentencePiece model at"):
    data.load_tokenizer(str(tmp_path / "absent.model"))
  (tmp_path / "bad.model").write_bytes(b"not a model")
  with pytest.raises(ValueError, match="is not a SentencePiece model"):
    data.load_tokenizer(str(tmp_path / "bad.model"))


def test_pydoc_is_on_every_machine():
  corpus = data.load_corpus("pydoc", BYTES, 0.1)
  assert len(corpus.train) > 400_000
  assert len(corpus.eval) == pytest.approx(len(corpus.train) / 9, rel=0.01)
  assert b"for" in bytes(corpus.train) and corpus.eval_bytes_per_token == pytest.approx(1, abs=0.01)
  assert (corpus.train == 0).sum() > 30  # documents
  assert corpus.fingerprint == data.load_corpus("pydoc", BYTES, 0.1).fingerprint
  assert corpus.fingerprint != data.load_corpus("pydoc", BYTES, 0.2).fingerprint


def test_files_are_documents(tmp_path):
  (tmp_path / "b.txt").write_bytes(b"second")
  with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
    file.write(b"first")
  with zipfile.ZipFile(tmp_path / "c.txt.zip", "w") as archive:
    archive.writestr("c.txt", b"third")
  corpus = data.load_corpus(str(tmp_path / "*"), BYTES, 0)
  assert bytes(corpus.train) == b"first\0second\0third"
  assert not len(corpus.eval)
  # A document that is split has no end where it is.
  corpus = data.load_corpus(str(tmp_path / "*"), BYTES, 0.5)
  assert bytes(corpus.train) == b"first\0sec" and bytes(corpus.eval) == b"ond\0third"


def test_characters_are_not_split(tmp_path):
  text = "数" * 10
  corpus = corpus_of(tmp_path / "t", text.encode(), 0.5)  # 15 bytes of 30: within the sixth
  assert bytes(corpus.train).decode() == "数" * 5 and bytes(corpus.eval).decode() == "数" * 5


def test_enwik8_is_split_as_the_seeds_have_it(tmp_path, monkeypatch):
  monkeypatch.setattr(data, "ENWIK8_SPLIT", (90, 5))
  text = bytes(range(1, 121))
  for name in ("enwik8", "enwik8.gz", "enwik8.zip"):
    path = tmp_path / name
    if name.endswith("gz"):
      path.write_bytes(gzip.compress(text))
    elif name.endswith("zip"):
      with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("enwik8", text)
    else:
      path.write_bytes(text)
    corpus = data.load_corpus(str(path), BYTES, 0.3)
    assert bytes(corpus.train) == text[:90] and bytes(corpus.eval) == text[90:95]
  monkeypatch.chdir(tmp_path)
  assert bytes(data.load_corpus("enwik8", BYTES, 0.3).eval) == text[90:95]
  monkeypatch.chdir("/")
  with pytest.raises(ValueError, match="there is no enwik8.*it can be had at"):
    data.load_corpus("enwik8", BYTES, 0.1)


@pytest.mark.parametrize("size, is_enwik8", [(95, True), (100, True), (94, False), (101, False)])
def test_enwik8_is_known_by_its_content(tmp_path, monkeypatch, size, is_enwik8):
  monkeypatch.setattr(data, "ENWIK8_SPLIT", (90, 5))
  text = data._ENWIK8 + b"x" * (size - len(data._ENWIK8))
  if is_enwik8:
    text = text[:-1] + b"\xe6"  # the last character is cut
  for name, content in (("wiki.txt", text), ("w", gzip.compress(text))):
    corpus = corpus_of(tmp_path / name, content, 0.5)
    assert bytes(corpus.train) == text[:90 if is_enwik8 else len(text) - size // 2]
    assert bytes(corpus.eval) == text[len(corpus.train): 95 if is_enwik8 else None]


def locked(path):
  """An archive that says of its file that it is encrypted."""
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("t", b"text")
  content = bytearray(path.read_bytes())
  content[content.index(b"PK\x01\x02") + 8] |= 1
  path.write_bytes(content)


@pytest.mark.parametrize("prepare, source, message", [
    (lambda d: None, "absent*", "no file matches .*absent"),
    (lambda d: None, "", "is a directory; name its files"),
    (lambda d: (d / "t").write_bytes(b""), "t", "is empty"),
    (lambda d: (d / "t.gz").write_bytes(b"no gzip"), "t.gz", "cannot be unpacked"),
    (lambda d: (d / "t.gz").write_bytes(gzip.compress(b"text" * 99)[:-9]), "t.gz",
     "cannot be unpacked"),
    (lambda d: (d / "t.zip").write_bytes(b"no zip"), "t.zip", "cannot be unpacked"),
    (lambda d: locked(d / "t.zip"), "t.zip", "cannot be unpacked.*password required"),
])
def test_bad_data_are_named(tmp_path, prepare, source, message):
  prepare(tmp_path)
  with pytest.raises(ValueError, match=message) as error:
    data.load_corpus(str(tmp_path / source), BYTES, 0.1)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_bad_fractions_are_named(fraction):
  with pytest.raises(ValueError, match="eval_fraction must be"):
    data.load_corpus("pydoc", BYTES, fraction)


TOKENS = np.arange(100, dtype=np.uint8)


def windows(seed, steps, start=0, batch_size=3):
  dataset = data.windows(TOKENS, seq_len=8, seed=seed).batch(batch_size)
  return np.concatenate([dataset[step]["tokens"] for step in range(start, steps)])


def test_batches_depend_only_on_the_step():
  all_at_once = windows(0, 20)
  assert all_at_once.shape == (60, 9) and all_at_once.dtype == np.int32
  np.testing.assert_array_equal(windows(0, 20, start=13), all_at_once[39:])
  dataset = data.windows(TOKENS, seq_len=8, seed=0).batch(3)
  np.testing.assert_array_equal(dataset[17]["tokens"], all_at_once[51:54])
  np.testing.assert_array_equal(dataset[2]["tokens"], all_at_once[6:9])
  assert np.any(windows(1, 20) != all_at_once)


def test_an_epoch_has_every_window_once():
  # 100 tokens hold 12 windows of 8 and their last target.
  epochs = windows(0, 12, batch_size=3).reshape(3, 4, 3, 9)[:, :, :, :].reshape(3, 12, 9)
  orders = set()
  for epoch in epochs:
    starts = np.sort(epoch[:, 0])
    np.testing.assert_array_equal(np.diff(starts), 8)
    assert starts[0] <= 3 and np.all(np.diff(epoch) == 1)  # no padding, no gap
    orders.add(tuple(epoch[:, 0] - starts[0]))
  assert len(orders) == 3


def test_the_seed_decides_where_windows_begin_and_their_order():
  shifts, orders = {}, {}
  for seed in (0, 1):
    epochs = windows(seed, 4 * 24).reshape(24, 12, 9)[:, :, 0]
    shifts[seed] = epochs.min(1).tolist()
    orders[seed] = [tuple(epoch - epoch.min()) for epoch in epochs]
    # 100 tokens are 3 more than 12 windows and a last target.
    assert set(shifts[seed]) == {0, 1, 2, 3} and len(set(orders[seed])) == 24
  assert shifts[0] != shifts[1] and all(a != b for a, b in zip(orders[0], orders[1]))


def test_segments():
  tokens = np.array([5, 0, 6, 7, 0, 0, 8], np.uint8)
  np.testing.assert_array_equal(data.segment_ids(tokens, 0), [0, 0, 1, 1, 1, 2, 3])
  batch = data.windows(tokens, seq_len=6, seed=0, eod=0).batch(1)[5]
  np.testing.assert_array_equal(batch["segment_ids"], [[0, 0, 1, 1, 1, 2, 3]])


def test_training_data_shorter_than_a_sequence_are_named():
  assert data.windows(TOKENS, seq_len=99, seed=0).batch(1)[3]["tokens"].shape == (1, 100)
  with pytest.raises(ValueError, match="100 tokens, fewer than one sequence of seq_len . 1 = 101"):
    data.windows(TOKENS, seq_len=100, seed=0).batch(1)


@pytest.mark.parametrize("length, seq_len", [(100, 8), (97, 8), (2, 8), (9, 8), (50, 60)])
def test_evaluation_has_every_target_once(length, seq_len):
  batches = list(data.eval_batches(TOKENS[:length], batch_size=4, seq_len=seq_len, eod=0))
  assert {batch["tokens"].shape for batch in batches} == {(4, seq_len + 1)}
  targets = np.concatenate([batch["tokens"][:, 1:][batch["weights"] == 1] for batch in batches])
  np.testing.assert_array_equal(targets, np.arange(1, length))
  assert sum(batch["weights"].sum() for batch in batches) == length - 1
  assert all(batch["segment_ids"].shape == batch["tokens"].shape for batch in batches)


def test_evaluation_tells_documents_apart():
  tokens = np.array([5, 6, 0, 7, 8, 9, 0, 1, 0, 2], np.uint8)
  batch, = data.eval_batches(tokens, batch_size=3, seq_len=3, eod=0)
  np.testing.assert_array_equal(batch["tokens"], [[5, 6, 0, 7], [7, 8, 9, 0], [0, 1, 0, 2]])
  np.testing.assert_array_equal(batch["segment_ids"], [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 2]])
