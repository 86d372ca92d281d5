"""Matrix products inside TPU kernels, and their order in a program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def dot(a, b, transposed: bool = False) -> jax.Array:
  """a @ b, or a @ b.T, in float32."""
  return jax.lax.dot_general(
      a, b, (((1,), (int(transposed),)), ((), ())), preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def ahead(places: Sequence, product: Callable[[Any], Any], finish: Callable[[Any, Any], Any],
          count: int = 1) -> None:
  """Calls finish(product(place), place) for each place, with `count` products issued ahead.

  In program order the products of the next places come before what is done to this one's, and the
  scheduler keeps that order: the matrix units work while the vector units do.
  """
  ready = [product(place) for place in places[:count]]
  for n, place in enumerate(places):
    if n + count < len(places):
      ready.append(product(places[n + count]))
    finish(ready[n], place)
    ready[n] = None  # frees it for the interpreter, too


def clear(ref) -> None:
  ref[...] = jnp.zeros_like(ref)
