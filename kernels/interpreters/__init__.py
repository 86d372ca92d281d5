"""Interpreters of the kernels: numbers, gradients and races without the hardware."""

import contextlib
from collections.abc import Iterator

import jax

from . import mode
from .mode import Mode


class Race(AssertionError):
  """Two accesses to one place, one of them a write, that no barrier orders."""


def interpret(*, detect_races: bool = False) -> contextlib.AbstractContextManager[None]:
  """A context in which kernels asked for by name run on a CPU, in their interpreters.

    def loss(query, key, value, implementation):
      return kernels.flash_attention(query, key, value, implementation=implementation).sum()

    with kernels.interpret(detect_races=True):
      fused = jax.grad(loss, (0, 1, 2))(query, key, value, "mosaic_tpu")
    reference = jax.grad(loss, (0, 1, 2))(query, key, value, "xla")

  For any op and "mosaic_gpu", "mosaic_tpu" or "triton", under any transformation. An interpreter
  checks bounds and fills fresh memory with NaN; it takes seconds for arrays of some thousand
  numbers. Programs compiled inside are used only in contexts with the same settings. At its end
  the context waits for the programs that are still running.

  Args:
    detect_races: look for unordered accesses to memory in Mosaic's kernels, which is slower.
      Triton's interpreter runs the programs of a grid one after another, and has no such option.

  Raises:
    interpreters.Race: at the end of the context, where there was a race.
  """
  return running(Mode(detect_races=detect_races))


@contextlib.contextmanager
def running(settings: Mode) -> Iterator[None]:
  """`interpret`, with all that can be set."""
  from . import races

  races.reset()
  unoptimized = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)  # they would cost more than they save
  try:
    with mode.current(settings):
      yield
      jax.effects_barrier()
  except Exception as error:
    if "RACE DETECTED" in str(error):  # of a callback, wrapped
      raise Race(str(error)) from None
    raise
  finally:
    jax.config.update("jax_disable_most_optimizations", unoptimized)
    raced = races.reset()
  if raced:
    raise Race("a kernel has races; standard output says where")
