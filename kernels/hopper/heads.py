"""Heads as rows of Hopper kernels.

The query heads of one key/value head are rows of one matrix: row r = i * group + g is query i of
head g.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from . import tiles
from .tiles import WARPGROUP_ROWS


def pack(x, kv_heads):
  """[B, T, heads, D] -> [B, rows, kv_heads, D] or [B * kv_heads, rows, 1, D].

  Multi-query attention has its rows in this order in memory already, and so has a group of one.
  """
  batch, length, heads, dim = x.shape
  group = heads // kv_heads
  if kv_heads == 1 or group == 1:
    return x.reshape(batch, length * group, kv_heads, dim)
  x = x.reshape(batch, length, kv_heads, group, dim).transpose(0, 2, 1, 3, 4)
  return x.reshape(batch * kv_heads, length * group, 1, dim)


def pad_rows(*arrays: jax.Array | None) -> tuple[Any, ...]:
  """The arrays [B, rows, ...] or None with zeros after the last row, for copies."""
  return tuple(None if x is None else tiles.pad_rows(x, axis=1) for x in arrays)


def unpack(x, shape, kv_heads):
  """The inverse of `pack`, and of `pad_rows` after it; `shape` is [B, T, heads, D]."""
  batch, length, heads, dim = shape
  group = heads // kv_heads
  x = x[:, :length * group]
  if kv_heads == 1 or group == 1:
    return x.reshape(shape)
  x = x.reshape(batch, kv_heads, length, group, dim).transpose(0, 2, 1, 3, 4)
  return x.reshape(shape)


def pack_rows(x, kv_heads, padded, fill):
  """[B, heads, T] -> [B, kv_heads, padded], in the row order of `pack`."""
  batch, heads, length = x.shape
  x = x.reshape(batch, kv_heads, -1, length).swapaxes(2, 3).reshape(batch, kv_heads, -1)
  return jnp.pad(x, ((0, 0), (0, 0), (0, padded - x.shape[2])), constant_values=fill)


def unpack_rows(x, shape):
  """The inverse of `pack_rows`; `shape` is [B, heads, T]."""
  batch, heads, length = shape
  kv_heads = x.shape[1]
  x = x[:, :, :length * heads // kv_heads].reshape(batch, kv_heads, length, -1)
  return x.swapaxes(2, 3).reshape(shape)


def row_slopes(alibi_slopes, kv_heads):
  """float32[kv_heads, group + 64]: from any row on, the slopes of the next 64 rows."""
  slopes = jnp.asarray(alibi_slopes, jnp.float32).reshape(kv_heads, -1)  # mutant: slopes
  size = slopes.shape[1] + WARPGROUP_ROWS
  return jnp.tile(slopes, (1, pl.cdiv(size, slopes.shape[1])))[:, :size]


def rows_at(ref, b, kv, kv_heads, start, size):
  """The index of rows [start, start + size) in a `pack`ed array."""
  if ref.shape[2] == kv_heads:
    return b, pl.ds(start, size), kv
  return b * kv_heads + kv, pl.ds(start, size), 0
