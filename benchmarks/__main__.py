"""The command line: python -m benchmarks COMMAND [options]."""

import importlib
import sys
import time

# What each command does, and the op that it needs.
_COMMANDS = {
    "attention": ("causal attention against its peers", "flash_attention"),
    "block": ("one layer of the model", "parallel_attention_ffn"),
    "loss": ("the loss from the last hidden states", "linear_cross_entropy"),
    "decode": ("attention of one token to a cache", "decode_attention"),
    "generate": ("generation against PaLM-jax", None),
    "train": ("the whole model against PaLM-jax", None),
    "static": ("kernels compiled for chips that are not here", None),
    "plan": ("plans of published training runs, against what was measured", None),
    "suite": ("everything worth running on a borrowed machine", None),
    "plot": ("draws the results", None),
    "report": ("writes the README's tables from the results", None),
}
_TIMED = ("attention", "block", "loss", "decode")


def main(argv: list[str]) -> int:
  if not argv or argv[0] not in _COMMANDS:
    wrong = bool(argv) and argv[0] not in ("-h", "--help")
    print("usage: python -m benchmarks COMMAND [options]  (COMMAND --help says which)\n\n"
          + "\n".join(f"  {name:10} {what}" for name, (what, _) in _COMMANDS.items()),
          file=sys.stderr if wrong else sys.stdout)
    return 2 if wrong else 0
  name, *rest = argv
  op = _COMMANDS[name][1]
  if op:
    from palm_haiku import kernels
    if not hasattr(kernels, op):
      print(f"benchmarks {name}: there is no op {op} yet")
      return 0
  try:
    module = importlib.import_module(f"benchmarks.{name}")
  except ModuleNotFoundError as error:
    if error.name != f"benchmarks.{name}":
      raise
    print(f"benchmarks {name}: there is no such benchmark in this checkout yet")
    return 0
  keywords = {}
  if name in _TIMED and "--seconds" in rest:  # what the suite has left
    at = rest.index("--seconds")
    keywords["deadline"] = time.monotonic() + float(rest[at + 1])
    del rest[at:at + 2]
  try:
    return module.main(rest, **keywords)
  except ValueError as error:
    print(f"benchmarks {name}: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
