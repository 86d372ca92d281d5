"""The parallel block's products for TPUs, in Pallas Mosaic; the backward pass's are beside it.

Tokens are divided into blocks of rows, and each block meets all weights, so that a byte of weights
that arrives does as many multiply-adds as a block has rows. Within a step, what is done to a result
stands after the product of the next rows in program order: the vector units work on one while the
matrix units make the other.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import cost, partition
from ..interpreters import mode
from ..tpu import vmem
from ..tpu.layout import LANES, round_up
from ..tpu.product import dot
from . import configs
from .fused import unfused
from .mosaic_tpu_backward import input_gradient, swiglu_gradient
from .mosaic_tpu_plan import Pair, Sizes, contraction, fit_columns, fit_sum, sum_of_products

HIDDEN = LANES
ROTATED = ("query", "key")

__all__ = ["in_projection", "input_gradient", "out_projection", "swiglu_gradient", "unsupported"]


def unsupported(x: jax.Array | jax.ShapeDtypeStruct, params: Mapping[str, Any], *,
                chip: str | None) -> str | None:
  """The first requirement that these shapes and dtypes fail, in words; None if they fit.

  Args:
    x: [M, D], an array or its type, as for `in_projection`.
    params: arrays or their types, as for the op.
    chip: "v4", "v5e", "v5p", "v6e" or "tpu7x"; None asks whether any of them could.
  """
  if problem := vmem.unfit(x.dtype, chip):
    return problem
  if problem := unfused(params):
    return problem
  _, heads, dim_head = params["query"].shape
  dim, hidden = params["gate"].shape
  if dim % LANES:
    return f"dim a multiple of {LANES}; got {dim}"
  if dim_head not in (64, 128, 256):  # attention's, too
    return f"dim_head in {{64, 128, 256}}; got {dim_head}"
  if chip is None:
    return None
  keys = params["key"].shape[1:]
  sizes = Sizes(x.shape[0], dim, heads, keys[0] if len(keys) == 2 else 1, dim_head,
                round_up(hidden, HIDDEN), x.dtype.itemsize)
  for name, plan in sizes.plans(chip).items():
    if problem := vmem.exceeded(
        plan.vmem_bytes, chip, "blocks", name, f" for dim {dim}, hidden width {hidden}"):
      return problem
  return None


def in_projection(x: jax.Array, params: Mapping[str, jax.Array],
                  rotation: tuple[jax.Array, jax.Array] | None, *, norm: str, eps: float,
                  keep: bool, chip: str | None, config: Any = None):
  """All that the layer computes from norm(x) before attention, in one launch.

  The norm of a block of rows is computed once, into VMEM. `act` is computed from gate and up in
  float32, before they are rounded.

  Args:
    x: [M, D].
    params: norm float32[D], query [D, H, Dh], key and value [D, K Dh] (value may be absent), gate
      and up [D, F], all but the norm in the dtype of x.
    rotation: None, or the cosines and the sines, float32[M, Dh // 2] each.
    norm: "layer" or "rms".
    eps: of the norm.
    keep: whether gate and up are returned.
    chip: as for `unsupported`.
    config: in place of that in `configs`.

  Returns:
    query [M, H, Dh], key [M, K Dh], value [M, K Dh] or None, act [M, F], gate and up [M, F] or
    None.
  """
  (num_tokens, dim), dtype = x.shape, x.dtype
  _, heads, dim_head = params["query"].shape
  keys, hidden = params["key"].shape[1], params["gate"].shape[1]
  values = ("value",) if "value" in params else ()
  plan = fit_columns(
      config or configs.mosaic_tpu(chip).in_projection, chip, num_tokens, dim, hidden,
      dtype.itemsize, heads=heads, kv_heads=keys // dim_head, dim_head=dim_head)
  depth, depths = plan.depth, dim // plan.depth
  key_steps, query_steps = -(-keys // plan.key_columns), -(-heads * dim_head // plan.query_columns)
  of_heads = key_steps + query_steps
  steps = of_heads + -(-hidden // plan.columns)

  # Only while its part is active does a weight's block change, so only then is one fetched.
  def weight(columns, first, count):
    def index(i, step, deep):
      turn = jnp.clip((step - first) * depths + deep, 0, count * depths - 1)
      return (0, turn) if depths == 1 else (turn % depths, turn // depths)
    return pl.BlockSpec((depth, columns), index)

  def result(columns, first, count):
    return pl.BlockSpec((plan.rows, columns),
                        lambda i, step, deep: (i, jnp.clip(step - first, 0, count - 1)))

  in_keys = (plan.key_columns, 0, key_steps)  # mutant: steps of keys
  in_queries = (plan.query_columns, key_steps, query_steps)
  in_hidden = (plan.columns, of_heads, steps - of_heads)
  columns = {"query": in_queries, "key": in_keys, "value": in_keys,
             "act": in_hidden, "gate": in_hidden, "up": in_hidden}
  operands = [(x, result(dim, 0, 1)),
              (params["norm"].astype(jnp.float32)[None], pl.BlockSpec((1, dim), lambda *_: (0, 0)))]
  operands += [(table, result(table.shape[1], 0, 1)) for table in spread(rotation, dim_head)]
  for name in ("query", "key", *values, "gate", "up"):
    operands.append((params[name].reshape(dim, -1), weight(*columns[name])))
  arrays = [array for array, _ in operands]
  names = ("query", "key", *values, "act", *(("gate", "up") if keep else ()))
  sizes = {"query": heads * dim_head, "key": keys, "value": keys}
  widest = max(plan.query_columns, 2 * plan.key_columns, 2 * plan.columns)
  out_shape = [partition.out_shape((num_tokens, sizes.get(name, hidden)), dtype, *arrays)
               for name in names]
  columns_of_all = heads * dim_head + (1 + len(values)) * keys + 2 * hidden
  results = pl.pallas_call(
      functools.partial(
          _in_projection_kernel, plan=plan, steps=(key_steps, of_heads), depths=depths,
          values=values, has_rotation=rotation is not None, keep=keep, norm=norm, eps=eps,
          dim_head=dim_head),
      grid=(-(-num_tokens // plan.rows), steps, depths),
      in_specs=[spec for _, spec in operands],
      out_specs=[result(*columns[name]) for name in names],
      out_shape=out_shape,
      cost_estimate=cost.estimate(
          2 * num_tokens * dim * columns_of_all, num_tokens * hidden, [*arrays, *out_shape]),
      scratch_shapes=[pltpu.VMEM((plan.rows, dim), dtype)]
      + [pltpu.VMEM((plan.rows, widest), jnp.float32)] * (depths > 1),
      compiler_params=pltpu.CompilerParams(
          disable_bounds_checks=True,  # of every copy, in every step; blocks end with their arrays
          dimension_semantics=("parallel", "arbitrary", "arbitrary"),
          vmem_limit_bytes=plan.vmem_bytes),
      interpret=mode.mosaic_tpu(),
      name="block_in_projection",
  )(*arrays)
  found = dict(zip(names, results, strict=True))
  query = found["query"].reshape(num_tokens, heads, dim_head)
  return (query, found["key"], found.get("value"), found["act"], found.get("gate"),
          found.get("up"))


def _in_projection_kernel(*refs, plan, steps, depths, values, has_rotation, keep, norm, eps,
                          dim_head):
  """One block of rows by one block of columns: of keys and values, queries, or gate and up.

  Args:
    refs: x [rows, D], gain [1, D], tables of rotation, the weights; the results; h [rows, D] and
      sums float32[rows, columns] in VMEM, the latter where a contraction takes several `depths`.
    steps: where the steps of keys end, and those of queries.
  """
  key_steps, of_heads = steps
  refs = iter(refs)
  take = lambda names: {name: next(refs) for name in names}
  x, gain = next(refs), next(refs)
  tables = [next(refs) for _ in range(2 * has_rotation)]
  weights = take(("query", "key", *values, "gate", "up"))
  out = take(("query", "key", *values, "act", *(("gate", "up") if keep else ())))
  h, *sums = refs
  step, deep = pl.program_id(1), pl.program_id(2)

  @pl.when((step == 0) & (deep == 0))
  def _():
    normalize(x, gain, h, plan.norm_rows, norm, eps)

  def products(*names):
    def product(at):
      part = slice(None) if depths == 1 else pl.ds(
          pl.multiple_of(deep * plan.depth, plan.depth), plan.depth)
      rows = h[at, part]
      return [dot(rows, weights[name][...]) for name in names]
    return product

  def write(name, at, part):
    part = rotated(part, tables, at, dim_head) if name in ROTATED else part
    out[name][at, :] = part.astype(out[name].dtype)

  def finish_heads(names):
    def finish(parts, at):
      for name, part in zip(names, parts, strict=True):
        write(name, at, part)
    return finish

  def finish_hidden(parts, at):
    gate, up = parts
    write("act", at, gate * jax.nn.sigmoid(gate) * up)
    if keep:
      write("gate", at, gate)
      write("up", at, up)

  of_keys = ("key", *values)
  for here, names, finish in (
      (step == 0 if key_steps == 1 else step < key_steps, of_keys, finish_heads(of_keys)),
      ((step > key_steps - 1) & (step <= of_heads - 1), ("query",), finish_heads(("query",))),
      (step > of_heads - 1, ("gate", "up"), finish_hidden)):
    @pl.when(here)
    def _():
      contraction(plan, depths, products(*names), finish, sums,
                  [weights[name].shape[1] for name in names])


def out_projection(x: jax.Array | None, attended: jax.Array, act: jax.Array, attn_out: jax.Array,
                   ff_out: jax.Array, *, chip: str | None, config: Any = None):
  """x + attended @ attn_out + act @ ff_out in one float32 accumulator, rounded once.

  Args:
    x: [M, D], or None for nothing to be added.
    attended: [M, H, Dh].
    act: [M, F].
    attn_out: [H, Dh, D].
    ff_out: [F, D].
    chip, config: as for `in_projection`.

  Returns:
    [M, D].
  """
  (num_tokens, heads, dim_head), (hidden, dim) = attended.shape, ff_out.shape
  stages = [[Pair(attended.reshape(num_tokens, -1), attn_out.reshape(-1, dim))],
            [Pair(act, ff_out)]]
  plan = fit_sum(config or configs.mosaic_tpu(chip).out_projection, chip, num_tokens,
                 dim, [(heads * dim_head, 1), (hidden, 1)], act.dtype.itemsize)
  return sum_of_products(x, stages, plan, transposed=False, name="block_out_projection")


def normalize(x, gain, h, chunk, norm, eps):
  """h = norm(x), a few rows at a time; as `norms.normalize`."""
  def some_rows(i, _):
    at = pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
    wide = x[at, :].astype(jnp.float32)
    if norm == "layer":
      wide -= wide.mean(-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    h[at, :] = (wide * gain[...]).astype(h.dtype)

  jax.lax.fori_loop(0, x.shape[0] // chunk, some_rows, None)


def spread(rotation, dim_head):
  """Tables of whole lanes: at dim_head 128 and 64, for both halves of the channels of each head."""
  if rotation is None:
    return []
  cos, sin = rotation
  if dim_head > LANES:
    return [cos, sin]
  copies = LANES // dim_head
  return [jnp.tile(jnp.concatenate(halves, 1), (1, copies)) for halves in ((cos, cos), (-sin, sin))]


def rotated(x, tables, at, dim_head):
  """Channels i and i + dim_head / 2 of each head in x float32[rows, columns], by the tables."""
  if not tables:
    return x
  cos, sin = (table[at, :] for table in tables)
  parts, half = [], dim_head // 2
  for i in range(0, x.shape[1], max(dim_head, LANES)):
    if dim_head > LANES:
      first, second = x[:, i : i + half], x[:, i + half : i + dim_head]
      parts += [first * cos - second * sin, second * cos + first * sin]
      continue
    here = x[:, i : i + LANES]
    other = pltpu.roll(here, half, 1)
    if dim_head < LANES:
      lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
      other = jnp.where(lane % dim_head < half, pltpu.roll(here, LANES - half, 1), other)
    parts.append(here * cos + other * sin)
  return jnp.concatenate(parts, 1)
