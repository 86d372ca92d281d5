"""Batches read ahead: from files, while the devices compute."""

import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

_AHEAD = 2  # batches


class Prefetch:
  """Reads the batches of the next steps in a thread.

  As a context: the thread ends with it.

  Attributes:
    waited: seconds that `__call__` has waited since it was last set to 0.
  """

  def __init__(self, read: Callable[[int], Any], last: int):
    """Starts the thread.

    Args:
      read: the batch of a step.
      last: step that no batch is read for any more.
    """
    self._read, self._last, self.waited = read, last, 0.0
    self._pool = futures.ThreadPoolExecutor(1)
    self._batches: dict[int, futures.Future] = {}

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._pool.shutdown(wait=False, cancel_futures=True)

  def __call__(self, step: int) -> Any:
    """The batch of a step; the next ones are read from now on."""
    for later in range(step, min(step + _AHEAD + 1, self._last)):
      if later not in self._batches:
        self._batches[later] = self._pool.submit(self._read, later)
    start = time.perf_counter()
    batch = self._batches.pop(step).result()
    self.waited += time.perf_counter() - start
    return batch

  def forget(self) -> None:
    """Drops what was read ahead, since other batches follow now."""
    for batch in self._batches.values():
      batch.cancel()
    self._batches.clear()
