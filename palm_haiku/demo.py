"""A minute of training on this machine, by the commands that one would type oneself."""

import argparse
import pathlib
import sys

import rich.console

from palm_haiku import cli


def main(argv: list[str] | None = None) -> int:
  """Trains a small PaLM on Python's documentation and samples from it; returns an exit status."""
  parser = argparse.ArgumentParser(prog="make demo", description=main.__doc__)
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs"), metavar="DIR")
  parser.add_argument("--steps", type=int, default=400)
  args = parser.parse_args(argv)
  out = _fresh(args.out / "demo")
  console = rich.console.Console()

  def run(*command: str) -> int:
    console.print(f"\n[bold]$ {cli.typed(*command)}", highlight=False, soft_wrap=True)
    return cli.main(list(command))

  console.print("A PaLM of a million parameters learns to write like Python's documentation, byte "
                "by byte.", highlight=False, soft_wrap=True)
  status = run("train", "--model", "palm-tiny", "--data", "pydoc", "--steps", str(args.steps),
               "--batch-size", "4", "--seq-len", "256", "--eval-every", "100", "--out", str(out))
  if status:
    return status
  # Not longer than what it was trained at: rotary positions do not reach beyond that.
  status = run("generate", str(out), "--prompt", "The for statement ", "--length", "230",
               "--temperature", "0.7")
  if status:
    return status
  console.print("\n[bold]What to type next")
  for command in _next(args.out, out, args.steps):
    console.print("  " + cli.typed(*command), highlight=False, soft_wrap=True)
  console.print(f"Your own text goes where docs/*.md is. The loss curve is in {out / 'loss.png'}.",
                highlight=False, soft_wrap=True)
  return 0


def _next(folder: pathlib.Path, demo: pathlib.Path, steps: int) -> list[list[str]]:
  more = ["--steps", str(steps)]
  return [
      ["generate", str(demo), "--prompt", "import ", "--top-p", "0.9", "--seed", "1"],
      ["train", "--resume", "--out", str(demo), "--steps", str(3 * steps)],
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
