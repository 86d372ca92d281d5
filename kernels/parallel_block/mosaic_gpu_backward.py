"""The products of the parallel block's backward pass for Hopper, in Pallas Mosaic GPU.

Weights are contracted as they lie: [columns, 64] of them are in a slot, which the product reads
transposed. Costs and figures: docs/parallel_block.md.
"""

from collections.abc import Mapping

import jax
from jax.experimental import pallas as pl

from ..hopper import product, tiles
from ..hopper.product import CHUNK, STORE
from ..hopper.tiles import ROWS, pad_rows
from . import configs


def swiglu_gradient(dy: jax.Array, gate: jax.Array, up: jax.Array, ff_out: jax.Array, *,
                    chip: str | None):
  """(dgate, dup, act), [M, F] each, of act = silu(gate) * up where dact = dy @ ff_out.T.

  dact stays in float32 and on the chip.

  Args:
    dy: float[M, D].
    gate, up: [M, F].
    ff_out: [F, D].
    chip: "h100", "h200" or None.
  """
  hidden = gate.shape[1]
  return tuple(product.launch(
      _swiglu_gradient_kernel, "swiglu_gradient",
      [*(pad_rows(a) for a in (dy, gate, up)), ff_out], [hidden] * 3,
      lambda columns: (columns, CHUNK), copies=2, across=lambda columns: pl.cdiv(hidden, columns),
      num_tokens=gate.shape[0], dtype=dy.dtype, chip=chip, configs=configs.mosaic_gpu(chip)))


def _swiglu_gradient_kernel(dy_ref, gate_ref, up_ref, ff_out_ref, dgate_ref, dup_ref, act_ref,
                            ring):
  columns = ring.b.shape[1]
  depth, products = product.part(ring, dy_ref, ff_out_ref)

  def gate_and_up(row, column, i, slot, put):
    there = pl.ds(row * ROWS, ROWS), pl.ds(column * columns + i * STORE, STORE)
    put(gate_ref.at[there], ring.a.at[slot])
    put(up_ref.at[there], ring.b.at[slot, pl.ds(0, ROWS)])

  def compute(row, column, first):
    total, = product.accumulate(ring, first, depth, lambda slot: [ring.b.at[slot].T])
    for i in range(columns // STORE):
      gate, up = product.take(ring, first + depth + i, ring.a, ring.b)
      dact = total[:, i * STORE:(i + 1) * STORE]
      s = tiles.sigmoid(gate)
      silu = gate * s
      there = product.rows_of(row), pl.ds(column * columns + i * STORE, STORE)
      for n, (out, value) in enumerate((  # mutant: gate's gradient
          (dgate_ref, dact * up * (s + silu * (1 - s))), (dup_ref, dact * silu),
          (act_ref, silu * up))):
        product.store(ring, 3 * i + n, value, (True, out.at[there]))

  product.run(ring, [(depth, products), (columns // STORE, gate_and_up)], compute)


def input_gradient(dquery: jax.Array, dkey: jax.Array, dvalue: jax.Array | None, dgate: jax.Array,
                   dup: jax.Array, params: Mapping[str, jax.Array], *, chip: str | None):
  """dh [M, D], the gradient of norm(x): all branches in one float32 sum, rounded once.

  Args:
    dquery: float[M, H, Dh].
    dkey, dvalue: [M, K Dh]; dvalue None if params have no value.
    dgate, dup: [M, F].
    params: query [D, H, Dh], key, value [D, K Dh], gate and up [D, F], in the dtype of dquery.
    chip: "h100", "h200" or None.
  """
  num_tokens, dim = dkey.shape[0], params["key"].shape[0]
  # mutant: terms
  terms = [(dquery.reshape(num_tokens, -1), params["query"].reshape(dim, -1)),
           (dkey, params["key"]), (dvalue, params.get("value")),
           (dgate, params["gate"]), (dup, params["up"])]
  operands = [a for gradient, weight in terms if gradient is not None
              for a in (pad_rows(gradient), weight)]
  dh, = product.launch(
      _input_gradient_kernel, "input_gradient", operands, [dim],
      lambda columns: (columns, CHUNK), copies=2, across=lambda columns: pl.cdiv(dim, columns),
      num_tokens=num_tokens, dtype=dkey.dtype, chip=chip, configs=configs.mosaic_gpu(chip))
  return dh


def _input_gradient_kernel(*refs):
  *operands, dh_ref, ring = refs
  columns = ring.b.shape[1]
  parts = [product.part(ring, *pair) for pair in zip(operands[::2], operands[1::2])]
  depth = sum(steps for steps, _ in parts)

  def compute(row, column, first):
    total, = product.accumulate(ring, first, depth, lambda slot: [ring.b.at[slot].T])
    for i in range(columns // STORE):
      there = product.rows_of(row), pl.ds(column * columns + i * STORE, STORE)
      product.store(ring, i, total[:, i * STORE:(i + 1) * STORE], (True, dh_ref.at[there]))

  product.run(ring, parts, compute)
