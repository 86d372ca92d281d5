import bz2
import codecs
import gzip
import io
import lzma
import os
import pickle
import sys
import tarfile
import zipfile

import pytest

from palm_haiku import data, textfiles

TEXT = "naïve ≠ 数, and so on\n" * 30
UTF8 = TEXT.encode()


def zipped(**members):
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return stream.getvalue()


def tarred(**members):
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w") as archive:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      archive.addfile(info, io.BytesIO(content))
  return stream.getvalue()


def without_magic(archive):
  """A tar archive of one member as it was before POSIX: only the sum over its header tells."""
  header = bytearray(archive[:512])
  header[148:156], header[257:265] = b" " * 8, bytes(8)
  header[148:156] = b"%06o\0 " % sum(header)
  return bytes(header) + archive[512:]


def test_a_file_counts_once_and_links_do_not_loop(tmp_path, monkeypatch):
  for name in ("a/one.txt", "a/b/two.txt", "a/z/three.txt", "elsewhere/four.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
  monkeypatch.chdir(tmp_path / "a")
  files = ["b/two.txt", "linked/four.txt", "one.txt", "z/three.txt"]
  assert textfiles.find("**/*.txt") == files
  # Cycles, links beside what they lead to and before it in order, hard links, broken links.
  for link, target in (("self", "."), ("b/up", ".."), ("aa", "z"), ("0.txt", "one.txt"),
                       ("z/far", "../../elsewhere"), ("broken.txt", "absent"), ("loop", "loop")):
    os.symlink(target, link)
  os.link("one.txt", "two.txt")
  files[1:2] = []  # `linked` and `z/far` are the same directory, and the first name is taken.
  assert textfiles.find("**/*.txt") == sorted([*files, "linked/four.txt"])
  assert textfiles.find("*.txt") == ["one.txt"]
  assert textfiles.find("**/z/**/*.txt") == ["z/far/four.txt", "z/three.txt"]
  assert textfiles.find("**/far/*") == ["z/far/four.txt"]
  assert textfiles.find(f"{tmp_path}/a//**//far//*") == [str(tmp_path / "a/z/far/four.txt")]
  assert textfiles.find(str(tmp_path / "a/**")) == [
      str(tmp_path / "a" / name) for name in sorted([*files, "linked/four.txt"])]
  assert textfiles.find("0.txt") == ["0.txt"]
  # Each of twelve directories has links to all of them.
  for n in range(12):
    (tmp_path / "web" / f"d{n}").mkdir(parents=True)
    (tmp_path / "web" / f"d{n}" / "t.txt").write_text("t")
    for m in range(12):
      os.symlink(f"../d{m}", tmp_path / "web" / f"d{n}" / f"to{m}")
  assert len(textfiles.find(str(tmp_path / "web/**/*.txt"))) == 12


def test_litter_beside_texts_is_left_out(tmp_path):
  for name in ("a.txt", ".DS_Store", "._a.txt", "Thumbs.db", "Desktop.ini", "a.txt~", "#a.txt#",
               ".nfs01", ".a.txt.swp", "__MACOSX/a.txt", ".git/a.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"\0\1")
  assert textfiles.find(str(tmp_path / "*")) == [str(tmp_path / "a.txt")]
  assert textfiles.find(str(tmp_path / "**")) == [str(tmp_path / "a.txt")]
  assert textfiles.find(str(tmp_path / "a.txt~")) == [str(tmp_path / "a.txt~")]  # asked for


def test_pipes_and_home_directories_are_read(tmp_path, monkeypatch):
  reading, writing = os.pipe()
  with os.fdopen(writing, "wb") as stream:
    stream.write(UTF8)
  try:
    corpus = data.load_corpus(f"/dev/fd/{reading}", data.ByteTokenizer(), 0)
    assert bytes(corpus.train) == UTF8
  finally:
    os.close(reading)
  with pytest.raises(ValueError, match="/dev/null is neither a file nor a pipe"):
    textfiles.find("/dev/null")
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "t.txt").write_bytes(UTF8)
  for source in ("~/t.txt", "~/*.txt"):
    assert textfiles.find(source) == [str(tmp_path / "t.txt")]


@pytest.mark.parametrize("name, content", [
    ("plain", UTF8),
    ("utf-8 with a mark", codecs.BOM_UTF8 + UTF8),
    ("utf-16", TEXT.encode("utf-16")),
    ("utf-16-le", codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le")),
    ("utf-16-be", codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")),
    ("utf-32-le", codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le")),
    ("utf-32-be", codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be")),
    ("t.GZ", gzip.compress(UTF8)),
    ("two members.gz", gzip.compress(UTF8[:99]) + gzip.compress(UTF8[99:])),
    ("t.txt.bz2", bz2.compress(UTF8)),
    ("t.xz", lzma.compress(UTF8)),
    ("t.lzma", lzma.compress(UTF8, lzma.FORMAT_ALONE)),
    ("gzip under another name.txt", gzip.compress(UTF8)),
    ("another compression.gz", bz2.compress(UTF8)),
    ("utf-16.gz", gzip.compress(TEXT.encode("utf-16"))),
    ("twice.gz.bz2", bz2.compress(gzip.compress(UTF8))),
    ("no.suffix", zipped(t=UTF8)),
    ("t.tar", tarred(t=UTF8)),
    ("old.tar", without_magic(tarred(t=UTF8))),
    ("t.tar.xz", lzma.compress(tarred(t=UTF8))),
], ids=lambda value: value if isinstance(value, str) else "")
def test_text_is_read_whatever_holds_it(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  assert textfiles.read(str(tmp_path / name)) == [UTF8]


def test_zst(tmp_path):
  # RFC 8878: a raw block of three bytes, the last, in a frame that says its content's size.
  frame = b"\x28\xb5\x2f\xfd\x20\x03\x19\x00\x00abc"
  for content in (frame, b"\x50\x2a\x4d\x18\2\0\0\0xx" + frame):  # after one to skip, as pzstd's
    (tmp_path / "t.zst").write_bytes(content)
    if sys.version_info >= (3, 14):
      assert textfiles.read(str(tmp_path / "t.zst")) == [b"abc"]
    else:
      with pytest.raises(ValueError, match="t.zst cannot be .*: Python reads zst from 3.14 on"):
        textfiles.read(str(tmp_path / "t.zst"))


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_each_file_of_an_archive_is_a_document_but_for_litter(tmp_path, pack):
  members = {
      "b/one.txt": b"one", "__MACOSX/b/._one.txt": bytes(30), "b/.DS_Store": b"\0\0\0\1Bud1",
      "./a.txt": codecs.BOM_UTF8 + b"two", "Thumbs.db": b"\xd0\xcf", "desktop.ini": b"[x]",
      ".git/config": b"x", "a.txt~": b"x", "in.txt.gz": gzip.compress(b"three"),
      "in.zip": zipped(c=b"four", d=TEXT.encode("utf-16"))}
  (tmp_path / "t").write_bytes(pack(**members))
  assert textfiles.read(str(tmp_path / "t")) == [b"one", b"two", b"three", b"four", UTF8]
  corpus = data.load_corpus(str(tmp_path / "t"), data.ByteTokenizer(), 0)
  assert bytes(corpus.train) == b"\0".join([b"one", b"two", b"three", b"four", UTF8])


def nested(depth):
  return zipped(t=nested(depth - 1)) if depth else b"text"


@pytest.mark.parametrize("name, content, message", [
    ("t.txt", "café au lait".encode("latin-1"), r"at byte 3; convert .* iconv -f ITS_ENC"),
    ("t.txt", "日本".encode("shift-jis"), "t.txt is no text in UTF-8"),
    ("t.txt", UTF8 + b"\xe6\x95", f"t.txt ends within a character, at byte {len(UTF8)}; .*head -c"),
    ("t.txt", "日本".encode("iso2022-jp"), "t.txt is in ISO-2022, not UTF-8"),
    ("t.txt", "한국".encode("iso2022-kr"), "t.txt is in ISO-2022, not UTF-8"),
    ("t.txt", "ｱｲｳ".encode("iso2022-jp-ext"), "t.txt is in ISO-2022, not UTF-8"),
    ("t.txt", b"+/v8-caf+AOk-", "t.txt is in UTF-7, not UTF-8; convert .* iconv -f UTF-7 -t UTF-8"),
    ("t.txt", "1 + 1 = 2 €, größer".encode("utf-7"), "t.txt is in UTF-7"),
    ("t.txt", "数据 and text".encode("utf-7"), "t.txt is in UTF-7"),
    ("t.txt", "a~b 数据".encode("hz"), "t.txt is in HZ, not UTF-8; .*encoding='hz'"),
    ("t.lz4", b"\x04\x22\x4d\x18d@\xa7", "t.lz4 is no text but lz4; unpack it with"),
    ("t.a", b"!<arch>\na.txt/", "t.a is no text but an ar archive"),
    ("t.txt", "text".encode("utf-16-le"), "byte 1 is NUL; it looks like UTF-16LE without"),
    ("t.txt", "text".encode("utf-16-be"), "t.txt is no text: byte 0 is NUL; .* iconv -f UTF-16BE"),
    ("t.txt", TEXT.encode("utf-16-le"), "t.txt is no text in UTF-8: .* it looks like UTF-16LE"),
    ("t.txt", "text".encode("utf-32-le"), "t.txt is no text: byte 1 is NUL; .* iconv -f UTF-32LE"),
    ("t.txt", TEXT.encode("utf-32-be"), "t.txt is no text in UTF-8: .* it looks like UTF-32BE"),
    ("t.txt", codecs.BOM_UTF16_LE + b"abc", "t.txt is no text in UTF-16-LE: truncated data at .*$"),
    ("t.txt", codecs.BOM_UTF16_LE + b"\0\xd8ab", "t.txt is no text in UTF-16-LE"),
    ("t.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1", "t.png is .* looks like a binary file$"),
    ("t.elf", b"\x7fELF\2\1\1" + bytes(9) + b"\3\0\x3e\0", "byte 7 is NUL; it looks like a binary"),
    ("t.bin", pickle.dumps(["text"], 4), "t.bin is no text .* it looks like a binary file$"),
    ("t.pdf", b"%PDF-1.4\nascii", "t.pdf is no text but a PDF"),
    ("t.pdf", codecs.BOM_UTF8 + b"\n%PDF-1.4\nascii", "t.pdf is no text but a PDF"),
    ("t.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
    ("t.docx", zipped(**{"_rels/.rels": "<x/>", "[Content_Types].xml": "<x/>"}), "an Office"),
    ("t.epub", zipped(mimetype="application/epub+zip", a="<x/>"), "an Office.* or EPUB file"),
    ("t.zip", zipped(**{"a.txt": b"fine", "b.bin": b"\1\0"}), "t.zip:b.bin is no text: byte 1"),
    ("t.zip", nested(6), "cannot be unpacked: .* is within more than 4 others"),
    ("t.zip", zipped(t=UTF8)[:-30], "t.zip cannot be unpacked"),
    ("t.zip", b"<html>404</html>", "t.zip cannot be unpacked: .* is not compressed, .* rename"),
    ("t.tar", tarred(t=UTF8)[:700], "t.tar cannot be unpacked"),
    ("t.gz", gzip.compress(UTF8)[:-9], "t.gz cannot be unpacked"),
    ("t.bz2", bz2.compress(UTF8)[:-9], "t.bz2 cannot be unpacked"),
    ("t.xz", lzma.compress(UTF8)[:-9], "t.xz cannot be unpacked"),
    ("t.gz", b"\x1f\x8b\x08" + bytes(40), "t.gz cannot be unpacked"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content, message):
  (tmp_path / "a.txt").write_bytes(UTF8)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    data.load_corpus(str(tmp_path / "*"), data.ByteTokenizer(), 0.1)
  assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("text", [
    "a+b=c x+y", "Google+document", "C++ +1 555 123", "x += i; ++j; a+B+C", "a ~{b~} Fig.~{\\bf 3}",
    "[a-z]+ f(a+bcd)", "foo+Bar and foo+Baz", "~~{a}~", "\x1b(B\x1b[0m", "1+2+3000",
    '(format t "~{ab~}, ~{<li>~a</li>~}" xs)',
    "one +A00 of a long text " + "without any " * 99])
def test_plain_ascii_is_text(tmp_path, text):
  (tmp_path / "t").write_text(text)
  assert textfiles.read(str(tmp_path / "t")) == [text.encode()]


def test_archives_of_nothing_are_empty(tmp_path):
  for content in (b"", zipped(), zipped(**{".DS_Store": b"x"}), gzip.compress(b"")):
    (tmp_path / "t.zip").write_bytes(content)
    with pytest.raises(ValueError, match="t.zip is empty"):
      data.load_corpus(str(tmp_path / "t.zip"), data.ByteTokenizer(), 0.1)


def test_long_text_is_checked_a_piece_at_a_time():
  for step in (1, 2, 3, 7, 1000):
    textfiles._check_utf8(UTF8, step)
    for before in (TEXT[:n].encode() for n in range(20)):
      with pytest.raises(UnicodeDecodeError) as error:
        textfiles._check_utf8(before + b"\xff" + UTF8, step)
      assert error.value.start == len(before)
