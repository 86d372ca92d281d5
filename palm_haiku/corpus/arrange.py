"""Duplicates dropped and documents shuffled, after they are tokenised: in memory of one shard."""

import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from palm_haiku.corpus import shards

# A shuffle moves documents from every unit to every shard: more would be files of few documents.
_MOST_SHUFFLED = 1000
_AT_ONCE = 2**22  # hashes that are sorted at one time


def num_shards(units: int, shuffle: int | None) -> int:
  """The number of shards that the documents of some units are arranged in."""
  return units if shuffle is None else min(units, _MOST_SHUFFLED)


def hashes_file(folder: pathlib.Path, split: str, unit: int) -> pathlib.Path:
  """Where uint64[D, 2], a hash of each document's text, is kept."""
  return folder / f"{split}-{unit:05d}.hashes.npy"


def mark_duplicates(folder: pathlib.Path, units: int) -> None:
  """Writes beside each unit which documents no earlier one is equal to.

  Equal documents are in the same part, which their hash has chosen.
  """
  for split in shards.SPLITS:
    files = {unit: path for unit in range(units)
             if (path := hashes_file(folder, split, unit)).exists()}
    sizes = {unit: len(np.load(path, mmap_mode="r")) for unit, path in files.items()}
    keep = {unit: np.ones(size, bool) for unit, size in sizes.items()}
    parts = -(-sum(sizes.values()) // _AT_ONCE)
    for part in range(parts):
      for unit, document in _repeated(files, part, parts):
        keep[unit][document] = False
    for unit, path in files.items():
      shards.write_array(_keep_file(path), keep[unit])


def _repeated(files, part, parts) -> Iterator[tuple[int, int]]:
  """The documents, by unit and number, whose hash another one had before; those of one part."""
  hashes, places = [], []
  for unit, path in files.items():
    rows = np.load(path)
    chosen = np.flatnonzero(rows[:, 0] % np.uint64(parts) == part)
    hashes.append(rows[chosen])
    places.append(np.stack([np.full(len(chosen), unit), chosen], 1))
  rows, order = np.concatenate(hashes), np.concatenate(places)
  sort = np.lexsort((rows[:, 1], rows[:, 0]))  # stable: the first of equals is the earliest
  rows, order = rows[sort], order[sort]
  again = np.flatnonzero((rows[1:] == rows[:-1]).all(1)) + 1
  yield from map(tuple, order[again].tolist())


def _keep_file(hashes):
  return hashes.with_name(hashes.name.replace(".hashes", ".keep"))


def gather(source: shards.Tokens, split: str, number: int, count: int, shuffle: int | None,
           writer: shards.ShardWriter, report: Callable[[int], None]) -> None:
  """Copies the documents that belong in a shard.

  Args:
    source: of all units, one shard each, whose names end with the unit's number.
    split: the part.
    number: of the shard.
    count: of the shards.
    shuffle: seed of the order; None for the documents of the unit of this number, in their order.
    writer: of the shard.
    report: receives the bytes of each document's text.
  """
  rows, first = [], 0
  for shard in source.shards:
    unit = int(shard["name"].rpartition("-")[2])
    if shuffle is not None or unit == number:
      rows.append(_chosen(source, shard, first, split, unit, number, count, shuffle))
    first += shard["tokens"]
  table = np.concatenate([np.zeros((0, 3), np.int64), *rows])
  if shuffle is not None:
    table = np.random.default_rng((shuffle, _index(split), number, 1)).permutation(table)
  for start, stop, num_bytes in itertools.chain.from_iterable(
      table[k: k + 4096].tolist() for k in range(0, len(table), 4096)):
    writer.add(source[start: stop - 1], num_bytes)
    report(num_bytes)


def _chosen(source, shard, first, split, unit, number, count, shuffle) -> np.ndarray:
  """int64[D, 3]: where a unit's documents for a shard begin and end, and their bytes of text."""
  documents = np.asarray(source.documents(shard))
  ends = documents[:, 0]
  table = np.stack([first + np.concatenate([[0], ends[:-1]]), first + ends, documents[:, 1]], 1)
  wanted = np.ones(len(table), bool)
  keep = _keep_file(hashes_file(source.directory, split, unit))
  if keep.exists():
    wanted = np.load(keep)
  if shuffle is not None:
    generator = np.random.default_rng((shuffle, _index(split), unit, 0))
    wanted = wanted & (generator.integers(count, size=len(table)) == number)
  return table[wanted]


def _index(split):
  return shards.SPLITS.index(split)


def entries(notes: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
  """The shards of a part that some units have."""
  return [note[split] for note in notes if note[split]]
