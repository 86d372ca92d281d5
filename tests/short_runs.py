"""A text, a training run and a process that take no time, for the tests of what goes on in them."""

import contextlib
import io
import os
import pathlib
import subprocess
import sys

import jax
import rich.console

from palm_haiku import train

TEXT = "".join(f"{n} times {m} is {n * m}.\n" for n in range(1, 30) for m in range(1, 30))


def run(config, out, **options):
  """The result of `train.train`, and what it printed."""
  console = rich.console.Console(file=io.StringIO(), width=200)
  result = train.train(config, out, console=console, **options)
  return result, console.file.getvalue()


def output(*argv, timeout=250):
  """Python's output on both streams, begun as a user would: with no platform named."""
  env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
  done = subprocess.run([sys.executable, *map(str, argv)], env=env, text=True, timeout=timeout,
                        cwd=pathlib.Path(__file__).parents[1],
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  assert done.returncode == 0, done.stdout
  return done.stdout


@contextlib.contextmanager
def compilations():
  """A list that has an entry for every program that is compiled meanwhile."""
  names = []

  def listen(name, *_, **__):
    if "backend_compile" in name:
      names.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield names
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
