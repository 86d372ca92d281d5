"""The first run on a kind of chip that nobody has measured: kernels are checked before they train.

What a check found is remembered by the kind of chip and by versions, in the user's cache.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from palm_haiku import distributed
from palm_haiku.doctor import check, child
from palm_haiku.doctor.cases import Case
from palm_haiku.doctor.worker import Worker
from palm_haiku.hardware import MEASURED
from palm_haiku.kernels.core import dispatch

CHECK_SECONDS = 120.0
_BEGUN = dict(status="died", why="the process that checked it ended")


@contextlib.contextmanager
def checked(cases: list[Case], say: Callable[[str], None], *,
            kind: str | None = None, ask: Callable[[Case], dict] | None = None) -> Iterator[None]:
  """A context in which `auto` takes plain JAX for ops whose kernels failed their check here.

  Nothing is checked on a CPU, on a chip of a kind in `hardware.MEASURED`, or twice.

  Args:
    cases: of the kernels that are about to be used.
    say: prints a line.
    kind: JAX's name of the chip; None for that of this process.
    ask: runs a check; None for a process of its own, on a TPU for this one.
  """
  device = jax.local_devices()[0]
  on_chip = device.platform != "cpu" or kind is not None
  kind = kind or device.device_kind
  if not on_chip or kind in MEASURED:
    yield
    return
  failed = distributed.from_leader(
      lambda: _failed(cases, kind, ask or _asker(device.platform), say), ())
  with dispatch.failed(frozenset(failed)):
    yield


def _failed(cases, kind, ask, say) -> dict[str, str]:
  """{op: why} of the ops whose kernels failed."""
  memory = Memory(kind)
  todo = [case for case in cases if memory.get(case) is None]
  if todo:
    say(f"{kind}: no measured result is known of such a chip, so the kernels that are about to run "
        "are checked against XLA first, once")
  for case in todo:
    # Written before, so that a check that takes this process with it is known the next time.
    memory.put(case, _BEGUN)
    memory.put(case, ask(case))
  failed = {}
  for case in cases:
    result = memory.get(case) or {}
    if result.get("status") in ("failed", "hung", "died"):
      failed[case.op] = result["why"]
      say(f"{case.op} takes xla: its kernel failed its check on {kind} ({result['why']}); "
          "palm-haiku doctor tells more")
  return failed


def _asker(platform: str) -> Callable[[Case], dict[str, Any]]:
  if platform == "tpu":  # which belongs to one process
    return _ask_here

  def ask(case):
    with Worker() as worker:
      return worker.ask(child.request(case), CHECK_SECONDS)

  return ask


def _ask_here(case: Case) -> dict[str, Any]:
  """Checks in this process, and ends it where the check hangs."""
  def give_up():
    print(f"palm-haiku: error: the check of {case.name} did not end within {CHECK_SECONDS:.0f} s; "
          "start the command again, and that op takes xla", file=sys.stderr, flush=True)
    os._exit(1)

  alarm = threading.Timer(CHECK_SECONDS, give_up)
  alarm.daemon = True
  alarm.start()
  try:
    return check.run(case)
  finally:
    alarm.cancel()


class Memory:
  """Results of checks on one kind of chip, in a file of the user's cache.

  They count for the versions that were installed and for the kernels' source as it was. Where the
  file can't be read or written they are known to this process alone.
  """

  def __init__(self, kind: str, folder: pathlib.Path | None = None):
    self._path = (folder or _cache()) / "checks.json"
    self._key = json.dumps([kind, child.versions(), _source()], sort_keys=True)
    try:
      self._all = json.loads(self._path.read_text())
      assert isinstance(self._all.setdefault(self._key, {}), dict)
    except (OSError, ValueError, AttributeError, AssertionError):
      self._all = {self._key: {}}

  def get(self, case: Case) -> dict[str, Any] | None:
    return self._all[self._key].get(_identity(case))

  def put(self, case: Case, result: dict[str, Any]) -> None:
    self._all[self._key][_identity(case)] = result
    with contextlib.suppress(OSError):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      part = self._path.with_suffix(f".{os.getpid()}.part")
      part.write_text(json.dumps(self._all, indent=1))
      part.replace(self._path)


def _identity(case: Case) -> str:
  return json.dumps(dataclasses.asdict(case), sort_keys=True)


def _source() -> str:
  """A hash of the code of the kernels."""
  digest = hashlib.sha256()
  for path in sorted((pathlib.Path(__file__).parents[1] / "kernels").rglob("*.py")):
    digest.update(path.read_bytes())
  return digest.hexdigest()[:16]


def _cache() -> pathlib.Path:
  base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
  return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "palm-haiku"
