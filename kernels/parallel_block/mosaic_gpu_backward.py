"""The products of the parallel block's backward pass for Hopper, in Pallas Mosaic GPU.

Weights are contracted as they lie: [columns, 64] of them are a slot, which the product reads
transposed. Costs and figures: docs/parallel_block.md.
"""

import functools

from jax.experimental import pallas as pl

from .. import mesh, tuning
from ..attention.mosaic_gpu_tiles import ROWS
from . import mosaic_gpu_product as product
from .mosaic_gpu_product import CHUNK, STORE


def swiglu_gradient(dy, gate, up, ff_out, *, chip, config=None):
  """(dgate, dup, act), [M, F] each, of act = silu(gate) * up where dact = dy @ ff_out.T.

  dact stays in float32 and on the chip.

  Args:
    dy: float[M, D].
    gate, up: [M, F].
    ff_out: [F, D].
    chip: "h100", "h200" or None.
    config: tuning.ParallelBlockMosaicGpu, for tests.
  """
  config = config or tuning.parallel_block_mosaic_gpu(chip)
  num_tokens, hidden = gate.shape
  operands = [*(product.whole(a, product.TILING) for a in (dy, gate, up)), ff_out]
  out_type = mesh.out_shape((operands[1].shape[0], hidden), dy.dtype, *operands)
  results = product.launch(
      functools.partial(_swiglu_gradient_kernel, columns=config.columns), "swiglu_gradient",
      operands, [out_type] * 3, (config.columns, CHUNK), copies=2,
      rows=pl.cdiv(num_tokens, ROWS), columns=pl.cdiv(hidden, config.columns), config=config)
  return tuple(a[:num_tokens] for a in results)


def _swiglu_gradient_kernel(dy_ref, gate_ref, up_ref, ff_out_ref, dgate_ref, dup_ref, act_ref,
                            a_smem, b_smem, out_smem, ring, *, columns):
  def operands_of_the_epilogue(row, column, i, slot, put):
    there = pl.ds(row * ROWS, ROWS), pl.ds(column * columns + i * STORE, STORE)
    put(gate_ref.at[there], a_smem.at[slot])
    put(up_ref.at[there], b_smem.at[slot, pl.ds(0, ROWS)])

  main = product.part(dy_ref, ff_out_ref, a_smem, b_smem)
  depth = main[0]

  def compute(row, column, first):
    total, = product.accumulate(
        ring, first, depth, a_smem, lambda slot: [b_smem.at[slot].T], columns)
    for i in range(columns // STORE):
      gate, up = product.take(ring, first + depth + i, a_smem, b_smem)
      dact = total[:, i * STORE:(i + 1) * STORE]
      s = product.sigmoid(gate)
      silu = gate * s
      there = product.my_rows_of(row), pl.ds(column * columns + i * STORE, STORE)
      for n, (out, value) in enumerate((
          (dgate_ref, dact * up * (s + silu * (1 - s))), (dup_ref, dact * silu),
          (act_ref, silu * up))):
        product.store(out_smem, 3 * i + n, value, (True, out.at[there]))

  product.run(ring, pl.cdiv(gate_ref.shape[0], ROWS), pl.cdiv(gate_ref.shape[1], columns),
              [main, (columns // STORE, operands_of_the_epilogue)], compute)


def input_gradient(dquery, dkey, dvalue, dgate, dup, params, *, chip, config=None):
  """dh [M, D], the gradient of norm(x): all branches in one float32 sum, rounded once.

  Args:
    dquery: float[M, H, Dh].
    dkey, dvalue: [M, Dh]; dvalue None if params have no value.
    dgate, dup: [M, F].
    params: query [D, H, Dh], key, value [D, Dh], gate and up [D, F], in the dtype of dquery.
    chip: "h100", "h200" or None.
    config: tuning.ParallelBlockMosaicGpu, for tests.
  """
  config = config or tuning.parallel_block_mosaic_gpu(chip)
  num_tokens, dim = dkey.shape[0], params["key"].shape[0]
  # The long sums first: the others are the rest of a pipeline that is full.
  terms = [(dgate, params["gate"]), (dup, params["up"]),
           (dquery.reshape(num_tokens, -1), params["query"].reshape(dim, -1)),
           (dkey, params["key"])]
  if dvalue is not None:
    terms.append((dvalue, params["value"]))
  operands = [a for gradient, weight in terms
              for a in (product.whole(gradient, product.TILING), weight)]
  out_type = mesh.out_shape((operands[0].shape[0], dim), dkey.dtype, *operands)
  dh, = product.launch(
      functools.partial(_input_gradient_kernel, columns=config.columns), "input_gradient",
      operands, [out_type], (config.columns, CHUNK), copies=2,
      rows=pl.cdiv(num_tokens, ROWS), columns=pl.cdiv(dim, config.columns), config=config)
  return dh[:num_tokens]


def _input_gradient_kernel(*refs, columns):
  *operands, dh_ref, a_smem, b_smem, out_smem, ring = refs
  parts = [product.part(gradient, weight, a_smem, b_smem)
           for gradient, weight in zip(operands[::2], operands[1::2])]
  depth = sum(steps for steps, _ in parts)

  def compute(row, column, first):
    total, = product.accumulate(
        ring, first, depth, a_smem, lambda slot: [b_smem.at[slot].T], columns)
    for i in range(columns // STORE):
      there = product.my_rows_of(row), pl.ds(column * columns + i * STORE, STORE)
      product.store(out_smem, i, total[:, i * STORE:(i + 1) * STORE], (True, dh_ref.at[there]))

  product.run(ring, pl.cdiv(dh_ref.shape[0], ROWS), pl.cdiv(dh_ref.shape[1], columns), parts,
              compute)
