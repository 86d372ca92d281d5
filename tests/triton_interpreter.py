"""Triton's kernels in their interpreter, with planted mistakes."""

import contextlib
import functools

import jax

from palm_haiku.kernels import interpreters
from tests import mutants

_patched = jax.make_user_context(None)


@contextlib.contextmanager
def interpreted(mistake=None):
  """Triton's kernels run in the interpreter; no op is taken from those compiled before.

  Args:
    mistake: a `mutants.Mistake` in the kernels' source, to see that tests notice it.
  """
  settings = interpreters.Mode() if mistake is None else interpreters.Mode(
      triton_source=functools.cache(lambda path: mutants.text(path, mistake)))
  with _patched(object()), interpreters.running(settings):
    yield
