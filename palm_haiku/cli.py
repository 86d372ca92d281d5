"""The command line: palm-haiku train | generate | plan | convert | info."""

import argparse
import contextlib
import dataclasses
import difflib
import os
import pathlib
import shutil
import signal
import sys
import threading
import time
import warnings
from typing import Any

import rich.table

from palm_haiku import failures, terminal
from palm_haiku.config import PaLMConfig, configs

_SIZES = ("num_tokens", "dim", "depth", "heads", "dim_head", "ff_mult", "kv_heads", "dim_ff",
          "window", "global_every")
_MODEL = (*_SIZES, "rope_theta", "position", "norm", "norm_bias", "qk_norm", "activation",
          "shared_kv", "xpos_scale_base")


def _path(text: str) -> pathlib.Path:
  return pathlib.Path(os.path.expanduser(text))


class _Parser(argparse.ArgumentParser):
  """Reports an error in one line, with the nearest known option."""

  def error(self, message):
    unknown = message.removeprefix("unrecognized arguments: ").split()[0]
    if unknown.startswith("-"):
      near = difflib.get_close_matches(unknown, self._option_string_actions, n=1)
      message += f"; did you mean {near[0]}?" if near else ""
    self.exit(2, f"{self.prog}: error: {terminal.one_line(message)} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit status. Errors of the user are one line on stderr."""
  terminal.prepare()
  parser = _parser()
  args, unknown = parser.parse_known_args(argv)
  if unknown:
    args.parser.error("unrecognized arguments: " + " ".join(unknown))
  try:
    with warnings.catch_warnings():
      terminal.warn_in_lines(f"palm-haiku {args.command}")
      status = args.run(args)
    terminal.flush()
    return status
  except BrokenPipeError:
    return terminal.abandon()
  except KeyboardInterrupt:
    return 130
  except Exception as error:
    message = failures.line(error, args.command)
    if message is None:
      raise
    print(f"palm-haiku {args.command}: error: {message}", file=sys.stderr)
    return 2 if isinstance(error, (ValueError, OverflowError)) else 1


def typed(*command: str | os.PathLike) -> str:
  """A command as it runs in a shell that starts where this process did."""
  program = pathlib.Path(sys.executable).with_name("palm-haiku")
  if shutil.which("palm-haiku") == str(program):
    program = "palm-haiku"
  elif program.is_relative_to(pathlib.Path.cwd()):
    program = program.relative_to(pathlib.Path.cwd())
  return " ".join(map(terminal.quoted, (program, *command)))


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="palm-haiku", description="Train a PaLM and sample from it.")
  commands = parser.add_subparsers(
      dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

  train = commands.add_parser(
      "train", help="train on text", formatter_class=argparse.RawDescriptionHelpFormatter,
      description="Train a PaLM on text. Everything that the run leaves is under --out: "
      "checkpoints,\nconfig.json, metrics.jsonl, loss.png and TensorBoard files.",
      epilog="examples:\n"
      "  palm-haiku train --out runs/first\n"
      "  palm-haiku train --model palm-lite --data 'books/*.txt' --out runs/books\n"
      "  palm-haiku train --resume --out runs/books\n"
      "  palm-haiku train --init models/command-r7b --lora-rank 8 --data 'b/*.txt' --out runs/ft\n"
      "  palm-haiku train --mesh fsdp=4,model=2 --model palm-8b --data 'books/*.txt' --out runs/8b")
  train.set_defaults(run=_train, parser=train)
  _add_model_options(train)
  group = train.add_argument_group("data")
  group.add_argument("--data", metavar="SOURCE", help="text to train on: pydoc (Python's own "
                     "documentation, the default), enwik8, or a path or quoted glob of text files; "
                     "on --resume, where the run's data are now")
  group.add_argument("--tokenizer", metavar="NAME", help="bytes (the default), a SentencePiece "
                     "model file or a tokenizer.json, of which the run keeps a copy")
  group.add_argument("--eval-fraction", type=float, metavar="F", help="how much of the end of the "
                     "data is held out (default 0.1)")
  group.add_argument("--mask-documents", action="store_true", default=None,
                     help="let no token attend to another document")
  group = train.add_argument_group("run")
  group.add_argument("--out", required=True, metavar="DIR", type=_path,
                     help="directory of the run")
  group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in "
                     "--out, with its settings; begin anew where there is none, with those in "
                     "config.json but for the options given")
  group.add_argument("--init", metavar="DIR", help="start from the weights, and with the "
                     "tokenizer, of a run or of a model of the Hugging Face hub")
  group.add_argument("--lora-rank", type=int, metavar="N", help="train adapters of this rank only; "
                     "with --init (default: all parameters)")
  group.add_argument("--steps", type=int, help="optimizer steps (default 2000)")
  group.add_argument("--batch-size", type=int, help="sequences per step (default 16)")
  group.add_argument("--batch-ramp", metavar="BATCH:SIZE,...", help="sizes of later batches, such "
                     "as 50000:1024,115000:2048 for PaLM-540B, which begins with 512")
  group.add_argument("--accumulate", type=int, metavar="N", help="compute a batch in N parts, for "
                     "want of memory (default 1)")
  group.add_argument("--seq-len", type=int, help="tokens per sequence (default 256)")
  group.add_argument("--optimizer", choices=("adamw", "palm"), help="adamw: warm-up and cosine "
                     "(default); palm: the paper's Adafactor")
  group.add_argument("--learning-rate", type=float, help="highest (default 3e-3 for adamw, 1e-2 "
                     "for palm)")
  group.add_argument("--z-loss", type=float, help="weight of log^2 Z (default 1e-4)")
  group.add_argument("--seed", type=int, help="of parameters and data order (default 0)")
  group.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations and matrix "
                     "products (default float32)")
  group.add_argument("--remat", choices=("none", "attention", "full"), help="what the "
                     "backward pass recomputes to save memory: little (the default), all but "
                     "attention, or whole layers")
  _add_implementation(group)
  group.add_argument("--skip-batches", metavar="FIRST:END", help="leave out batches FIRST to "
                     "END - 1, which made the loss spike; adds to those skipped before")
  group.add_argument("--spike", type=float, metavar="NATS", help="when the loss is this much above "
                     "its recent median, go back 100 steps and skip 200 batches (default: never)")
  group.add_argument("--log-every", type=int, metavar="STEPS", help="default 10")
  group.add_argument("--eval-every", type=int, metavar="STEPS", help="default 250")
  group.add_argument("--checkpoint-every", type=int, metavar="STEPS", help="default 500")

  group = train.add_argument_group(
      "many chips", "Sizes of mesh axes multiply to the number of chips; -1 is all that are left. "
      "Sequences are divided over data and fsdp, parameters over fsdp, heads and columns of "
      "weights over model, the tokens of a sequence over seq.")
  group.add_argument("--mesh", metavar="AXES", help="such as data=2,fsdp=4,model=2, or one of "
                     "one-chip (the default), fsdp, fsdp-tensor and paper")
  group.add_argument("--shard-residual", action=argparse.BooleanOptionalAction, default=None,
                     help="divide the residual stream between layers over model")
  group.add_argument("--distributed", action="store_true", help="join the other processes that "
                     "SLURM, Kubernetes or Cloud TPU started for this job")
  group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where none of those "
                     "started the job")
  group.add_argument("--num-processes", type=int, metavar="N", help="with --coordinator")
  group.add_argument("--process-id", type=int, metavar="I", help="with --coordinator")
  group.add_argument("--start-timeout", type=int, metavar="SECONDS", default=300,
                     help="how long to wait for all processes (default 300)")

  generate = commands.add_parser(
      "generate", help="continue a text", description="Continue a text with a trained model, "
      "printing it as it comes.",
      epilog="example: palm-haiku generate runs/first --prompt 'The for statement' --top-k 40",
      formatter_class=argparse.RawDescriptionHelpFormatter)
  generate.set_defaults(run=_generate, parser=generate)
  generate.add_argument("checkpoint", type=_path, metavar="DIR", help="directory of a run")
  generate.add_argument("--prompt", default="", help="text to continue (default: a new document)")
  generate.add_argument("--length", type=int, help="tokens to add (default 256, or what is left of "
                        "the length that the model was trained at)")
  generate.add_argument("--temperature", type=float, default=0.8, help="0 always takes the "
                        "likeliest token (default 0.8)")
  generate.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
  generate.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens "
                        "that make up probability P")
  generate.add_argument("--seed", type=int, default=0, help="default 0")
  generate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  generate.add_argument("--weights", choices=("int8",), help="keep matrices in fewer bytes")
  generate.add_argument("--cache-dtype", choices=("int8", "bfloat16", "float32"),
                        help="of keys and values (default --dtype)")
  generate.add_argument("--draft", type=_path, metavar="DIR", help="run of a smaller model "
                        "with the same tokenizer, whose guesses are checked several at a time")
  generate.add_argument("--draft-length", type=int, default=4, metavar="N",
                        help="guesses at a time (default 4)")
  generate.add_argument("--tokenizer", metavar="NAME", help="the run's tokenizer, where the run "
                        "does not have it any more")
  _add_implementation(generate)

  from palm_haiku.plan.command import add_arguments as add_plan_arguments
  plan = commands.add_parser(
      "plan", help="compile a step for a machine that is not here", description="Compile a "
      "training step for chips that are not here: whether it fits, what\ntravels between them, and "
      "how long it takes.",
      epilog="examples:\n"
      "  palm-haiku plan --model palm-8b --topology v5p:4x4x4 --mesh fsdp=64 --batch-size 512\n"
      "  palm-haiku plan --model palm-540b --topology v4:12x16x16 --slices 2 --mesh paper "
      "\\\n      --batch-size 2048 --shard-residual --optimizer palm --plot 540b.png\n"
      "  palm-haiku plan --model palm-62b --topology v5p:8x8x8 --batch-size 1024 --sweep",
      formatter_class=argparse.RawDescriptionHelpFormatter)
  plan.set_defaults(run=_plan, parser=plan)
  _add_model_options(plan)
  add_plan_arguments(plan)
  _add_implementation(plan)

  convert = commands.add_parser(
      "convert", help="weights of other PaLMs and of the hub", description="Convert weights "
      "between this project, the other public PaLMs and\nthe Hugging Face hub's layout.",
      epilog="examples:\n"
      "  palm-haiku convert --from hub models/command-r7b --out runs/imported\n"
      "  palm-haiku convert --to hub runs/books --out models/books  # for transformers, vLLM, "
      "llama.cpp\n"
      "  palm-haiku convert --from palm-pytorch weights.npz --out runs/imported\n"
      "  palm-haiku convert --to palm-pytorch runs/imported --out weights.npz",
      formatter_class=argparse.RawDescriptionHelpFormatter)
  convert.set_defaults(run=_convert, parser=convert)
  convert.add_argument("source", type=_path, metavar="SOURCE", help="a file of the peer's "
                       "arrays or a directory of the hub's (--from), or a run (--to)")
  direction = convert.add_mutually_exclusive_group(required=True)
  direction.add_argument("--from", dest="from_peer", metavar="PEER", help="hub, palm-jax, "
                         "palm-jax-lite, palm-flax, palm-pytorch, palm-pytorch-lite or "
                         "palm-rlhf-pytorch")
  direction.add_argument("--to", dest="to_peer", metavar="PEER")
  convert.add_argument("--out", required=True, type=_path, metavar="PATH", help="a new run "
                       "directory (--from), file or directory (--to)")
  convert.add_argument("--tokenizer", metavar="NAME", help="that the model was trained with: "
                       "bytes, a SentencePiece model file or a tokenizer.json (default: the "
                       "model's own; bytes where it has none)")
  convert.add_argument("--heads", type=int, metavar="N", help="query heads, to check: PaLM-jax's "
                       "two models have arrays of the same names")
  convert.add_argument("--gain-offset", type=int, choices=(0, 1), help="of palm-rlhf-pytorch: 1 "
                       "where gains are stored minus 1 (from 0.2.4 on), else 0 (default: told by "
                       "their means; 1 for --to)")
  convert.add_argument("--xpos-scale-base", type=int, metavar="N", help="of palm-rlhf-pytorch "
                       "(default 512)")

  info = commands.add_parser(
      "info", help="parameters and FLOPs of a model", description="Parameters and FLOPs of a "
      "model; nothing is allocated. Without a model: those that have names.")
  info.set_defaults(run=_info, parser=info)
  _add_model_options(info)
  info.add_argument("--seq-len", type=int, default=2048, help="for attention's FLOPs (default "
                    "2048)")
  return parser


def _add_model_options(parser):
  group = parser.add_argument_group("model")
  group.add_argument("--model", metavar="NAME", help=", ".join(configs))
  for name in _SIZES:
    group.add_argument("--" + name.replace("_", "-"), type=int, metavar="N")
  group.add_argument("--position", choices=("rotary", "alibi"))
  group.add_argument("--rope-theta", type=float, metavar="X", help="base of rotary wavelengths "
                     "(default 10,000)")
  group.add_argument("--xpos-scale-base", type=int, metavar="N", help="positions over which xPos "
                     "decays (default: no xPos)")
  group.add_argument("--norm", choices=("layer", "rms"))
  group.add_argument("--norm-bias", action=argparse.BooleanOptionalAction, default=None,
                     help="norms have a bias")
  group.add_argument("--qk-norm", nargs="?", const="l2", choices=("l2", "layer"),
                     help="normalise queries and keys: l2 (the default) or layer")
  group.add_argument("--activation", choices=("swiglu", "gelu"))
  group.add_argument("--shared-kv", action=argparse.BooleanOptionalAction, default=None,
                     help="values are the keys")


def _add_implementation(parser):
  parser.add_argument("--implementation", metavar="NAME", help="of every kernel: auto (the "
                      "default), xla, pallas, mosaic_gpu, mosaic_tpu or triton")


def _model(args, base: PaLMConfig | None = None,
           default: PaLMConfig | None = None) -> PaLMConfig | None:
  """The model that the options describe, starting from `--model` or else from `base`.

  Without either, a model of its own if they give its size; if not, they start from `default`.
  """
  given = {name: getattr(args, name) for name in _MODEL if getattr(args, name) is not None}
  if args.model is not None:
    if args.model not in configs:
      near = difflib.get_close_matches(args.model, configs, n=1)
      raise ValueError(f"no model is called {args.model!r}; "
                       + (f"did you mean {near[0]}?" if near
                          else f"there are {', '.join(configs)}"))
    base = configs[args.model]
  missing = [name for name in ("dim", "depth", "heads") if name not in given]
  if base is None and len(missing) == 3:
    if default is None and given:
      options = ", ".join("--" + name.replace("_", "-") for name in given)
      raise ValueError(f"{options} need{'s' if len(given) == 1 else ''} --model, or --dim, --depth "
                       "and --heads")
    base = default
  if base is not None:
    return dataclasses.replace(base, **given)
  if not given:
    return None
  if missing:
    raise ValueError("a model without --model needs --" + ", --".join(missing))
  sizes: dict[str, Any] = {"num_tokens": 256} | given
  return PaLMConfig(**sizes)


def _train(args) -> int:
  import jax

  from palm_haiku import distributed, kernels
  from palm_haiku.checkpoint import CheckpointError
  from palm_haiku.recipe import TrainConfig, load_config
  from palm_haiku.rundir import RunDirectory
  from palm_haiku.train import train

  _join(args)
  distributed.start_backend()
  console = terminal.Console(enduring=True, quiet=not distributed.is_leader())
  directory, before = RunDirectory(args.out), None
  if args.resume:
    before = distributed.from_leader(directory.settings, (ValueError, OSError, CheckpointError))
  base = before and load_config(before)
  if args.init is not None and base is None:
    model = _initial_model(args)
  else:
    model = _model(args, base and base.model, configs["palm-tiny"])
  assert model  # of the default, if of nothing else
  # A model that the run has already is large enough, but not one that is named again.
  if args.num_tokens is None and args.init is None and (base is None or args.model is not None):
    tokenizer = args.tokenizer or (base and base.tokenizer) or "bytes"
    needed = directory.tokenizer(tokenizer, before).num_tokens
    model = dataclasses.replace(model, num_tokens=max(model.num_tokens, needed))
  given = {field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)
           if getattr(args, field.name, None) is not None and field.name != "model"}
  config = (dataclasses.replace(base, model=model, **given) if base
            else TrainConfig(model=model, **given))
  kernels.explain("parallel_attention_ffn", implementation=config.implementation)
  terminal.say(console, f"{model.num_params:,} parameters, {config.steps} steps of "
               f"{config.batch_size} x {config.seq_len} tokens of {config.data}")
  try:
    result = train(config, args.out, resume=args.resume, console=console)
  except (CheckpointError, OSError) as error:  # Of this process, perhaps: the others wait for it.
    distributed.leave(f"palm-haiku train: error: {error}")
    raise
  except jax.errors.JaxRuntimeError as error:
    distributed.leave(
        "palm-haiku train: error: another process of the job died or cannot be reached, so this "
        "one ends; nothing is lost before the last checkpoint: start the job again with --resume, "
        f"on as many hosts as there are: {str(error).splitlines()[0][:200]}")
    raise
  resume = typed("train", "--resume", "--out", args.out)
  if console.lost:
    print(f"palm-haiku train: its output can't be written ({console.lost}): stopped "
          f"{_progress(result)}; go on with: {resume}", file=sys.stderr)
    return terminal.BROKEN_PIPE
  terminal.say(console)
  for name, score in (("train loss", result.train), ("held-out loss", result.held_out)):
    if score is not None:
      terminal.say(console, f"{name:16}{score.nats_per_token:.4f} nats per token, "
                   f"{score.bits_per_byte:.4f} bits per byte")
  terminal.say(console, f"{'loss curve':16}{terminal.quoted(args.out / 'loss.png')}")
  if result.interrupted_by is not None:
    terminal.say(console, f"stopped by {result.interrupted_by.name} {_progress(result)}; go on "
                 f"with: {resume}")
    return 128 + result.interrupted_by
  terminal.say(console, f"{'sample':16}{typed('generate', args.out, '--prompt', 'The ')}")
  return 0


def _initial_model(args) -> PaLMConfig:
  """The architecture of --init; its tokenizer becomes that of the run unless one is named."""
  from palm_haiku import pretrained

  given = [name for name in ("model", *_MODEL) if getattr(args, name) is not None]
  if given:
    raise ValueError(f"--init brings its own model; leave out --{given[0].replace('_', '-')}")
  start = pretrained.describe(args.init, tokenizer=args.tokenizer)
  args.init, args.tokenizer = os.path.abspath(os.path.expanduser(args.init)), start.tokenizer
  return start.config


def _progress(result) -> str:
  return (f"at step {result.step}, which is saved" if result.step
          else "before the first step was over")


def _join(args):
  """Joins the other processes of a job, if the options speak of any."""
  from palm_haiku import distributed

  manual = (args.coordinator, args.num_processes, args.process_id)
  if any(x is not None for x in manual):
    if None in manual:
      raise ValueError("--coordinator, --num-processes and --process-id come together")
    if not 0 <= args.process_id < args.num_processes:
      raise ValueError(f"--process-id must be from 0 to {args.num_processes - 1}; "
                       f"got {args.process_id}")
  elif not args.distributed:
    return
  distributed.start(*manual, timeout=args.start_timeout)


def _pretrained(path: pathlib.Path, tokenizer: str | None = None):
  from palm_haiku import pretrained

  return pretrained.load(path, tokenizer=tokenizer,
                         warn=lambda line: print(f"warning: {line}", file=sys.stderr))


def _generate(args) -> int:
  import jax

  from palm_haiku import distributed, kernels
  from palm_haiku.generate import generate

  distributed.start_backend()
  if not 0 <= args.seed < 2**32:
    raise ValueError(f"--seed must be from 0 to 2^32 - 1; got {args.seed}")
  if args.implementation is not None:
    kernels.explain("parallel_attention_ffn", implementation=args.implementation)
  model = _pretrained(args.checkpoint, args.tokenizer)
  tokenizer = model.tokenizer
  draft = None
  if args.draft is not None:
    drafts = _pretrained(args.draft)
    if drafts.tokenizer.fingerprint != tokenizer.fingerprint:
      raise ValueError(f"the draft must have the tokenizer of the model, {tokenizer.name}; "
                       f"{args.draft} has {drafts.tokenizer.name}")
    draft = drafts.params, drafts.config
  prompt = tokenizer.prompt(args.prompt)
  if not len(prompt):
    if args.prompt:
      warnings.warn(f"the tokenizer leaves nothing of the prompt {args.prompt!r}: a new document "
                    "begins", stacklevel=2)
    prompt = [tokenizer.eod]
  trained = model.seq_len if model.config.position == "rotary" else None
  length = args.length
  if length is None:
    room = 256 if trained is None else trained + 1 - len(prompt)
    length = min(room, 256) if room > 0 else 256
  _check_memory(model.config, len(prompt) + length, args.cache_dtype or args.dtype)
  decoder = tokenizer.stream_decoder(prompt)
  times = []

  def show(token):
    times.append(time.perf_counter())
    if token != tokenizer.eod:
      with _ending_at_errors():
        print(decoder.feed(int(token)), end="", flush=True)

  with _as_a_filter():
    print(args.prompt, end="", flush=True)
    generate(
        model.params, model.config, prompt, length, key=jax.random.key(args.seed),
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, eod=tokenizer.eod,
        dtype=args.dtype, weights=args.weights, cache_dtype=args.cache_dtype, draft=draft,
        draft_length=args.draft_length, implementation=args.implementation or "auto",
        on_token=show)
    jax.effects_barrier()
    print(decoder.flush(), flush=True)
  read = len(prompt) + length - 1  # The last token is not read again.
  if trained is not None and read > trained:
    warnings.warn(f"the model was trained at {trained} tokens and {read} are asked for: rotary "
                  "positions do not reach beyond what was trained, and the text gets worse there",
                  stacklevel=2)
  if len(times) > 1:
    print(f"{len(times)} tokens, {(len(times) - 1) / (times[-1] - times[0]):.0f} a second",
          file=sys.stderr)
  return 0


def _check_memory(config, length, dtype):
  """Raises where a cache is larger than all memory: some systems kill a process for that."""
  import jax

  from palm_haiku import memory
  from palm_haiku.cache import empty_cache

  there = memory.total(jax.local_devices()[0])
  if there is not None and 0 < length < 2**31:
    cache = jax.eval_shape(lambda: empty_cache(config, (), length, dtype))
    need = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    if need > there:
      raise MemoryError(f"keys and values of {length} tokens are {terminal.size(need)}, of "
                        f"{terminal.size(there)} there are")


@contextlib.contextmanager
def _as_a_filter():
  """Lets Ctrl-C, and a reader that goes away, end the process at once.

  While XLA computes, Python handles no signal; and an error of `print` would come out of XLA as
  the traceback of a callback.
  """
  before = {}
  if threading.current_thread() is threading.main_thread():  # No other may set signals.
    signals = [getattr(signal, name, None) for name in ("SIGINT", "SIGPIPE")]  # Windows: no SIGPIPE
    before = {one: signal.signal(one, signal.SIG_DFL) for one in signals if one is not None}
  try:
    yield
  finally:
    for one, handler in before.items():
      signal.signal(one, handler)


@contextlib.contextmanager
def _ending_at_errors():
  """Ends the process with a line when output fails where XLA would make a traceback of it."""
  try:
    yield
  except OSError as error:
    print(f"palm-haiku generate: error: standard output: {error.strerror}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _plan(args) -> int:
  from palm_haiku.plan import command

  return command.run(args, _model(args))


def _convert(args) -> int:
  from palm_haiku import array_files, data, distributed, hub, interop
  from palm_haiku.recipe import TrainConfig
  from palm_haiku.rundir import RunDirectory

  if args.out.exists():
    raise ValueError(f"{args.out} exists already; choose another --out")
  if "hub" not in (args.from_peer, args.to_peer):
    interop.layout_of(args.from_peer or args.to_peer)
  distributed.start_backend()
  if args.to_peer:
    model = _pretrained(args.source, args.tokenizer)
    if args.to_peer == "hub":
      hub.save(args.out, model.config, model.params, model.tokenizer)
    else:
      array_files.write_arrays(args.out, interop.dump(
          args.to_peer, model.config, model.params, gain_offset=args.gain_offset))
    print(f"{terminal.quoted(args.out)}: {model.config.num_params:,} parameters for "
          f"{args.to_peer}, {_sizes(model.config)}")
    return 0
  if args.from_peer == "hub":
    config, params, tokenizer, _ = _pretrained(args.source, args.tokenizer)
  else:
    config, params = interop.load(
        args.from_peer, array_files.read_arrays(args.source), args.heads,
        gain_offset=args.gain_offset, xpos_scale_base=args.xpos_scale_base)
    tokenizer = data.load_tokenizer(args.tokenizer or "bytes")
  settings = TrainConfig(model=config, tokenizer=tokenizer.name)
  metadata = {"config": dataclasses.asdict(settings), "data_fingerprint": None,
              "tokenizer_fingerprint": tokenizer.fingerprint, "step": 0}
  directory = RunDirectory(args.out)
  directory.checkpoints.save(0, {"params": params}, metadata)
  directory.keep(tokenizer)
  print(f"{terminal.quoted(args.out)}: {config.num_params:,} parameters from {args.from_peer}, "
        f"{_sizes(config)}{'' if args.heads else interop.other_reading(args.from_peer, config)}; "
        f"sample: {typed('generate', args.out)}")
  return 0


def _sizes(c: PaLMConfig) -> str:
  heads = f"{c.heads} heads" + (f" on {c.kv_heads}" if c.kv_heads > 1 else "")
  return (f"{c.depth} layers of dim {c.dim}, {heads} of {c.dim_head}, feed-forward "
          f"{c.dim_ff}, {c.num_tokens:,} tokens, {c.position}"
          + (f", xPos {c.xpos_scale_base}" if c.xpos_scale_base else ""))


def _info(args) -> int:
  console = terminal.Console()
  model = _model(args)
  if model is None:
    table = rich.table.Table("model", "parameters", "dim", "depth", "heads", "dim_head",
                             "num_tokens", "position", box=None, padding=(0, 1, 0, 0))
    for name, c in configs.items():
      table.add_row(name, f"{c.num_params:,}", str(c.dim), str(c.depth), str(c.heads),
                    str(c.dim_head), f"{c.num_tokens:,}", c.position)
    console.print(table)
    return 0
  if args.seq_len < 1:
    raise ValueError(f"--seq-len must be at least 1; got {args.seq_len}")
  c = model
  table = rich.table.Table("parameters", "per layer", f"x {c.depth}", box=None)
  for column in table.columns[1:]:
    column.justify = "right"
  table.add_row("embedding", "", f"{c.num_tokens * c.dim:,}")
  for name, count in c.layer_params.items():
    table.add_row(name, f"{count:,}", f"{count * c.depth:,}")
  table.add_row("final norm", "", f"{c.dim * (1 + c.norm_bias):,}")
  table.add_row("total", f"{sum(c.layer_params.values()):,}", f"{c.num_params:,}", style="bold")
  console.print(table)
  total = c.train_flops_per_token(args.seq_len)
  attention = total - 6 * c.num_params
  table = rich.table.Table("training FLOPs per token", f"at {args.seq_len} tokens", box=None)
  table.columns[1].justify = "right"
  table.add_row("matrix products (6 N)", f"{6 * c.num_params:.4g}")
  table.add_row("attention (12 L H Q T)", f"{attention:.4g}")
  table.add_row("total", f"{total:.4g}", style="bold")
  console.print()
  console.print(table)
  terminal.say(console, f"\nmemory: parameters {terminal.size(4 * c.num_params)} in float32, with "
               f"gradients and AdamW's moments {terminal.size(16 * c.num_params)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
