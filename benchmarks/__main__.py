"""The command line: python -m benchmarks COMMAND [options]."""

import importlib
import sys
import time

_COMMANDS = {
    "attention": "causal attention against its peers",
    "block": "one layer of the model",
    "loss": "the loss from the last hidden states",
    "decode": "attention of one token to a cache",
    "generate": "generation against PaLM-jax",
    "train": "the whole model against PaLM-jax",
    "static": "kernels compiled for chips that are not here: static [WHAT]",
    "calibrate": "predicted times of kernels that others timed, and the error",
    "plan": "plans of published training runs, against what was measured",
    "suite": "everything worth running on a borrowed machine",
    "plot": "draws the results",
    "report": "writes the docs' tables from the results",
}
_STATIC = {
    "attention": "attention beside its peers, on GPUs and TPUs (the default)",
    "block": "the parallel block's products on TPUs, beside XLA's",
    "layer": "a layer as a whole: fused, and as XLA's products around attention",
    "loss": "memory of the loss, and its products",
    "decode": "decoding on TPUs: cycles beside bytes",
    "gathers": "gathers of weights that pass while TPUs compute",
    "arithmetic": "the most that fusing a layer's passes over memory can gain",
}
_TIMED = ("attention", "block", "loss", "decode")


def main(argv: list[str]) -> int:
  name, *rest = argv or [""]
  if name not in _COMMANDS:
    return _usage("COMMAND", _COMMANDS, wrong=bool(argv) and name not in ("-h", "--help"))
  module = name
  if name == "static":
    if not rest or rest[0].startswith("--") and rest[0] != "--help":
      rest = ["attention", *rest]
    what, *rest = rest
    if what not in _STATIC:
      return _usage("static [WHAT]", _STATIC, wrong=what not in ("-h", "--help"))
    module = f"static.{what}"
  keywords = {}
  if name in _TIMED and "--seconds" in rest:  # what the suite has left
    at = rest.index("--seconds")
    keywords["deadline"] = time.monotonic() + float(rest[at + 1])
    del rest[at:at + 2]
  try:
    return importlib.import_module(f"benchmarks.{module}").main(rest, **keywords)
  except ValueError as error:
    print(f"benchmarks {module.replace('.', ' ')}: error: {error}", file=sys.stderr)
    return 2


def _usage(command, choices, wrong) -> int:
  last = command.split()[-1].strip("[]")
  print(f"usage: python -m benchmarks {command} [options]  ({last} --help says which)\n\n"
        + "\n".join(f"  {name:10} {what}" for name, what in choices.items()),
        file=sys.stderr if wrong else sys.stdout)
  return 2 if wrong else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
