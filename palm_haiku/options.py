"""The options of each command of palm-haiku."""

import argparse
import difflib
import os
import pathlib
from collections.abc import Callable, Mapping

from palm_haiku import terminal
from palm_haiku.config import configs

SIZES = ("num_tokens", "dim", "depth", "heads", "dim_head", "ff_mult", "kv_heads", "dim_ff",
          "window", "global_every")


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


def parser(run: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
  """The parser of all commands.

  Args:
    run: the function of each command, which the namespace has as `run`, with the command's own
      parser as `parser`.
  """
  parser = _Parser(prog="palm-haiku", description="Train a PaLM and sample from it.")
  commands = parser.add_subparsers(
      dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
  for name, add in (("train", _add_train), ("tokenize", _add_tokenize), ("data", _add_data),
                    ("generate", _add_generate), ("eval", _add_eval), ("plan", _add_plan),
                    ("convert", _add_convert), ("info", _add_info), ("doctor", _add_doctor)):
    command = add(commands)
    command.set_defaults(run=run[name], parser=command)
  return parser


def _add_train(commands):
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
  _add_model_options(train)
  _add_data_options(train)
  _add_run_options(train)
  _add_mesh_options(train)
  return train


def _add_data_options(train):
  group = train.add_argument_group("data")
  group.add_argument("--data", metavar="SOURCE", help="text to train on: pydoc (Python's own "
                     "documentation, the default), enwik8, a path or quoted glob of text files, or "
                     "a directory of palm-haiku tokenize; a:0.7,b:0.3 mixes some by weight; on "
                     "--resume, where the run's data are now")
  group.add_argument("--tokenizer", metavar="NAME", help="bytes (the default), a SentencePiece "
                     "model file or a tokenizer.json, of which the run keeps a copy; a tokenised "
                     "directory has its own")
  group.add_argument("--eval-fraction", type=float, metavar="F", help="how much of the end of the "
                     "data is held out (default 0.1); a tokenised directory has its own part")
  group.add_argument("--eval-tokens", type=int, metavar="N", help="evaluate at most N held-out "
                     "tokens (default: all of a text's, 2^20 of a tokenised directory's)")
  group.add_argument("--mask-documents", action="store_true", default=None,
                     help="let no token attend to another document")
  group.add_argument("--packing", choices=("end-to-end", "best-fit"), help="end-to-end: sequences "
                     "cut from the documents in a row (default); best-fit: whole documents that "
                     "fit together, none split that is not longer than a sequence")


def _add_run_options(train):
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


def _add_mesh_options(train):
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


def _add_tokenize(commands):
  from palm_haiku.corpus.command import add_tokenize_arguments
  tokenize = commands.add_parser(
      "tokenize", help="make a corpus of text", description="Tokenise text of any size, once, into "
      "a directory that train reads.",
      epilog="examples:\n"
      "  palm-haiku tokenize --data 'books/*.txt' --out corpora/books\n"
      "  palm-haiku tokenize --data web/*.jsonl.zst --tokenizer spm.model --dedupe --shuffle 0 "
      "\\\n      --out corpora/web\n"
      "  palm-haiku train --data corpora/web --out runs/web",
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add_tokenize_arguments(tokenize)
  return tokenize


def _add_data(commands):
  from palm_haiku.corpus.command import add_data_arguments
  parser = commands.add_parser(
      "data", help="describe a tokenised corpus", description="Say what is in a corpus of "
      "palm-haiku tokenize: documents, tokens, lengths, a few samples.",
      epilog="example: palm-haiku data corpora/web --samples 5 --check",
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add_data_arguments(parser)
  return parser


def _add_generate(commands):
  generate = commands.add_parser(
      "generate", help="continue a text", description="Continue a text with a trained model, "
      "printing it as it comes.",
      epilog="example: palm-haiku generate runs/first --prompt 'The for statement' --top-k 40",
      formatter_class=argparse.RawDescriptionHelpFormatter)
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
  return generate


def _add_eval(commands):
  from palm_haiku.evaluate.command import add_arguments as add_eval_arguments
  evaluate = commands.add_parser(
      "eval", help="loss on held-out text, at any length", description="The loss of trained models "
      "on held-out text, by length and by\nposition in the sequence.",
      epilog="examples:\n"
      "  palm-haiku eval runs/first\n"
      "  palm-haiku eval runs/rotary runs/alibi --seq-len 256,512,1024,2048 --plot lengths.png\n"
      "  palm-haiku eval models/command-r7b --data 'books/*.txt' --seq-len 4096 --stride 1024",
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add_eval_arguments(evaluate)
  _add_implementation(evaluate)
  return evaluate


def _add_plan(commands):
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
  _add_model_options(plan)
  add_plan_arguments(plan)
  _add_implementation(plan)
  return plan


def _add_convert(commands):
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
  return convert


def _add_info(commands):
  info = commands.add_parser(
      "info", help="parameters and FLOPs of a model", description="Parameters and FLOPs of a "
      "model; nothing is allocated. Without a model: those that have names.")
  _add_model_options(info)
  info.add_argument("--seq-len", type=int, default=2048, help="for attention's FLOPs (default "
                    "2048)")
  return info


def _add_doctor(commands):
  from palm_haiku.doctor.command import add_arguments as add_doctor_arguments
  doctor = commands.add_parser(
      "doctor", help="check the kernels on this machine", description="Check the kernels that can "
      "run on this machine, forward and backward, against XLA\nin float32, each in at most a "
      "minute: the first thing to run on a new machine.\nThe exit status is 1 if one fails.",
      epilog="example: palm-haiku doctor --json > doctor.json",
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add_doctor_arguments(doctor)
  return doctor


def _add_model_options(parser):
  group = parser.add_argument_group("model")
  group.add_argument("--model", metavar="NAME", help=", ".join(configs))
  for name in SIZES:
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
