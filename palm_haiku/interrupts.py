"""Ctrl-C before a command has begun: no traceback of whatever is being imported.

Importing this module in a command's process lets SIGINT end it at once, as it ends a program that
is not Python; `handled` gives Python its handler back. Other programs are left alone.
"""

import os
import signal
import sys
import threading


def _is_command() -> bool:
  if sys.argv[:1] == ["-m"]:  # while `python -m` looks for a module and imports its package
    module = sys.orig_argv.index("-m") + 1 if "-m" in sys.orig_argv else 0
    return sys.orig_argv[module: module + 1] == ["palm_haiku"]
  return os.path.basename(sys.argv[0] if sys.argv else "") in ("palm-haiku", "palm-haiku.exe")


def _at_once() -> bool:
  """Whether SIGINT ends the process from now on; not where it is ignored, as under nohup."""
  if (not _is_command() or threading.current_thread() is not threading.main_thread()
      or signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
    return False
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  return True


def handled() -> None:
  """Makes SIGINT a KeyboardInterrupt again."""
  if _CHANGED and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_CHANGED = _at_once()
