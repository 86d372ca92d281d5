"""Documents of files, whatever their form and however they are divided."""

import bz2
import gzip
import json
import lzma
import os
import pathlib
import random
import tarfile
import types
import zipfile

import pytest

from palm_haiku import textfiles
from palm_haiku.corpus import sources

TEXTS = [b"first\n", "zw\u00f6lf \u6570\n\nlines".encode(), b"x" * 300, b'{"text": 1}', b"last"]


def read(*names, field=None, unit_bytes=2**30):
  files = sources.find(list(map(str, names)))
  units = sources.units(files, field, unit_bytes)
  return [text for unit in units for piece, _ in unit for text in sources.documents(piece, field)]


def write_lines(path, texts=TEXTS, name="text"):
  path.write_text("\n".join(json.dumps({"id": k, name: text.decode()})
                            for k, text in enumerate(texts)))
  return path


def write_parquet(path, texts=TEXTS, **options):
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet
  table = pyarrow.table({"n": range(len(texts)), "text": [text.decode() for text in texts]})
  parquet.write_table(table, path, **options)
  return path


def zstandard(content):
  pyarrow = pytest.importorskip("pyarrow")
  sink = pyarrow.BufferOutputStream()
  with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
    stream.write(content)
  return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress, zstandard,
                                  lambda x: gzip.compress(x[:50]) + gzip.compress(x[50:])])
def test_texts_and_lines_packed_or_not(tmp_path, pack):
  content = write_lines(tmp_path / "plain.jsonl").read_bytes()
  (tmp_path / "plain.jsonl").unlink()
  (tmp_path / "a.jsonl").write_bytes(pack(content))
  (tmp_path / "b").write_bytes(pack(b"\xef\xbb\xbf" + content))
  (tmp_path / "c.txt").write_bytes(pack(b"plain text\n" + TEXTS[1]))
  assert read(tmp_path / "a.jsonl") == TEXTS
  assert read(tmp_path / "b") == [content] and read(tmp_path / "b", field="text") == TEXTS
  assert read(tmp_path / "c.txt", field="text") == [b"plain text\n" + TEXTS[1]]
  assert read(tmp_path) == TEXTS + [content, b"plain text\n" + TEXTS[1]]
  assert read(tmp_path / "*.txt", tmp_path / "a*", tmp_path / "c.txt") == read(
      tmp_path / "c.txt", tmp_path / "a.jsonl")


def test_whole_files_of_other_kinds(tmp_path):
  with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
    archive.writestr("a", "one")
    archive.writestr("b", "two")
  (tmp_path / "u").write_bytes("r\u00e9sum\u00e9".encode("utf-16"))
  (tmp_path / ".hidden").write_text("no")
  (tmp_path / "copy~").write_text("no")
  (tmp_path / "deep").mkdir()
  (tmp_path / "deep" / "t").write_text("below")
  (tmp_path / "void").touch()
  assert read(tmp_path) == [b"below", "r\u00e9sum\u00e9".encode(), b"one", b"two"]
  assert len(read("pydoc")) > 30


@pytest.mark.parametrize("unit_bytes", [1, 100, 10**6])
def test_parquet(tmp_path, unit_bytes):
  write_parquet(tmp_path / "p", TEXTS * 3, row_group_size=4)
  assert read(tmp_path / "p", unit_bytes=unit_bytes) == TEXTS * 3
  with pytest.raises(ValueError, match="no column 'body'; it has n, text"):
    read(tmp_path / "p", field="body")
  with pytest.raises(ValueError, match="row 1 of those from row group 0 on, has no text in 'n', "):
    read(tmp_path / "p", field="n")
  content = (tmp_path / "p").read_bytes()
  (tmp_path / "p").write_bytes(content.replace("\u6570".encode(), b"\xe6\x95\n"))
  with pytest.raises(ValueError, match="p is damaged: .*utf-8"):
    read(tmp_path / "p")
  (tmp_path / "p").write_bytes(content[:-9])
  with pytest.raises(ValueError, match="is no whole Parquet file"):
    read(tmp_path / "p")


def test_lines_are_read_once_wherever_a_file_is_divided(tmp_path):
  rng = random.Random(0)
  texts = [b"%d " % k + b"y" * rng.randrange(40) for k in range(60)]
  path = write_lines(tmp_path / "t.jsonl", texts)
  path.write_bytes(path.read_bytes().replace(b"\n", b"\n\n", 5) + b"\n")
  for unit_bytes in (1, 7, 50, 333, 1000):
    assert read(path, unit_bytes=unit_bytes) == texts
    assert len(sources.units([str(path)], None, unit_bytes)) >= path.stat().st_size / (
        unit_bytes + 60)


@pytest.mark.parametrize("seed", range(6))
def test_long_texts_are_cut_at_ends_of_lines(tmp_path, monkeypatch, seed):
  monkeypatch.setattr(sources, "LONGEST_TEXT", 64)
  rng = random.Random(seed)
  line = lambda: rng.choice("ab\u00e9\u6570") * rng.choice([0, 3, 20, 63, 64, 65, 200])
  text = "\n".join(line() for _ in range(rng.randrange(1, 30))).encode() or b"x"
  (tmp_path / "t").write_bytes(text)
  (tmp_path / "t.gz").write_bytes(gzip.compress(text))
  parts = read(tmp_path / "t")
  assert b"".join(parts) == text and all(parts) and max(map(len, parts)) <= 3 * 64
  assert len(parts) >= len(text) / (3 * 64)
  for part in parts:
    part.decode()
  place = 0
  for part in parts[:-1]:
    place += len(part)
    around = text[:place].rpartition(b"\n")[2] + text[place:].partition(b"\n")[0]
    assert part.endswith(b"\n") or len(around) >= 60
  assert read(tmp_path / "t.gz") == parts and read(tmp_path / "t", unit_bytes=130) == parts


def test_archives_and_other_encodings_are_read_as_text_files_are(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "LONGEST_TEXT", 64)
  monkeypatch.setattr(textfiles, "_SAMPLE", 33)  # characters are cut
  text = "".join(f"line {k} \u6570\U0001f600\n" for k in range(40))
  (tmp_path / "t").write_text(text)
  want = read(tmp_path / "t")
  assert len(want) > 8
  for encoding in ("utf-16", "utf-32"):
    recoded = text.encode(encoding)
    (tmp_path / "u").write_bytes(recoded)
    (tmp_path / "u.gz").write_bytes(gzip.compress(recoded))
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
      archive.write(tmp_path / "t", "a")
      archive.write(tmp_path / "u.gz", "b")
    with tarfile.open(tmp_path / "z.tar.gz", "w:gz") as archive:
      for name in ("t", "u", "z.zip"):
        archive.add(tmp_path / name, name)
    assert read(tmp_path / "u", unit_bytes=100) == read(tmp_path / "u.gz") == want
    assert read(tmp_path / "z.zip") == 2 * want and read(tmp_path / "z.tar.gz") == 4 * want
  monkeypatch.setattr(textfiles, "_MOST_HELD", 99)
  with pytest.raises(ValueError, match="z.tar.gz:z.zip is an archive of more than .* unpack that"):
    read(tmp_path / "z.tar.gz")
  (tmp_path / "u").write_bytes(b"\xff\xfe" + "abc".encode("utf-16-le") * 30 + b"\0\xdc\0\0")
  with pytest.raises(ValueError, match="u is no text in UTF-16-LE: .* at byte 182"):
    read(tmp_path / "u")


@pytest.mark.parametrize("content, message", [
    (b'{"text": "a"}\n\n{"text": "b"\n', r"t.jsonl, line 3, is no JSON: Expecting"),
    (b'{"text": "a"}\n"b"', r"line 2, has no field 'text'; name"),
    (b'{"txt": "a", "id": 3}', r"line 1, has no field 'text'; it has 'txt', 'id'; name.*--field"),
    (b'{"text": ["a"]}', r"line 1, has no text in 'text', but list"),
    (b'{"text": "a\\u0000"}', r"line 1, holds a NUL"),
    (b'{"text": "\\ud800"}', r"line 1, has half a surrogate pair"),
    (b'{"text": "\xff"}', r"line 1, is no JSON: .*utf-8"),
    (b"[" * 100_000, r"line 1, is no JSON"),
    (gzip.compress(b'{"text": "a"}\n' * 9)[:-9], r"t.jsonl cannot be unpacked"),
    (gzip.compress(b'{"text": "a"}\nno'), r"line 2, is no JSON"),
    (b"PAR1 no more", "is no whole Parquet file"),
    (b"\x28\xb5\x2f\xfd no zst", "cannot be unpacked"),
])
def test_bad_files_are_named(tmp_path, content, message):
  if b"PAR1" in content or b"\x28\xb5" in content:
    pytest.importorskip("pyarrow")
  (tmp_path / "t.jsonl").write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    read(tmp_path / "t.jsonl")
  assert len(str(error.value).splitlines()) == 1


def test_lines_are_read_as_by_the_standard_library(tmp_path, monkeypatch):
  good = [
      b'{"text": "a", "text": "b"}', b'\x0b{"text": "c"}\t\r', b'{"te\\u0078t": "\\ud83d\\ude00"}',
      b'{"text": "d", "n": [NaN, -Infinity, 1e999, 123456789012345678901234567890]}',
      b'{"text": "e", "n": "\\udc00"}', b'{"text": null}', b'{"text": ""}', b"", b" \r",
      b'{"n": %s1%s, "text": "\xf4\x8f\xbf\xbf"}' % (b"[" * 500, b"]" * 500)]
  bad = [
      b'{"text": "\\ud83d"}', b'{"text": "\xed\xa0\xbd"}', b'{"text": "\xc0\x80"}', b'["text"]',
      b'{"text": "\t"}', b'{"text": "a"} 1', b'{"text": 01}', b'{"text": 1.}', b'{"text": 1e999}',
      b'"text"', b'{"text": "a",}', b"{'text': 1}", b'\xef\xbb\xbf{"text": "a"}', b"nul", b"\x0c1",
      b'{"text": true}', b'{"text": 123456789012345678901234567890}', b'{"text": "\\u0000"}', b"{",
      b'{"n": %s1%s, "text": "a"}' % (b"[" * 3000, b"]" * 3000)]

  def outcome(lines):
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    try:
      return read(tmp_path / "t.jsonl")
    except ValueError as error:
      return str(error)

  got = []
  for _ in range(2):
    got.append([outcome(good), *(outcome([b"", line]) for line in bad)])
    standard = types.SimpleNamespace(loads=lambda line: json.loads(line.decode()))
    monkeypatch.setattr(sources, "orjson", standard)
  assert got[0] == got[1]
  assert got[0][0] == [b"b", b"c", "\U0001f600".encode(), b"d", b"e", "\U0010ffff".encode()]
  assert all("line 2, " in message for message in got[0][1:])


def test_lines_are_counted_from_the_start_of_the_file(tmp_path):
  path = write_lines(tmp_path / "t.jsonl", TEXTS * 20)
  lines = path.read_bytes().split(b"\n")
  lines[77] = b"{"
  path.write_bytes(b"\n".join(lines))
  for unit_bytes in (10, 100, 3000, 10**6):
    with pytest.raises(ValueError, match="line 78, is no JSON"):
      read(path, unit_bytes=unit_bytes)


def test_a_file_counts_once_whatever_names_it(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"once")
  (tmp_path / "link.txt").symlink_to("a.txt")
  os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
  names = [tmp_path / name for name in ("a.txt", "link.txt", "hard.txt", "../a.txt", "*.txt")]
  names[3] = tmp_path / ".." / tmp_path.name / "a.txt"
  assert read(*names, tmp_path) == [b"once"]


def test_lines_that_must_be_read_whole(tmp_path):
  content = write_lines(tmp_path / "t.jsonl").read_bytes()
  (tmp_path / "t.jsonl").write_bytes(content.decode().encode("utf-16"))
  assert read(tmp_path / "t.jsonl") == TEXTS
  with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
    archive.writestr("a/one.jsonl", content)
    archive.writestr("two.txt", b"plain")
    archive.writestr("three", content)
  assert read(tmp_path / "t.zip") == [*TEXTS, b"plain", content]
  assert read(tmp_path / "t.zip", field="text") == [*TEXTS, b"plain", *TEXTS]
  (tmp_path / "bad.jsonl").write_bytes((content + b"\n{").decode().encode("utf-16"))
  with pytest.raises(ValueError, match=f"bad.jsonl, line {len(TEXTS) + 1}, is no JSON"):
    read(tmp_path / "bad.jsonl")


def test_bad_texts_are_named(tmp_path, monkeypatch):
  monkeypatch.setattr(sources, "LONGEST_TEXT", 64)
  (tmp_path / "t").write_bytes(b"line\n" * 30 + b"\xff\n")
  with pytest.raises(ValueError, match=r"t, from byte 130 on, is no text in UTF-8.*at byte 20"):
    read(tmp_path / "t")
  (tmp_path / "t.gz").write_bytes(b"not packed")
  with pytest.raises(ValueError, match="is not compressed"):
    read(tmp_path / "t.gz")
  for name, message in ((tmp_path / "absent*", "no file matches"), ("/dev/null", "neither a file")):
    with pytest.raises(ValueError, match=message):
      read(name)
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match="no file matches"):
    read(pathlib.Path(tmp_path / "empty"))
