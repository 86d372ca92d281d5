"""What the forward and the backward kernel for TPUs share: packed rows and visible chunks.

The query heads of one key/value head are packed into rows: row r of a key/value head stands at
position r // group and belongs to head r % group. For multi-query attention that is how
[T, heads, D] lies in memory already, a tile of rows spans few positions, and so the diagonal
of the causal mask wastes little.
"""

import jax
import jax.numpy as jnp
import numpy as np

LOG2E = float(np.log2(np.e))
FAR = 2**30  # a window that reaches this far hides nothing


def round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple


def pad(x: jax.Array, axis: int, size: int, mode: str = "constant") -> jax.Array:
  if x.shape[axis] == size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, mode=mode)


def pack(x: jax.Array, kv_heads: int, num_rows: int) -> jax.Array:
  """[B, T, heads, D] as [B * kv_heads, num_rows, D]; rows past T * group are zeros."""
  batch, length, heads, dim = x.shape
  group = heads // kv_heads
  x = x.reshape(batch, length, kv_heads, group, dim).swapaxes(1, 2)
  return pad(x.reshape(batch * kv_heads, length * group, dim), 1, num_rows)


def unpack(x: jax.Array, batch: int, length: int, heads: int) -> jax.Array:
  """The inverse of `pack`."""
  kv_heads, dim = x.shape[0] // batch, x.shape[-1]
  group = heads // kv_heads
  x = x[:, : length * group].reshape(batch, kv_heads, length, group, dim)
  return x.swapaxes(1, 2).reshape(batch, length, heads, dim)


def pack_vector(x: jax.Array, kv_heads: int, num_rows: int, fill: float) -> jax.Array:
  """float32[B, heads, T] as float32[B * kv_heads, 1, num_rows]."""
  batch, heads, length = x.shape
  x = x.reshape(batch * kv_heads, heads // kv_heads, length).swapaxes(1, 2)
  x = x.reshape(batch * kv_heads, 1, -1)
  return jnp.pad(x, ((0, 0), (0, 0), (0, num_rows - x.shape[-1])), constant_values=fill)


def unpack_vector(x: jax.Array, batch: int, length: int, heads: int) -> jax.Array:
  """The inverse of `pack_vector`."""
  kv_heads = x.shape[0] // batch
  group = heads // kv_heads
  x = x[:, 0, : length * group].reshape(batch, kv_heads, length, group)
  return x.swapaxes(2, 3).reshape(batch, heads, length)


def row_positions(length: int, group: int, num_rows: int, query_offset) -> jax.Array:
  """int32[1, num_rows]: the position of each row."""
  return (jnp.arange(num_rows, dtype=jnp.int32) // group + query_offset).astype(jnp.int32)[None]


def row_slopes(slopes: jax.Array, kv_heads: int, num_rows: int) -> jax.Array:
  """float32[kv_heads, 1, num_rows]: the slope of each row, for scores in base 2."""
  slopes = slopes.astype(jnp.float32).reshape(kv_heads, 1, -1) * LOG2E
  return jnp.tile(slopes, (1, 1, -(-num_rows // slopes.shape[-1])))[:, :, :num_rows]


def visible_chunks(*, length, num_keys, group, rows, num_blocks, fine, query_offset, is_causal,
                   window, segment_ids):
  """Which chunks of `fine` keys each block of rows visits, and which need no mask.

  Returns:
    int32[batch or 1, 4, num_blocks]: (first, full, rest, last). A block visits chunks
    [first, last); every row of it sees every key of the chunks [full, rest). Computed from
    arrays of size O(T / rows + S / fine), and right for any segment ids, sorted or not: what
    can't be excluded is visited under the mask.
  """
  num_chunks = -(-num_keys // fine)
  row = np.arange(num_blocks) * rows
  used = row < length * group
  low = query_offset + jnp.asarray(row // group, jnp.int32)  # positions of a block's ends
  high = query_offset + jnp.asarray(
      np.minimum((row + rows - 1) // group, length - 1), jnp.int32)

  # Keys that some row sees, then keys that every row sees; both ends belong to the range.
  some, every = [0, num_keys - 1], [0, num_keys - 1]
  if is_causal:
    some[1], every[1] = jnp.minimum(some[1], high), jnp.minimum(every[1], low)
  if window is not None:
    left, right = (min(w, FAR) for w in window)
    some = [jnp.maximum(some[0], low - left), jnp.minimum(some[1], high + right)]
    every = [jnp.maximum(every[0], high - left), jnp.minimum(every[1], low + right)]
  first = jnp.clip(some[0] // fine, 0, num_chunks)
  last = jnp.clip(some[1] // fine + 1, 0, num_chunks)
  full = -(-every[0] // fine)
  rest = (every[1] + 1) // fine

  if segment_ids is not None:
    query_ids, key_ids = segment_ids  # [B, T], [B, S]
    row_ids = jnp.repeat(query_ids, group, axis=1)
    blocks = pad(row_ids, 1, num_blocks * rows, "edge").reshape(-1, num_blocks, rows)
    chunks = pad(key_ids, 1, num_chunks * fine, "edge").reshape(-1, num_chunks, fine)
    block_min, block_max = blocks.min(-1), blocks.max(-1)
    chunk_min, chunk_max = chunks.min(-1), chunks.max(-1)
    # No chunk before `met` reaches the block's smallest id, none from `left_at` on starts
    # below its largest; for sorted ids that is exactly the range of chunks that share an id.
    met = jax.vmap(jnp.searchsorted)(jax.lax.cummax(chunk_max, axis=1), block_min)
    tail_min = jax.lax.cummin(chunk_min, axis=1, reverse=True)
    left_at = jax.vmap(lambda a, v: jnp.searchsorted(a, v, side="right"))(tail_min, block_max)
    first, last = jnp.maximum(first, met), jnp.minimum(last, left_at)

    # Runs of chunks that hold one and the same id; a block of that id alone needs no mask there.
    single = chunk_min == chunk_max
    same = single[:, 1:] & single[:, :-1] & (chunk_min[:, 1:] == chunk_min[:, :-1])
    ends = jnp.pad(~same, ((0, 0), (0, 1)), constant_values=True)
    index = jnp.arange(num_chunks)
    run_end = jax.lax.cummin(jnp.where(ends, index + 1, num_chunks), axis=1, reverse=True)
    at = lambda x, i: jnp.take_along_axis(x, jnp.clip(i, 0, num_chunks - 1), axis=1)
    uniform = lambda i: at(single, i) & (at(chunk_min, i) == block_min) & (i < num_chunks)
    start = jnp.maximum(full, first)
    start = jnp.where(uniform(start), start, start + 1)
    ok = uniform(start) & (block_min == block_max)
    full, rest = start, jnp.where(ok, jnp.minimum(rest, at(run_end, start)), start)

  last = jnp.where(used, jnp.maximum(first, last), first)
  full = jnp.clip(full, first, last)
  rest = jnp.clip(rest, full, last)
  ranges = jnp.broadcast_arrays(*(jnp.atleast_2d(x) for x in (first, full, rest, last)))
  out = jnp.stack(ranges, axis=1).astype(jnp.int32)
  return jnp.broadcast_to(out, (*out.shape[:2], num_blocks))


def struct(shape, dtype, *arrays):
  """The type of an output that varies over every mesh axis over which `arrays` vary."""
  varying = frozenset().union(
      *(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))
  return jax.ShapeDtypeStruct(
      shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying))


def fit(blocks, num_rows, num_keys):
  """`blocks` made no larger than the problem."""
  rows = min(blocks.rows, round_up(-(-num_rows // blocks.cores), blocks.lanes))
  major = min(blocks.major, round_up(num_keys, blocks.fine))
  return blocks._replace(rows=rows, major=major, chunk=min(blocks.chunk, major))


def biased(x, refs, at, blocks, group):
  """Scores [size, lanes] with slope * (key's place in its chunk) added."""
  if "slope" not in refs:
    return x
  bias = refs["bias"][: x.shape[0], :]
  if blocks.periodic(group):
    return x + jnp.concatenate([bias] * (x.shape[1] // bias.shape[1]), axis=1)
  return x + bias[:, :1] * refs["slope"][:, at]


def visible(shape, distance, refs, at, key_ids, num_keys, *, is_causal, window):
  """Which of the scores [size, lanes] count.

  Args:
    distance: int32[1, lanes], position of the chunk's first key minus that of the row.
    key_ids: int32[1, size] or None.
    num_keys: keys from the chunk's first to the last one there is.
  """
  place = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  last = num_keys - 1
  if is_causal:
    last = jnp.minimum(last, -distance)
  if window is not None:
    last = jnp.minimum(last, min(window[1], FAR) - distance)
  mask = place <= last
  if window is not None:
    mask &= place >= -min(window[0], FAR) - distance
  if key_ids is not None:
    # Ids lie along lanes; turned, they meet the rows' ids.
    turned = jnp.broadcast_to(key_ids, (shape[1], shape[0])).T
    mask &= turned == refs["query_id"][:, at]
  return mask


def interleave(blocks, scores, update):
  """Calls update(scores(rows), rows) for each slice of rows, with products issued ahead.

  In program order the scores of the next slices come before the softmax of this one, and the
  scheduler keeps that order: the matrix unit works while the vector units do.
  """
  slices = [slice(r, r + blocks.lanes) for r in range(0, blocks.rows, blocks.lanes)]
  ready = [scores(at) for at in slices[: blocks.ahead]]
  for n, at in enumerate(slices):
    if n + blocks.ahead < len(slices):
      ready.append(scores(slices[n + blocks.ahead]))
    update(ready[n], at)
    ready[n] = None


def for_each_chunk(visited, key_block, blocks, step):
  """Calls step(start, size, masked) for what of [first, last) lies in this block of keys.

  Large steps without a mask where every row sees every key, fine masked ones around them.
  """
  per_major = blocks.major // blocks.fine
  first, full, rest, last = (
      jnp.clip(x - key_block * per_major, 0, per_major) for x in visited)
  ratio = blocks.chunk // blocks.fine
  num_large = (rest - full) // ratio
  middle = full + num_large * ratio

  def large(t, _):
    step(full + t * ratio, ratio * blocks.fine, False)

  def small(t, _):
    before = full - first
    step(jnp.where(t < before, first + t, middle + t - before), blocks.fine, True)

  jax.lax.fori_loop(0, num_large, large, None)
  jax.lax.fori_loop(0, full - first + last - middle, small, None)
