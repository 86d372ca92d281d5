"""A PaLM as generation runs it: layer by layer, on weights and a cache that are laid out for it.

A loop over stacked layers copies each layer's weights and cache out of the stack at every token,
on top of reading them. Here every layer has its own arrays, and what reads the same input is one
matrix: 1.3 times the tokens a second on a CPU (dim 512, depth 8, batches of 1 and 16).
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from palm_haiku import kernels
from palm_haiku.config import PaLMConfig
from palm_haiku.kernels import mesh as meshes
from palm_haiku.kernels.int8 import Int8, product, quantize
from palm_haiku.kernels.parallel_block.xla import normalize, positioned, write
from palm_haiku.model import palm_params


class Layer(NamedTuple):
  """Weights of one layer. Matrices of a group lie side by side, or are one."""

  norm: jax.Array  # [D]
  into: tuple[jax.Array | Int8, ...]  # [D, n]: query, key, value if it is not the key, gate, up
  out: tuple[jax.Array | Int8, ...]  # [n, D]: attn_out, ff_out
  scales: dict[str, jax.Array]  # query_scale and key_scale [Dh], of QK-norm


class Weights(NamedTuple):
  """What `prepare` makes of a model's parameters."""

  embedding: jax.Array | Int8  # [V, D], or int8 by column: [D, V]
  norm: jax.Array  # [D]
  layers: tuple[Layer, ...]


class Int8Rows(NamedTuple):
  """Rows of a cache as int8, with a scale for each."""

  values: jax.Array  # int8[..., S, Dh]
  scales: jax.Array  # float32[..., S]


class Cache(NamedTuple):
  """Keys and values of the positions seen so far, layer by layer."""

  layers: tuple[tuple[jax.Array | Int8Rows, ...], ...]  # (keys, values) or (keys,): [..., S, Dh]
  length: jax.Array  # int32[], positions filled; or int32[...], by sequence


def prepare(params, config: PaLMConfig, dtype=jnp.float32, weights: str | None = None,
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
  model, stack = palm_params(params, prefix)
  apart = meshes.to_take_over(meshes.current(model["embedding"]))
  cast = quantize if weights == "int8" else lambda matrix: matrix.astype(dtype)

  def group(matrices, axis):
    return tuple(map(cast, matrices if apart else [jnp.concatenate(matrices, axis)]))

  def layer(i):
    one = {name: array[i] for name, array in stack.items()}
    flat = lambda name: one[name].reshape(config.dim, -1)
    names = ["query", "key", "gate", "up"] if config.shared_kv else [
        "query", "key", "value", "gate", "up"]
    return Layer(
        one["norm"], group([flat(name) for name in names], 1),
        group([one["attn_out"].reshape(-1, config.dim), one["ff_out"]], 0),
        {name: one[name] for name in ("query_scale", "key_scale") if name in one})

  embedding = model["embedding"]
  embedding = quantize(embedding.T) if weights == "int8" else embedding.astype(dtype)
  return Weights(embedding, model["norm"], tuple(map(layer, range(config.depth))))


def empty_cache(config: PaLMConfig, lead: tuple[int, ...], max_len: int, dtype) -> Cache:
  """Room for at least `max_len` positions of sequences with leading dimensions `lead`.

  Args:
    dtype: of keys and values; int8 for `Int8Rows`.
  """
  max_len = -(-max_len // 8) * 8  # as kernels ask for

  def rows():
    values = jnp.zeros((*lead, max_len, config.dim_head), dtype)
    return Int8Rows(values, jnp.zeros((*lead, max_len))) if values.dtype == jnp.int8 else values

  num = 1 if config.values_are_keys else 2
  return Cache(tuple(tuple(rows() for _ in range(num)) for _ in range(config.depth)),
               jnp.zeros((), jnp.int32))


def run(weights: Weights, config: PaLMConfig, tokens, cache: Cache, *, dtype=jnp.float32,
        fresh: bool = False, implementation: str = "auto"):
  """The normalised residual stream after the last layer, and the new cache.

  Args:
    tokens: int[..., T], at positions cache.length and on.
    fresh: nothing is in the cache yet: attention is among the tokens.

  Returns:
    [..., T, D] in dtype; `logits` makes logits of it.
  """
  c = config
  if isinstance(weights.embedding, Int8):
    x = weights.embedding.columns(tokens, dtype)
  else:
    x = weights.embedding.at[tokens].get(mode="fill", fill_value=jnp.nan)
  positions = cache.length[..., None] + jnp.arange(tokens.shape[-1])
  lengths = jnp.broadcast_to(cache.length + tokens.shape[-1], tokens.shape[:-1])
  options = dict(implementation=implementation,
                 alibi_slopes=kernels.alibi_slopes(c.heads) if c.position == "alibi" else None)
  sizes = (c.heads * c.dim_head, c.dim_head, 0 if c.shared_kv else c.dim_head, c.dim_ff)
  borders = tuple(itertools.accumulate(sizes))
  layers = []
  for layer, stored in zip(weights.layers, cache.layers):
    h = normalize(x, layer.norm, kind=c.norm, eps=c.norm_eps)
    columns = jnp.concatenate([product(h, matrix) for matrix in layer.into], -1)
    query, key, value, gate, up = jnp.split(columns, borders, -1)
    value = key if c.shared_kv else value
    query = query.reshape(*query.shape[:-1], c.heads, c.dim_head)
    query, key = positioned(
        query, key[..., None, :], layer.scales, positions, rotary=c.position == "rotary",
        xpos_scale_base=c.xpos_scale_base)
    key = key[..., 0, :]
    rows = (key,) if c.values_are_keys else (key, value)
    stored = tuple(_write(old, new, cache.length) for old, new in zip(stored, rows))
    layers.append(stored)
    if fresh:
      heads = [row[..., None, :] for row in rows]
      attended = kernels.flash_attention(query, heads[0], heads[-1], **options)
    else:
      attended = _attend(query, stored, lengths, options)
    parts = attended.reshape(*attended.shape[:-2], -1), jax.nn.silu(gate) * up
    if len(layer.out) == 1:
      parts = jnp.concatenate(parts, -1),
    x = sum(map(product, parts, layer.out), start=x)
  x = normalize(x, weights.norm, kind=c.norm, eps=c.norm_eps)
  return x, Cache(tuple(layers), cache.length + tokens.shape[-1])


def logits(weights: Weights, config: PaLMConfig, x) -> jax.Array:
  """float32[..., V] of what `run` returns."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  if isinstance(weights.embedding, Int8):
    return config.logits_factor * product(x, weights.embedding, wide)
  # Contracted as it lies: for one row XLA's CPU backend copies a transposed matrix at every token.
  return config.logits_factor * jnp.einsum(
      "...d,vd->...v", x, weights.embedding, preferred_element_type=wide)


def _write(old, rows, offset):
  if not isinstance(old, Int8Rows):
    return write(old, rows, offset)
  rows = rows.astype(jnp.float32)
  scales = jnp.abs(rows).max(-1) / 127
  values = jnp.round(rows / jnp.where(scales == 0, 1, scales)[..., None])
  return Int8Rows(write(old.values, values, offset),
                  write(old.scales[..., None], scales[..., None], offset)[..., 0])


def _attend(query, stored, lengths, options):
  def one_head(rows):
    if isinstance(rows, Int8Rows):
      return rows.values[..., None, :], rows.scales[..., None]
    return rows[..., None, :].astype(query.dtype), None

  heads = [one_head(rows) for rows in stored]
  (key, key_scales), (value, value_scales) = heads[0], heads[-1]
  return kernels.decode_attention(
      query, key, value, lengths, key_scales=key_scales,
      value_scales=None if value is key else value_scales, **options)
