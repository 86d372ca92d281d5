"""Text to batches: tokenizers, corpora, and batches that depend only on the step."""

import codecs
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
import sentencepiece

from palm_haiku import textfiles

ENWIK8_SPLIT = (90_000_000, 5_000_000)  # bytes to train on and held out, as PaLM-jax has it
_ENWIK8 = b"""<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.3/" """  # and of enwik9


class ByteTokenizer:
  """The bytes of UTF-8 as tokens.

  The end-of-document token is 0, the NUL byte, which text does not contain: so the vocabulary
  stays at 256, as in PaLM-jax.
  """

  name = fingerprint = "bytes"
  serialized = b""  # nothing that a run must keep
  keeps_newlines = True
  num_tokens = 256
  eod = 0

  def encode(self, text: str | bytes) -> np.ndarray:
    """uint8[T]; raises ValueError for text that has no UTF-8 form."""
    if isinstance(text, str):
      try:
        text = text.encode()
      except UnicodeEncodeError as error:
        raise ValueError(f"text cannot be encoded as UTF-8: {error.reason} at position "
                         f"{error.start}") from error
    return np.frombuffer(text, np.uint8)

  def prompt(self, text: str) -> np.ndarray:
    """uint8[T] of a text to continue."""
    return self.encode(text)

  def decode(self, tokens) -> str:
    """The text of int[T]; what is no byte, or not UTF-8, becomes a replacement character."""
    tokens = np.asarray(tokens)
    return bytes(np.where(tokens < 256, tokens, 0xFF).astype(np.uint8)).decode(errors="replace")

  def stream_decoder(self, prompt=()) -> "_ByteStreamDecoder":
    """A decoder of what follows the tokens of a prompt, fed one token at a time."""
    return _ByteStreamDecoder(prompt)

  def save(self, directory: pathlib.Path) -> dict:
    """Writes the tokenizer in the hub's layout; returns what config.json says of it."""
    from palm_haiku.hub import tokenizer

    return tokenizer.from_bytes().save(directory)


class _ByteStreamDecoder:
  """Holds bytes back until they make up a character."""

  def __init__(self, prompt):
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in prompt:
      self.feed(token)

  def feed(self, token: int) -> str:
    """The text that this token completes, if any."""
    # A model from elsewhere may have more tokens than there are bytes.
    return self._decoder.decode(bytes([token]) if token < 256 else b"\xff")

  def flush(self) -> str:
    """The text that is left at the end."""
    return self._decoder.decode(b"", final=True)


class SentencePieceTokenizer:
  """Subwords from a SentencePiece model file, whose end-of-sentence piece ends documents."""

  def __init__(self, model_file: str):
    path = pathlib.Path(os.path.expanduser(model_file))
    if not path.is_file():
      raise ValueError(f"no SentencePiece model at {model_file}")
    self.name = str(model_file)
    self.serialized = path.read_bytes()
    self.fingerprint = hashlib.sha256(self.serialized).hexdigest()
    self._model = sentencepiece.SentencePieceProcessor()
    try:
      if not self._model.LoadFromSerializedProto(self.serialized):
        raise RuntimeError("it is empty")
    except (RuntimeError, OSError) as error:
      raise ValueError(f"{model_file} is not a SentencePiece model") from error
    self.num_tokens = self._model.vocab_size()
    self.eod = self._model.eos_id()
    if self.eod < 0:
      raise ValueError(f"{model_file} has no end-of-sentence piece, which ends documents here")
    self.keeps_newlines = "\n" in self.decode(self.encode("a\nb"))

  def encode(self, text: str | bytes) -> np.ndarray:
    """int32[T]; raises ValueError for bytes that are not UTF-8."""
    try:
      if isinstance(text, str):
        text = text.encode()
      elif not text.isascii():
        text.decode()  # The library replaces what is no UTF-8.
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
      raise ValueError(f"text is not valid UTF-8: {error.reason} at position "
                       f"{error.start}") from error
    return self._model.EncodeAsNumpy(text)

  def prompt(self, text: str) -> np.ndarray:
    """int32[T] of a text to continue."""
    return self.encode(text)

  def decode(self, tokens) -> str:
    """The text of int[T]; what is no piece becomes a replacement character."""
    # A model from elsewhere may have more tokens than there are pieces.
    return self._model.DecodePieces([
        self._model.IdToPiece(int(token)) if token < self.num_tokens else "\ufffd"
        for token in tokens])

  def stream_decoder(self, prompt=()) -> "_PieceStreamDecoder":
    """A decoder of what follows the tokens of a prompt, fed one token at a time."""
    return _PieceStreamDecoder(self, prompt)

  def save(self, directory: pathlib.Path) -> dict:
    """Writes the tokenizer in the hub's layout; returns what config.json says of it."""
    from palm_haiku.hub import pieces

    return pieces.from_sentencepiece(self.name, self.serialized).save(directory)


class _PieceStreamDecoder:
  """Decodes all pieces so far and gives what is new, since spaces depend on neighbours."""

  def __init__(self, tokenizer: SentencePieceTokenizer, prompt):
    self._tokenizer = tokenizer
    self._tokens = list(prompt)
    self._shown = len(tokenizer.decode(self._tokens))

  def feed(self, token: int) -> str:
    """The text that this token completes, if any."""
    self._tokens.append(token)
    text = self._tokenizer.decode(self._tokens)
    return "" if text.endswith("\ufffd") else self._show(text)

  def flush(self) -> str:
    """The text that is left at the end."""
    return self._show(self._tokenizer.decode(self._tokens))

  def _show(self, text):
    new, self._shown = text[self._shown:], len(text)
    return new


def load_tokenizer(name: str):
  """A tokenizer: "bytes", or by path a SentencePiece model, a tokenizer.json or its directory."""
  if name == "bytes":
    return ByteTokenizer()
  path = pathlib.Path(os.path.expanduser(name))
  is_json = path.is_dir() or path.suffix == ".json"
  if path.is_file() and not is_json:
    with open(path, "rb") as file:
      is_json = file.read(1) == b"{"
  if not is_json:
    return SentencePieceTokenizer(name)
  from palm_haiku.hub import tokenizer

  return tokenizer.load(name)


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Text as tokens, documents concatenated with an end-of-document token between them."""

  name: str
  train: Any  # unsigned int[N]: an array, or `corpus.shards.Tokens`, read where it lies
  eval: np.ndarray  # unsigned int[M], held out
  eod: int
  train_bytes_per_token: float  # to turn nats per token into bits per byte
  eval_bytes_per_token: float
  fingerprint: str  # of the tokens; differs when the text or the tokenizer does
  loses_newlines: bool  # which the text has, and the tokens have not
  max_token: int  # the largest of all


def load_corpus(source: str, tokenizer, eval_fraction: float,
                eval_tokens: int | None = None) -> Corpus:
  """Reads text and holds the end of it out, or opens a corpus that is tokenised already.

  Args:
    source: "pydoc" (CPython's documentation prose, on every machine); "enwik8" or a file of it
      (split into 90M and 5M bytes, as PaLM-jax has it, whatever `eval_fraction` is); or a path or
      glob of text files, plain, compressed or in archives, each a document; see `textfiles`; or
      a directory of `palm-haiku tokenize`.
    tokenizer: of `load_tokenizer`.
    eval_fraction: how much of the text, counted in bytes from its end, is held out; what a
      tokenised corpus holds out was decided when it was made.
    eval_tokens: at most so many of those that are held out are evaluated; None for all of a text's
      and the first 2^20 of a tokenised corpus.

  Raises:
    ValueError: no such data, empty data, or text that the tokenizer cannot take.
  """
  if not 0 <= eval_fraction < 1:
    raise ValueError(f"eval_fraction must be in [0, 1); got {eval_fraction}")
  from palm_haiku.corpus import shards, tokenised  # which import this module

  if shards.is_corpus(source):
    return tokenised.load(source, tokenizer, eval_tokens)
  cut, documents = 0, []
  if source == "pydoc":
    documents = pydoc()
  else:
    paths = find(source)
    for name, content in itertools.chain.from_iterable(map(textfiles.unpack, paths)):
      if len(paths) == 1 and not documents and _is_enwik8(source, content):
        # Its last character may be cut, which no text's is.
        cut, documents = ENWIK8_SPLIT[0], [content[:sum(ENWIK8_SPLIT)]]
      else:
        documents.append(textfiles.decode(content, name))
  total = sum(map(len, documents))
  if not total:
    raise ValueError(f"{source} is empty")
  cut = cut or total - int(total * eval_fraction)
  train, held_out = _split(documents, cut)
  dtype = np.min_scalar_type(tokenizer.num_tokens - 1)
  train_tokens, held_out_tokens = (_tokenize(part, tokenizer, dtype) for part in (train, held_out))
  digest = hashlib.sha256(train_tokens.tobytes() + b"|" + held_out_tokens.tobytes()).hexdigest()

  def bytes_per_token(parts, tokens):
    return sum(map(len, parts)) / max(1, len(tokens))

  largest = max(int(tokens.max(initial=0)) for tokens in (train_tokens, held_out_tokens))
  return Corpus(source, train_tokens, held_out_tokens[:eval_tokens], tokenizer.eod,
                bytes_per_token(train, train_tokens), bytes_per_token(held_out, held_out_tokens),
                digest[:16], not tokenizer.keeps_newlines and any(b"\n" in x for x in documents),
                largest)


def losing_newlines(tokenizer: str) -> str:
  """The warning for `Corpus.loses_newlines`."""
  return (f"{tokenizer} drops line breaks: the model can't learn them, and bits per byte count "
          "them all the same")


def pydoc() -> list[bytes]:
  """CPython's documentation prose, a document for each topic."""
  from pydoc_data import topics
  return [text.encode() for _, text in sorted(topics.topics.items())]


def find(source: str) -> list[str]:
  """The files that a source names: as `textfiles.find`, and of enwik8."""
  if source != "enwik8":
    return textfiles.find(source)
  for folder in ("", "data/"):
    for name in ("enwik8", "enwik8.gz", "enwik8.zip"):
      if pathlib.Path(folder + name).is_file():
        return [folder + name]
  raise ValueError("there is no enwik8, enwik8.gz or enwik8.zip here or in ./data; it can be "
                   "had at https://mattmahoney.net/dc/enwik8.zip")


def _is_enwik8(source, content) -> bool:
  """Whether it is named so, or the dump's first page of settings is there."""
  size = sum(ENWIK8_SPLIT)
  return len(content) >= size and (
      pathlib.Path(source).name.startswith("enwik8")
      or len(content) <= size / 0.95 and content.startswith(_ENWIK8))


def _split(documents: list[bytes], cut: int) -> tuple[list[bytes], list[bytes]]:
  """Splits at byte `cut`, or at the next character if that is within one."""
  before, after = [], []
  for document in documents:
    here = min(max(cut, 0), len(document))
    while here < len(document) and document[here] & 0xC0 == 0x80:
      here += 1
    before += [document[:here]] if here else []
    after += [document[here:]] if here < len(document) else []  # mutant: held out
    cut -= len(document)
  return before, after


def _tokenize(documents, tokenizer, dtype) -> np.ndarray:
  parts = []
  for document in documents:
    parts += [tokenizer.encode(document).astype(dtype), np.array([tokenizer.eod], dtype)]
  return np.concatenate(parts[:-1]) if parts else np.zeros(0, dtype)


def windows(tokens: Any, *, seq_len: int, seed: int,
            eod: int | None = None) -> grain.MapDataset:
  """Endless training sequences; `windows(...)[k]` depends on k and the arguments alone.

  An epoch is a random order of windows that overlap only in the token that is the target of
  one and the input of the next; where they begin shifts from epoch to epoch.

  Args:
    tokens: int[N], of which slices are read.
    seq_len: tokens that a model reads; a window has one more, the last target.
    eod: end-of-document token, for segment ids.

  Returns:
    A dataset of {"tokens": int32[seq_len + 1]} and, with `eod`, "segment_ids" of the same
    shape, which count documents from the start of the window.

  Raises:
    ValueError: fewer tokens than one window.
  """
  if len(tokens) < seq_len + 1:
    raise ValueError(f"the training data have {len(tokens)} tokens, fewer than one sequence of "
                     f"seq_len + 1 = {seq_len + 1}")
  count = (len(tokens) - 1) // seq_len
  slack = len(tokens) - 1 - count * seq_len

  @functools.lru_cache(maxsize=2)
  def shift(epoch):
    return int(np.random.default_rng((seed, epoch)).integers(slack + 1))  # mutant: shift

  def window(index, position):
    start = shift(index // count) + position * seq_len
    row = {"tokens": tokens[start: start + seq_len + 1].astype(np.int32)}
    return row if eod is None else row | {"segment_ids": segment_ids(row["tokens"], eod)}

  # mutant: order
  return grain.MapDataset.range(count).shuffle(seed=seed).repeat().map_with_index(window)


def segment_ids(tokens: np.ndarray, eod: int) -> np.ndarray:
  """int32[..., T]: the number of the document that a token belongs to, its `eod` included."""
  ends = np.cumsum(tokens == eod, axis=-1, dtype=np.int32)
  return ends - (tokens == eod)


def eval_batches(tokens: np.ndarray, *, batch_size: int, seq_len: int, stride: int | None = None,
                 eod: int | None = None) -> Iterator[dict[str, np.ndarray]]:
  """Batches that count every target of `tokens` (all but the first token) once, in order.

  Args:
    stride: tokens from one sequence to the next, at most seq_len; None for seq_len. A sequence
      counts those of its targets that are in none before it.

  Yields:
    As a batch of `windows`, and "weights": float32[batch_size, seq_len], 0 where a target is
    padding or counted already; all of one shape.
  """
  targets, stride = len(tokens) - 1, seq_len if stride is None else stride
  count = max(min(1, targets), -(-(targets - seq_len + stride) // stride))
  rows = np.arange(-(-count // batch_size) * batch_size)[:, None] * stride
  for first in range(0, len(rows), batch_size):
    starts = rows[first: first + batch_size]
    index = starts + np.arange(seq_len + 1)
    uncounted = (starts == 0) | (np.arange(seq_len) >= seq_len - stride)
    batch = {  # mutant: held-out batch
        "tokens": tokens[np.minimum(index, targets)].astype(np.int32),
        "weights": (uncounted & (index[:, 1:] <= targets)).astype(np.float32),
    }
    yield batch if eod is None else batch | {"segment_ids": segment_ids(batch["tokens"], eod)}
