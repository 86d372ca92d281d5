"""Two products of the parallel block's backward pass for TPUs, with what stands around them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import cost, partition
from ..interpreters import mode
from ..tpu.product import dot
from . import configs
from .mosaic_tpu_plan import Pair, contraction, fit_columns, fit_sum, sum_of_products


def swiglu_gradient(dy: jax.Array, gate: jax.Array, up: jax.Array, ff_out: jax.Array, *,
                    chip: str | None, config: Any = None):
  """From the gradient of act @ ff_out those of gate and up, and act itself once more.

  The gradient of act is never in memory.

  Args:
    dy: [M, D].
    gate, up: [M, F].
    ff_out: [F, D].
    chip: "v4", "v5e", "v5p", "v6e" or "tpu7x", or None.
    config: in place of that in `configs`.

  Returns:
    dgate, dup, act, each [M, F].
  """
  (num_tokens, dim), hidden, dtype = dy.shape, gate.shape[1], dy.dtype
  plan = fit_columns(config or configs.mosaic_tpu(chip).swiglu_gradient, chip,
                     num_tokens, dim, hidden, dtype.itemsize)
  depth, depths = plan.depth, dim // plan.depth

  def kernel(dy, gate, up, ff_out, dgate, dup, act, *sums):
    deep = pl.program_id(2)

    def product(at):
      rows = dy[at, :] if depths == 1 else dy[at, pl.ds(pl.multiple_of(deep * depth, depth), depth)]
      return [dot(rows, ff_out[...], transposed=True)]

    def finish(parts, at):
      dact, = parts
      g, u = gate[at, :].astype(jnp.float32), up[at, :].astype(jnp.float32)
      s = jax.nn.sigmoid(g)
      silu = g * s
      act[at, :] = (silu * u).astype(dtype)
      dup[at, :] = (dact * silu).astype(dtype)
      dgate[at, :] = (dact * u * (s + silu * (1 - s))).astype(dtype)

    contraction(plan, depths, product, finish, sums, [plan.columns])

  tile = pl.BlockSpec((plan.rows, plan.columns), lambda i, j, deep: (i, j))
  operands = (dy, gate, up, ff_out)
  out_shape = [partition.out_shape(gate.shape, dtype, *operands)] * 3
  return pl.pallas_call(
      kernel,
      grid=(-(-num_tokens // plan.rows), -(-hidden // plan.columns), depths),
      in_specs=[pl.BlockSpec((plan.rows, dim), lambda i, j, deep: (i, 0)), tile, tile,
                pl.BlockSpec((plan.columns, depth), lambda i, j, deep: (j, deep))],
      out_specs=[tile] * 3,
      out_shape=out_shape,
      cost_estimate=cost.estimate(
          2 * num_tokens * dim * hidden, num_tokens * hidden, [*operands, *out_shape]),
      scratch_shapes=[pltpu.VMEM((plan.rows, plan.columns), jnp.float32)] * (depths > 1),
      compiler_params=pltpu.CompilerParams(
          disable_bounds_checks=True,  # of every copy, in every step; blocks end with their arrays
          dimension_semantics=("parallel", "parallel", "arbitrary"),
          vmem_limit_bytes=plan.vmem_bytes),
      interpret=mode.mosaic_tpu(),
      name="block_swiglu_gradient",
  )(*operands)


def input_gradient(dquery: jax.Array, dkey: jax.Array, dvalue: jax.Array | None, dgate: jax.Array,
                   dup: jax.Array, params: Mapping[str, jax.Array], *, chip: str | None,
                   config: Any = None):
  """The gradient of norm(x) from those of all that was projected, in one float32 accumulator.

  Weights are contracted as they lie, by columns.

  Args:
    dquery: [M, H, Dh].
    dkey, dvalue: [M, K Dh]; dvalue may be None.
    dgate, dup: [M, F].
    params: query [D, H, Dh], key and value [D, K Dh], gate and up [D, F].
    chip, config: as for `swiglu_gradient`.

  Returns:
    [M, D].
  """
  num_tokens, dim = len(dgate), params["query"].shape[0]
  flat = lambda x, rows: x.reshape(rows, -1)
  keys = [Pair(dkey, params["key"])]
  if dvalue is not None:
    keys.append(Pair(dvalue, params["value"]))
  query = Pair(flat(dquery, num_tokens), flat(params["query"], dim))
  stages = [[query], keys, [Pair(dgate, params["gate"]), Pair(dup, params["up"])]]
  plan = fit_sum(config or configs.mosaic_tpu(chip).input_gradient, chip, num_tokens,
                 dim, [(stage[0].left.shape[1], len(stage)) for stage in stages],
                 dgate.dtype.itemsize, transposed=True)
  return sum_of_products(None, stages, plan, transposed=True, name="block_input_gradient")
