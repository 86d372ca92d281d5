"""Attention in plain JAX: the oracle of every test, and what runs where no kernel does.

`attend` is the formula. `attention` applies it to blocks of queries, so that the scores of one
block at a time exist, and leaves out the keys that no query of a block can see.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK_Q = 128  # queries whose scores exist at one time
MAX_SPANS = 8  # distinct key ranges compiled; bounds the program's size for long sequences


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

  # The query heads of one key/value head are rows of one matrix.
  query = query.reshape(batch, num_queries, kv_heads, group, dim_head)
  scores = scale * jnp.einsum("btkgd,bskd->bktgs", query, key, preferred_element_type=accum)

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
  total = weights.sum(-1)
  out = jnp.einsum("bktgs,bskd->btkgd", weights.astype(value.dtype), value,
                   preferred_element_type=accum)
  # A row that sees nothing has total 0 and stays 0.
  out /= jnp.where(total == 0, 1, total).transpose(0, 2, 1, 3)[..., None]
  return out.reshape(batch, num_queries, heads, dim_head).astype(query.dtype)


def attention(query, key, value, *, is_causal, alibi_slopes, scale, segment_ids, window,
              query_offset, block_q=BLOCK_Q):
  """`attend`, a block of queries at a time; shapes as there, contract as `flash_attention`."""
  batch, num_queries, heads, dim_head = query.shape
  num_keys = key.shape[1]
  formula = functools.partial(
      attend, is_causal=is_causal, alibi_slopes=alibi_slopes, scale=scale, window=window)
  key_pos = jnp.arange(num_keys)
  if num_queries <= block_q:
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
  blocks_per_span = -(-num_blocks // MAX_SPANS)
  outs = []
  for first in range(0, num_blocks, blocks_per_span):
    last = min(first + blocks_per_span, num_blocks)
    lo, hi = _reach(first * block_q, last * block_q, num_keys, is_causal, window, query_offset)
    if lo == hi:
      outs.append(jnp.zeros((batch, (last - first) * block_q, heads, dim_head), query.dtype))
      continue
    block = jax.checkpoint(functools.partial(attend_block, lo=lo, hi=hi), prevent_cse=False)
    out = jax.lax.map(block, jnp.arange(first, last) * block_q)  # [blocks, B, block_q, ...]
    outs.append(out.swapaxes(0, 1).reshape(batch, -1, heads, dim_head))
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
