"""State of JAX's interpreters of Mosaic's kernels: memory, and races that were found."""

import functools
from collections.abc import Callable
from typing import Any

from jax._src.pallas.mosaic.interpret import race_detection_state

_found = []
_resets = []


@functools.cache
def watch(reset: Callable[[], None]) -> None:
  """Counts the races of an interpreter, whose state `reset` forgets."""
  if not _resets:
    # 0.11 prints a race and keeps the news until the next kernel; 0.12 raises.
    state: Any = race_detection_state.RaceDetectionState
    state.races_found = property(
        lambda self: bool(_found), lambda self, found: _found.append(True) if found else None)
  _resets.append(reset)
  reset()


def reset() -> bool:
  """Whether there was a race since this was last called. Also frees what failed kernels hold."""
  for forget in _resets:
    forget()
  raced = bool(_found)
  _found.clear()
  return raced
