"""Flash attention with ALiBi for TPUs: the backward pass, one kernel of five products.

A block of keys stays in VMEM with the gradients of its keys and values while the blocks of
rows that see it pass by; scores and weights are computed once for all three gradients. Scores are
transposed, [keys, rows], as in the forward pass: then weights and score gradients are the moving
operand of the key and value gradients and the stationary one of the query gradient as they are.
Blocks of keys follow each other in a loop around the kernel, and the query gradient is its carry.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import cost, partition
from ..core.constants import LOG2E
from ..core.vmap import folding_batch
from ..interpreters import mode
from ..tpu.product import ahead, clear, dot
from . import configs, mosaic_tpu_layout as layout, mosaic_tpu_mask as masking
from .residuals import Residuals


class _Specs(NamedTuple):
  """Which parts of arrays a step of the grid has: core, batch and key/value head, block of rows."""

  row: Callable  # of an array with a number for each row, by its index from that of the head
  rows: pl.BlockSpec
  all_rows: pl.BlockSpec  # blocks that see none of the keys too
  every_row: pl.BlockSpec  # likewise, of an array with a number for each row
  keys: pl.BlockSpec
  sofar: pl.BlockSpec  # the query gradient of the blocks of keys before
  sums: pl.BlockSpec  # of the gradients of the keys


def _specs(plan, ranges, dim):
  def rows_at(s, b, i, scalars):
    # A block of rows that sees none of these keys repeats another's index: it is not fetched,
    # and of several blocks of keys its query gradient is left as it was.
    row = ranges.batch(b) * 2
    return plan.dealt(s, jnp.clip(i, scalars[3][row], scalars[3][row + 1]))

  block = (None, plan.block_rows, dim)
  rows = lambda s, b, i, *r: (b, rows_at(s, b, i, r), 0)
  stays = dict(pipeline_mode=pl.Buffered(1))  # for all blocks of rows
  return _Specs(
      row=lambda index: pl.BlockSpec(
          (None, 1, plan.block_rows), lambda s, b, i, *r: (index(b), 0, rows_at(s, b, i, r))),
      rows=pl.BlockSpec(block, rows),
      all_rows=pl.BlockSpec(block, lambda s, b, i, *r: (b, plan.dealt(s, i), 0)),
      every_row=pl.BlockSpec(
          (None, 1, plan.block_rows), lambda s, b, i, *r: (b, 0, plan.dealt(s, i))),
      keys=pl.BlockSpec(
          (None, plan.major, dim), lambda s, b, i, *r: (b, r[2][0], 0), **stays),
      sofar=pl.BlockSpec(block, rows, **stays),
      sums=pl.BlockSpec(
          (None, None, plan.major, dim), lambda s, b, i, *r: (s, b, 0, 0), **stays))


def _outputs(plan, specs, rows_shape, dtype, several, shared, slope_gradients, typed):
  """Results of the kernel for a block of keys, {name: (type, its BlockSpec)}, in their order."""
  heads, _, dim = rows_shape
  sums = typed((plan.cores, heads, plan.major, dim), jnp.float32), specs.sums
  outputs = dict(
      dquery=(typed(rows_shape, jnp.float32 if several else dtype),
              specs.rows if several else specs.all_rows), dkey=sums)
  if not shared:
    outputs["dvalue"] = sums
  if slope_gradients:
    outputs["moment"] = typed((heads, 1, plan.num_rows), jnp.float32), specs.every_row
  return outputs


@folding_batch
def backward(residuals: Residuals, dout: jax.Array, *,
             segment_ids: tuple[jax.Array, jax.Array] | None, alibi_slopes: jax.Array | None,
             query_offset: int | jax.Array, is_causal: bool, scale: float,
             window: tuple[int, int] | None, chip: str | None, config: Any = None,
             slope_gradients: bool = False):
  """The gradients of attention; the contract of every backend.

  Args:
    residuals: of `forward`.
    dout: like query.
    segment_ids, alibi_slopes, query_offset, window, chip, config: as in `forward`.
    slope_gradients: whether the slopes' are among them.

  Returns:
    dquery, dkey, dvalue; where value is None, dkey is the sum of both and dvalue None. With
    `slope_gradients` also float32[B, heads], each sequence's part of the gradient of the slopes.
  """
  query, key, value, out, lse = residuals
  batch, length, heads, given_dim = query.shape
  query, key, value, out, dout = (layout.widen(x) for x in (query, key, value, out, dout))
  dim = query.shape[-1]
  num_keys, kv_heads = key.shape[1:3]
  group = heads // kv_heads
  plan = layout.fit(config or configs.mosaic_tpu(chip, dim)[1], length=length,
                    group=group, num_keys=num_keys, itemsize=query.dtype.itemsize)
  mask = dict(query_offset=query_offset, is_causal=is_causal, window=window)
  edges = masking.find_edges(plan, length=length, num_keys=num_keys, **mask)
  chunks = masking.visible_chunks(
      plan, length=length, num_keys=num_keys, segment_ids=segment_ids, **mask)
  ranges = masking.Ranges(chunks, plan, edges, kv_heads, query_offset, segment_ids)
  num_key_blocks = plan.padded_keys // plan.major

  # A row's sum of (gradient * output); the log-sum-exp in base 2, infinite where the row is
  # empty or padding, which makes its weights zero.
  delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
  lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, jnp.inf)
  q = layout.pack(query, kv_heads, plan.num_rows)
  do = layout.pack(dout, kv_heads, plan.num_rows)
  k = layout.pack(key, kv_heads, plan.padded_keys)
  v = None if value is None else layout.pack(value, kv_heads, plan.padded_keys)
  lse = layout.pack_vector(lse, kv_heads, plan.num_rows, jnp.inf)
  delta = layout.pack_vector(delta, kv_heads, plan.num_rows, 0)

  specs = _specs(plan, ranges, dim)
  operands = dict(
      query=(q, specs.rows), dout=(do, specs.rows), lse=(lse, specs.row(lambda b: b)),
      delta=(delta, specs.row(lambda b: b)), key=(k, specs.keys))
  if v is not None:
    operands["value"] = (v, specs.keys)
  operands |= layout.row_operands(
      plan, kv_heads, length, alibi_slopes, segment_ids, query_offset, specs.row,
      pl.BlockSpec((None, 1, plan.major), lambda s, b, i, *r: (b // kv_heads, 0, r[2][0])))

  # One block of keys gives the query gradient as it is returned; several add to it in turn, in
  # place.
  several = num_key_blocks > 1
  arrays = (query, key, value, dout)
  outputs = _outputs(plan, specs, q.shape, query.dtype, several, value is None, slope_gradients,
                     lambda *type_: partition.out_shape(*type_, *arrays))
  carry = dict(sofar=specs.sofar) if several else {}
  scratch = dict(accum=pltpu.VMEM((dim, plan.block_rows), jnp.float32))
  if alibi_slopes is not None:
    scratch["bias"] = layout.bias_scratch(plan, edges)
  names = ("chunks", "blocks", "key_block", "row_blocks", *carry, *operands, *outputs, *scratch)

  def kernel(*refs):
    refs = dict(zip(names, refs, strict=True))
    _kernel(refs, ranges, plan, edges, num_keys, scale, **mask)

  out_shape = [shape for shape, _ in outputs.values()]
  # Of one block of keys, on average.
  pairs = batch * heads * masking.pairs(
      length=length, num_keys=num_keys, **mask) // num_key_blocks
  call = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=4,
          grid=(plan.cores, batch * kv_heads, plan.num_blocks // plan.cores),
          in_specs=[*carry.values(), *(spec for _, spec in operands.values())],
          out_specs=[spec for _, spec in outputs.values()],
          scratch_shapes=list(scratch.values())),
      out_shape=out_shape,
      cost_estimate=cost.estimate(
          5 * 2 * dim * pairs, pairs, [*(x for x, _ in operands.values()), *out_shape]),
      input_output_aliases={4: 0} if several else {},  # after the four scalar operands
      compiler_params=pltpu.CompilerParams(
          disable_bounds_checks=True,  # of every copy, in every step; all indices are clipped
          dimension_semantics=("parallel", "arbitrary", "arbitrary"),
          vmem_limit_bytes=layout.vmem_bytes(
              plan, dim=dim, itemsize=query.dtype.itemsize, shared=value is None,
              backward=True) + slope_gradients * layout.moment_bytes(plan)),
      interpret=mode.mosaic_tpu(plan.cores),
      name="alibi_attention_backward")

  def of_key_block(n, *sofar):
    dquery, *rest = call(
        *ranges.operands, jnp.reshape(n, (1,)),
        ranges.row_blocks(n, plan.cores).reshape(-1), *sofar, *(x for x, _ in operands.values()))
    # The cores' parts, in one order.
    factors = (1.0,) if value is None else (scale, 1.0)
    return (dquery, [(x.sum(0) * c).astype(key.dtype) for x, c in zip(rest, factors)],
            rest[len(factors):])

  if several:
    start = partition.varying_together(jnp.zeros(q.shape, jnp.float32), *arrays)[0]
    def add(sofar, n):
      dquery, *parts = of_key_block(n, sofar)
      return dquery, parts

    dquery, (parts, moments) = jax.lax.scan(
        add, start, jnp.arange(num_key_blocks, dtype=jnp.int32))
    moments = [x.sum(0) for x in moments]  # mutant: blocks of keys
    # [key blocks, B * kv_heads, major, D]
    parts = [x.swapaxes(0, 1).reshape(batch * kv_heads, plan.padded_keys, dim) for x in parts]
  else:
    dquery, parts, moments = of_key_block(jnp.int32(0))
  dquery = layout.unpack(dquery.astype(query.dtype), batch, length, heads)
  gradients = dquery, *(layout.unpack(x, batch, num_keys, kv_heads) for x in parts)
  moments = [layout.unpack_vector(x, batch, length, heads).sum(-1) for x in moments]
  return *(*(x[..., :given_dim] for x in gradients), None)[:3], *moments


def _kernel(refs, ranges, plan, edges, num_keys, scale, *, query_offset, is_causal, window):
  """One block of rows against what it sees of one block of keys; refs by name."""
  core, head, row_block = (pl.program_id(axis) for axis in range(3))
  block = plan.dealt(core, row_block)
  key_block = refs["key_block"][0]
  query, dout, key, accum, dkey = (refs[n] for n in ("query", "dout", "key", "accum", "dkey"))
  shared = "value" not in refs
  value = key if shared else refs["value"]
  dtype = key.dtype

  @pl.when(row_block == 0)
  def _():
    for name in ("dkey",) if shared else ("dkey", "dvalue"):
      clear(refs[name])
    if "slope" in refs:
      layout.fill_bias(refs, plan)

  if "moment" in refs:
    clear(refs["moment"])

  diagonal = jnp.int32(0)  # how the diagonal is visited, if it lies in these keys
  if edges:
    distance = block * (plan.block_rows // plan.group) + query_offset - key_block * plan.major
    diagonal = jnp.where((distance >= 0) & (distance < plan.major),
                         ranges.of_edge(refs, head, block, 0), 0)

  low, high = ranges.key_blocks((refs["chunks"], refs["blocks"]), head, block)
  visits = (low <= key_block) & (key_block <= high)

  @pl.when(visits & (diagonal == 0))
  def _():
    clear(accum)

  def finish(at, dquery):
    dquery = (dquery * scale).astype(refs["dquery"].dtype).T
    refs["dquery"][at, :] = refs["sofar"][at, :] + dquery if "sofar" in refs else dquery

  def step(first_row, first_key, tiles, size, masked, ids, fresh, whole):
    first_key = pl.multiple_of(first_key, plan.fine)
    keys = pl.ds(first_key, size)
    k, v = key[keys, :], value[keys, :]
    k_turned = k.T
    key_ids = layout.turned(refs["key_id"][:, keys], plan.lanes) if ids else None
    position = key_block * plan.major + first_key
    left = None if fresh else num_keys - position

    def rows(tile):
      return pl.ds(pl.multiple_of(first_row + tile.row, plan.lanes), plan.lanes)

    def products(tile):
      at, span = rows(tile), slice(*tile.keys)
      return dot(k[span], query[at, :], transposed=True), dot(v[span], dout[at, :], transposed=True)

    def update(pair, tile):
      x, dweights = pair
      at = rows(tile)
      distance = position - refs["position"][:, at]  # of the step's first key
      x = layout.biased(x * (scale * LOG2E), refs, at, tile.keys, plan)
      if masked:
        x = layout.hide(x, tile, distance, left, refs, at, key_ids,
                        is_causal=is_causal, window=window)
      total = refs["lse"][:, at]
      if "slope" in refs:
        total -= refs["slope"][:, at] * distance.astype(jnp.float32)
      weights = jnp.exp2(x - total)
      dscores = weights * (dweights - refs["delta"][:, at])
      if "moment" in refs:  # a row's share of the gradient of its slope
        place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) + (distance + tile.keys[0])
        share = dscores * place.astype(jnp.float32)  # mutant: share
        refs["moment"][:, at] += share.sum(axis=0, keepdims=True)  # mutant: moment
      dscores = dscores.astype(dtype)
      weights = weights.astype(dtype)
      span = pl.ds(first_key + tile.keys[0], tile.keys[1] - tile.keys[0])
      dvalue_part, dkey_part = dot(weights, dout[at, :]), dot(dscores, query[at, :])
      if shared:
        dkey[span, :] += dvalue_part + dkey_part * scale
      else:
        refs["dvalue"][span, :] += dvalue_part
        dkey[span, :] += dkey_part
      dquery = dot(k_turned[:, slice(*tile.keys)], dscores)
      if whole:
        finish(at, dquery)
      else:
        accum[:, at] = dquery if fresh else accum[:, at] + dquery

    ahead(tiles, products, update, plan.ahead)

  # Short documents are diagonals and little else; the first block alone would not pay.
  @pl.when(visits)
  def _():
    masking.traverse(ranges, refs, head, block, key_block, query_offset, plan, edges, step,
                     window=window, whole=ranges.has_ids)

  @pl.when(visits & ((diagonal != 3) | (not ranges.has_ids)))
  def _():
    finish(slice(None), accum[...])

  # Blocks of rows on both sides of those that see these keys are left alone where there is a sum.
  idle = jnp.logical_not(visits)
  if "sofar" in refs:
    first, last = (refs["row_blocks"][ranges.batch(head) * 2 + k] for k in range(2))
    idle &= (first <= row_block) & (row_block <= last)

  @pl.when(idle)
  def _():
    if "sofar" in refs:
      refs["dquery"][...] = refs["sofar"][...]
    else:
      clear(refs["dquery"])
