"""A corpus for people: lengths of documents, and samples of their text."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from palm_haiku import plotting, terminal
from palm_haiku.corpus import shards

_SHOWN = 200  # characters of a sample
_BAR = 40  # characters of the longest bar


def lengths(source: str | os.PathLike, index: dict[str, Any]) -> np.ndarray:
  """int64[65]: how many training documents have from 2^k to 2^(k + 1) - 1 tokens, for each k."""
  tokens = shards.tokens_of(source, index, "train")
  counts = np.zeros(65, np.int64)
  for shard in tokens.shards:
    sizes = np.diff(tokens.documents(shard)[:, 0], prepend=0)
    counts += np.bincount(np.frexp(sizes.astype(np.float64))[1] - 1, minlength=65)
  return counts


def table(index: dict[str, Any], counts: np.ndarray) -> list[str]:
  """Lines on the form of a corpus, and the histogram of its documents' lengths."""
  parts = [len(index["shards"][split]) for split in shards.SPLITS]
  lines = [f"{'tokenizer':10}{index['tokenizer']['name']}, {index['tokenizer']['num_tokens']:,} "
           f"tokens, {index['tokenizer']['eod']} ends a document",
           f"{'shards':10}{sum(parts):,} of {index['dtype']}, "
           f"{terminal.size(shards.size(index))}", "",
           "tokens of a training document"]
  present = np.flatnonzero(counts)
  width = max(len(f"{2 ** (int(k) + 1) - 1:,}") for k in present)
  for k in range(int(present[0]), int(present[-1]) + 1):
    bar = "#" * round(_BAR * int(counts[k]) / int(counts.max()))
    lines.append(f"  {2**k:{width},} to {2 ** (k + 1) - 1:{width},}  {int(counts[k]):12,}  {bar}"
                 .rstrip())
  return lines


def samples(source: str | os.PathLike, index: dict[str, Any], tokenizer: Any, count: int,
            seed: int) -> Iterator[str]:
  """The beginnings of some training documents, a line each."""
  for tokens in shards.samples(shards.tokens_of(source, index, "train"), count, seed):
    text = tokenizer.decode(tokens[:-1][:4 * _SHOWN])
    shown = terminal.one_line(text[:_SHOWN])
    yield ""
    yield f"{len(tokens):,} tokens: {shown}{'...' if len(text) > _SHOWN else ''}"


def plot(counts: np.ndarray, path: pathlib.Path) -> None:
  """Draws the histogram."""
  present = np.flatnonzero(counts)
  span = np.arange(present[0], present[-1] + 1)
  with plotting.defaults() as Figure:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(2.0**span, counts[span], width=2.0**span, align="edge", edgecolor="white")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of a document", ylabel="documents")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
