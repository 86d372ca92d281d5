"""A rule for `vmap` of what works on rows of tokens."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .compat import in_32_bits


def folding_vmap(function: Callable):
  """`function(tokens, others)` with a rule for `vmap`: mapped tokens become more tokens.

  Every array of `tokens`, and every result, has one row for each token. Where one of the others
  is mapped, the calls are made one after the other.
  """
  mapped = jax.custom_batching.custom_vmap(in_32_bits()(function))

  @mapped.def_vmap
  def fold(size, batched, tokens, others):
    if any(jax.tree.leaves(batched[1])):
      pick = lambda i: lambda x, is_batched: x[i] if is_batched else x
      results = jax.lax.map(
          lambda i: mapped(*jax.tree.map(pick(i), (tokens, others), tuple(batched))),
          jnp.arange(size))
    else:
      def merge(x, is_batched):
        x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
        return x.reshape(size * x.shape[1], *x.shape[2:])

      results = mapped(jax.tree.map(merge, tokens, batched[0]), others)
      split = lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:])
      results = jax.tree.map(split, results)
    return results, jax.tree.map(lambda _: True, results)

  return mapped


def folding_batch(function: Callable):
  """Attention's forward or backward pass, which `vmap` calls on a larger batch.

  Its arrays and segment ids have one row for each sequence; mapped slopes or offsets are called
  one after the other.
  """
  @functools.wraps(function)
  def folded(*arrays, segment_ids, alibi_slopes, query_offset, **static):
    is_static = isinstance(query_offset, int)

    def call(sequences, others):
      (arrays, ids), (slopes, offset) = sequences, others
      return function(*arrays, segment_ids=ids, alibi_slopes=slopes,
                      query_offset=query_offset if is_static else offset, **static)

    return folding_vmap(call)(
        (arrays, segment_ids), (alibi_slopes, None if is_static else query_offset))

  return folded
