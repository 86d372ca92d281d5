"""Integers of any width as the int32 that kernels compute with, none of them cut."""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from . import partition
from .compat import Array, under_jit


def known(array: ArrayLike | None) -> np.ndarray | None:
  """The numbers of an array; None where it is traced, or partly in other processes."""
  if array is None or isinstance(array, jax.core.Tracer):
    return None
  if isinstance(array, jax.Array):
    return np.asarray(jax.device_get(array)) if array.is_fully_addressable else None
  return np.asarray(array)


def exceeds(number: Any, limit: Any) -> bool:
  """Whether number > limit, as far as it is known: not of a dimension that is exported as any."""
  return isinstance(number, int) and isinstance(limit, int) and number > limit


def clamped(numbers: ArrayLike, low: int, high: int) -> Any:
  """int32 numbers, those outside [low, high] replaced by the nearer end, not by their low bits.

  Args:
    numbers: integers of any width, an array or a number.
    low, high: within 32 bits; low at most 0.
  """
  xp = jnp if isinstance(numbers, jax.Array) else np
  numbers = xp.asarray(numbers)
  if numbers.dtype.itemsize < 4:
    numbers = numbers.astype(np.int32)
  # In a program a bound is a constant; else it is moved explicitly, for some disallow the rest.
  move = jax.device_put if xp is jnp and not under_jit() else lambda bound: bound
  limits = None if numbers.dtype == object else np.iinfo(numbers.dtype)
  if limits is None or high < limits.max:
    numbers = xp.minimum(numbers, move(np.asarray(high, numbers.dtype)))
  if limits is None or low > limits.min and limits.min < 0:
    numbers = xp.maximum(numbers, move(np.asarray(low, numbers.dtype)))
  return numbers.astype(np.int32) if hasattr(numbers, "astype") else np.int32(numbers)


def same_ids(query_ids: Array, key_ids: Array) -> tuple[Array, Array]:
  """int32 ids, equal where the given ones are and in their order.

  Args:
    query_ids, key_ids: integers [..., T] and [..., S] of any width; compared within a row.
  """
  ids = query_ids, key_ids
  if all(x.dtype.itemsize < 4 or x.dtype == jnp.int32 for x in ids):
    return query_ids.astype(jnp.int32), key_ids.astype(jnp.int32)
  if not any(isinstance(x, jax.Array) for x in ids):
    if all(x.min() >= -2**31 and x.max() < 2**31 for x in ids):
      return query_ids.astype(np.int32), key_ids.astype(np.int32)
    wide = object if any(x.max() >= 2**63 for x in ids) else np.int64
    values = np.unique(np.concatenate([x.astype(wide).ravel() for x in ids]))
    rank = lambda x: np.searchsorted(values, x.astype(wide)).astype(np.int32)
    return rank(query_ids), rank(key_ids)
  query, key = (tuple(map(jnp.asarray, _words(x))) for x in ids)
  return (partition.partitioned(lambda *words: _ranks(words[:3], words[3:]), *query, *key),
          partition.partitioned(lambda *words: _ranks(words[:3], words[3:]), *key, *query))


def _words(ids):
  """Three int32 by which integers of any width are ordered, the least significant one first."""
  signed = jnp.issubdtype(ids.dtype, jnp.signedinteger)
  low = ids.astype(np.int32) ^ np.int32(-2**31)  # in the order of unsigned numbers
  if ids.dtype.itemsize == 8:
    high = (ids >> ids.dtype.type(32)).astype(np.int32)
  else:
    high = -(ids < 0).astype(np.int32) if signed else low & np.int32(0)
  top = high & np.int32(0) if signed else (high < 0).astype(np.int32)
  return low, high, top


def _ranks(ids, others):
  """int32[..., n]: the place of each id among the values of its row, of `others` as well."""
  words = [jnp.concatenate(pair, axis=-1) for pair in zip(ids, others)]
  index = jax.lax.broadcasted_iota(jnp.int32, words[0].shape, words[0].ndim - 1)
  *words, index = jax.lax.sort((*words[::-1], index), num_keys=3)
  new = functools.reduce(
      jnp.logical_or, [word[..., 1:] != word[..., :-1] for word in words])
  rank = jnp.cumsum(jnp.concatenate([jnp.zeros_like(new[..., :1]), new], axis=-1), axis=-1,
                    dtype=jnp.int32)
  return jax.lax.sort((index, rank), num_keys=1)[1][..., : ids[0].shape[-1]]
