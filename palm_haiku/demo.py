"""A minute of training on this machine, by the commands that one would type oneself."""

import argparse
import pathlib
import sys

from palm_haiku import cli, terminal


def main(argv: list[str] | None = None) -> int:
  """Trains a small PaLM on Python's documentation and samples from it; returns an exit status."""
  parser = argparse.ArgumentParser(prog="make demo", description=main.__doc__)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"), metavar="DIR")
  parser.add_argument("--steps", type=int, default=400)
  args = parser.parse_args(argv)
  out = _fresh(args.out / "demo")
  console = terminal.Console()

  def run(*command: str) -> int:
    terminal.say(console, f"\n$ {cli.typed(*command)}", style="bold")
    return cli.main(list(command))

  terminal.say(console, "A PaLM of a million parameters learns to write like Python's "
               "documentation, byte by byte.")
  status = run("train", "--model", "palm-tiny", "--data", "pydoc", "--steps", str(args.steps),
               "--batch-size", "4", "--seq-len", "256", "--eval-every", "100", "--out", str(out))
  if status:
    return status
  # Not longer than what it was trained at: rotary positions do not reach beyond that.
  status = run("generate", str(out), "--prompt", "The for statement ", "--length", "230",
               "--temperature", "0.7")
  if status:
    return status
  terminal.say(console, "\nWhat to type next", style="bold")
  for command in _next(args.out, out, args.steps):
    terminal.say(console, "  " + cli.typed(*command))
  terminal.say(console, "Your own text goes where docs/*.md is. The loss curve is in "
               f"{terminal.quoted(out / 'loss.png')}.")
  return 0


def _next(folder: pathlib.Path, demo: pathlib.Path, steps: int) -> list[list[str]]:
  more = ["--steps", str(steps)]
  return [
      ["generate", str(demo), "--prompt", "import ", "--top-p", "0.9", "--seed", "1"],
      ["train", "--out", str(_fresh(folder / "longer")), "--steps", str(3 * steps)],
      ["train", "--data", "docs/*.md", "--out", str(_fresh(folder / "mine")), *more],
      ["train", "--model", "palm-lite-tiny", "--out", str(_fresh(folder / "alibi")), *more],
      ["info", "--model", "palm-540b"],
  ]


def _fresh(path: pathlib.Path) -> pathlib.Path:
  """The path, or if that is taken the first of path-2, path-3, ... that is not."""
  number, free = 1, path
  while free.exists():
    number += 1
    free = path.with_name(f"{path.name}-{number}")
  return free


if __name__ == "__main__":
  sys.exit(main())
