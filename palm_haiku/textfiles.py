"""Files to documents: which files a source names, what they hold, and whether that is text.

Names decide little here. A file counts once however many links lead to it, compression is told by
a file's first bytes, and what is no text in a Unicode encoding is refused by its name.
"""

import bz2
import codecs
import collections
import contextlib
import fnmatch
import glob
import gzip
import io
import lzma
import os
import re
import stat
import struct
import tarfile
import types
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

try:
  from compression.zstd import ZstdError  # pyright: ignore[reportMissingImports]  (of Python 3.14)
except ImportError:
  ZstdError = EOFError

# Left by systems and editors, beside the hidden files that a glob leaves out too.
_LITTER = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "*~", "#*#", "~$*", "@eadir",
           "icon\r")
SUFFIXES = (".gz", ".tgz", ".bz2", ".xz", ".lzma", ".zst", ".zip", ".tar")  # promise an archive
_MAX_DEPTH = 4  # archives within archives
_MOST_HELD = 2**28  # bytes of an archive that is within another file

# UTF-32 first: its mark for little endian begins with that of UTF-16.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
          codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
          codecs.BOM_UTF8: "utf-8"}
_NO_TEXT = {b"%PDF-": "a PDF", b"{\\rtf": "a Rich Text file", b"7z\xbc\xaf'\x1c": "a 7z archive",
            b"Rar!": "a RAR archive", b"!<arch>\n": "an ar archive", b"PAR1": "a Parquet file",
            b"\x04\x22\x4d\x18": "lz4; unpack it with `lz4 -d`",
            b"LZIP": "lzip; unpack it with `lzip -d`",
            b"\x1f\x9d": "compress; unpack it with `uncompress`", b"%!PS": "PostScript",
            b"SQLite format 3\0": "an SQLite database",
            b"version https://git-lfs": "a Git LFS pointer, which `git lfs pull` replaces",
            b"/annex/objects/": "a git-annex pointer, which `git annex get` replaces"}
_ISO_2022 = re.compile(rb"\x1b(\$[@AB()]|\(I)")  # shifts from ASCII to other characters
_SAMPLE = 2**20  # bytes that tell whether ASCII is what it seems
_CONTROLS = bytes({*range(32)} - {*b"\t\n\v\f\r\x1a\x1b"})  # which no encoding of text has


def find(source: str) -> list[str]:
  """The files that a path or glob names, each once, in the order of their names.

  Of several links to a file the path without symbolic links is taken, if it is among them. `**`
  follows links to directories, and enters each directory once.

  Raises:
    ValueError: there is none, or `source` is a directory.
  """
  source = os.path.expanduser(source)
  if os.path.isdir(source):
    raise ValueError(f"{source} is a directory; name its files, such as "
                     f"'{os.path.join(source, '*.txt')}'")
  if os.path.exists(source):
    mode = os.stat(source).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):  # /dev/fd/63 of a shell's <(...) is a FIFO.
      raise ValueError(f"{source} is neither a file nor a pipe")
    return [source]
  files = collections.defaultdict(set)
  for path in _matches(source):
    if os.path.isfile(path) and not _is_litter(os.path.basename(path)):
      files[identity(path)].add(path)
  if not files:
    raise ValueError(f"no file matches {source}")
  return sorted(min(names, key=lambda path: (len(names) > 1 and _is_behind_link(path), path))
                for names in files.values())


def _matches(pattern) -> Iterator[str]:
  """As `glob.glob(pattern, recursive=True)`, which never ends where links to directories do."""
  first, *rest = pattern.split(os.sep)
  parts = [first, *filter(None, rest)]  # of d//** as of d/**; an absolute pattern begins with ""
  if "**" not in parts:
    yield from glob.iglob(pattern)
    return
  first = parts.index("**")
  before, after = os.sep.join(parts[:first]), os.sep.join(parts[first + 1:]) or "*"
  for root in glob.iglob(before) if before else ["/" if first else ""]:
    for folder in _folders(root):
      yield from _matches(os.path.join(glob.escape(folder), after))


def _folders(root) -> Iterator[str]:
  """A directory and those below it, each once, under a path without links if there is one."""
  seen, direct, links = set(), [root], []
  while direct or links:
    folder = direct.pop() if direct else links.pop(0)
    try:
      if (entered := identity(folder or ".")) in seen:
        continue
      seen.add(entered)
      entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except OSError:  # As in `glob`: no directory, or not for us.
      continue
    yield folder
    for entry in entries:
      if not entry.name.startswith(".") and not _is_litter(entry.name):
        path = os.path.join(folder, entry.name)
        if entry.is_symlink():
          links.append(path)
        elif entry.is_dir():
          direct.append(path)


def identity(path: str) -> tuple[int, int]:
  """A file's or directory's, whatever its names."""
  status = os.stat(path)
  return status.st_dev, status.st_ino


def _is_behind_link(path):
  return os.path.realpath(path) != os.path.abspath(path)


def _is_litter(name):
  return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _LITTER)


def read(path: str) -> list[bytes]:
  """The documents of a file in UTF-8: one, or one per file in an archive.

  Raises:
    ValueError: what it holds is no text; the message has the name.
  """
  return [decode(content, name) for name, content in unpack(path)]


def unpack(path: str) -> Iterator[tuple[str, bytes]]:
  """The files in a file, with their names: itself, or what is compressed or archived in it.

  Raises:
    ValueError: it is damaged, encrypted, or packed in a way that is unknown here.
  """
  for name, stream in streams(path):
    with unpacking(path):
      content = stream.read()
    yield name, content


def streams(path: str) -> Iterator[tuple[str, IO[bytes]]]:
  """As `unpack`, each file a stream, which is read before the next one is asked for."""
  with open(path, "rb") as stream, unpacking(path, ValueError):
    yield from _streams(stream if stream.seekable() else io.BytesIO(stream.read()), path, 0)


@contextlib.contextmanager
def unpacking(path: str, *more: type[Exception]) -> Iterator[None]:
  """Names the file in errors of what unpacks it; raises ValueError."""
  try:
    yield
  except (OSError, EOFError, RuntimeError, struct.error, zlib.error, lzma.LZMAError,
          zipfile.BadZipFile, tarfile.TarError, ZstdError, *more) as error:
    # RuntimeError: an archive that asks for a password, or for a compression that is not here.
    raise ValueError(f"{path} cannot be unpacked: {error}") from error


def _streams(stream, name, depth, is_named=True) -> Iterator[tuple[str, IO[bytes]]]:
  if depth > _MAX_DEPTH:
    raise RuntimeError(f"{name} is within more than {_MAX_DEPTH} others")
  head = stream.read(512)
  stream.seek(0)
  if is_zip(head):
    with zipfile.ZipFile(_held(stream, name) if depth else stream) as zipped:
      names = zipped.namelist()
      if "[Content_Types].xml" in names or names[:1] == ["mimetype"]:
        raise RuntimeError(f"{name} is an Office, OpenDocument or EPUB file")
      for member in zipped.infolist():
        if not member.is_dir() and not _is_left_out(member.filename):
          with zipped.open(member) as content:
            yield from _streams(content, f"{name}:{member.filename}", depth + 1)
  elif is_tar(head):
    with tarfile.open(fileobj=stream) as archive:
      while member := archive.next():
        # It would hold what it has read of a million files; typeshed does not know it.
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        if member.isfile() and not _is_left_out(member.name):
          content = archive.extractfile(member)
          assert content  # as of every member that is a file
          yield from _streams(content, f"{name}:{member.name}", depth + 1)
  elif (inner := _decompressed(stream, head)) is not None:
    with inner:
      yield from _streams(inner, name, depth + 1, is_named=False)
  elif head and is_named and name.lower().endswith(SUFFIXES):
    raise RuntimeError(f"{name} is not compressed, nor an archive that is known here; rename it if "
                       "it is plain text")
  else:
    yield name, stream


def _held(stream, name) -> io.BytesIO:
  """An archive within another file, in memory: it is read from its end, where its table is."""
  content = stream.read(_MOST_HELD + 1)
  if len(content) > _MOST_HELD:
    raise RuntimeError(f"{name} is an archive of more than {_MOST_HELD >> 20} MiB within another "
                       "file; unpack that one first, and name what was in it")
  return io.BytesIO(content)


def _is_left_out(member: str) -> bool:
  parts = member.replace("\\", "/").split("/")
  return any(part.strip(".") and part.startswith(".") or _is_litter(part) for part in parts)


def is_zip(head: bytes) -> bool:
  """Whether a file is a zip archive, by its first bytes."""
  return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def is_tar(head: bytes) -> bool:
  """Whether a file is a tar archive, by its first 512 bytes; old ones have nothing but a sum."""
  try:
    tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
  except tarfile.HeaderError:
    return False
  return True


def is_zstd(head: bytes) -> bool:
  """Whether a file is compressed by zstd, by its first bytes; pzstd begins with a frame to skip."""
  return head.startswith(b"\x28\xb5\x2f\xfd") or (
      head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50)


def compression(head: bytes) -> types.ModuleType | None:
  """The module of Python 3.12 that reads a compressed file, by its first bytes."""
  if head.startswith(b"\x1f\x8b"):
    return gzip
  if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
    return bz2
  if head.startswith((b"\xfd7zXZ\0", b"]\0\0")):
    return lzma
  return None


def _decompressed(stream, head) -> IO[bytes] | None:
  module: Any = compression(head)
  if module is not None:
    return module.open(stream)
  if is_zstd(head):
    try:
      from compression import zstd  # pyright: ignore[reportMissingImports]  (of Python 3.14)
    except ImportError as error:
      raise RuntimeError("Python reads zst from 3.14 on; unpack it with `zstd -d`") from error
    return zstd.open(stream)
  return None


def decode(content: bytes, name: str) -> bytes:
  """Text in UTF-8 without a byte order mark; raises ValueError as `read`."""
  mark = _mark(content)
  encoding = _MARKS.get(mark, "utf-8")
  content = content[len(mark):]
  head = content[:1024].lstrip()  # a PDF may begin there
  for start, kind in _NO_TEXT.items():
    if head.startswith(start):
      raise ValueError(f"{name} is no text but {kind}")
  if (other := _within_ascii(content)) is not None:
    raise ValueError(f"{name} is in {other}, not UTF-8; convert it first, such as"
                     + (" in Python: open(name, encoding='hz').read()" if other == "HZ" else
                        f": iconv -f {other.replace('2022', '2022-JP')} -t UTF-8"))
  try:
    if encoding != "utf-8":
      content = content.decode(encoding).encode()
    else:
      _check_utf8(content)
  except UnicodeDecodeError as error:
    if encoding == "utf-8" and error.reason == "unexpected end of data":
      size = len(mark) + error.start
      raise ValueError(f"{name} ends within a character, at byte {size}; leave that out, such as: "
                       f"head -c {size}") from error
    advice = f"; {_advice(content)}" if encoding == "utf-8" else ""
    raise ValueError(f"{name} is no text in {encoding.upper()}: {error.reason} at byte "
                     f"{error.start}{advice}") from error
  if b"\0" in content:
    raise ValueError(f"{name} is no text: byte {content.index(0)} is NUL; {_advice(content)}")
  return content


def _advice(content) -> str:
  """A guess at what is no UTF-8, and what to do with it."""
  sample = content[:2**12]
  is_binary = sample.replace(b"\0", b"").translate(None, _CONTROLS) != sample.replace(b"\0", b"")
  for encoding in () if is_binary else ("UTF-32LE", "UTF-32BE", "UTF-16LE", "UTF-16BE"):
    with contextlib.suppress(UnicodeDecodeError):
      text = codecs.getincrementaldecoder(encoding)().decode(sample)
      if sum(character.isascii() for character in text) > 0.3 * len(text) > 0:
        return (f"it looks like {encoding} without a byte order mark; convert it first: iconv -f "
                f"{encoding} -t UTF-8")
  if is_binary or b"\0" in sample:
    return "it looks like a binary file"
  return "convert text in another encoding first: iconv -f ITS_ENCODING -t UTF-8"


class Recoded(io.RawIOBase):
  """A text in UTF-16 or UTF-32 with a byte order mark, as a stream in UTF-8 without one."""

  def __init__(self, stream: IO[bytes], head: bytes, name: str):
    """Begins to read.

    Args:
      stream: of the text.
      head: its first bytes, which `stream` gives again.
      name: for errors.
    """
    mark = _mark(head)
    self._stream, self._name, self._encoding = stream, name, _MARKS[mark]
    self._decoder = codecs.getincrementaldecoder(self._encoding)()
    self._read, self._ready, self._ended = len(stream.read(len(mark))), b"", False

  def readable(self) -> bool:
    """True."""
    return True

  def readinto(self, buffer: Any) -> int:
    """As of every raw stream; raises ValueError as `decode`."""
    while not self._ready and not self._ended:
      content = self._stream.read(_SAMPLE)
      self._ended = not content
      pending = len(self._decoder.getstate()[0])
      try:
        self._ready = self._decoder.decode(content, final=self._ended).encode()
      except UnicodeDecodeError as error:
        place = self._read - pending + error.start
        raise ValueError(f"{self._name} is no text in {self._encoding.upper()}: {error.reason} at "
                         f"byte {place}") from error
      self._read += len(content)
    size = min(len(buffer), len(self._ready))
    buffer[:size], self._ready = self._ready[:size], self._ready[size:]
    return size


def encoding_of(content: bytes) -> str:
  """The encoding that a text's byte order mark names; UTF-8 without one."""
  return _MARKS.get(_mark(content), "utf-8")


def _mark(content) -> bytes:
  return next(filter(content.startswith, _MARKS), b"")


def _within_ascii(content) -> str | None:
  """The encoding of a text that writes other characters in ASCII; None for plain text."""
  if _ISO_2022.search(content):
    return "ISO-2022"
  sample = content[:_SAMPLE]
  if content.startswith((b"+/v8", b"+/v9", b"+/v+", b"+/v/")) or _is_utf7(sample):
    return "UTF-7"
  # A format of Lisp, ~{ab~}, could be a character.
  is_hz = b"~{" in sample and _foreign(sample, "hz") > 0.02 * len(sample)
  return "HZ" if is_hz else None


def _is_utf7(sample) -> bool:
  """Whether each + begins a character's code, which of sums and words behind it is no code."""
  runs = re.findall(rb"\+([A-Za-z0-9+/]{3,})", sample)
  likely = sum(not run.islower() and not run.isdigit() for run in runs)
  foreign = _foreign(sample, "utf-7") if 2 * likely > len(runs) else 0
  return foreign > 0.005 * len(sample)


def _foreign(sample, encoding) -> int:
  """The number of characters beyond ASCII in an ASCII text once decoded; 0 if it can't be."""
  try:
    text = codecs.getincrementaldecoder(encoding)().decode(sample) if sample.isascii() else ""
  except UnicodeDecodeError:
    return 0
  return sum(unicodedata.category(character)[0] in "LMNPS" for character in text
             if character > "\x7f")


def _check_utf8(content, step=2**24):
  """Raises UnicodeDecodeError; a piece at a time, since a str may be four times as large."""
  decoder = codecs.getincrementaldecoder("utf-8")()
  for start in range(0, len(content) or 1, step):
    pending = len(decoder.getstate()[0])
    try:
      decoder.decode(content[start: start + step], final=start + step >= len(content))
    except UnicodeDecodeError as error:
      error.start += start - pending
      raise
