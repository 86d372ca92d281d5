"""Output for people and shells: literal text, commands that can be pasted, readers that leave."""

import contextlib
import io
import os
import shlex
import signal
import sys
import threading
import warnings

import rich.console

BROKEN_PIPE = 128 + 13  # the exit status of a process that SIGPIPE ended


class Console(rich.console.Console):
  """A console without markup: brackets, colons and digits of a text are printed as they are."""

  def __init__(self, *, enduring: bool = False, **options):
    """Opens standard output.

    Args:
      enduring: output that can't be written is no error: `lost` says why, and silence follows.
      **options: of rich's console.
    """
    super().__init__(markup=False, emoji=False, highlight=False, **options)
    self.lost: str | None = None
    self._enduring = enduring

  def print(self, *objects, **options) -> None:
    """Prints; see rich."""
    try:
      super().print(*objects, **options)
    except OSError as error:
      if not self._enduring:
        raise
      self.quiet, self.lost = True, error.strerror
      _discard(self.file)

  def on_broken_pipe(self) -> None:
    """Raises the error, in place of rich's SystemExit."""
    raise


def say(console: rich.console.Console, text: str = "", style: str | None = None) -> None:
  """Prints lines as they are: neither interpreted nor wrapped, on any console."""
  console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def quoted(argument: str | os.PathLike) -> str:
  """An argument of a command as a shell reads it; a path is never taken for an option.

  Characters that this terminal can't show are written as bash, zsh and POSIX.1-2024 shells read
  them: $'\\xc3\\xa9'.
  """
  text = os.fspath(argument)
  if isinstance(argument, os.PathLike) and text.startswith("-"):
    text = "./" + text
  try:
    text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    shown = text.isprintable()
  except UnicodeEncodeError:
    shown = False
  if shown:
    return shlex.quote(text)
  return "$'" + "".join(
      chr(byte) if 0x20 <= byte < 0x7F and chr(byte) not in "'\\" else f"\\x{byte:02x}"
      for byte in os.fsencode(text)) + "'"


def prepare() -> None:
  """Makes standard output and error take any text, whatever their encoding, and if closed, too."""
  for number in (0, 1, 2):
    try:
      os.fstat(number)
    except OSError:  # Or the next file that is opened would get what is printed.
      os.dup2(os.open(os.devnull, os.O_RDWR), number)
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")


def flush() -> None:
  """Writes what is still buffered, so that an error of it is not one of the interpreter's end."""
  for stream in (sys.stdout, sys.stderr):
    if stream is not None and not stream.closed:
      stream.flush()


def abandon() -> int:
  """Lets the process end without a word when nobody reads its output; returns the exit status."""
  _discard(sys.stdout)
  return BROKEN_PIPE


def warn_in_lines(prefix: str) -> None:
  """Shows warnings as one line each, without the source line that they come from."""
  def show(message, category, filename, lineno, file=None, line=None):
    print(f"{prefix}: warning: {one_line(message)}", file=file or sys.stderr)

  warnings.showwarning = show


def one_line(text: object) -> str:
  """A text without line breaks."""
  return " ".join(part.strip() for part in str(text).splitlines() if part.strip())


def size(count: float) -> str:
  """Bytes in the unit that leaves one to four digits before the point."""
  for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
    if abs(count) < 1024 or unit == "TiB":
      break
    count /= 1024
  return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.2f} {unit}"


def _discard(stream):
  """Points a stream at nothing, so that what it still holds is no error at the end."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def as_a_filter():
  """Lets Ctrl-C, and a reader that goes away, end the process at once.

  While XLA computes, Python handles no signal; and an error of `print` would come out of XLA as
  the traceback of a callback.
  """
  before = {}
  if threading.current_thread() is threading.main_thread():  # No other may set signals.
    signals = [getattr(signal, name, None) for name in ("SIGINT", "SIGPIPE")]  # Windows: no SIGPIPE
    before = {one: signal.signal(one, signal.SIG_DFL) for one in signals if one is not None}
  try:
    yield
  finally:
    for one, handler in before.items():
      signal.signal(one, handler)


@contextlib.contextmanager
def ending_at_errors():
  """Ends the process with a line when output fails where XLA would make a traceback of it."""
  try:
    yield
  except OSError as error:
    print(f"palm-haiku generate: error: standard output: {error.strerror}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
