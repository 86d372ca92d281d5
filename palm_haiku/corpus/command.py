"""The command line: palm-haiku tokenize and palm-haiku data."""

import argparse
import os
import pathlib
import time
import warnings
from typing import Any

import rich.progress

from palm_haiku import terminal

_SECONDS = 10  # between two lines of progress, where there is no terminal


def add_tokenize_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of tokenize."""
  parser.add_argument("--data", required=True, nargs="+", metavar="SOURCE", help="text, JSON lines "
                      "or Parquet, also in gz, bz2, xz or zst: paths, quoted globs, directories; "
                      "or pydoc")
  parser.add_argument("--field", metavar="NAME", help="that has the text of JSON lines and Parquet "
                      "(default text)")
  parser.add_argument("--tokenizer", metavar="NAME", default="bytes", help="bytes (the default), a "
                      "SentencePiece model file or a tokenizer.json, of which the corpus keeps a "
                      "copy")
  parser.add_argument("--out", required=True, metavar="DIR", type=pathlib.Path,
                      help="directory of the corpus: a new one, or that of the same command, which "
                      "goes on where it was killed")
  parser.add_argument("--held-out", type=float, metavar="F", default=0.01, help="share of the "
                      "documents to hold out, chosen by their hash (default 0.01)")
  parser.add_argument("--shuffle", type=int, metavar="SEED", help="put the documents in a random "
                      "order (default: that of the sources)")
  parser.add_argument("--dedupe", action="store_true",
                      help="keep one of equal documents, the first")
  parser.add_argument("--shard-mb", type=float, metavar="MB", default=64, help="of the sources, "
                      "about, in a shard (default 64)")
  parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each "
                      "core)")


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of data."""
  parser.add_argument("directory", metavar="DIR", type=pathlib.Path, help="of a corpus")
  parser.add_argument("--samples", type=int, metavar="N", default=3, help="documents to show the "
                      "beginning of (default 3)")
  parser.add_argument("--seed", type=int, default=0, help="of the choice of samples (default 0)")
  parser.add_argument("--check", action="store_true", help="read every shard and compare it with "
                      "its hash")
  parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png", help="draw the lengths of "
                      "the documents")


def run(args: argparse.Namespace) -> int:
  """Runs either command; errors of the user are ValueErrors."""
  return {"tokenize": _tokenize, "data": _describe}[args.command](args)


def _describe(args) -> int:
  from palm_haiku import data
  from palm_haiku.corpus import describe, shards

  for name in ("samples", "seed"):
    if getattr(args, name) < 0:
      raise ValueError(f"--{name} must not be negative; got {getattr(args, name)}")
  if args.plot and not args.plot.parent.is_dir():
    raise ValueError(f"--plot: there is no directory {args.plot.parent}")
  console = terminal.Console()
  index = shards.read_index(args.directory)
  if args.check:
    shards.check_hashes(args.directory, index)
  lengths = describe.lengths(args.directory, index)
  for line in [*summary(index), *describe.table(index, lengths)]:
    terminal.say(console, line)
  if args.check:
    terminal.say(console, "every shard is what its hash says")
  tokenizer = data.load_tokenizer(shards.tokenizer_name(args.directory, index))
  for line in describe.samples(args.directory, index, tokenizer, args.samples, args.seed):
    terminal.say(console, line)
  if args.plot:
    describe.plot(lengths, args.plot)
  return 0


def _tokenize(args) -> int:
  from palm_haiku import data
  from palm_haiku.corpus import build

  workers = _cores() if args.workers is None else args.workers
  if workers < 1:
    raise ValueError(f"--workers must be at least 1; got {workers}")
  if not 0 < args.shard_mb < 1e9:
    raise ValueError(f"--shard-mb must be positive; got {args.shard_mb}")
  settings = build.Settings(
      tuple(args.data), args.field, args.held_out, args.shuffle, args.dedupe,
      max(1, round(args.shard_mb * 1e6)))
  console = terminal.Console()
  with _Shown(console) as shown:
    index = build.build(settings, args.tokenizer, args.out, workers=workers, show=shown)
  for line in summary(index):
    terminal.say(console, line)
  if index["loses_newlines"]:
    warnings.warn(data.losing_newlines(args.tokenizer), stacklevel=2)
  return 0


def summary(index: dict[str, Any]) -> list[str]:
  """A line for each part of a corpus."""
  lines = []
  for split, total in index["totals"].items():
    ratio = f", {total['bytes'] / total['tokens']:.2f} bytes per token" if total["tokens"] else ""
    lines.append(f"{split.replace('_', ' '):10}{total['documents']:,} documents, "
                 f"{total['tokens']:,} tokens{ratio}")
  return lines


def _cores() -> int:
  """Those that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class _Shown:
  """Progress: a bar in a terminal, elsewhere a line now and then."""

  def __init__(self, console):
    self._console, self._said, self._stage = console, time.monotonic(), None
    self._bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"), rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(), rich.progress.TextColumn("{task.fields[status]}"),
        console=console, disable=not console.is_terminal)
    self._task = self._bar.add_task("", total=None, status="")

  def __enter__(self):
    self._bar.start()
    return self

  def __exit__(self, *_):
    self._bar.stop()

  def __call__(self, progress):
    left = progress.seconds_left
    status = f"{progress.speed / 1e6:.1f} MB/s" + ("" if left is None else f", {_time(left)} left")
    name = {"encode": "tokenising", "arrange": "arranging"}[progress.stage]
    self._bar.update(self._task, description=name, total=progress.total_bytes or 1,
                     completed=progress.done_bytes, status=status)
    now = time.monotonic()
    if not self._console.is_terminal and (
        now - self._said > _SECONDS or self._stage not in (None, progress.stage)):
      share = progress.done_bytes / (progress.total_bytes or 1)
      terminal.say(self._console, f"{name}  {share:.0%}  {status}")
      self._said = now
    self._stage = progress.stage


def _time(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
