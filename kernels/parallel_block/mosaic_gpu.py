"""The parallel block for Hopper in Pallas Mosaic GPU: products with their neighbours fused in.

How it works, and what it costs: docs/parallel_block.md. The products of the backward pass are in
mosaic_gpu_backward.py, the main loop is hopper/product.py.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import norms
from ..core import chips
from ..hopper import product, tiles
from ..hopper.product import CHUNK, STORE
from ..hopper.tiles import ROWS, TILE, WARPGROUP_ROWS, pad_rows
from . import configs
from .fused import unfused
from .mosaic_gpu_backward import input_gradient, swiglu_gradient  # noqa: F401

HIDDEN = CHUNK

def unsupported(x: jax.Array | jax.ShapeDtypeStruct, params: Mapping[str, Any], *,
                chip: str | None):
  """The first requirement that x [M, D] or the params fail, or None."""
  if chip not in (None, *chips.HOPPER):
    return f"a Hopper GPU (h100, h200); got {chip}"
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"bfloat16 or float16; got {x.dtype}"
  if problem := unfused(params):
    return problem
  if x.shape[-1] % CHUNK:
    return f"dim a multiple of {CHUNK}; got {x.shape[-1]}"
  if params["query"].shape[2] not in (64, 128, 256):
    return f"dim_head in {{64, 128, 256}}; got {params['query'].shape[2]}"
  return None


def in_projection(x: jax.Array, params: Mapping[str, jax.Array],
                  rotation: tuple[jax.Array, jax.Array] | None, *, norm: str, eps: float,
                  keep: bool, chip: str | None):
  """(query [M, H, Dh], key, value [M, K Dh], act [M, F], gate, up) of norm(x).

  act = silu(gate) * up, from the float32 sums. gate and up [M, F] are None unless `keep`, value
  where there is no weight of it.

  Args:
    x: float[M, D].
    params: norm float32[D]; query [D, H, Dh], key [D, K Dh], value [D, K Dh] or absent, gate and
      up [D, F], in the dtype of x.
    rotation: None, or (cos, sin), float32[M, Dh // 2] each, by which channel i of query and key is
      rotated with channel i + Dh // 2.
    norm: "layer" or "rms", with `eps`.
    keep: whether to return gate and up.
    chip: "h100", "h200" or None.
  """
  num_tokens, dim = x.shape
  _, heads, dim_head = params["query"].shape
  h = pad_rows(norms.normalize(x, params["norm"], kind=norm, eps=eps))  # mutant: statistics
  weights = [params["query"].reshape(dim, -1), params["key"], params.get("value"),
             params["gate"], params["up"]]
  tables = (None, None)
  if rotation is not None:  # a warpgroup reads its 64 rows of them without asking where they end
    tables = [pad_rows(table, 2 * ROWS) for table in rotation]
  *of_heads, gate, up = (None if w is None else w.shape[1] for w in weights)

  def across(columns):
    half = columns // 2
    if dim_head > columns:
      return 0
    return pl.cdiv(sum(_blocks(w, half) for w in weights[:3]), 2) + _blocks(weights[3], half)

  query, *rest = product.launch(
      functools.partial(_in_projection_kernel, dim_head=dim_head), "in_projection",
      [h, *weights, *tables], [*of_heads, gate, *((gate, up) if keep else (None, None))],
      lambda columns: (2, CHUNK, columns // 2), copies=3, across=across, num_tokens=num_tokens,
      dtype=x.dtype, chip=chip, configs=configs.mosaic_gpu(chip))
  return query.reshape(num_tokens, heads, dim_head), *rest


def _blocks(weight, width):
  """The number of blocks of columns of a weight; 0 if it is absent."""
  return 0 if weight is None else pl.cdiv(weight.shape[1], width)


def _in_projection_kernel(h_ref, query_ref, key_ref, value_ref, gate_ref, up_ref, cos_ref, sin_ref,
                          query_out, key_out, value_out, act_out, gate_out, up_out, ring, *,
                          dim_head):
  # A tile is two blocks of columns. Those of queries, keys and values are numbered through, so
  # that none is left alone but the last; then come blocks of gate and up, side by side.
  half = ring.b.shape[3]
  heads, stop = [], 0
  for weight, out in ((query_ref, query_out), (key_ref, key_out), (value_ref, value_out)):
    if weight is not None:
      heads.append((stop, stop + _blocks(weight, half), weight, out))
      stop += _blocks(weight, half)
  head_tiles, depth = pl.cdiv(stop, 2), h_ref.shape[1] // CHUNK
  # A block past the last one is past the end of its array: zeros come and nothing goes.
  heads[-1] = (heads[-1][0], stop + 1, *heads[-1][2:])

  def fill(row, column, i, slot, put):
    chunk = pl.ds(i * CHUNK, CHUNK)
    put(h_ref.at[pl.ds(row * ROWS, ROWS), chunk], ring.a.at[slot])
    for side, wide in enumerate((gate_ref, up_ref)):  # mutant: gate and up
      block = column * 2 + side
      choices = [((start <= block) & (block < end) & (column < head_tiles), weight, block - start)
                 for start, end, weight, _ in heads]
      choices.append((column >= head_tiles, wide, column - head_tiles))
      for condition, weight, block in choices:
        pl.when(condition)(functools.partial(
            put, weight.at[chunk, pl.ds(block * half, half)], ring.b.at[slot, side], shared=True))

  def compute(row, column, first):
    sums = product.accumulate(
        ring, first, depth, lambda slot: [ring.b.at[slot, side] for side in (0, 1)])
    here = product.rows_of(row)

    @pl.when(column < head_tiles)
    def of_heads():
      for side in (0, 1):
        block = column * 2 + side

        def pieces(piece_at, side=side, block=block):
          for at in range(0, half, STORE):
            place = side * half + at
            product.store(ring, place // STORE, piece_at(place), *[
                ((start <= block) & (block < end),
                 out.at[here, pl.ds((block - start) * half + at, STORE)])
                for start, end, _, out in heads])

        plain = lambda at: _columns(sums, at, STORE)
        rotated = lambda at: _rotated(sums, at, cos_ref, sin_ref, here, dim_head)
        if cos_ref is None:
          pieces(plain)
        elif value_ref is None:
          pieces(rotated)
        else:
          # mutant: rotated columns
          pl.when(block < heads[-1][0])(functools.partial(pieces, rotated))
          # mutant: rotated columns
          pl.when(block >= heads[-1][0])(functools.partial(pieces, plain))

    @pl.when(column >= head_tiles)
    def of_hidden():
      outs = [out for out in (act_out, gate_out, up_out) if out is not None]
      for n, at in enumerate(range(0, half, STORE)):
        gate, up = (total[:, at:at + STORE] for total in sums)
        there = here, pl.ds((column - head_tiles) * half + at, STORE)
        for i, (out, value) in enumerate(zip(
            outs, (gate * tiles.sigmoid(gate) * up, gate, up))):
          product.store(ring, n * len(outs) + i, value, (True, out.at[there]))

  product.run(ring, [(depth, fill)], compute)


def _columns(sums, at, width):
  """Columns [at, at + width) of the two sums side by side."""
  side, at = divmod(at, sums[0].shape[1])
  return sums[side][:, at:at + width]


def _rotated(sums, at, cos_ref, sin_ref, rows, dim_head):
  """STORE columns from `at` on, of heads that begin at multiples of dim_head, rotated."""
  pair = dim_head // 2
  width = min(STORE, pair)
  second_half, channel = divmod(at % dim_head, pair)
  at -= second_half * pair
  first, second = _columns(sums, at, width), _columns(sums, at + pair, width)
  cos, sin = (  # mutant: angles
      plgpu.load(table.at[rows, pl.ds(channel, width)], layout=TILE, optimized=False)
      for table in (cos_ref, sin_ref))
  halves = first * cos - second * sin, second * cos + first * sin  # mutant: rotation
  if pair < STORE:
    return jnp.concatenate(halves, axis=1)
  return halves[second_half]


def out_projection(x: jax.Array | None, attended: jax.Array, act: jax.Array, attn_out: jax.Array,
                   ff_out: jax.Array, *, chip: str | None):
  """y [M, D] = x + attended @ attn_out + act @ ff_out, summed in float32 and rounded once.

  Args:
    x: float[M, D], or None for 0.
    attended: [M, H, Dh].
    act: [M, F].
    attn_out: [H, Dh, D].
    ff_out: [F, D].
    chip: "h100", "h200" or None.
  """
  num_tokens, dim = act.shape[0], ff_out.shape[1]
  operands = [None if x is None else pad_rows(x),
              pad_rows(attended.reshape(num_tokens, -1)), attn_out.reshape(-1, dim),
              pad_rows(act), ff_out]
  y, = product.launch(
      _out_projection_kernel, "out_projection", operands, [dim],
      lambda columns: (CHUNK, columns), copies=2, across=lambda columns: pl.cdiv(dim, columns),
      num_tokens=num_tokens, dtype=act.dtype, chip=chip, configs=configs.mosaic_gpu(chip))
  return y


def _out_projection_kernel(x_ref, attended_ref, attn_out_ref, act_ref, ff_out_ref, y_ref, ring):
  columns = ring.b.shape[2]

  def residual(row, column, i, slot, put):
    for half in (0, WARPGROUP_ROWS):
      # mutant: residual's place
      put(x_ref.at[pl.ds(row * ROWS + half, WARPGROUP_ROWS),
                   pl.ds(column * columns + i * STORE, STORE)],
          ring.a.at[slot, pl.ds(half, WARPGROUP_ROWS)])

  parts = [product.part(ring, attended_ref, attn_out_ref), product.part(ring, act_ref, ff_out_ref)]
  depth = sum(steps for steps, _ in parts)  # mutant: products
  if x_ref is not None:
    parts.append((columns // STORE, residual))

  def compute(row, column, first):
    total, = product.accumulate(ring, first, depth, lambda slot: [ring.b.at[slot]])
    for i in range(columns // STORE):
      value = total[:, i * STORE:(i + 1) * STORE]
      if x_ref is not None:
        value += product.take(ring, first + depth + i, ring.a)[0]  # mutant: residual
      there = product.rows_of(row), pl.ds(column * columns + i * STORE, STORE)
      product.store(ring, i, value, (True, y_ref.at[there]))

  product.run(ring, parts, compute)
