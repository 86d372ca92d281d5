"""Callbacks with arrays of numpy, which JAX puts on a device first."""

import functools

import jax
import numpy as np
from jax._src import callback


@functools.cache
def mend() -> None:
  """Changes how JAX calls the interpreters back, from now on; nobody else is affected.

  Pallas's interpreters call Python at each access to memory, and moving the arguments to a device
  is four fifths of their time. A large argument would even wait for a thread that the program
  itself occupies.
  """
  for name in ("io_callback_impl", "pure_callback_impl"):
    setattr(callback, name, functools.partial(_call, getattr(callback, name)))


def _call(original, *args, **params):
  function = params["callback"].callback_func
  while isinstance(function, functools.partial):
    function = function.func
  own = "jax._src.pallas.", __package__ or ""
  if not getattr(function, "__module__", "").startswith(own):
    return original(*args, **params)
  return jax.tree.map(np.asarray, params["callback"](*map(np.array, args)))
