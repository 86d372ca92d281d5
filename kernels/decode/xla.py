"""Attention to a cache in plain JAX: the oracle of every test, and what runs without a kernel."""

import jax.numpy as jnp


def attend(query, key, value, lengths, *, alibi_slopes, scale, key_scales, value_scales,
           left=None):
  """The formula.

  Args:
    query: float[B, T, heads, dim_head].
    key: query's dtype or int8[B, S, kv_heads, dim_head].
    value: like key; None where it is the key.
    lengths: int32[B].
    alibi_slopes: None or float[heads].
    key_scales, value_scales: None or float32[B, S, kv_heads].
    left: positions before its own that a query sees; None for all.

  Returns:
    [B, T, heads, dim_head] in the dtype of query; NaN where the length is not in [0, S].
  """
  batch, num_queries, heads, dim_head = query.shape
  max_len, kv_heads = key.shape[1:3]
  accum = jnp.promote_types(query.dtype, jnp.float32)
  scale = scale if isinstance(scale, float) else jnp.asarray(scale, accum)
  if value is None:
    value, value_scales = key, key_scales
  rows = query.reshape(batch, num_queries, kv_heads, -1, dim_head)  # the last but one is the group
  # int8 is exact in every floating dtype, so the scales go to the scores and the weights.
  scores = scale * jnp.einsum(
      "btkgd,bskd->bktgs", rows, key.astype(query.dtype), preferred_element_type=accum)
  if key_scales is not None:
    scores *= key_scales.transpose(0, 2, 1)[:, :, None, None, :]

  query_pos = lengths[:, None] - num_queries + jnp.arange(num_queries)
  distance = jnp.arange(max_len) - query_pos[:, :, None]  # [B, T, S]
  if alibi_slopes is not None:
    slopes = jnp.asarray(alibi_slopes, accum).reshape(kv_heads, 1, -1, 1)
    scores += slopes * distance.astype(accum)[:, None, :, None, :]
  visible = distance <= 0 if left is None else (distance <= 0) & (distance >= -left)
  scores = jnp.where(visible[:, None, :, None, :], scores, -jnp.inf)

  # The weights beyond are 0, and 0 * NaN is not.
  filled = (jnp.arange(max_len) < lengths[:, None])[:, :, None]
  if left is not None:
    first = first_seen(lengths, num_queries, left)
    filled &= (jnp.arange(max_len) >= first[:, None])[:, :, None]
  if value_scales is None:
    value = jnp.where(filled[..., None], value, 0)
  else:
    value_scales = jnp.where(filled, value_scales, 0)

  top = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
  total = weights.sum(-1)[..., None]
  if value_scales is not None:
    weights *= value_scales.transpose(0, 2, 1)[:, :, None, None, :]
  out = jnp.einsum("bktgs,bskd->bktgd", weights.astype(query.dtype), value.astype(query.dtype),
                   preferred_element_type=accum)
  # A row that sees nothing has total 0 and stays 0.
  out = (out / jnp.where(total == 0, 1, total)).swapaxes(1, 2).reshape(query.shape)
  return nan_outside(out, lengths, max_len).astype(query.dtype)


def first_seen(length, num_queries, left):
  """The first position that a sequence's queries see, with a window."""
  return jnp.maximum(length - num_queries - left, 0)  # mutant: first position


def nan_outside(out, lengths, max_len):
  """`out` [B, ...], NaN where a sequence's length is none that a cache can have."""
  fits = (lengths >= 0) & (lengths <= max_len)
  return jnp.where(fits.reshape(-1, *[1] * (out.ndim - 1)), out, jnp.nan)
