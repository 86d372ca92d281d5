"""Packing: sequences of whole documents, best fit, in an order that seed and epoch decide.

A sequence of `seq_len` targets holds documents that fit together, and padding behind them. Which
lengths go together follows from a histogram of the lengths, so that packing costs the same for a
thousand documents and for a million; which of the documents of a length, from seed and epoch.

Documents are packed in groups: chunks of neighbours, drawn from all over the corpus. A group has as
many sequences in every epoch, so that a sequence is found by its number with two groups in memory.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from palm_haiku.corpus.shards import DataError

_CHUNK = 2**8  # documents that are in one group, at most
_GROUP = 2**18  # documents, and sequences of those longer than one, about


class Strategy(NamedTuple):
  """Sequences that are filled alike."""

  sequences: int
  parts: tuple[tuple[int, int], ...]  # a size, and how many of it each sequence has


def best_fit(counts: Sequence[int] | np.ndarray, room: int) -> list[Strategy]:
  """Packs sizes into sequences, each size, largest first, where the least room is left behind it.

  Args:
    counts: int[room + 1], how many there are of each size; those of size 0 take no place.
    room: of a sequence.
  """
  open_: dict[int, list[Strategy]] = {}  # by the room that is left
  rooms: list[int] = []  # keys of `open_`, sorted

  def put_back(left, strategy):
    if left not in open_:
      bisect.insort(rooms, left)
    open_.setdefault(left, []).append(strategy)

  for size in range(room, 0, -1):
    count = int(counts[size])
    while count:
      place = bisect.bisect_left(rooms, size)
      if place == len(rooms):
        left, before = room, Strategy(count, ())  # as many new ones as could be needed
      else:
        left = rooms[place]
        before = open_[left].pop()
        if not open_[left]:
          del open_[left], rooms[place]
      # The tightest sequence stays the tightest until no other of this size fits into it.
      times = min(left // size, count)
      used = min(before.sequences, count // times)
      put_back(left - times * size, Strategy(used, (*before.parts, (size, times))))
      if before.parts and used < before.sequences:
        put_back(left, before._replace(sequences=before.sequences - used))
      count -= used * times
  return [strategy for left in rooms for strategy in open_[left]]


class _Documents:
  """Where the documents of a stream of tokens end, shard by shard."""

  def __init__(self, tokens, eod):
    self._tokens, self._ends = tokens, None
    if hasattr(tokens, "shards"):
      self.counts = np.array([shard["documents"] for shard in tokens.shards])
      sizes = np.array([shard["tokens"] for shard in tokens.shards])
    else:
      ends = np.flatnonzero(tokens == eod) + 1
      if not len(ends) or ends[-1] < len(tokens):
        ends = np.append(ends, len(tokens))  # The last document of a text is cut from the rest.
      self._ends, self.counts, sizes = ends, np.array([len(ends)]), np.array([len(tokens)])
    self.sizes, self.first = sizes, np.cumsum(sizes) - sizes
    self.mean = sizes / self.counts

  def spans(self, shard: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where some of a shard's documents begin, and how many tokens they have.

    Args:
      shard: its number.
      numbers: int64[D], of the documents within the shard.

    Returns:
      int64[D] twice.
    """
    ends = self._ends
    if ends is None:  # a file that is mapped, of which the pages of these documents are read
      ends = self._tokens.documents(self._tokens.shards[shard])[:, 0]
    begins = np.where(numbers > 0, ends[numbers - 1], 0)
    return self.first[shard] + begins, ends[numbers] - begins


class _Layout(NamedTuple):
  """The sequences of a group in one epoch, in the order in which they are seen."""

  begins: np.ndarray  # int64[D]
  lengths: np.ndarray  # int64[D]
  packed: np.ndarray  # int[P], the documents of one packed sequence after the other
  offsets: np.ndarray  # int[S + 1], where each packed sequence begins in `packed`
  pieces: np.ndarray  # int64[D], whole sequences that this and earlier documents fill alone
  order: np.ndarray  # int[S + pieces[-1]], of packed sequences and then of those


class Packed:
  """Endless training sequences of whole documents, by number.

  `packed[k]` depends on k and the arguments alone. Each token is the target of one sequence in an
  epoch. A document of more than `seq_len` tokens fills sequences alone, and what is left of it is
  packed like a document, behind the token before.

  Attributes:
    padding: share of the targets that stand for nothing.
  """

  def __init__(self, tokens: Any, *, seq_len: int, seed: int, eod: int, mask: bool):
    """Reads the lengths of all documents.

    Args:
      tokens: an array, or `corpus.shards.Tokens`, of documents that end with `eod`.
      seq_len: tokens that a model reads.
      seed: of the groups, of the documents in a sequence, and of the order.
      eod: end-of-document token; the first input of a sequence, and its padding.
      mask: whether sequences have segment ids.

    Raises:
      ValueError: there is no document, or where documents end is damaged.
    """
    if not len(tokens):
      raise ValueError("the training data have no tokens")
    self._tokens, self._seq_len, self._seed = tokens, seq_len, seed
    self._eod, self._mask = eod, mask
    self._documents = documents = _Documents(tokens, eod)
    chunks = -(-documents.counts // _CHUNK)
    self._first_chunk = np.cumsum(chunks) - chunks
    self._groups = self._draw_groups(chunks)
    self._counts = np.zeros((self._groups.max() + 1, seq_len + 1), np.int64)
    self._sequences = np.zeros(len(self._counts), np.int64)
    for shard in range(len(documents.counts)):
      self._count(shard)
    self._sequences += [sum(strategy.sequences for strategy in best_fit(counts, seq_len))
                        for counts in self._counts]
    self._total = int(self._sequences.sum())
    self.padding = 1 - len(tokens) / (self._total * seq_len)
    self._epoch = functools.lru_cache(2)(self._arrange)
    self._layout = functools.lru_cache(2)(self._pack)

  def __len__(self) -> int:
    """The number of sequences in an epoch."""
    return self._total

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    """{"tokens": int32[T + 1], "weights": float32[T], 0 where a target is padding or repeated}.

    If documents are masked, also "segment_ids": int32[T + 1].
    """
    epoch, place = divmod(k, self._total)
    groups, ends = self._epoch(epoch)
    position = int(np.searchsorted(ends, place, side="right"))
    group = int(groups[position])
    layout = self._layout(group, epoch)
    number = int(layout.order[place - int(ends[position] - self._sequences[group])])
    num_packed = len(layout.offsets) - 1
    row = {"tokens": np.full(self._seq_len + 1, self._eod, np.int32),
           "weights": np.zeros(self._seq_len, np.float32),
           "segment_ids": np.zeros(self._seq_len + 1, np.int32)}
    if number < num_packed:
      self._fill(row, layout, layout.packed[layout.offsets[number]: layout.offsets[number + 1]])
    else:
      self._fill_alone(row, layout, number - num_packed)
    if not self._mask:
      del row["segment_ids"]
    return row

  def _fill(self, row, layout, documents):
    """Puts the ends of some documents, mostly all of them, into a row behind the first token."""
    at = 1
    for segment, document in enumerate(documents, 1):
      end = int(layout.begins[document] + layout.lengths[document])
      rest, repeated = _rest(int(layout.lengths[document]), self._seq_len)
      size = rest + repeated
      row["tokens"][at: at + size] = self._tokens[end - size: end]
      row["weights"][at - 1 + repeated: at - 1 + size] = 1
      row["segment_ids"][at: at + size] = segment
      at += size
    row["segment_ids"][at:] = len(documents) + 1

  def _fill_alone(self, row, layout, number):
    """Fills a row with a part of one document."""
    document = int(np.searchsorted(layout.pieces, number, side="right"))
    piece = number - (int(layout.pieces[document - 1]) if document else 0)
    begin = int(layout.begins[document]) + piece * self._seq_len
    before = min(piece, 1)  # the token before is of this document, or ends another
    row["tokens"][1 - before:] = self._tokens[begin - before: begin + self._seq_len]
    row["weights"][:] = 1
    row["segment_ids"][1 - before:] = 1

  def _draw_groups(self, chunks) -> np.ndarray:
    """int64[C]: the group of each chunk, for about as much in each."""
    documents, load = self._documents, []
    for count, number, mean in zip(documents.counts, chunks, documents.mean):
      sizes = np.full(number, _CHUNK)
      sizes[-1] = count - (number - 1) * _CHUNK
      load.append(sizes * (1 + mean / self._seq_len))
    load = np.concatenate(load)
    order = np.random.default_rng(self._seed).permutation(len(load))
    before = np.cumsum(load[order]) - load[order]
    total = load.sum()
    groups = np.empty(len(load), np.int64)
    groups[order] = before * max(1, round(total / _GROUP)) // total
    return groups

  def _count(self, shard):
    """Counts a shard's documents, by group and size."""
    numbers = np.arange(int(self._documents.counts[shard]))
    groups = self._groups[self._first_chunk[shard] + numbers // _CHUNK]
    lengths = self._documents.spans(shard, numbers)[1]
    if lengths.min() < 1 or lengths.sum() != self._documents.sizes[shard]:
      # Its hash would say so, but those of many shards are compared beside the run.
      name = self._tokens.directory / self._tokens.shards[shard]["name"]
      raise DataError(f"{name}.documents.npy is damaged: its documents are not those of the shard; "
                      "restore it or tokenise again")
    rest, repeated = _rest(lengths, self._seq_len)
    np.add.at(self._counts, (groups, rest + repeated), 1)
    np.add.at(self._sequences, groups, lengths // self._seq_len)

  def _arrange(self, epoch) -> tuple[np.ndarray, np.ndarray]:
    """The order of the groups in an epoch, and where each one's sequences end."""
    groups = np.random.default_rng((self._seed, epoch)).permutation(len(self._sequences))
    return groups, np.cumsum(self._sequences[groups])

  def _pack(self, group, epoch) -> _Layout:
    """Packs a group: which document of a length goes where depends on the epoch."""
    chunks = np.flatnonzero(self._groups == group)
    shards, spans = np.searchsorted(self._first_chunk, chunks, side="right") - 1, []
    for shard in np.unique(shards):
      firsts = (chunks[shards == shard] - self._first_chunk[shard]) * _CHUNK
      numbers = (firsts[:, None] + np.arange(_CHUNK)).ravel()
      spans.append(self._documents.spans(
          int(shard), numbers[numbers < self._documents.counts[shard]]))
    begins, lengths = (np.concatenate(parts) for parts in zip(*spans))
    rest, repeated = _rest(lengths, self._seq_len)
    sizes = rest + repeated
    generator = np.random.default_rng((self._seed, epoch, group))
    order = generator.permutation(len(lengths))
    order = order[np.argsort(sizes[order], kind="stable")]
    next_ = np.searchsorted(sizes[order], np.arange(self._seq_len + 1))
    packed, widths = [np.zeros(0, np.int64)], [np.zeros(1, np.int64)]
    for number, parts in best_fit(self._counts[group], self._seq_len):
      columns = []
      for size, times in parts:
        taken = order[next_[size]: next_[size] + number * times]
        columns.append(taken.reshape(number, times))
        next_[size] += number * times
      block = generator.permuted(np.concatenate(columns, 1), axis=1)
      packed.append(block.ravel())
      widths.append(np.full(number, block.shape[1]))
    return _Layout(begins, lengths, np.concatenate(packed), np.cumsum(np.concatenate(widths)),
                   np.cumsum(lengths // self._seq_len),
                   generator.permutation(self._sequences[group]))


def _rest(length: Any, seq_len: int) -> tuple[Any, Any]:
  """Tokens of a document that fill no sequence, and the token before them if there is one.

  That one is an input and no target: it has been one.
  """
  rest = length % seq_len
  return rest, np.minimum(length // seq_len, 1) * np.minimum(rest, 1)
