"""Flash attention with ALiBi for TPUs, in Pallas Mosaic: the forward pass and the entry points.

Scores are held transposed, [keys, rows]: a row's maximum and sum run over sublanes, which
is plain vector arithmetic, what belongs to a row (its position, slope, maximum) is one lane, and
the weights enter the second product as the stationary operand, so that the moving one,
[dim_head, keys], fills the matrix unit's depth and width at any dim_head.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import tuning
from . import mosaic_tpu_layout as layout
from .mosaic_tpu_layout import LOG2E

LOWEST = -1e30  # below every score; finite, so that an empty row's arithmetic stays finite
SUM_ROWS = 16  # rows of ones under the values (one bfloat16 tile), whose product is the sum


def unsupported(query, key, value, *, chip) -> str | None:
  """The first requirement that these shapes and dtypes fail, in words; None if they fit.

  Args:
    query, key, value: arrays or their types, as for `forward`.
    chip: "v4", "v5e", "v5p", "v6e" or "tpu7x"; None asks whether any of them could.
  """
  if query.dtype not in (jnp.bfloat16, jnp.float32):
    return f"bfloat16 or float32 (the matrix unit takes no float16); got {query.dtype}"
  dim_head = query.shape[-1]
  if dim_head > 256:
    return f"dim_head <= 256; got {dim_head}"
  return None


def forward(query, key, value, *, segment_ids, alibi_slopes, query_offset, is_causal, scale,
            window, chip, blocks=None):
  """Attention and its log-sum-exp; the contract of every backend.

  Args:
    query: bfloat16 or float32[B, T, heads, D].
    key, value: like query, [B, S, kv_heads, D]; value may be None, then it is the key.
    segment_ids: None or (int32[B, T], int32[B, S]).
    alibi_slopes: None or float32[heads].
    query_offset: the first query's position, a Python int or int32[].
    window: None or (left, right).
    chip: what to choose the block sizes for; None takes those that fit the smallest.
    blocks: block sizes to use instead.

  Returns:
    [B, T, heads, D] in query's dtype, and float32[B, heads, T].
  """
  batch, length, heads, dim = query.shape
  num_keys, kv_heads = key.shape[1:3]
  group = heads // kv_heads
  blocks = layout.fit(blocks or tuning.attention_mosaic_tpu(chip, dim)[0],
                      length * group, num_keys)
  num_blocks = layout.round_up(-(-length * group // blocks.rows), blocks.cores)
  num_rows = num_blocks * blocks.rows
  padded_keys = layout.round_up(num_keys, blocks.major)
  alibi = alibi_slopes is not None
  ranges = layout.visible_chunks(
      length=length, num_keys=num_keys, group=group, rows=blocks.rows, num_blocks=num_blocks,
      fine=blocks.fine, query_offset=query_offset, is_causal=is_causal, window=window,
      segment_ids=segment_ids)
  per_batch = ranges.shape[0] > 1

  # Grid: core, batch and key/value head, block of rows, block of keys. A core takes every
  # other block of rows, so that the causal triangle splits evenly.
  def at(s, i):
    return i * blocks.cores + s

  def ranges_at(ranges, b, block, k):
    return ranges[((b // kv_heads if per_batch else 0) * 4 + k) * num_blocks + block]

  def keys_at(s, b, i, j, ranges):
    # A block that is not visited repeats a visited one's index, and so is not fetched.
    per_major = blocks.major // blocks.fine
    first = ranges_at(ranges, b, at(s, i), 0) // per_major
    last = jnp.maximum(ranges_at(ranges, b, at(s, i), 3) - 1, 0) // per_major
    return jnp.clip(j, jnp.minimum(first, last), last)

  row_spec = lambda index: pl.BlockSpec(
      (None, 1, blocks.rows), lambda s, b, i, j, r: (index(b), 0, at(s, i)))
  rows_spec = pl.BlockSpec((None, blocks.rows, dim), lambda s, b, i, j, r: (b, at(s, i), 0))
  keys_spec = pl.BlockSpec(
      (None, blocks.major, dim), lambda s, b, i, j, r: (b, keys_at(s, b, i, j, r), 0))
  operands = dict(
      position=(layout.row_positions(length, group, num_rows, query_offset)[None],
                row_spec(lambda b: 0)),
      query=(layout.pack(query, kv_heads, num_rows), rows_spec),
      key=(layout.pack(key, kv_heads, padded_keys), keys_spec))
  if value is not None:
    operands["value"] = (layout.pack(value, kv_heads, padded_keys), keys_spec)
  if alibi:
    operands["slope"] = (layout.row_slopes(alibi_slopes, kv_heads, num_rows),
                         row_spec(lambda b: b % kv_heads))
  if segment_ids is not None:
    ids = jnp.repeat(segment_ids[0], group, axis=1)
    operands["query_id"] = (layout.pad(ids, 1, num_rows)[:, None], row_spec(lambda b: b // kv_heads))
    operands["key_id"] = (
        layout.pad(segment_ids[1], 1, padded_keys)[:, None],
        pl.BlockSpec((None, 1, blocks.major),
                     lambda s, b, i, j, r: (b // kv_heads, 0, keys_at(s, b, i, j, r))))

  scratch = dict(
      top=pltpu.VMEM((1, blocks.rows), jnp.float32),
      accum=pltpu.VMEM((dim + SUM_ROWS, blocks.rows), jnp.float32))
  if alibi:
    scratch["bias"] = pltpu.VMEM((blocks.chunk, blocks.period(group)), jnp.float32)

  def kernel(ranges, *refs):
    names = (*operands, "out", "lse", *scratch)
    s, b, i = (pl.program_id(axis) for axis in range(3))
    visited = [ranges_at(ranges, b, at(s, i), k) for k in range(4)]
    _kernel(visited, i, dict(zip(names, refs, strict=True)), blocks=blocks, group=group, num_keys=num_keys,
            is_causal=is_causal, scale=scale, window=window)

  out, lse = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(blocks.cores, batch * kv_heads, num_blocks // blocks.cores,
                padded_keys // blocks.major),
          in_specs=[spec for _, spec in operands.values()],
          out_specs=[rows_spec, row_spec(lambda b: b)],
          scratch_shapes=list(scratch.values())),
      out_shape=[
          layout.struct((batch * kv_heads, num_rows, dim), query.dtype, query, key, value),
          layout.struct((batch * kv_heads, 1, num_rows), jnp.float32, query, key, value)],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
          vmem_limit_bytes=100 << 20),
      name="alibi_attention_forward",
  )(ranges.reshape(-1), *(x for x, _ in operands.values()))
  return (layout.unpack(out, batch, length, heads),
          layout.unpack_vector(lse, batch, length, heads))


def _kernel(visited, row_block, refs, *, blocks, group, num_keys, is_causal, scale, window):
  """One block of rows against what it sees of one block of keys; refs by name."""
  key_block, num_key_blocks = pl.program_id(3), pl.num_programs(3)
  key, out, lse, top, accum = (refs[n] for n in ("key", "out", "lse", "top", "accum"))
  value = refs.get("value", key)
  dim = key.shape[-1]
  alibi = "slope" in refs
  low_precision = key.dtype != jnp.float32
  dot = functools.partial(
      jax.lax.dot_general, preferred_element_type=jnp.float32,
      precision=None if low_precision else jax.lax.Precision.HIGHEST)

  @pl.when(key_block == 0)
  def _():
    top[...] = jnp.full_like(top, LOWEST)
    accum[...] = jnp.zeros_like(accum)

  if alibi:
    # slope * (key's place in its chunk): the same for every chunk, and periodic in the rows.
    @pl.when((key_block == 0) & (row_block == 0))
    def _():
      bias = refs["bias"]
      place = jax.lax.broadcasted_iota(jnp.int32, bias.shape, 0).astype(jnp.float32)
      bias[...] = place * refs["slope"][:, : bias.shape[1]] if blocks.periodic(group) else place

  first_key = key_block * blocks.major

  def step(start, size, masked):
    """Adds the keys [start, start + size) of this block to every row."""
    start = pl.multiple_of(start * blocks.fine, blocks.fine)
    keys = pl.ds(start, size)
    k = key[keys, :]
    ones = (jax.lax.broadcasted_iota(jnp.int32, (SUM_ROWS, size), 0) == 0).astype(k.dtype)
    v = jnp.concatenate([value[keys, :].T, ones], axis=0)

    def scores(at):
      return dot(k, refs["query"][at, :], (((1,), (1,)), ((), ())))  # [size, lanes]

    def update(x, at):
      distance = first_key + start - refs["position"][:, at]  # of the chunk's first key
      x = layout.biased(x * (scale * LOG2E), refs, at, blocks, group)
      if masked:
        key_ids = refs["key_id"][:, keys] if "key_id" in refs else None
        x = jnp.where(layout.visible(
            x.shape, distance, refs, at, key_ids, num_keys - first_key - start,
            is_causal=is_causal, window=window), x, -jnp.inf)
      # The row's own part of the bias shifts its maximum instead of every score.
      shift = refs["slope"][:, at] * distance.astype(jnp.float32) if alibi else 0.0
      old = top[:, at]
      new = jnp.maximum(old, x.max(axis=0, keepdims=True) + shift)
      weights = jnp.exp2(x - (new - shift)).astype(v.dtype)
      top[:, at] = new
      accum[:, at] = (accum[:, at] * jnp.exp2(old - new)
                      + dot(v, weights, (((1,), (0,)), ((), ()))))

    layout.interleave(blocks, scores, update)

  layout.for_each_chunk(visited, key_block, blocks, step)

  @pl.when(key_block == num_key_blocks - 1)
  def _():
    total = accum[dim : dim + 1, :]
    seen = total > 0
    lse[...] = jnp.where(seen, top[...] + jnp.log2(jnp.where(seen, total, 1)), -jnp.inf) / LOG2E
    out[...] = (accum[:dim, :] / jnp.where(seen, total, 1)).T.astype(out.dtype)
