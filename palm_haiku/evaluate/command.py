"""The command line: palm-haiku eval."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
import warnings
from typing import Any, NamedTuple

import jax
import rich.progress
import rich.table

from palm_haiku import data, distributed, evaluate, kernels, pretrained, terminal
from palm_haiku.corpus import mixture
from palm_haiku.evaluate import Evaluation, Text, draw
from palm_haiku.recipe import TrainConfig

_LENGTH = 1024  # where nothing says at which length a model was trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """All options but those of the kernels."""
  path = lambda text: pathlib.Path(os.path.expanduser(text))
  parser.add_argument("models", type=path, nargs="+", metavar="DIR", help="directory of a run or "
                      "of a model of the Hugging Face hub")
  parser.add_argument("--data", metavar="SOURCE", help="text, as for train: of a run's own data "
                      "what it held out, else all of it (default: the run's data)")
  parser.add_argument("--seq-len", metavar="N,...", help="lengths of the sequences (default: the "
                      f"one that the model was trained at, or {_LENGTH})")
  parser.add_argument("--stride", type=int, metavar="N", help="tokens from one sequence to the "
                      "next, of which each then counts the last N (default: the length)")
  parser.add_argument("--batch-tokens", type=int, default=evaluate.BATCH_TOKENS, metavar="N",
                      help=f"tokens of a batch (default {evaluate.BATCH_TOKENS})")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations and matrix "
                      "products (default: the run's, or float32)")
  parser.add_argument("--weights", choices=("int8",), help="as for generate")
  parser.add_argument("--tokenizer", metavar="NAME", help="the model's tokenizer, where it does "
                      "not bring it")
  parser.add_argument("--json", action="store_true", help="one object instead of tables")
  parser.add_argument("--plot", type=path, metavar="FILE.png", help="draw the loss by length and "
                      "by position")


class Subject(NamedTuple):
  """A model to evaluate, and what on."""

  name: str
  model: pretrained.Pretrained
  text: Text
  lengths: tuple[int, ...]
  dtype: str


def run(args: argparse.Namespace) -> int:
  """Evaluates, and prints; errors of the user are ValueErrors."""
  lengths = _lengths(args.seq_len)
  if args.plot and not args.plot.parent.is_dir():
    raise ValueError(f"--plot: there is no directory {args.plot.parent}")
  distributed.start_backend()
  implementation = args.implementation or "auto"
  kernels.explain("parallel_attention_ffn", implementation=implementation)
  subjects = [_subject(path, args, lengths) for path in dict.fromkeys(args.models)]
  total = sum(evaluate.num_batches(len(one.text.tokens), length, args.stride or length,
                                   args.batch_tokens)
              for one in subjects for length in one.lengths)
  console = terminal.Console(stderr=args.json)
  results = []
  with rich.progress.Progress(
      rich.progress.TextColumn("{task.description}", markup=False), rich.progress.BarColumn(),
      rich.progress.MofNCompleteColumn(), rich.progress.TimeRemainingColumn(),
      console=console, disable=not console.is_terminal, transient=True) as progress:
    task = progress.add_task("", total=total)
    for one in subjects:
      params = evaluate.prepare(one.model.params, one.model.config, args.weights)
      for length in one.lengths:
        progress.update(task, description=f"{one.name}, {length} tokens")
        results.append((one, evaluate.evaluate(
            params, one.model.config, one.text, seq_len=length, stride=args.stride,
            batch_tokens=args.batch_tokens, dtype=one.dtype, implementation=implementation,
            on_batch=lambda: progress.advance(task))))
  if args.json:
    print(json.dumps(_described(results, args)))
  else:
    _show(console, results)
  if args.plot:
    terminal.flush()
    try:
      draw.losses([(one.name, one.model.seq_len, of) for one, of in results], args.plot)
    except Exception as error:  # Of any type: Matplotlib's fonts, its writers, the disk.
      raise ValueError(f"{args.plot} could not be drawn: {terminal.one_line(error)}") from error
  return 0


def _lengths(text: str | None) -> tuple[int, ...]:
  """The lengths that are asked for, each once; none for each model's own."""
  if text is None:
    return ()
  parts = [part.strip() for part in text.split(",")]
  if not all(part.isdecimal() and int(part) for part in parts):
    raise ValueError(f"--seq-len must be positive numbers such as 256,512; got {text!r}")
  return tuple(dict.fromkeys(map(int, parts)))


def _subject(path, args, lengths) -> Subject:
  model = pretrained.load_with_tokenizer(
      path, tokenizer=args.tokenizer,
      warn=lambda line: print(f"warning: {line}", file=sys.stderr))
  settings = pretrained.settings(path)
  text = held_out(path, settings, args.data, model.tokenizer)
  lengths = lengths or (model.seq_len or _LENGTH,)
  for length in lengths:
    try:
      evaluate.num_windows(len(text.tokens), length, args.stride or length)
    except ValueError as error:
      raise ValueError(f"{error}; name another --seq-len"
                       + (", --stride" if args.stride else "") + " or --data") from None
  if beyond := pretrained.beyond_training(model, max(lengths)):
    warnings.warn(f"{path}: {beyond}", stacklevel=2)
  dtype = args.dtype or (settings[0].dtype if settings else "float32")
  return Subject(terminal.quoted(path), model, text, lengths, dtype)


def held_out(path: pathlib.Path, settings: tuple[TrainConfig, str] | None, source: str | None,
             tokenizer: Any) -> Text:
  """The text to evaluate a model on.

  Args:
    path: of the model, for messages.
    settings: of `pretrained.settings`.
    source: as of `data.load_corpus`; None for the data of the run. Of the run's own data it is what
      the run held out, of others all.

  Raises:
    ValueError: no source for a model that is no run's, or a run's data that are not what they were.
  """
  eod = tokenizer.eod if settings and settings[0].mask_documents else None
  if settings is not None:
    config, fingerprint = settings
    parts = [name for name, _ in mixture.parse(config.data)]
    if source is None and len(parts) > 1:
      raise ValueError(f"{path} was trained on a mixture; name one of its sources with --data: "
                       + ", ".join(parts))
    name = source or parts[0]
    corpus = _corpus(name, tokenizer, config.eval_fraction, config.eval_tokens)
    if corpus.fingerprint == fingerprint or len(parts) > 1 and name in parts:
      if len(corpus.eval) < 2:
        raise ValueError(f"{path} held nothing out of {name}; name another text with --data")
      return Text(name, corpus.eval, corpus.eval_bytes_per_token, eod)
    if source is None:
      raise ValueError(f"{path} was trained on other data than {config.data} holds now; name a "
                       "text with --data")
  elif source is None:
    raise ValueError(f"{path} does not say what it was trained on; name a text with --data")
  corpus = _corpus(source, tokenizer, 0.0)
  if len(corpus.eval):  # enwik8, whose division is fixed
    return Text(source, corpus.eval, corpus.eval_bytes_per_token, eod)
  return Text(source, corpus.train, corpus.train_bytes_per_token, eod)


def _corpus(source, tokenizer, *division):
  corpus = data.load_corpus(source, tokenizer, *division)
  if corpus.loses_newlines:
    warnings.warn(data.losing_newlines(tokenizer.name), stacklevel=2)
  return corpus


def _described(results: list[tuple[Subject, Evaluation]], args) -> dict[str, Any]:
  versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "dm-haiku")}
  return {
      "device": jax.devices()[0].device_kind, "versions": versions,
      "implementation": args.implementation or "auto", "weights": args.weights,
      "results": [{
          "model": one.name, "num_params": one.model.config.num_params,
          "position": one.model.config.position, "trained_seq_len": one.model.seq_len,
          "data": one.text.name, "dtype": one.dtype, "seq_len": of.seq_len, "stride": of.stride,
          "tokens": int(of.tokens.sum()), "nats_per_token": of.nats_per_token,
          "bits_per_byte": of.bits_per_byte, "positions": of.by_position(4)}
          for one, of in results]}


def _show(console, results: list[tuple[Subject, Evaluation]]):
  table = rich.table.Table("model", "data", "length", "stride", "tokens", "nats per token",
                           "bits per byte", box=None, padding=(0, 1, 0, 0))
  table.columns[0].overflow = "fold"
  for column in table.columns[2:]:
    column.justify = "right"
  for one, of in results:
    table.add_row(one.name, one.text.name, f"{of.seq_len:,}", f"{of.stride:,}",
                  f"{of.tokens.sum():,}", f"{of.nats_per_token:.4f}", f"{of.bits_per_byte:.4f}")
  console.print(table)
  for name in dict.fromkeys(one.name for one, _ in results):
    ofs = [of for one, of in results if one.name == name]
    rows: dict[str, dict[int, str]] = {}
    for of in ofs:
      for row in of.by_position():
        first, last = row["first"], row["last"]
        key = f"{last:,}" if first == last else f"{first:,} to {last:,}"
        rows.setdefault(key, {})[of.seq_len] = f"{row['nats_per_token']:.4f}"
    table = rich.table.Table(f"{name}: after", *(f"of {of.seq_len:,}" for of in ofs), box=None,
                             padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
      column.justify = "right"
    order = lambda key: int(key.split()[-1].replace(",", ""))
    for key in sorted(rows, key=order):
      table.add_row(key, *(rows[key].get(of.seq_len, "") for of in ofs))
    console.print()
    console.print(table)
