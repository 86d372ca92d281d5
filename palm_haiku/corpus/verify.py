"""Shards compared with their hashes: before a run begins, or beside it where they are many."""

import pathlib
import threading
from collections.abc import Iterable
from typing import Any

from palm_haiku import data
from palm_haiku.corpus import shards

_BEFORE = 2**30  # bytes of shards that are read before a run begins, in about a second


class Verification:
  """Reads every shard of some corpora once.

  As a context: what is not read yet at the end is left out.
  """

  def __init__(self):
    """Reads nothing yet."""
    self._indices: list[tuple[pathlib.Path, dict[str, Any]]] = []
    self._problem: Exception | None = None
    self._ended = False

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._ended = True

  def begin(self, corpora: Iterable[data.Corpus]) -> None:
    """Reads the shards of those that are tokenised, or begins to; raises as `raise_problem`."""
    paths = [corpus.train.directory for corpus in corpora
             if isinstance(corpus.train, shards.Tokens)]
    self._indices = [(path, shards.read_index(path)) for path in paths]
    if sum(shards.size(index) for _, index in self._indices) <= _BEFORE:
      self._check()
      self.raise_problem()
    else:
      threading.Thread(target=self._check, daemon=True).start()

  def raise_problem(self) -> None:
    """Raises `DataError` if a shard that was read is not what its hash says."""
    if self._problem is not None:
      raise self._problem

  def _check(self):
    try:
      for path, index in self._indices:
        shards.check_hashes(path, index, is_wanted=lambda: not self._ended)
    except (shards.DataError, OSError) as error:
      self._problem = error
