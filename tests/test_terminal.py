import io
import os
import pathlib
import subprocess
import sys
import warnings

import pytest
import rich.console
import rich.table

from palm_haiku import failures, terminal

ODD = ["runs/[lr=3e-3] a", "[/old]/run", ":car: 5", "it's", pathlib.Path("-out"), "a\tb", "a\nb",
       "$HOME `x` \\", "héλ", os.fsdecode(b"\xff[bold]"), "~/x"]


@pytest.mark.parametrize("console", [terminal.Console, rich.console.Console])
def test_text_is_printed_as_it_is(console):
  stream = io.StringIO()
  console = console(file=stream, width=20)
  for text in ("[bold]a[/] :car: [/x]", "x" * 50, "step [1/2] 'a' 3.5"):
    terminal.say(console, text)
    assert stream.getvalue() == text + "\n"
    stream.truncate(stream.seek(0))


def test_cells_of_tables_are_printed_as_they_are():
  stream = io.StringIO()
  table = rich.table.Table("[/a]", box=None)
  table.add_row("[bold]b :car:")
  terminal.Console(file=stream, width=40).print(table)
  assert stream.getvalue().split() == ["[/a]", "[bold]b", ":car:"]


def test_arguments_can_be_pasted():
  command = "printf '%s\\0' " + " ".join(map(terminal.quoted, ODD))
  assert "\n" not in command and "\t" not in command
  pasted = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
  want = [os.fsencode("./-out" if text == pathlib.Path("-out") else text) for text in ODD]
  assert pasted.split(b"\0")[:-1] == want
  assert terminal.quoted(pathlib.Path("runs/first")) == "runs/first"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8", "utf-16"])
def test_every_encoding_takes_every_text(encoding, monkeypatch):
  stream = io.TextIOWrapper(io.BytesIO(), encoding)
  monkeypatch.setattr(sys, "stdout", stream)
  monkeypatch.setattr(sys, "stderr", None)  # As Python has it when the descriptor is closed.
  terminal.prepare()
  print("λ \ufffd \udcff", flush=True)
  terminal.say(terminal.Console(), "λ")
  terminal.flush()
  shown = stream.buffer.getvalue().decode(encoding)
  assert "\\udcff" in shown and ("λ" in shown) == encoding.startswith("utf")
  quoted = terminal.quoted("é λ")
  assert quoted.isascii() == (encoding in ("cp1252", "ascii"))
  assert subprocess.run(["bash", "-c", "printf %s " + quoted], capture_output=True).stdout == (
      "é λ".encode())


def test_output_that_nobody_reads():
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as stream:
    with pytest.raises(BrokenPipeError):
      terminal.say(terminal.Console(file=stream), "a")
    console = terminal.Console(file=stream, enduring=True)
    assert console.lost is None
    terminal.say(console, "a")
    terminal.say(console, "b")
    assert console.lost == "Broken pipe"


def test_warnings_are_lines(capsys):
  with warnings.catch_warnings():
    warnings.simplefilter("always")
    terminal.warn_in_lines("tool")
    warnings.warn("two\n  lines", stacklevel=1)
  assert capsys.readouterr().err == "tool: warning: two lines\n"


@pytest.mark.parametrize("count, text", [
    (0, "0 B"), (1000, "1,000 B"), (4512, "4.41 KiB"), (2**20, "1.00 MiB"),
    (1.5 * 2**30, "1.50 GiB"), (2**52, "4,096.00 TiB")])
def test_sizes_have_a_unit_that_shows_them(count, text):
  assert terminal.size(count) == text


@pytest.mark.parametrize("error, command, message", [
    (MemoryError(), "train", "out of memory .Python has none left.: --accumulate, --remat full"),
    (MemoryError("std::bad_alloc"), "convert", "out of memory .std::bad_alloc.: it needs a mach"),
    (RuntimeError("INTERNAL: Out of memory allocating 16 bytes."), "generate", "--weights int8"),
    (RuntimeError("RESOURCE_EXHAUSTED: x\ny"), "plan", "out of memory .RESOURCE_EXHAUSTED: x y.:"),
    (OSError(12, "Cannot allocate memory"), "train", "out of memory"),
    (OverflowError("Python int too large"), "train", "a number is too large: Python int"),
    (PermissionError(13, "Permission denied", "/x/[a]"), "train", r"^/x/\[a\]: Permission denied$"),
    (ModuleNotFoundError("No module named 'x'"), "train", "No module named 'x'; a package"),
])
def test_errors_are_lines(error, command, message):
  line = failures.line(error, command)
  with pytest.raises(ValueError, match=message):
    raise ValueError(line)
  assert "\n" not in line


def test_mistakes_keep_their_traceback():
  assert failures.line(KeyError("x"), "train") is None
  assert failures.line(RuntimeError("x"), "train") is None
