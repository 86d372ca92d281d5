"""Mixtures: sequences of several corpora in turn, by weight."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from palm_haiku import data
from palm_haiku.corpus.packing import Packed


def parse(source: str) -> list[tuple[str, Fraction]]:
  """The sources of a mixture and their shares; a source that is none is all of it.

  Args:
    source: as for `data.load_corpus`, or SOURCE:WEIGHT,SOURCE:WEIGHT,...

  Raises:
    ValueError: a weight that is not positive, or missing.
  """
  if os.path.lexists(os.path.expanduser(source)):
    return [(source, Fraction(1))]
  pieces = [part.strip().rpartition(":") for part in source.split(",")]
  weights = [_number(text) if name else None for name, _, text in pieces]
  if all(weight is None for weight in weights):
    return [(source, Fraction(1))]
  parts = []
  for (name, _, text), weight in zip(pieces, weights):
    if weight is None:
      raise ValueError(f"a mixture is written SOURCE:WEIGHT,SOURCE:WEIGHT; got {source!r}")
    if not isinstance(weight, Fraction) or weight <= 0:
      raise ValueError(f"the weight of {name} must be positive and finite; got {text}")
    parts.append((name, weight))
  total = sum(weight for _, weight in parts)
  return [(name, weight / total) for name, weight in parts]


def _number(text: str) -> Fraction | float | None:
  """A number as exact as it is written, a float if it is not finite; None for what is none."""
  try:
    return Fraction(text)
  except ZeroDivisionError:
    return math.inf
  except ValueError:
    pass
  try:
    return float(text)
  except ValueError:
    return None


def turn(k: int, proportions: Sequence[int]) -> tuple[int, int]:
  """Which of some endless sequences gives the k-th element of their mixture, and which of its own.

  After any number of elements each sequence has given its share but for less than one element for
  each sequence before it; the shares are exact in the long run. (The interleaving of
  `grain.MapDataset.mix`, which rounds the shares to about a hundredth of the smallest.)

  Args:
    k: from 0.
    proportions: of the sequences, in whole numbers.
  """
  remaining, before, after = sum(proportions), k, k + 1
  for number, share in enumerate(proportions):
    rest = before * (remaining - share) // remaining, after * (remaining - share) // remaining
    if after - rest[1] != before - rest[0]:
      return number, before - rest[0]
    remaining -= share
    before, after = rest
  raise AssertionError(f"no sequence has the turn {k}")


class _Turns:
  """The sequences of a mixture."""

  def __init__(self, windows, proportions):
    self._windows, self._proportions = windows, proportions

  @property
  def padding(self) -> float:
    """As of `packing.Packed`: the mean by share."""
    shares = zip(self._windows, self._proportions)
    return sum(part.padding * n for part, n in shares) / sum(self._proportions)

  def __getitem__(self, k):
    number, place = turn(k, self._proportions)
    return self._windows[number][place]


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The corpora that a run reads, each with its share of the sequences; shares add up to 1."""

  parts: tuple[tuple[data.Corpus, Fraction], ...]

  @property
  def fingerprint(self) -> str:
    """Of the corpora and their shares; of one alone, its own."""
    if len(self.parts) == 1:
      return self.parts[0][0].fingerprint
    said = [[corpus.fingerprint, str(share)] for corpus, share in self.parts]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

  @property
  def loses_newlines(self) -> bool:
    """Whether a text has line breaks that its tokens lack."""
    return any(corpus.loses_newlines for corpus, _ in self.parts)

  @property
  def max_token(self) -> int:
    """The largest token of all."""
    return max(corpus.max_token for corpus, _ in self.parts)

  @property
  def eod(self) -> int:
    """The token that ends documents, the same in all."""
    return self.parts[0][0].eod

  @property
  def held_out(self) -> list[tuple[data.Corpus, Fraction]]:
    """The parts that hold anything out."""
    return [(corpus, share) for corpus, share in self.parts if len(corpus.eval) > 1]

  @property
  def train_bytes_per_token(self) -> float:
    """Of the sequences that are trained on."""
    return float(sum(share * corpus.train_bytes_per_token for corpus, share in self.parts))

  @property
  def eval_bytes_per_token(self) -> float:
    """The mean over what is held out, by share."""
    return self.mean_held_out(lambda corpus: corpus.eval_bytes_per_token)

  def mean_held_out(self, value: Callable[[data.Corpus], float]) -> float:
    """The mean of a number over the parts that hold anything out, by share."""
    total = float(sum(share for _, share in self.held_out))
    return sum(float(share) * value(corpus) for corpus, share in self.held_out) / total

  def windows(self, *, seq_len: int, seed: int, eod: int | None = None,
              packing: str = "end-to-end") -> Any:
    """Endless training sequences, by number.

    Args:
      seq_len, seed: see `data.windows`.
      eod: end-of-document token, for segment ids; None for none.
      packing: "end-to-end" for `data.windows`, "best-fit" for `packing.Packed`.
    """
    if packing == "best-fit":
      windows = [Packed(corpus.train, seq_len=seq_len, seed=seed, eod=corpus.eod,
                        mask=eod is not None) for corpus, _ in self.parts]
    else:
      windows = [data.windows(corpus.train, seq_len=seq_len, seed=seed, eod=eod)
                 for corpus, _ in self.parts]
    if len(windows) == 1:
      return windows[0]
    scale = math.lcm(*(share.denominator for _, share in self.parts))
    return _Turns(windows, [int(share * scale) for _, share in self.parts])


def load(source: str, tokenizer: Any, eval_fraction: float,
         eval_tokens: int | None = None) -> Mixture:
  """Opens the corpora of a source.

  Args:
    source: see `parse`.
    tokenizer, eval_fraction, eval_tokens: see `data.load_corpus`.

  Raises:
    ValueError: as `parse` and `data.load_corpus`.
  """
  return Mixture(tuple((data.load_corpus(name, tokenizer, eval_fraction, eval_tokens), share)
                       for name, share in parse(source)))


def tokenizer_name(source: str) -> str | None:
  """The tokenizer of the first tokenised corpus that a source names; None without one."""
  from palm_haiku.corpus import shards

  for name, _ in parse(source):
    if shards.is_corpus(name):
      return shards.tokenizer_name(name, shards.read_index(name))
  return None
