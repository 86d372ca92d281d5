"""The command line: the function of each command of palm-haiku."""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import shutil
import sys
import time
import warnings
from typing import Any

import rich.table

from palm_haiku import failures, interrupts, options, terminal
from palm_haiku.config import PaLMConfig, configs

_MODEL = (*options.SIZES, "rope_theta", "position", "norm", "norm_bias", "qk_norm", "activation",
          "shared_kv", "xpos_scale_base")


def main(argv: list[str] | None = None) -> int:
  """Runs a command; returns the exit status. Errors of the user are one line on stderr."""
  terminal.prepare()
  args, unknown = _parser().parse_known_args(argv)
  if unknown:
    args.parser.error("unrecognized arguments: " + " ".join(unknown))
  try:
    if args.command != "train":  # which has a handler of its own for what must not be lost
      interrupts.handled()
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


def _parser():
  return options.parser(dict(
      train=_train, tokenize=_corpus, data=_corpus, generate=_generate, eval=_eval, plan=_plan,
      convert=_convert, info=_info, doctor=_doctor))


def typed(*command: str | os.PathLike) -> str:
  """A command as it runs in a shell that starts where this process did."""
  program = pathlib.Path(sys.executable).with_name("palm-haiku")
  if shutil.which("palm-haiku") == str(program):
    program = "palm-haiku"
  elif program.is_relative_to(pathlib.Path.cwd()):
    program = program.relative_to(pathlib.Path.cwd())
  return " ".join(map(terminal.quoted, (program, *command)))


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
      named = ", ".join("--" + name.replace("_", "-") for name in given)
      raise ValueError(f"{named} need{'s' if len(given) == 1 else ''} --model, or --dim, --depth "
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
  from palm_haiku.corpus import mixture
  from palm_haiku.corpus.shards import DataError
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
  if base is None and args.init is None and args.tokenizer is None and args.data is not None:
    args.tokenizer = mixture.tokenizer_name(args.data)
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
    with _first_use(config.implementation, config.model, config.dtype, training=True):
      result = train(config, args.out, resume=args.resume, console=console)
  # Of this process, perhaps: the others wait for it.
  except (CheckpointError, DataError, OSError) as error:
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


def _first_use(implementation, model, dtype, *, training):
  """The check of the kernels that `auto` is about to use, where nobody has measured such a chip."""
  if implementation != "auto":
    return contextlib.nullcontext()
  from palm_haiku.doctor import cases, first_use

  return first_use.checked(cases.of_model(model, dtype, training=training),
                           lambda line: print(line, file=sys.stderr))


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

  from palm_haiku import cache, distributed, kernels, pretrained
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
  cache.check_memory(model.config, len(prompt) + length, args.cache_dtype or args.dtype)
  decoder = tokenizer.stream_decoder(prompt)
  times = []

  def show(token):
    times.append(time.perf_counter())
    if token != tokenizer.eod:
      with terminal.ending_at_errors():
        print(decoder.feed(int(token)), end="", flush=True)

  first_use = _first_use(args.implementation or "auto", model.config, args.dtype, training=False)
  with first_use, terminal.as_a_filter():
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
  if beyond := pretrained.beyond_training(model, read):
    warnings.warn(beyond, stacklevel=2)
  if len(times) > 1:
    print(f"{len(times)} tokens, {(len(times) - 1) / (times[-1] - times[0]):.0f} a second",
          file=sys.stderr)
  return 0


def _eval(args) -> int:
  from palm_haiku.evaluate import command

  return command.run(args)


def _plan(args) -> int:
  from palm_haiku.plan import command

  return command.run(args, _model(args))


def _corpus(args) -> int:
  from palm_haiku.corpus import command

  return command.run(args)


def _convert(args) -> int:
  from palm_haiku import array_files, data, distributed, hub, interop
  from palm_haiku.recipe import TrainConfig
  from palm_haiku.rundir import RunDirectory

  if args.out.exists():
    raise ValueError(f"{args.out} exists already; choose another --out")
  peer = args.from_peer or args.to_peer
  for name in ("heads", "gain_offset", "xpos_scale_base"):
    if getattr(args, name) is not None and (
        peer == "hub" or args.to_peer and name != "gain_offset"):
      raise ValueError(f"--{name.replace('_', '-')} has no meaning for "
                       f"{'--to' if args.to_peer else '--from'} {peer}")
  if peer != "hub":
    interop.layout_of(peer)
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


def _doctor(args) -> int:
  from palm_haiku.doctor import command

  return command.run(args)


if __name__ == "__main__":
  sys.exit(main())
