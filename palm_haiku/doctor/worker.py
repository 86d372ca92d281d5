"""Checks in a process of their own: one that hangs or dies is a result, and the next ones run."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

COMMAND = (sys.executable, "-m", "palm_haiku.doctor.child")


class Worker(contextlib.AbstractContextManager):
  """A process that answers requests (`child`), started when it is needed and after it was lost."""

  def __init__(self, command: tuple[str, ...] = COMMAND):
    self._command = command
    self._process: subprocess.Popen[str] | None = None
    self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
    self._errors: IO[str] | None = None

  def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The answer to a request; of one that has none, status "hung" or "died" and why."""
    process = self._process or self._start()
    assert process.stdin  # a pipe
    try:
      process.stdin.write(json.dumps(request) + "\n")
      process.stdin.flush()
      line = self._answers.get(timeout=seconds)
    except queue.Empty:
      self.stop()
      return dict(status="hung", why=f"it did not end within {seconds:.0f} s")
    except OSError:  # it is gone already
      line = ""
    if not line:
      status = process.wait()
      why = f"its process ended with {_signal(-status) if status < 0 else f'status {status}'}"
      said = self._last_words()
      self.stop()
      return dict(status="died", why=why + (f": {said}" if said else ""))
    return json.loads(line)

  def stop(self) -> None:
    """Ends the process and all that it started."""
    if self._process is None:
      return
    assert self._process.stdin and self._errors
    with contextlib.suppress(ProcessLookupError, PermissionError):
      if hasattr(os, "killpg"):
        os.killpg(self._process.pid, signal.SIGKILL)
    self._process.kill()
    self._process.wait()
    with contextlib.suppress(OSError):  # what it has not read
      self._process.stdin.close()
    self._errors.close()
    self._process, self._errors = None, None

  def __exit__(self, *_) -> None:
    self.stop()

  def _start(self) -> subprocess.Popen[str]:
    # Not all of a GPU's memory: another process may hold most of it.
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    self._errors = tempfile.TemporaryFile("w+")
    self._answers = queue.SimpleQueue()
    process = self._process = subprocess.Popen(
        self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        text=True, env=environment, start_new_session=True)

    assert process.stdout

    def read(answers=self._answers, lines=process.stdout):
      with lines:
        for line in lines:
          answers.put(line)
      answers.put("")  # its end

    threading.Thread(target=read, daemon=True).start()
    return process

  def _last_words(self) -> str:
    assert self._errors
    self._errors.seek(0)
    lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _signal(number):
  try:
    return signal.Signals(number).name
  except ValueError:
    return f"signal {number}"
