"""Sources of documents: text, JSON lines and Parquet, compressed or not, read as a stream.

What is to be read is divided into units by the sources alone: whoever reads them, in whatever
order, each unit gives the same documents.
"""

import codecs
import contextlib
import glob
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from palm_haiku import data, textfiles

# A text file is a document, and a longer one is cut at ends of lines into several of this size.
LONGEST_TEXT = 2**22  # bytes
_LINES = re.compile(r"\.(jsonl|ndjson|jsonlines)\b", re.IGNORECASE)
_PARQUET = b"PAR1"
PYDOC = "pydoc"
_BUFFER = 2**20  # bytes that are read at a time: a call of the system for each line costs as much


class Piece(NamedTuple):
  """A file, or a part of one that can be read alone.

  `start` and `stop` count bytes, in a Parquet file its row groups; `stop` is None for all of it.
  """

  path: str
  start: int
  stop: int | None


def find(sources: Sequence[str]) -> list[str]:
  """The files that the sources name, in the order of the sources and of their names.

  Args:
    sources: paths, globs and directories of files, "enwik8" or "pydoc", which is its own name.

  Raises:
    ValueError: there is none.
  """
  files: dict[Any, str] = {}  # by identity: a file counts once however many sources name it
  for source in sources:
    folder = os.path.expanduser(source)
    if source == PYDOC:
      names = [PYDOC]
    elif os.path.isdir(folder):
      names = textfiles.find(os.path.join(glob.escape(folder), "**"))
    else:
      names = data.find(source)
    for path in names:
      if path != PYDOC and not os.path.isfile(path):
        raise ValueError(f"{path} is a pipe, which can't be read in parts; name a file")
      files.setdefault(PYDOC if path == PYDOC else textfiles.identity(path), path)
  return list(files.values())


def units(files: Sequence[str], field: str | None,
          unit_bytes: int) -> list[list[tuple[Piece, int]]]:
  """The files in pieces, with their sizes in bytes, and those in units of about `unit_bytes`.

  Compressed files, archives, UTF-16 and UTF-32 are one piece each, whatever their size.
  """
  division, size = [[]], 0
  for path in files:
    for piece, piece_size in _pieces(path, field, unit_bytes):
      if division[-1] and size + piece_size > unit_bytes:
        division.append([])
        size = 0
      division[-1].append((piece, piece_size))
      size += piece_size
  return [unit for unit in division if unit]


def _pieces(path, field, unit_bytes) -> Iterator[tuple[Piece, int]]:
  size = 0 if path == PYDOC else os.path.getsize(path)
  step = size
  if size > min(LONGEST_TEXT, unit_bytes):
    with open(path, "rb") as stream:
      kind = _kind(stream.read(512), path, field)
    if kind == "parquet":
      groups = _parquet(path).num_row_groups
      step = max(1, groups * unit_bytes // size)
      for start in range(0, groups, step):
        stop = min(start + step, groups)
        yield Piece(path, start, stop), size * (stop - start) // groups
      return
    step = {"text": LONGEST_TEXT, "lines": unit_bytes}.get(kind, size)
  if step >= size:
    yield Piece(path, 0, None), size
    return
  for start in range(0, size, step):
    yield Piece(path, start, min(start + step, size)), min(step, size - start)


def _kind(head: bytes, name: str, field: str | None) -> str:
  """The kind of a file, by its first bytes: those within, where it is compressed."""
  if head.startswith(_PARQUET):
    return "parquet"
  if textfiles.is_zip(head) or textfiles.is_tar(head):
    return "archive"
  if textfiles.encoding_of(head) != "utf-8":
    return "recoded"
  if textfiles.compression(head) or textfiles.is_zstd(head):
    return "packed"
  return "lines" if _is_lines(head.removeprefix(codecs.BOM_UTF8), name, field) else "text"


def _is_lines(text: bytes, name: str, field: str | None) -> bool:
  """Whether a text is JSON lines: by its file's name, or by how it begins if a field is named."""
  return (_LINES.search(os.path.basename(name)) is not None
          or field is not None and text[:512].lstrip().startswith(b"{"))


def documents(piece: Piece, field: str | None) -> Iterator[bytes]:
  """The texts of a piece in UTF-8; empty ones are left out.

  Args:
    piece: of `units`.
    field: of JSON lines and Parquet, that has the text; None for "text". If it is named, a file
      that begins with { is JSON lines whatever its name.

  Raises:
    ValueError: what is no text, no JSON, or damaged; the message has the file and the line.
  """
  path = piece.path
  if path == PYDOC:
    yield from data.pydoc()
    return
  with contextlib.ExitStack() as stack:
    stream: Any = stack.enter_context(open(path, "rb", buffering=_BUFFER))
    head = _head(stream)
    kind, is_packed = _kind(head, path, field), False
    if kind == "packed":
      is_packed = True
      with textfiles.unpacking(path):
        stream = stack.enter_context(_unpacked(stream, head))
        head = _head(stream)
      kind = _kind(head, path, field)
      if kind in ("packed", "parquet"):
        kind = "archive"  # in which each is text, or refused
    elif kind == "text" and path.lower().endswith(textfiles.SUFFIXES):
      kind = "archive"  # which is refused, for its name
    if kind == "parquet":
      yield from _rows(piece, field or "text")
    elif kind == "archive":
      for name, content in textfiles.streams(path):
        with textfiles.unpacking(path):
          yield from _whole(content, Piece(name, 0, None), field)
    else:
      with textfiles.unpacking(path) if is_packed else contextlib.nullcontext():
        if kind == "recoded":
          yield from _whole(stream, piece, field)
        elif kind == "lines":
          yield from _lines(stream, piece, field or "text")
        else:
          yield from _texts(stream, piece)


def _whole(stream, piece, field) -> Iterator[bytes]:
  """The documents of a text, JSON lines or not, in the encoding that it begins with."""
  head = _head(stream)
  if textfiles.encoding_of(head) != "utf-8":
    stream = io.BufferedReader(textfiles.Recoded(stream, head, piece.path), _BUFFER)
    head = stream.peek(512)
  is_lines = _is_lines(head.removeprefix(codecs.BOM_UTF8), piece.path, field)
  yield from _lines(stream, piece, field or "text") if is_lines else _texts(stream, piece)


def _head(stream) -> bytes:
  if not stream.seekable():
    return stream.peek(512)[:512]
  head = stream.read(512)
  stream.seek(0)
  return head


def _unpacked(stream, head):
  """A stream of what a compressed one holds."""
  if module := textfiles.compression(head):
    return module.open(stream)
  try:
    from compression import zstd  # pyright: ignore[reportMissingImports]  (of Python 3.14)
  except ImportError:
    return io.BufferedReader(_pyarrow("zst files").CompressedInputStream(stream, "zstd"), 2**20)
  return zstd.open(stream)


def _texts(stream, piece) -> Iterator[bytes]:
  """The documents of a text: all of it, or a part for each LONGEST_TEXT bytes.

  A part ends with the first line that ends at or behind its size, or, if that line is as long
  again, between two characters.
  """
  content, begin = b"", max(0, piece.start - 1)  # A line may have ended just before this piece.
  if begin:
    stream.seek(begin)

  def take(end):
    nonlocal content, begin
    content += stream.read(max(0, end + LONGEST_TEXT - begin - len(content)))
    cut = _cut(content, end - begin)
    part, content, begin = content[:cut], content[cut:], begin + cut
    return part

  if piece.start:
    take(piece.start)
  for end in itertools.count(piece.start + LONGEST_TEXT, LONGEST_TEXT):
    first = begin
    if part := take(end):
      is_all = not first and not content
      yield textfiles.decode(part, piece.path if is_all else f"{piece.path}, from byte {first} on,")
    if not content or piece.stop is not None and end >= piece.stop:
      return


def _cut(content, target):
  """Where the line ends that covers a position, or the character if that line is too long."""
  newline = content.find(b"\n", target - 1, target - 1 + LONGEST_TEXT)
  if newline >= 0:
    return newline + 1
  while target < len(content) and content[target] & 0xC0 == 0x80:
    target += 1
  return target


def _lines(stream, piece, field) -> Iterator[bytes]:
  """The documents of JSON lines: those lines that begin within the piece."""
  position, number = piece.start, 0
  if piece.start:
    stream.seek(piece.start - 1)
    position += len(stream.readline()) - 1

  def where():
    before = number if not piece.start else number + _count_lines(piece.path, piece.start)
    return f"{piece.path}, line {before},"

  stop, readline = math.inf if piece.stop is None else piece.stop, stream.readline
  while position < stop and (line := readline()):
    position += len(line)
    number += 1
    if number == 1 and not piece.start:
      line = line.removeprefix(codecs.BOM_UTF8)
    try:  # The standard library says what is wrong, and takes NaN and half a surrogate pair too.
      content = orjson.loads(line)[field].encode()
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
      content = _carefully(line, field, where)
    if b"\0" in content:
      raise ValueError(f"{where()} holds a NUL, which no text does")
    if content:
      yield content


def _carefully(line: bytes, field: str, where: Callable[[], str]) -> bytes:
  """A line's text in UTF-8, b"" for none, or an error that says what is wrong with it."""
  if not (line := line.strip()):
    return b""
  try:
    row = json.loads(line.decode())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where()} is no JSON: {error or type(error).__name__}") from error
  if not isinstance(row, dict) or field not in row:
    has = f"; it has {', '.join(map(repr, row))}" if isinstance(row, dict) and row else ""
    raise ValueError(f"{where()} has no field {field!r}{has[:200]}; name the text's field with "
                     "--field")
  return _utf8(row[field], field, where)


def _count_lines(path, stop) -> int:
  """The number of lines that begin before a position."""
  lines, last = 0, b"\n"
  with open(path, "rb") as stream:
    while stop > 0 and (content := stream.read(min(stop, 2**20))):
      lines, last, stop = lines + content.count(b"\n"), content[-1:], stop - len(content)
  return lines + (last != b"\n")


def _utf8(text, field, where) -> bytes:
  """A field's text in UTF-8; b"" for null."""
  if text is None:
    return b""
  if not isinstance(text, str):
    raise ValueError(f"{where()} has no text in {field!r}, but {type(text).__name__}")
  try:
    content = text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"{where()} has half a surrogate pair, which is no character") from error
  if b"\0" in content:
    raise ValueError(f"{where()} holds a NUL, which no text does")
  return content


def _rows(piece, field) -> Iterator[bytes]:
  """The documents of a Parquet file's row groups."""
  number = 0
  where = lambda: f"{piece.path}, row {number} of those from row group {piece.start} on,"
  with contextlib.closing(_parquet(piece.path)) as file:
    if field not in file.schema_arrow.names:
      raise ValueError(f"{piece.path} has no column {field!r}; it has "
                       f"{', '.join(file.schema_arrow.names)[:200]}; name the text's with --field")
    groups = range(piece.start, file.num_row_groups if piece.stop is None else piece.stop)
    try:
      for batch in file.iter_batches(256, row_groups=list(groups), columns=[field]):
        for text in batch.column(0).to_pylist():
          number += 1
          if content := _utf8(text, field, where):
            yield content
    except (OSError, UnicodeDecodeError, _pyarrow("").ArrowException) as error:
      raise ValueError(f"{piece.path} is damaged: {error}") from error


def _parquet(path):
  """A Parquet file, opened."""
  pyarrow = _pyarrow("Parquet files")
  from pyarrow import parquet

  try:
    return parquet.ParquetFile(path)
  except pyarrow.ArrowException as error:
    raise ValueError(f"{path} is no whole Parquet file: {error}") from error


def _pyarrow(of: str):
  try:
    import pyarrow
  except ImportError as error:
    raise ValueError(f"{of} need pyarrow: pip install 'palm-haiku[parquet]'") from error
  return pyarrow
