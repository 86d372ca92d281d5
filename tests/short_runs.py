"""A text and a training run that take no time, for the tests of what goes on in a run."""

import io

import rich.console

from palm_haiku import train

TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(1, 30) for m in range(1, 30))


def run(config, out, **options):
  """The result of `train.train`, and what it printed."""
  console = rich.console.Console(file=io.StringIO(), width=200)
  result = train.train(config, out, console=console, **options)
  return result, console.file.getvalue()
