"""Flash attention with ALiBi for TPUs, in Pallas Mosaic: the forward pass and the entry points.

Scores are held transposed, [keys, rows]: a row's maximum and sum run over sublanes, which
is plain vector arithmetic, what belongs to a row (its position, slope, maximum) is one lane, and
the weights enter the second product as the stationary operand, so that the moving one,
[dim_head, keys], fills the matrix unit's depth and width at any dim_head.
"""


from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import cost, partition
from ..core.constants import LOG2E, LOWEST
from ..core.vmap import folding_batch
from ..interpreters import mode
from ..tpu import vmem
from ..tpu.product import ahead, clear, dot
from . import configs, mosaic_tpu_layout as layout, mosaic_tpu_mask as masking
from .mosaic_tpu_backward import backward as backward

SUM_ROWS = 16  # under the values (one bfloat16 tile), the first of ones: its product is the sum


def unsupported(query: jax.Array | jax.ShapeDtypeStruct, key: jax.Array | jax.ShapeDtypeStruct,
                value: jax.Array | jax.ShapeDtypeStruct | None, *, chip: str | None) -> str | None:
  """The first requirement that these shapes and dtypes fail, in words; None if they fit.

  Args:
    query, key, value: arrays or their types, as for `forward`.
    chip: "v4", "v5e", "v5p", "v6e" or "tpu7x"; None asks whether any of them could.
  """
  if problem := vmem.unfit(query.dtype, chip):
    return problem
  dim = query.shape[-1]
  if dim > 256:
    return f"dim_head of at most 256; got {dim}"
  if chip is None:
    return None
  itemsize = query.dtype.itemsize
  for backward_too, config in enumerate(configs.mosaic_tpu(chip, dim)):
    plan = layout.fit(config, length=query.shape[1], group=query.shape[2] // key.shape[2],
                      num_keys=key.shape[1], itemsize=itemsize)
    taken = layout.vmem_bytes(plan, dim=dim, itemsize=itemsize, shared=value is None,
                              backward=bool(backward_too))
    kernel = "backward" if backward_too else "forward"
    if problem := vmem.exceeded(taken, chip, "blocks", kernel):
      return problem
  return None


@folding_batch
def forward(query: jax.Array, key: jax.Array, value: jax.Array | None, *,
            segment_ids: tuple[jax.Array, jax.Array] | None, alibi_slopes: jax.Array | None,
            query_offset: int | jax.Array, is_causal: bool, scale: float,
            window: tuple[int, int] | None, chip: str | None, config: Any = None):
  """Attention and its log-sum-exp; the contract of every backend.

  Args:
    query: bfloat16 or float32[B, T, heads, D].
    key, value: like query, [B, S, kv_heads, D]; value may be None, then it is the key.
    segment_ids: None or (int32[B, T], int32[B, S]).
    alibi_slopes: None or float32[heads].
    query_offset: the first query's position, a Python int or int32[].
    window: None or (left, right).
    chip: what to choose the block sizes for; None takes those that fit the smallest.
    config: block sizes to use instead.

  Returns:
    [B, T, heads, D] in query's dtype, and float32[B, heads, T].
  """
  batch, length, heads, given_dim = query.shape
  query, key, value = (layout.widen(x) for x in (query, key, value))
  dim = query.shape[-1]
  num_keys, kv_heads = key.shape[1:3]
  group = heads // kv_heads
  plan = layout.fit(config or configs.mosaic_tpu(chip, dim)[0], length=length,
                    group=group, num_keys=num_keys, itemsize=query.dtype.itemsize)
  mask = dict(query_offset=query_offset, is_causal=is_causal, window=window)
  edges = masking.find_edges(plan, length=length, num_keys=num_keys, **mask)
  chunks = masking.visible_chunks(
      plan, length=length, num_keys=num_keys, segment_ids=segment_ids, **mask)
  ranges = masking.Ranges(chunks, plan, edges, kv_heads, query_offset, segment_ids)

  # Grid: core, batch and key/value head, block of rows, block of keys. The last keys come first:
  # where a block of rows has a diagonal, it starts there.
  at = plan.dealt
  num_key_blocks = plan.padded_keys // plan.major

  def keys_at(s, b, i, j, scalars):
    # A block that is not visited repeats a visited one's index, and so is not fetched.
    return jnp.clip(num_key_blocks - 1 - j, *ranges.key_blocks(scalars, b, at(s, i)))

  row_spec = lambda index: pl.BlockSpec(
      (None, 1, plan.block_rows), lambda s, b, i, j, *r: (index(b), 0, at(s, i)))
  rows_spec = pl.BlockSpec(
      (None, plan.block_rows, dim), lambda s, b, i, j, *r: (b, at(s, i), 0))
  keys_spec = pl.BlockSpec(
      (None, plan.major, dim), lambda s, b, i, j, *r: (b, keys_at(s, b, i, j, r), 0))
  operands = dict(
      query=(layout.pack(query, kv_heads, plan.num_rows), rows_spec),
      key=(layout.pack(key, kv_heads, plan.padded_keys), keys_spec))
  if value is not None:
    operands["value"] = (layout.pack(value, kv_heads, plan.padded_keys), keys_spec)
  operands |= layout.row_operands(
      plan, kv_heads, length, alibi_slopes, segment_ids, query_offset, row_spec,
      pl.BlockSpec((None, 1, plan.major),
                   lambda s, b, i, j, *r: (b // kv_heads, 0, keys_at(s, b, i, j, r))))
  scratch = dict(
      top=pltpu.VMEM((1, plan.block_rows), jnp.float32),
      accum=pltpu.VMEM((dim + SUM_ROWS, plan.block_rows), jnp.float32))
  if alibi_slopes is not None:
    scratch["bias"] = layout.bias_scratch(plan, edges)

  def kernel(*refs):
    refs = dict(zip(("chunks", "blocks", *operands, "out", "lse", *scratch), refs, strict=True))
    _kernel(refs, ranges, plan, edges, num_keys, scale, **mask)

  out_shape = [
      partition.out_shape((batch * kv_heads, plan.num_rows, dim), query.dtype, query, key, value),
      partition.out_shape((batch * kv_heads, 1, plan.num_rows), jnp.float32, query, key, value)]
  arrays = [x for x, _ in operands.values()]
  pairs = batch * heads * masking.pairs(length=length, num_keys=num_keys, **mask)
  out, lse = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2,
          grid=(plan.cores, batch * kv_heads, plan.num_blocks // plan.cores,
                num_key_blocks),
          in_specs=[spec for _, spec in operands.values()],
          out_specs=[rows_spec, row_spec(lambda b: b)],
          scratch_shapes=list(scratch.values())),
      out_shape=out_shape,
      cost_estimate=cost.estimate(2 * 2 * dim * pairs, pairs, [*arrays, *out_shape]),
      compiler_params=pltpu.CompilerParams(
          disable_bounds_checks=True,  # of every copy, in every step; all indices are clipped
          dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
          vmem_limit_bytes=layout.vmem_bytes(
              plan, dim=dim, itemsize=query.dtype.itemsize, shared=value is None,
              backward=False)),
      interpret=mode.mosaic_tpu(plan.cores),
      name="alibi_attention_forward",
  )(*ranges.operands, *arrays)
  return (layout.unpack(out, batch, length, heads)[..., :given_dim],
          layout.unpack_vector(lse, batch, length, heads))


def _kernel(refs, ranges, plan, edges, num_keys, scale, *, query_offset, is_causal, window):
  """One block of rows against what it sees of one block of keys; refs by name."""
  core, head, row_block, turn = (pl.program_id(axis) for axis in range(4))
  block = plan.dealt(core, row_block)
  last_turn = pl.num_programs(3) - 1
  key_block = last_turn - turn
  key, out, lse, top, accum = (refs[n] for n in ("key", "out", "lse", "top", "accum"))
  value = refs.get("value", key)
  dim = key.shape[-1]

  diagonal = ranges.of_edge(refs, head, block, 0) if edges else jnp.int32(0)

  def finish(at, sums, top):
    total = sums[dim : dim + 1, :]
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse[:, at] = jnp.where(seen, top + jnp.log2(total), -jnp.inf) / LOG2E
    out[at, :] = (sums[:dim, :] * (1 / total)).astype(out.dtype).T

  @pl.when((turn == 0) & (diagonal == 0))
  def _():
    clear(accum)
    top[...] = jnp.full_like(top, LOWEST)

  if "slope" in refs:
    @pl.when((turn == 0) & (row_block == 0))
    def _():
      layout.fill_bias(refs, plan)

  def step(first_row, first_key, tiles, size, masked, ids, fresh, whole):
    first_key = pl.multiple_of(first_key, plan.fine)
    keys = pl.ds(first_key, size)
    k = key[keys, :]
    ones = (jax.lax.broadcasted_iota(jnp.int32, (SUM_ROWS, size), 0) == 0).astype(k.dtype)
    v = jnp.concatenate([value[keys, :].T, ones], axis=0)
    key_ids = layout.turned(refs["key_id"][:, keys], plan.lanes) if ids else None
    position = key_block * plan.major + first_key
    left = None if fresh else num_keys - position

    def rows(tile):
      return pl.ds(pl.multiple_of(first_row + tile.row, plan.lanes), plan.lanes)

    def scores(tile):
      return dot(k[slice(*tile.keys)], refs["query"][rows(tile), :], transposed=True)

    def update(x, tile):
      at = rows(tile)
      distance = position - refs["position"][:, at]  # of the step's first key
      x = layout.biased(x * (scale * LOG2E), refs, at, tile.keys, plan)
      if masked:
        x = layout.hide(x, tile, distance, left, refs, at, key_ids,
                        is_causal=is_causal, window=window)
      # The row's own part of the bias shifts its maximum instead of every score.
      shift = refs["slope"][:, at] * distance.astype(jnp.float32) if "slope" in refs else 0.0
      old = LOWEST if fresh else top[:, at]
      new = jnp.maximum(old, x.max(axis=0, keepdims=True) + shift)
      weights = jnp.exp2(x - (new - shift)).astype(v.dtype)
      sums = dot(v[:, slice(*tile.keys)], weights)
      if whole:
        waiting.append((at, sums, new))
        if len(waiting) > 1:
          finish(*waiting.pop(0))
      else:
        top[:, at] = new
        accum[:, at] = sums if fresh else accum[:, at] * jnp.exp2(old - new) + sums

    waiting = []
    ahead(tiles, scores, update, plan.ahead)
    for result in waiting:
      finish(*result)

  low, high = ranges.key_blocks((refs["chunks"], refs["blocks"]), head, block)

  @pl.when((low <= key_block) & (key_block <= high))
  def _():
    masking.traverse(ranges, refs, head, block, key_block, query_offset, plan, edges, step,
                     window=window, whole=True)

  @pl.when((turn == last_turn) & (diagonal != 3))
  def _():
    finish(slice(None), accum[...], top[...])
