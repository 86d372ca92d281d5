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
      rows=pl.cdiv(num_tokens, ROWS), columns=pl.cdiv(dim, config.columns), config=config)
  return y[:num_tokens]


def _out_projection_kernel(x_ref, attended_ref, attn_out_ref, act_ref, ff_out_ref, y_ref,
                           a_smem, b_smem, out_smem, ring, *, columns):
  def pair(a_ref, b_ref):
    def fill(row, column, i, slot, put):
      chunk = pl.ds(i * CHUNK, CHUNK)
      put(a_ref.at[pl.ds(row * ROWS, ROWS), chunk], a_smem.at[slot])
      put(b_ref.at[chunk, pl.ds(column * columns, columns)], b_smem.at[slot], shared=True)
    return a_ref.shape[1] // CHUNK, fill

  def residual(row, column, i, slot, put):
    for half in (0, WARPGROUP_ROWS):
      put(x_ref.at[pl.ds(row * ROWS + half, WARPGROUP_ROWS),
                   pl.ds(column * columns + i * STORE, STORE)],
          a_smem.at[slot, pl.ds(half, WARPGROUP_ROWS)])

  parts = [pair(attended_ref, attn_out_ref), pair(act_ref, ff_out_ref)]
  depth = sum(count for count, _ in parts)
  if x_ref is not None:
    parts.append((columns // STORE, residual))

  def compute(row, column, first):
    total, = product.accumulate(
        ring, first, depth, a_smem, lambda slot: [b_smem.at[slot]], columns)
    here = pl.ds(row * ROWS + lax.axis_index("wg") * WARPGROUP_ROWS, WARPGROUP_ROWS)
    for i in range(columns // STORE):
      value = total[:, i * STORE:(i + 1) * STORE]
      if x_ref is not None:
        slot = ring.wait(first + depth + i)
        value += product.load(a_smem.at[slot, product.my_rows()])
        ring.release(first + depth + i)
      product.store(out_smem, i, value, y_ref.at[here, pl.ds(column * columns + i * STORE, STORE)])

  product.run(ring, pl.cdiv(y_ref.shape[0], ROWS), pl.cdiv(y_ref.shape[1], columns), parts, compute)
