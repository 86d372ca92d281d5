"""A PaLM as generation runs it: layer by layer, on weights and a cache that are laid out for it.

A loop over stacked layers copies each layer's weights and cache out of the stack at every token,
on top of reading them. Here every layer has its own arrays, and what reads the same input is one
matrix: 1.3 times the tokens a second on a CPU (dim 512, depth 8, batches of 1 and 16).
"""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from palm_haiku import cache as caches, kernels
from palm_haiku.cache import Cache, Int8Rows
from palm_haiku.config import PaLMConfig
from palm_haiku.int8 import Int8, product, quantize
from palm_haiku.kernels.core import partition
from palm_haiku.kernels.core.compat import promoting
from palm_haiku.kernels.norms import normalize
from palm_haiku.kernels.parallel_block.steps import activate, positioned
from palm_haiku.model import palm_params


class Layer(NamedTuple):
  """Weights of one layer. Matrices of a group lie side by side, or are one."""

  norm: tuple[jax.Array, ...]  # gain and, if there is one, bias [D]
  into: tuple[jax.Array | Int8, ...]  # [D, n]: those of query, key, value, gate, up that exist
  out: tuple[jax.Array | Int8, ...]  # [n, D]: attn_out, ff_out
  scales: dict[str, jax.Array]  # query_scale and key_scale, of QK-norm


class Weights(NamedTuple):
  """A model's parameters after `prepare`."""

  embedding: jax.Array | Int8  # [V, D], or int8 by column: [D, V]
  norm: tuple[jax.Array, ...]  # as a layer's
  layers: tuple[Layer, ...]


@promoting()
def prepare(params: Mapping[str, chex.ArrayTree], config: PaLMConfig,
            dtype: DTypeLike = jnp.float32, weights: str | None = None,
            prefix: str | None = None) -> Weights:
  """Weights for generation.

  Args:
    params: of `PaLM.from_config(config)`, alone or within other modules.
    dtype: of products.
    weights: None for matrices of that dtype; "int8" for a quarter or half of their bytes, with one
      scale for each column (and each token of the vocabulary).
    prefix: the module's name in params; None where they hold one PaLM.

  Over a mesh the matrices stay apart, so that each can be divided by its own columns.
  """
  model, stack = palm_params(params, prefix, config)
  apart = partition.to_take_over(partition.current(model["embedding"]))
  cast = quantize if weights == "int8" else lambda matrix: matrix.astype(dtype)

  def group(matrices, axis):
    return tuple(map(cast, matrices if apart else [jnp.concatenate(matrices, axis)]))

  def norm(arrays):
    return tuple(arrays[name] for name in ("norm", "norm_bias") if name in arrays)

  def layer(i):
    one = {name: array[i] for name, array in stack.items()}
    flat = lambda name: one[name].reshape(config.dim, -1)
    names = [name for name in ("query", "key", "value", "gate", "up") if name in one]
    return Layer(
        norm(one), group([flat(name) for name in names], 1),
        group([one["attn_out"].reshape(-1, config.dim), one["ff_out"]], 0),
        {name: one[name] for name in ("query_scale", "key_scale") if name in one})

  embedding = model["embedding"]
  embedding = quantize(embedding.T) if weights == "int8" else embedding.astype(dtype)
  return Weights(embedding, norm(model), tuple(map(layer, range(config.depth))))


def run(weights: Weights, config: PaLMConfig, tokens: jax.Array, cache: Cache, *,
        dtype: DTypeLike = jnp.float32, fresh: bool = False,
        prompt_lengths: jax.Array | None = None, segment_ids: jax.Array | None = None,
        implementation: kernels.Implementation = "auto"):
  """The normalised residual stream after the last layer, and the new cache.

  Args:
    tokens: int[..., T], at positions cache.length and on.
    fresh: nothing is in the cache yet: attention is among the tokens.
    prompt_lengths: with `fresh`, int32[...], how many of the tokens count of each sequence; None
      for all.
    segment_ids: with `fresh`, int[..., T]; attention stays within equal ids.

  Returns:
    [..., T, D] in dtype; `logits` makes logits of it.
  """
  c = config
  if isinstance(weights.embedding, Int8):
    x = weights.embedding.columns(tokens, dtype)
  else:
    x = weights.embedding.at[tokens].get(mode="fill", fill_value=jnp.nan)
  positions = cache.length[..., None] + jnp.arange(tokens.shape[-1])
  length = cache.length + tokens.shape[-1] if prompt_lengths is None else prompt_lengths
  lengths = jnp.broadcast_to(length, tokens.shape[:-1])
  kv_dim = c.kv_heads * c.dim_head
  sizes = (c.heads * c.dim_head, kv_dim, 0 if c.shared_kv else kv_dim,
           c.dim_ff if c.activation == "swiglu" else 0)
  borders = tuple(itertools.accumulate(sizes))
  layers = []
  for i, (layer, stored) in enumerate(zip(weights.layers, cache.layers)):
    is_global = c.is_global(i)
    window, alibi = None if is_global else c.window, c.position == "alibi" and not is_global
    options: dict[str, Any] = dict(
        implementation=implementation,
        alibi_slopes=kernels.alibi_slopes(c.heads) if alibi else None)
    h = normalize(x, *layer.norm, kind=c.norm, eps=c.norm_eps)
    columns = jnp.concatenate([product(h, matrix) for matrix in layer.into], -1)
    query, key, value, gate, up = jnp.split(columns, borders, -1)
    value = key if c.shared_kv else value
    query, key, value = (
        rows.reshape(*rows.shape[:-1], -1, c.dim_head) for rows in (query, key, value))
    query, key = positioned(
        query, key, layer.scales, positions, norm_eps=c.norm_eps,
        rotary=c.position == "rotary" and not is_global, rope_theta=c.rope_theta,
        xpos_scale_base=c.xpos_scale_base)
    heads = (key,) if c.values_are_keys else (key, value)
    rows = (caches.repeated(stored, heads) if c.kv_heads > 1
            else tuple(row[..., 0, :] for row in heads))
    if fresh:
      stored = caches.fill(stored, rows, lengths, window=window)
      attended = kernels.flash_attention(
          query, heads[0], heads[-1], segment_ids=segment_ids, **options,
          local_window_size=None if window is None else (window - 1, 0))
    else:
      stored, view = caches.extend(stored, rows, cache.length, axis=tokens.ndim - 1, window=window,
                                   by_position=alibi)
      attended = _attend(query, view, c.kv_heads > 1, options)
    layers.append(stored)
    parts = (attended.reshape(*attended.shape[:-2], -1),
             activate(gate if c.activation == "swiglu" else None, up))
    if len(layer.out) == 1:
      parts = jnp.concatenate(parts, -1),
    x = sum(map(product, parts, layer.out), start=x)
  x = normalize(x, *weights.norm, kind=c.norm, eps=c.norm_eps)
  return x, Cache(tuple(layers), length)


def logits(weights: Weights, config: PaLMConfig, x: jax.Array) -> jax.Array:
  """float32[..., V] of what `run` returns."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  if isinstance(weights.embedding, Int8):
    return config.logits_factor * product(x, weights.embedding, wide)
  # Contracted as it lies: for one row XLA's CPU backend copies a transposed matrix at every token.
  return config.logits_factor * jnp.einsum(
      "...d,vd->...v", x, weights.embedding, preferred_element_type=wide)


def _attend(query, view, grouped, options):
  def by_head(rows):
    rows, scales = rows if isinstance(rows, Int8Rows) else (rows.astype(query.dtype), None)
    if grouped:
      return rows, scales
    return rows[..., None, :], None if scales is None else scales[..., None]

  heads = [by_head(rows) for rows in view.rows]
  (key, key_scales), (value, value_scales) = heads[0], heads[-1]
  return kernels.decode_attention(
      query, key, value, view.lengths, key_scales=key_scales,
      value_scales=None if value is key else value_scales,
      local_window_size=None if view.window is None else (view.window - 1, 0), **options)
