"""Shards of tokens: .npy files of whole documents, under an index of counts and hashes.

A directory holds, for each shard, NAME.npy (the tokens of its documents, each ended by the
end-of-document token) and NAME.documents.npy (int64[D, 2]: where each ends, and the bytes of its
text), the tokenizer's file, and index.json, which is written last: without it there is no corpus.
"""

import array
import contextlib
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np
from numpy.lib import format as npy

from palm_haiku.checkpoint import write_atomically

INDEX = "index.json"
UNFINISHED = "unfinished"  # the folder of a tokenisation that goes on, or was killed
TOKENIZER = "tokenizer.model"  # a copy, as a run's
SPLITS = ("train", "held_out")
_FORMAT = "palm-haiku tokens, version 1"
_HEADER = 128  # bytes before the tokens of a file; numpy leaves room for any length
_OPEN_FILES = 256  # at a time; many systems allow a process 1,024
_CHUNK = 2**16  # tokens that are written at a time


class DataError(ValueError):
  """A corpus that is damaged, incomplete or does not fit; the message is one line."""


class ShardWriter:
  """A shard in the making. Nothing has its final name before `close` returns."""

  def __init__(self, stem: pathlib.Path, dtype: np.dtype, eod: int):
    """Opens the draft.

    Args:
      stem: path of the shard without a suffix.
      dtype: of the tokens.
      eod: the token that ends each document.
    """
    self._stem, self._dtype, self._eod = stem, np.dtype(dtype), eod
    self._rows = array.array("q")
    self._buffer, self._waiting = np.empty(_CHUNK, dtype), 0  # and how many tokens are in it
    self._tokens = self._largest = 0  # of those that are written
    self._draft = _file(stem, ".npy.draft")
    self._stream = open(self._draft, "wb", buffering=0)
    with self._named():
      self._write_header()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._stream.close()

  def add(self, tokens: np.ndarray, num_bytes: int) -> None:
    """Appends a document.

    Args:
      tokens: int[T], without the one that ends it.
      num_bytes: of its text.
    """
    start = self._waiting
    end = start + len(tokens)
    if end >= len(self._buffer):
      self._flush()
      start, end = 0, len(tokens)
      if end >= len(self._buffer):
        self._buffer = np.empty(2 * end, self._dtype)
    self._buffer[start:end] = tokens
    self._buffer[end] = self._eod
    self._waiting = end + 1
    self._rows.append(self._tokens + end + 1)
    self._rows.append(num_bytes)

  def close(self) -> dict[str, Any] | None:
    """Writes the rest and gives the files their names.

    Returns:
      The index's entry of the shard; None for one without documents, which leaves no file.
    """
    if not self._rows:
      self._stream.close()
      self._draft.unlink()
      return None
    self._flush()
    with self._named():
      self._stream.seek(0)
      self._write_header()
      os.fsync(self._stream.fileno())
      self._stream.close()
    table = np.frombuffer(self._rows, np.int64).reshape(-1, 2)
    documents = _file(self._stem, ".documents.npy")
    write_array(documents, table)
    entry = {
        "name": self._stem.name, "documents": len(table), "tokens": self._tokens,
        "bytes": int(table[:, 1].sum()), "max_token": self._largest,
        "sha256": file_hash(self._draft), "documents_sha256": file_hash(documents)}
    self._draft.rename(_file(self._stem, ".npy"))
    return entry

  def _flush(self):
    if self._waiting:
      tokens = self._buffer[:self._waiting]
      self._largest = max(self._largest, int(tokens.max()))
      with self._named():
        rest = memoryview(tokens).cast("B")
        while rest:  # A write to a disk that gets full may be of less than is asked.
          rest = rest[self._stream.write(rest):]
      self._tokens += self._waiting
      self._waiting = 0

  def _write_header(self):
    npy.write_array_header_1_0(self._stream, {
        "descr": self._dtype.str, "fortran_order": False, "shape": (self._tokens,)})
    assert self._stream.tell() == _HEADER

  @contextlib.contextmanager
  def _named(self):
    """Adds the file's name to errors of the system, which lack it."""
    try:
      yield
    except OSError as error:
      raise OSError(error.errno, error.strerror, str(self._draft)) from error


def write_array(path: pathlib.Path, values: np.ndarray) -> None:
  """Writes an .npy file, all of it or none."""
  draft = path.with_name(path.name + ".draft")
  try:
    with open(draft, "wb") as stream:
      np.save(stream, values)
      stream.flush()
      os.fsync(stream.fileno())
  except OSError as error:
    raise OSError(error.errno, error.strerror, str(draft)) from error
  draft.rename(path)


def file_hash(path: pathlib.Path) -> str:
  """SHA-256 of a file, in hexadecimal digits as `sha256sum` prints them."""
  with open(path, "rb") as stream:
    return hashlib.file_digest(stream, "sha256").hexdigest()


class Tokens:
  """The tokens of some shards in a row: `len`, and slices, each read from the files it lies in.

  Files are read at the positions that are asked for and not mapped, so that memory does not grow
  with what has been read.
  """

  ndim = 1

  def __init__(self, directory: pathlib.Path, shards: list[dict[str, Any]], dtype: np.dtype):
    """Names the shards, whose files need not be there.

    Args:
      directory: of the corpus.
      shards: entries of the index.
      dtype: of the tokens.
    """
    self.directory, self.shards, self.dtype = directory, shards, np.dtype(dtype)
    self._starts = np.cumsum([0] + [shard["tokens"] for shard in shards])
    self._file = functools.lru_cache(_OPEN_FILES)(self._open)

  def __len__(self) -> int:
    return int(self._starts[-1])

  @property
  def shape(self) -> tuple[int]:
    """As of an array."""
    return (len(self),)

  def __getitem__(self, part: slice) -> np.ndarray:
    """dtype[stop - start]; a slice of step 1.

    Raises:
      DataError: a shard is missing or was cut.
    """
    start, stop, step = part.indices(len(self))
    if step != 1:
      raise IndexError(f"tokens are read in slices of step 1; got {part}")
    tokens = np.empty(max(stop - start, 0), self.dtype)
    done = 0
    shard = int(np.searchsorted(self._starts, start, side="right")) - 1
    while done < len(tokens):
      first = start + done - int(self._starts[shard])
      count = min(len(tokens) - done, self.shards[shard]["tokens"] - first)
      self._read(shard, first, tokens[done: done + count])
      done, shard = done + count, shard + 1
    return tokens

  def document(self, number: int) -> np.ndarray:
    """The tokens of a document, the last of which ends it."""
    for shard, start in zip(self.shards, self._starts):
      if number < shard["documents"]:
        ends = self.documents(shard)[:, 0]
        first = int(ends[number - 1]) if number else 0
        return self[int(start) + first: int(start) + int(ends[number])]
      number -= shard["documents"]
    raise IndexError(number)

  def documents(self, shard: dict[str, Any]) -> np.ndarray:
    """int64[D, 2] of a shard: where each document ends, and the bytes of its text."""
    return np.load(_file(self.directory / shard["name"], ".documents.npy"), mmap_mode="r")

  def lengths(self) -> np.ndarray:
    """int64[D]: the number of tokens of every document."""
    return np.concatenate([np.zeros(0, np.int64)] + [
        np.diff(self.documents(shard)[:, 0], prepend=0) for shard in self.shards])

  def _open(self, shard):
    path = _file(self.directory / self.shards[shard]["name"], ".npy")
    try:
      stream = open(path, "rb", buffering=0)
    except FileNotFoundError as error:
      raise DataError(f"{path} is missing, a shard that {INDEX} lists; restore it or tokenise "
                      "again") from error
    if hasattr(os, "posix_fadvise"):  # Windows of random order: what lies behind them is not read.
      os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return stream

  def _read(self, shard, first, tokens):
    stream = self._file(shard)
    target, offset = memoryview(tokens).cast("B"), _HEADER + first * self.dtype.itemsize
    while len(target):
      count = os.preadv(stream.fileno(), [target], offset)
      if not count:
        raise DataError(f"{stream.name} ends early, though {INDEX} lists more tokens; restore it "
                        "or tokenise again")
      target, offset = target[count:], offset + count


def is_corpus(source: str | os.PathLike) -> bool:
  """Whether a path is that of a tokenised corpus, or of one that is not whole yet."""
  path = pathlib.Path(os.path.expanduser(source))
  return (path / INDEX).is_file() or (path / UNFINISHED).is_dir()


def write_index(directory: pathlib.Path, tokenizer: Any, settings: dict[str, Any],
                shards: dict[str, list[dict[str, Any]]], loses_newlines: bool) -> dict[str, Any]:
  """Writes the index of shards that are there, which makes a corpus of them; returns it."""
  totals = {split: {name: sum(shard[name] for shard in shards[split])
                    for name in ("documents", "tokens", "bytes")} for split in SPLITS}
  index = {
      "format": _FORMAT, "dtype": token_dtype(tokenizer).name,
      "tokenizer": {"name": tokenizer.name, "fingerprint": tokenizer.fingerprint,
                    "num_tokens": tokenizer.num_tokens, "eod": tokenizer.eod},
      "settings": settings, "loses_newlines": loses_newlines, "totals": totals, "shards": shards}
  write_atomically(directory / INDEX, json.dumps(index, indent=1).encode())
  return index


def read_index(source: str | os.PathLike) -> dict[str, Any]:
  """The index of a corpus whose files are all there, each of its size.

  Raises:
    DataError: it is not whole, or it is no corpus.
  """
  directory = pathlib.Path(os.path.expanduser(source))
  path = directory / INDEX
  if not path.is_file():
    if (directory / UNFINISHED).is_dir():
      raise DataError(f"{directory} is not whole: its tokenisation did not end; give the same "
                      "command again, and it goes on")
    raise DataError(f"{directory} is no tokenised corpus: there is no {INDEX}")
  try:
    index = json.loads(path.read_text())
    if index["format"] != _FORMAT:
      raise DataError(f"{path} has another format, {index['format']!r}")
    for split in SPLITS:
      for shard in index["shards"][split]:
        _check_size(directory, shard, np.dtype(index["dtype"]))
    _ = [index["tokenizer"][key] for key in ("fingerprint", "num_tokens", "eod")]
    _ = [index["totals"][split]["bytes"] / (1 + index["totals"][split]["tokens"])
         for split in SPLITS]
  except DataError:
    raise
  except (ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
    raise DataError(f"{path} is damaged ({type(error).__name__}: {error}); restore it or tokenise "
                    "again") from error
  return index


def _check_size(directory, shard, dtype):
  sizes = {".npy": _HEADER + shard["tokens"] * dtype.itemsize,
           ".documents.npy": _HEADER + shard["documents"] * 16}
  for suffix, size in sizes.items():
    path = _file(directory / shard["name"], suffix)
    try:
      there = path.stat().st_size
    except FileNotFoundError as error:
      raise DataError(f"{path} is missing, a shard that {INDEX} lists; restore it or tokenise "
                      "again") from error
    if there != size:
      raise DataError(f"{path} is damaged: it has {there:,} bytes, not {size:,}; restore it or "
                      "tokenise again")


def check_hashes(source: str | os.PathLike, index: dict[str, Any], workers: int = 2,
                 is_wanted: Callable[[], bool] = lambda: True) -> None:
  """Reads every shard and compares it with its hash.

  Args:
    source: the corpus.
    index: of `read_index`.
    workers: threads that read.
    is_wanted: asked before each file; once it says no, the rest is left out.

  Raises:
    DataError: a file differs; the message has its name and both hashes.
  """
  directory = pathlib.Path(os.path.expanduser(source))

  def check(path, want):
    if is_wanted() and (got := file_hash(path)) != want:
      raise DataError(f"{path} is damaged: its sha256 is {got[:16]}..., not {want[:16]}...; "
                      "restore it or tokenise again")

  with futures.ThreadPoolExecutor(workers) as pool:
    files = ((_file(directory / shard["name"], suffix), shard[key])
             for shard in itertools.chain(*index["shards"].values())
             for suffix, key in ((".npy", "sha256"), (".documents.npy", "documents_sha256")))
    checks = [pool.submit(check, *file) for file in files]
    try:
      for done in checks:
        done.result()
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def size(index: dict[str, Any]) -> int:
  """Bytes of all shards."""
  width = np.dtype(index["dtype"]).itemsize
  return sum(total["tokens"] * width + total["documents"] * 16
             for total in index["totals"].values())


def fingerprint(index: dict[str, Any]) -> str:
  """Of the tokens and their division; differs when the text, the tokenizer or the order does."""
  hashes = [[shard["sha256"] for shard in index["shards"][split]] for split in SPLITS]
  said = json.dumps([index["dtype"], index["tokenizer"]["eod"], hashes])
  return hashlib.sha256(said.encode()).hexdigest()[:16]


def open_tokens(source: str | os.PathLike, split: str = "train") -> Tokens:
  """The tokens of a corpus's "train" or "held_out" part, of which nothing is read yet.

  Raises:
    DataError: it is not whole, or it is no corpus.
  """
  index = read_index(source)
  return tokens_of(source, index, split)


def tokens_of(source: str | os.PathLike, index: dict[str, Any], split: str) -> Tokens:
  """As `open_tokens`, with the index at hand."""
  return Tokens(pathlib.Path(os.path.expanduser(source)), index["shards"][split], index["dtype"])


def tokenizer_name(source: str | os.PathLike, index: dict[str, Any]) -> str:
  """The name under which `data.load_tokenizer` loads the tokenizer of a corpus."""
  if index["tokenizer"]["fingerprint"] == "bytes":
    return "bytes"
  return str(pathlib.Path(os.path.expanduser(source)) / TOKENIZER)


def token_dtype(tokenizer: Any) -> np.dtype:
  """The smallest unsigned integers that hold every token."""
  return np.min_scalar_type(tokenizer.num_tokens - 1)


def samples(tokens: Tokens, count: int, seed: int = 0) -> Iterator[np.ndarray]:
  """Some documents' tokens, drawn without replacement."""
  total = sum(shard["documents"] for shard in tokens.shards)
  drawn = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
  return map(tokens.document, sorted(map(int, drawn)))


def _file(stem: pathlib.Path, suffix: str) -> pathlib.Path:
  return stem.with_name(stem.name + suffix)
