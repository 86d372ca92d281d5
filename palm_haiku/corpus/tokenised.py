"""A tokenised directory as a corpus to train on."""

import os
import pathlib
from typing import Any

import numpy as np

from palm_haiku import data
from palm_haiku.corpus import shards

EVAL_TOKENS = 2**20  # that an evaluation reads unless another number is named


def load(source: str, tokenizer: Any, eval_tokens: int | None = None) -> data.Corpus:
  """Opens a corpus of `palm-haiku tokenize`, of which only what is held out is read.

  Args:
    source: its directory.
    tokenizer: that it must have been made with.
    eval_tokens: at most so many tokens are evaluated, the first that are held out.

  Raises:
    shards.DataError: it is damaged, not whole, or of another tokenizer.
  """
  source = os.path.expanduser(source)
  index = shards.read_index(source)
  made_with = index["tokenizer"]
  if made_with["fingerprint"] != tokenizer.fingerprint:
    raise shards.DataError(
        f"{source} was tokenised with another tokenizer than {tokenizer.name}: leave --tokenizer "
        f"out, or name {shards.tokenizer_name(source, index)}")
  train, held_out = (shards.Tokens(pathlib.Path(source), index["shards"][split], index["dtype"])
                     for split in shards.SPLITS)
  evaluated = held_out[:eval_tokens or EVAL_TOKENS]
  largest = max(shard["max_token"] for part in (train, held_out) for shard in part.shards)
  return data.Corpus(
      source, train, evaluated, made_with["eod"], _bytes_per_token(index, "train"),
      _bytes_of(held_out, len(evaluated)) / max(1, len(evaluated)), shards.fingerprint(index),
      index["loses_newlines"], largest)


def _bytes_per_token(index, split) -> float:
  total = index["totals"][split]
  return total["bytes"] / max(1, total["tokens"])


def _bytes_of(tokens: shards.Tokens, count: int) -> float:
  """The bytes of text that the first tokens stand for; of a document that is cut, a share."""
  total = 0.0
  for shard in tokens.shards:
    table = np.asarray(tokens.documents(shard))
    inside = int(np.searchsorted(table[:, 0], count, side="right"))
    total += float(table[:inside, 1].sum())
    if inside < len(table):
      start = int(table[inside - 1, 0]) if inside else 0
      return total + table[inside, 1] * (count - start) / (table[inside, 0] - start)
    count -= shard["tokens"]
  return total
