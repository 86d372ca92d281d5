"""Attention to a cache for TPUs, in Pallas Mosaic: a stream of the cache through VMEM.

The queries of all heads of one key/value head are the rows of one matrix. The positions of a
sequence are divided into blocks, and the blocks of all sequences, one after the other, are one
list, of which each core walks its share: blocks ahead of it are fetched, over the ends of
sequences too, and of a sequence's last block only what is filled. A step computes the scores of
the next block and, from the scores of the step before, the sum over the values of this one: two
chains that do not wait for each other.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import mesh as meshes, tuning

LOG2E = 1.4426950408889634
LOWEST = -1e30  # below every score; finite, so that an empty row's arithmetic stays finite
LANES = 128
GRANULE = 32  # positions: a tile of int8, two of bfloat16; the end of a sequence is fetched to it


class Plan(NamedTuple):
  """How one problem is divided."""

  size: int  # positions in a block
  slots: int  # blocks in VMEM, two of them being computed on
  chunk: int  # positions in one product
  cores: int
  sequences: int  # times key/value heads
  kv_heads: int
  num_queries: int
  group: int  # heads of a key/value head
  dim: int
  max_len: int

  @property
  def rows(self) -> int:
    return self.num_queries * self.group

  @property
  def parts(self) -> list[int]:
    """Positions that a step may compute on: a block, or what holds the end of a sequence."""
    return [n for n in (self.size // 4, self.size // 2) if n and n % LANES == 0] + [self.size]


def forward(query, key, value, lengths, *, alibi_slopes, scale, key_scales, value_scales, chip,
            blocks=None):
  """Attention to the cache; the contract of every backend, in `fused`.

  Args:
    blocks: (positions, slots, chunk, cores) to use instead of those for the chip.
  """
  batch, num_queries, heads, dim = query.shape
  max_len, kv_heads = key.shape[1:3]
  size, slots, chunk, cores = blocks
  plan = Plan(min(size, round_up(max_len, LANES)), slots, chunk, cores, batch * kv_heads, kv_heads,
              num_queries, heads // kv_heads, dim, max_len)

  cache = lambda x: x.swapaxes(1, 2).reshape(plan.sequences, max_len, dim)
  grouped = query.reshape(batch, num_queries, kv_heads, plan.group, dim)
  streams = dict(query=grouped.swapaxes(1, 2).reshape(plan.sequences, plan.rows, dim),
                 key=cache(key))
  if value is not None:
    streams["value"] = cache(value)
  for name, x in (("key_scales", key_scales), ("value_scales", value_scales)):
    if x is not None:
      x = x.swapaxes(1, 2).reshape(plan.sequences, 1, max_len)
      streams[name] = jnp.pad(x, ((0, 0), (0, 0), (0, -max_len % LANES)))
  tables = {}
  if alibi_slopes is not None:
    slopes = jnp.tile(alibi_slopes.reshape(kv_heads, 1, plan.group), (1, num_queries, 1))
    tables["slopes"] = slopes.reshape(kv_heads, plan.rows, 1) * LOG2E

  f32, vmem = jnp.float32, pltpu.VMEM
  shape = lambda name: ((plan.rows, dim) if name == "query" else
                        (1, plan.size) if name.endswith("_scales") else (plan.size, dim))
  scratch = {f"{name}_block": vmem((slots, *shape(name)), x.dtype) for name, x in streams.items()}
  scratch |= dict(
      scores=vmem((plan.rows, plan.size), f32), peak=vmem((plan.rows, LANES), f32),
      top=vmem((plan.rows, LANES), f32), total=vmem((plan.rows, LANES), f32),
      accum=vmem((plan.rows, dim), f32), result=vmem((2, plan.rows, dim), query.dtype),
      fetched=pltpu.SemaphoreType.DMA((slots, len(streams))),
      written=pltpu.SemaphoreType.DMA((2,)))
  outputs = dict(out=((plan.sequences, plan.rows, dim), query.dtype))
  if cores > 1:
    outputs["shared"] = (cores, plan.rows, dim + LANES), f32
    scratch |= dict(piece=vmem((plan.rows, dim + LANES), f32), sent=pltpu.SemaphoreType.DMA)

  ranges, owner = deal(plan, lengths)

  def kernel(*refs):
    names = ("ranges", "lengths", *streams, *tables, *outputs, *scratch)
    _kernel(dict(zip(names, refs, strict=True)), plan, list(streams), scale * LOG2E)

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  out, *shared = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(cores,),
          in_specs=[anywhere] * len(streams) + [
              pl.BlockSpec(x.shape, lambda *_: (0, 0, 0)) for x in tables.values()],
          out_specs=[anywhere] * len(outputs),
          scratch_shapes=list(scratch.values())),
      out_shape=[meshes.out_shape(*x, query, key, value, lengths) for x in outputs.values()],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",), vmem_limit_bytes=60*2**20),
      name="decode_attention",
  )(ranges, lengths, *streams.values(), *tables.values())
  if shared:
    out = merge(out, *shared, owner, dim)
  out = out.reshape(batch, kv_heads, num_queries, plan.group, dim)
  return out.swapaxes(1, 2).reshape(query.shape)


def deal(plan, lengths):
  """What each core walks.

  Returns:
    int32[cores, 4], (sequence, block) of the first block and of the one after the last; and of
    two cores the sequence that they may share and whether they do.
  """
  if plan.cores == 1:
    return jnp.array([[0, 0, plan.sequences, 0]], jnp.int32), None
  blocks = jnp.repeat(jnp.maximum(-(-lengths // plan.size), 1), plan.kv_heads)
  ends = jnp.cumsum(blocks, dtype=jnp.int32)
  half = ends[-1] // 2
  sequence = (ends <= half).sum(dtype=jnp.int32)
  block = half - jnp.where(ends <= half, blocks, 0).sum(dtype=jnp.int32)
  ranges = jnp.stack([jnp.int32(0), jnp.int32(0), sequence, block,
                      sequence, block, jnp.int32(plan.sequences), jnp.int32(0)])
  return ranges.reshape(2, 4), (sequence, block > 0)


def merge(out, pieces, owner, dim):
  """`out` with the sequence that two cores share: softmax over the pieces of both."""
  sequence, is_shared = owner
  values, lse = pieces[..., :dim], pieces[..., dim : dim + 1]
  first = jnp.arange(2)[:, None, None] == 0
  hidden = first & ~is_shared  # the first core has then written nothing there
  lse = jnp.where(hidden, -jnp.inf, lse)
  weights = jnp.exp2(lse - jnp.maximum(lse.max(axis=0), LOWEST))
  merged = (jnp.where(hidden, 0, values) * weights).sum(axis=0)
  total = weights.sum(axis=0)
  merged = (merged / jnp.where(total > 0, total, 1)).astype(out.dtype)
  return out.at[sequence].set(merged)


def _kernel(refs, plan, streams, scale):
  """The blocks of one core, one after the other; `scale` of scores to base 2."""
  size, slots = plan.size, plan.slots
  core = pl.program_id(0)
  first = refs["ranges"][core, 0], refs["ranges"][core, 1]
  end = refs["ranges"][core, 2], refs["ranges"][core, 3]
  before_end = lambda i, n: (i < end[0]) | (i == end[0]) & (n < end[1])

  def length(i):
    i = jnp.minimum(i, plan.sequences - 1)
    return refs["lengths"][jax.lax.div(i, plan.kv_heads) if plan.kv_heads > 1 else i]

  def after(i, n):
    last = (n + 1) * size >= length(i)
    return jnp.where(last, i + 1, i), jnp.where(last, 0, n + 1)

  def fetch(t, at):
    @pl.when(before_end(*at))
    def _():
      slot, left = jax.lax.rem(t, slots), length(at[0]) - at[1] * size
      pl.when((t < slots) & (left < size))(lambda: clear_stale(refs, slot))
      copy_block(refs, plan, streams, *at, slot, left, "start")
    return after(*at)

  def written(i):
    slot = jax.lax.rem(i, 2)
    return pltpu.make_async_copy(
        refs["result"].at[slot], refs["out"].at[i], refs["written"].at[slot])

  own = first[0] + (core > 0).astype(jnp.int32)  # the first sequence that is this core's alone

  def finish(i, is_shared):
    total = refs["total"][...].sum(axis=1, keepdims=True)
    out = refs["accum"][...] / jnp.where(total > 0, total, 1)

    def store():
      pl.when(i - 2 >= own)(written(i - 2).wait)
      refs["result"][jax.lax.rem(i, 2)] = out.astype(refs["result"].dtype)
      written(i).start()

    if plan.cores == 1:
      return store()
    pl.when(~is_shared)(store)

    @pl.when(is_shared)
    def _():
      lse = jnp.where(total > 0, refs["top"][...] + jnp.log2(jnp.where(total > 0, total, 1)), -jnp.inf)
      refs["piece"][:, : plan.dim] = out
      refs["piece"][:, plan.dim :] = lse
      copy = pltpu.make_async_copy(refs["piece"], refs["shared"].at[core], refs["sent"])
      copy.start()
      copy.wait()

  def body(carry):
    t, now, then, ahead = carry
    ahead = fetch(t + slots - 1, ahead)
    more = before_end(*then)
    slot, next_slot = jax.lax.rem(t + slots, slots), jax.lax.rem(t + 1, slots)
    left = jnp.where(t < 0, 0, length(now[0]) - now[1] * size)
    next_left = jnp.where(more, length(then[0]) - then[1] * size, 0)
    pl.when(more)(lambda: copy_block(
        refs, plan, streams, *then, next_slot, next_left, "wait"))
    fresh = (t == 0) | (now[1] == 0)
    low, needed = -2**31, jnp.maximum(left, next_left)
    for part in plan.parts:
      high = part if part < size else 2**31 - 1
      pl.when((needed > low) & (needed <= high))(functools.partial(
          step, refs, plan, scale, part, slot, fresh, next_slot, then[0], next_left))
      low = part
    whole = then[1] == 0  # this was the sequence's last block

    @pl.when((t >= 0) & (whole | ~more))
    def _():
      finish(now[0], ~whole | (core > 0) & (now[0] == first[0]))
    return t + 1, then, after(*then), ahead

  ahead = jax.lax.fori_loop(0, slots - 1, fetch, first)
  jax.lax.while_loop(lambda carry: before_end(*carry[1]), body,
                     (jnp.int32(-1), (first[0], first[1] - 1), first, ahead))
  for i in (end[0] - 2, end[0] - 1):
    pl.when(i >= own)(written(i).wait)


def copy_block(refs, plan, streams, i, n, slot, left, act):
  """Starts the copies of block n of sequence i, of which `left` positions are filled, or waits."""
  begin = pl.multiple_of(n * plan.size, plan.size)
  left = jnp.clip(left, 1, plan.size)
  upto = lambda grain: pl.multiple_of(pl.cdiv(left, grain) * grain, grain)
  rest = plan.max_len % GRANULE  # at the end of a cache that does not end with a granule
  for number, name in enumerate(streams):
    source, target = refs[name].at[i], refs[f"{name}_block"].at[slot]

    def copy(source, target):
      getattr(pltpu.make_async_copy(source, target, refs["fetched"].at[slot, number]), act)()

    if name == "query":
      copy(source, target)
    elif name.endswith("_scales"):
      copy(source.at[:, pl.ds(begin, upto(LANES))], target.at[:, pl.ds(0, upto(LANES))])
    elif not rest:
      copy(source.at[pl.ds(begin, upto(GRANULE))], target.at[pl.ds(0, upto(GRANULE))])
    else:
      most = plan.max_len - rest - begin
      rows = pl.multiple_of(jnp.minimum(upto(GRANULE), most), GRANULE)
      pl.when(rows > 0)(functools.partial(
          copy, source.at[pl.ds(begin, rows)], target.at[pl.ds(0, rows)]))
      pl.when(left > most)(functools.partial(
          copy, source.at[pl.ds(plan.max_len - rest, rest)],
          target.at[pl.ds(pl.multiple_of(most, GRANULE), rest)]))


def clear_stale(refs, slot):
  """Zeros where no copy will write: the weights there are 0, and 0 * NaN is not."""
  for name in ("key_block", "value_block", "key_scales_block", "value_scales_block"):
    if name in refs and refs[name].dtype != jnp.int8:
      refs[name][slot] = jnp.zeros(refs[name].shape[1:], refs[name].dtype)


def step(refs, plan, scale, part, slot, fresh, next_slot, sequence, left):
  """The values of the block in `slot`, and the scores of the first `part` positions of the next.

  Args:
    fresh: whether the block in `slot` is the first that this core sees of its sequence.
    sequence, left: of the next block; its filled positions.
  """
  query = refs["query_block"][next_slot]
  dtype, tile = query.dtype, (plan.rows, LANES)
  dot = functools.partial(
      jax.lax.dot_general, preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None)
  value, value_scales = "value_block", "value_scales_block"
  if value not in refs:
    value, value_scales = "key_block", "key_scales_block"

  old = jnp.where(fresh, LOWEST, refs["top"][...])
  new = jnp.maximum(old, refs["peak"][...])
  refs["top"][...] = new
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  behind = 0
  if plan.num_queries > 1:
    row = jax.lax.broadcasted_iota(jnp.int32, tile, 0)
    behind = plan.num_queries - 1 - jax.lax.div(row, plan.group)
  if "slopes" in refs:
    slopes = jnp.broadcast_to(refs["slopes"][jax.lax.rem(sequence, plan.kv_heads)], tile)

  peak, total, product = jnp.full(tile, LOWEST), 0.0, 0.0
  for begin in range(0, part, plan.chunk):
    chunk = slice(begin, min(begin + plan.chunk, part))
    key = refs["key_block"][next_slot, chunk].astype(dtype)
    scores = dot(query, key, (((1,), (1,)), ((), ())))

    weights = []
    for j in range(begin, chunk.stop, LANES):
      at = slice(j, j + LANES)
      weight = jnp.exp2(refs["scores"][:, at] - new)
      total += weight
      if value_scales in refs:
        weight *= refs[value_scales][slot, :, at]
      weights.append(weight)

      x, factor = scores[:, j - begin : j - begin + LANES], scale
      if "key_scales_block" in refs:
        factor = refs["key_scales_block"][next_slot, :, at] * scale
      distance = lane + (j + 1 - left) + behind
      x *= factor
      if "slopes" in refs:
        x += slopes * distance.astype(jnp.float32)
      x = jnp.where(jnp.broadcast_to(distance, tile) <= 0, x, -jnp.inf)
      refs["scores"][:, at] = x
      peak = jnp.maximum(peak, x)
    product += dot(jnp.concatenate(weights, axis=1).astype(dtype), refs[value][slot, chunk].astype(dtype),
                   (((1,), (0,)), ((), ())))

  if part < plan.size:  # The step that reads the scores may be a longer one.
    refs["scores"][:, part:] = jnp.full((plan.rows, plan.size - part), -jnp.inf)
  refs["peak"][...] = jnp.broadcast_to(peak.max(axis=1, keepdims=True), tile)
  shrink = jnp.exp2(old - new)
  kept = lambda name: jnp.where(fresh, 0, refs[name][...])
  refs["total"][...] = kept("total") * shrink + total
  shrink = jnp.concatenate([shrink] * -(-plan.dim // LANES), axis=1)[:, : plan.dim]
  refs["accum"][...] = kept("accum") * shrink + product


def round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
