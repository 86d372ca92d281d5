"""Attention in plain JAX: the oracle of every test, and what runs where no kernel does.

`attend` is the formula. `attention` applies it to blocks of queries, so that the scores of one
block at a time exist, and leaves out the keys that no query of a block can see.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Queries whose scores exist at one time. Forward and backward at 4 x 1024 tokens, 8 heads of 64 on
# two CPU cores: 0.19 CPU seconds with 64, 0.19 to 0.22 with 128 (and 3 times as long forward).
BLOCK_Q = 64
# Queries that share one static range of keys, at least, and how many such spans there may be. Each
# is compiled apart, for 0.45 CPU seconds with its gradient; at 1024 tokens leaving out the keys
# that no query of a span sees would win a sixth of the training step of an 8-layer model.
SPAN = 1024
MAX_SPANS = 8


def attend(query, key, value, query_pos, key_pos, segment_ids, *,
           is_causal, alibi_slopes, scale, window):
  """Attention of all given queries to all given keys.

  Args:
    query: float[B, T, heads, dim_head].
    key, value: float[B, S, kv_heads, dim_head].
    query_pos, key_pos: int[T], int[S].
    segment_ids: None or (int[B, T], int[B, S]).

  Returns:
    [B, T, heads, dim_head] in the dtype of `query`.
  """
  batch, num_queries, heads, dim_head = query.shape
  kv_heads = key.shape[2]
  group = heads // kv_heads
  accum = jnp.promote_types(query.dtype, jnp.float32)
  scale = scale if isinstance(scale, float) else jnp.asarray(scale, accum)

  # The queries of all heads that share a key/value head are rows of one matrix.
  shape = (batch, num_queries, kv_heads, group, dim_head)
  rows = query.reshape(shape).swapaxes(1, 2).reshape(batch, kv_heads, -1, dim_head)
  scores = scale * jnp.einsum("bkrd,bskd->bkrs", rows, key, preferred_element_type=accum)
  scores = scores.reshape(batch, kv_heads, num_queries, group, -1)

  distance = key_pos - query_pos[:, None]  # [T, S]
  if alibi_slopes is not None:
    slopes = jnp.asarray(alibi_slopes, accum).reshape(kv_heads, 1, group, 1)
    scores += slopes * distance.astype(accum)[:, None, :]

  visible = jnp.ones((1,) + distance.shape, bool)
  if is_causal:
    visible &= distance <= 0
  if window is not None:
    visible &= (distance >= -window[0]) & (distance <= window[1])
  if segment_ids is not None:
    visible &= segment_ids[0][:, :, None] == segment_ids[1][:, None, :]
  scores = jnp.where(visible[:, None, :, None, :], scores, -jnp.inf)

  # The maximum only keeps exp in range, so no gradient flows through it.
  top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
  total = weights.sum(-1, keepdims=True)
  weights = weights.reshape(batch, kv_heads, num_queries * group, -1).astype(value.dtype)
  out = jnp.einsum("bkrs,bskd->bkrd", weights, value, preferred_element_type=accum)
  # A row that sees nothing has total 0 and stays 0.
  out = out.reshape(batch, kv_heads, num_queries, group, dim_head)
  out /= jnp.where(total == 0, 1, total)
  return out.swapaxes(1, 2).reshape(query.shape).astype(query.dtype)


def attention(query, key, value, *, is_causal, alibi_slopes, scale, segment_ids, window,
              query_offset, block_q=BLOCK_Q, span=SPAN):
  """`attend`, a block of queries at a time; shapes as there, contract as `flash_attention`."""
  batch, num_queries, heads, dim_head = query.shape
  num_keys = key.shape[1]
  formula = functools.partial(
      attend, is_causal=is_causal, alibi_slopes=alibi_slopes, scale=scale, window=window)
  key_pos = jnp.arange(num_keys)
  if isinstance(num_queries, int) and num_queries <= block_q:
    query_pos = query_offset + jnp.arange(num_queries)
    out = formula(query, key, value, query_pos, key_pos, segment_ids)
    return checkpoint_name(out, "attention_out")

  num_blocks = -(-num_queries // block_q)
  padding = num_blocks * block_q - num_queries
  query = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0)))
  if segment_ids is not None:
    segment_ids = (jnp.pad(segment_ids[0], ((0, 0), (0, padding))), segment_ids[1])

  def attend_block(first_row, lo, hi):
    rows = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=first_row, slice_size=block_q, axis=1)
    segments = segment_ids and (rows(segment_ids[0]), segment_ids[1][:, lo:hi])
    query_pos = query_offset + first_row + jnp.arange(block_q)
    return formula(rows(query), key[:, lo:hi], value[:, lo:hi], query_pos, key_pos[lo:hi],
                   segments)

  # Each span of blocks has a static range of keys; its blocks' scores are recomputed in the
  # backward pass, never kept.
  if isinstance(num_blocks, int) and isinstance(num_keys, int):
    blocks_per_span = max(-(-num_blocks // MAX_SPANS), span // block_q)
    edges = [*range(0, num_blocks, blocks_per_span), num_blocks]
    spans = [(first, last, *_reach(first * block_q, last * block_q, num_keys, is_causal, window,
                                   query_offset)) for first, last in itertools.pairwise(edges)]
  else:  # dimensions of a program that is exported for any
    spans = [(0, num_blocks, 0, num_keys)]
  outs = []
  for first, last, lo, hi in spans:
    if isinstance(hi, int) and lo == hi:
      outs.append(jnp.zeros((batch, (last - first) * block_q, heads, dim_head), query.dtype))
      continue
    block = jax.checkpoint(functools.partial(attend_block, lo=lo, hi=hi), prevent_cse=False)
    out = jax.lax.map(block, jnp.arange(first, last) * block_q)  # [blocks, B, block_q, ...]
    outs.append(out.swapaxes(0, 1).reshape(batch, (last - first) * block_q, heads, dim_head))
  out = jnp.concatenate(outs, axis=1)[:, :num_queries]
  return checkpoint_name(out, "attention_out")


def _reach(first_row, end_row, num_keys, is_causal, window, query_offset):
  """The range of keys that queries [first_row, end_row) can see, as Python ints."""
  if not isinstance(query_offset, int):
    return 0, num_keys
  lo, hi = 0, num_keys
  if is_causal:
    hi = min(hi, query_offset + end_row)
  if window is not None:
    lo = max(lo, query_offset + first_row - window[0])
    hi = min(hi, query_offset + end_row + window[1])
  return (lo, hi) if lo < hi else (0, 0)
