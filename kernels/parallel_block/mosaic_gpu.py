"""The parallel block for Hopper in Pallas Mosaic GPU: products with their neighbours fused in.

How it works, and what it costs: docs/parallel_block.md. The backward pass's products are in
mosaic_gpu_backward.py, what all share in mosaic_gpu_product.py.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import mesh, tuning
from ..attention.mosaic_gpu_tiles import ROWS, TILE, WARPGROUP_ROWS
from . import mosaic_gpu_product as product
from . import xla
from .mosaic_gpu_backward import input_gradient, swiglu_gradient  # noqa: F401
from .mosaic_gpu_product import CHUNK, STORE


def out_projection(x, attended, act, attn_out, ff_out, *, chip, config=None):
  """y [M, D] = x + attended @ attn_out + act @ ff_out, summed in float32 and rounded once.

  Args:
    x: float[M, D], or None for 0.
    attended: [M, H, Dh].
    act: [M, F].
    attn_out: [H, Dh, D].
    ff_out: [F, D].
    chip: "h100", "h200" or None.
    config: tuning.ParallelBlockMosaicGpu, for tests.
  """
  config = config or tuning.parallel_block_mosaic_gpu(chip)
  num_tokens, dim = act.shape[0], ff_out.shape[1]
  attended = attended.reshape(num_tokens, -1)
  operands = [x, attended, attn_out.reshape(-1, dim), act, ff_out]
  out_type = mesh.out_shape(
      (pl.cdiv(num_tokens, product.TILING) * product.TILING, dim), act.dtype,
      *[a for a in operands if a is not None])
  x, attended, act = (None if a is None else product.whole(a, product.TILING)
                      for a in (x, attended, act))
  y, = product.launch(
      functools.partial(_out_projection_kernel, columns=config.columns), "out_projection",
      [x, attended, operands[2], act, ff_out], [out_type], (CHUNK, config.columns),
      copies=2, rows=pl.cdiv(num_tokens, ROWS), columns=pl.cdiv(dim, config.columns), config=config)
  return y[:num_tokens]


def _out_projection_kernel(x_ref, attended_ref, attn_out_ref, act_ref, ff_out_ref, y_ref,
                           a_smem, b_smem, out_smem, ring, *, columns):
  def residual(row, column, i, slot, put):
    for half in (0, WARPGROUP_ROWS):
      put(x_ref.at[pl.ds(row * ROWS + half, WARPGROUP_ROWS),
                   pl.ds(column * columns + i * STORE, STORE)],
          a_smem.at[slot, pl.ds(half, WARPGROUP_ROWS)])

  parts = [product.part(attended_ref, attn_out_ref, a_smem, b_smem),
           product.part(act_ref, ff_out_ref, a_smem, b_smem)]
  depth = sum(count for count, _ in parts)
  if x_ref is not None:
    parts.append((columns // STORE, residual))

  def compute(row, column, first):
    total, = product.accumulate(
        ring, first, depth, a_smem, lambda slot: [b_smem.at[slot]], columns)
    here = product.my_rows_of(row)
    for i in range(columns // STORE):
      value = total[:, i * STORE:(i + 1) * STORE]
      if x_ref is not None:
        value += product.take(ring, first + depth + i, a_smem)[0]
      target = y_ref.at[here, pl.ds(column * columns + i * STORE, STORE)]
      product.store(out_smem, i, value, (True, target))

  product.run(ring, pl.cdiv(y_ref.shape[0], ROWS), pl.cdiv(y_ref.shape[1], columns), parts, compute)


def in_projection(x, params, rotation, *, norm, eps, keep, chip, config=None):
  """(query [M, H, Dh], key [M, Dh], value [M, Dh] or None, act [M, F], gate, up) of norm(x).

  act = silu(gate) * up, from the float32 sums. gate and up [M, F] are None unless `keep`.

  Args:
    x: float[M, D].
    params: norm float32[D]; query [D, H, Dh], key [D, Dh], value [D, Dh] or absent, gate and up
      [D, F], in the dtype of x.
    rotation: None, or (cos, sin), float32[M, Dh // 2] each, by which channel i of query and key is
      rotated with channel i + Dh // 2.
    norm: "layer" or "rms", with `eps`.
    keep: whether to return gate and up.
    chip: "h100", "h200" or None.
    config: tuning.ParallelBlockMosaicGpu, for tests.
  """
  config = config or tuning.parallel_block_mosaic_gpu(chip)
  num_tokens, dim = x.shape
  _, heads, dim_head = params["query"].shape
  h = product.whole(xla.normalize(x, params["norm"], kind=norm, eps=eps), product.TILING)
  weights = [params["query"].reshape(dim, -1), params["key"], params.get("value"),
             params["gate"], params["up"]]
  if rotation is not None:
    # A warpgroup reads its 64 rows of these without asking where they end.
    rotation = [product.whole(table, 2 * ROWS) for table in rotation]
  operands = [h, *weights, *(rotation or (None, None))]
  like = lambda weight: None if weight is None else mesh.out_shape(
      (h.shape[0], weight.shape[1]), x.dtype, *[a for a in operands if a is not None])
  query, key, value, gate, up = map(like, weights)
  half = config.columns // 2
  tiles = pl.cdiv(sum(_blocks(w, half) for w in weights[:3]), 2) + _blocks(gate, half)
  query, key, value, act, gate, up = product.launch(
      functools.partial(_in_projection_kernel, dim_head=dim_head, half=half), "in_projection",
      operands, [query, key, value, gate, *((gate, up) if keep else (None, None))],
      (2, CHUNK, half), copies=3, rows=pl.cdiv(num_tokens, ROWS), columns=tiles, config=config)
  cut = lambda a: None if a is None else a[:num_tokens]
  return (cut(query).reshape(num_tokens, heads, dim_head), cut(key), cut(value), cut(act),
          cut(gate), cut(up))


def _blocks(weight, width):
  """How many blocks of columns a weight has; 0 if it is absent."""
  return 0 if weight is None else pl.cdiv(weight.shape[1], width)


def _in_projection_kernel(h_ref, query_ref, key_ref, value_ref, gate_ref, up_ref, cos_ref, sin_ref,
                          query_out, key_out, value_out, act_out, gate_out, up_out,
                          a_smem, b_smem, out_smem, ring, *, dim_head, half):
  # A tile is two blocks of columns. Those of queries, keys and values are numbered through, so
  # that none is left alone but the last; then come blocks of gate and up, side by side.
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
    put(h_ref.at[pl.ds(row * ROWS, ROWS), chunk], a_smem.at[slot])
    for side, wide in enumerate((gate_ref, up_ref)):
      block = column * 2 + side
      choices = [((start <= block) & (block < end) & (column < head_tiles), weight, block - start)
                 for start, end, weight, _ in heads]
      choices.append((column >= head_tiles, wide, column - head_tiles))
      for condition, weight, block in choices:
        pl.when(condition)(functools.partial(
            put, weight.at[chunk, pl.ds(block * half, half)], b_smem.at[slot, side], shared=True))

  def compute(row, column, first):
    sums = product.accumulate(
        ring, first, depth, a_smem, lambda slot: [b_smem.at[slot, side] for side in (0, 1)], half)
    here = product.my_rows_of(row)
    store = functools.partial(product.store, out_smem)

    @pl.when(column < head_tiles)
    def of_heads():
      for side in (0, 1):
        block = column * 2 + side

        def pieces(piece_at, side=side, block=block):
          for at in range(0, half, STORE):
            store((side * half + at) // STORE, piece_at(side * half + at), *[
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
          pl.when(block < heads[-1][0])(functools.partial(pieces, rotated))
          pl.when(block >= heads[-1][0])(functools.partial(pieces, plain))

    @pl.when(column >= head_tiles)
    def of_hidden():
      outs = [out for out in (act_out, gate_out, up_out) if out is not None]
      for n, at in enumerate(range(0, half, STORE)):
        gate, up = (total[:, at:at + STORE] for total in sums)
        there = pl.ds((column - head_tiles) * half + at, STORE)
        for i, (out, value) in enumerate(zip(outs, (gate * product.sigmoid(gate) * up, gate, up))):
          store(n * len(outs) + i, value, (True, out.at[here, there]))

  rows = pl.cdiv(h_ref.shape[0], ROWS)
  product.run(ring, rows, head_tiles + _blocks(gate_ref, half), [(depth, fill)], compute)


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
  cos, sin = (
      plgpu.load(table.at[rows, pl.ds(channel, width)], layout=TILE, optimized=False)
      for table in (cos_ref, sin_ref))
  halves = first * cos - second * sin, second * cos + first * sin
  if pair < STORE:
    return jnp.concatenate(halves, axis=1)
  return halves[second_half]
