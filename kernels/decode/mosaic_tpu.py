"""Attention to a cache for TPUs, in Pallas Mosaic: a stream of the cache through VMEM.

The queries of all heads of one key/value head are the rows of one matrix. The positions of a
sequence are divided into blocks, and the blocks of all sequences, one after the other, are one
list. Each core walks its share of the list: it fetches the blocks ahead of the one it computes on,
over the ends of sequences as well, and of a sequence's last block only what is filled. The one
sequence that two cores share is merged by plain JAX.
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
  slots: int  # blocks in VMEM, one of them being computed on
  cores: int
  num_queries: int
  group: int  # heads of a key/value head
  kv_heads: int
  sequences: int  # times key/value heads
  max_len: int
  scale: float

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
    blocks: (positions, slots, cores) to use instead of those for the chip.
  """
  batch, num_queries, heads, dim = query.shape
  max_len, kv_heads = key.shape[1:3]
  size, slots, cores = blocks or fit(query, key, value, chip)
  plan = Plan(min(size, round_up(max_len, LANES)), slots, cores, num_queries, heads // kv_heads,
              kv_heads, batch * kv_heads, max_len, scale)

  rows = query.reshape(batch, num_queries, kv_heads, plan.group, dim).swapaxes(1, 2)
  cache = lambda x: x.swapaxes(1, 2).reshape(plan.sequences, max_len, dim)
  streams = dict(query=rows.reshape(plan.sequences, plan.rows, dim), key=cache(key))
  if value is not None:
    streams["value"] = cache(value)
  for name, x in (("key_scales", key_scales), ("value_scales", value_scales)):
    if x is not None:
      x = x.swapaxes(1, 2).reshape(plan.sequences, 1, max_len)
      streams[name] = jnp.pad(x, ((0, 0), (0, 0), (0, -max_len % LANES)))
  block_shapes = dict(query=(plan.rows, dim), key=(plan.size, dim), value=(plan.size, dim),
                      key_scales=(1, plan.size), value_scales=(1, plan.size))
  tables = {}
  if alibi_slopes is not None:
    slopes = jnp.tile(alibi_slopes.reshape(kv_heads, 1, plan.group), (1, num_queries, 1))
    tables["slopes"] = slopes.reshape(kv_heads, plan.rows, 1) * LOG2E

  f32 = jnp.float32
  scratch = {f"{name}_block": pltpu.VMEM((slots, *block_shapes[name]), x.dtype)
             for name, x in streams.items()}
  scratch |= dict(
      rows=pltpu.VMEM((plan.rows, dim), query.dtype), result=pltpu.VMEM((2, plan.rows, dim), query.dtype),
      top=pltpu.VMEM((plan.rows, LANES), f32), total=pltpu.VMEM((plan.rows, LANES), f32),
      accum=pltpu.VMEM((plan.rows, dim), f32),
      fetched=pltpu.SemaphoreType.DMA((slots, len(streams))),
      written=pltpu.SemaphoreType.DMA((2,)))

  def kernel(*refs):
    names = ("lengths", *streams, *tables, "out", *scratch)
    _kernel(dict(zip(names, refs, strict=True)), plan, list(streams))

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  whole = lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * x.ndim)
  out = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=(cores,),
          in_specs=[anywhere] * len(streams) + [whole(x) for x in tables.values()],
          out_specs=anywhere,
          scratch_shapes=list(scratch.values())),
      out_shape=meshes.out_shape(
          streams["query"].shape, query.dtype, query, key, value, lengths),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",), vmem_limit_bytes=60*2**20),
      name="decode_attention",
  )(lengths, *streams.values(), *tables.values())
  return out.reshape(batch, kv_heads, num_queries, plan.group, dim).swapaxes(1, 2).reshape(
      query.shape)


def _kernel(refs, plan, streams):
  """The blocks of one core, one after the other."""
  size, slots = plan.size, plan.slots
  lengths = refs["lengths"]
  block = lambda name: refs[f"{name}_block"]

  def length(i):
    return lengths[jax.lax.div(i, plan.kv_heads) if plan.kv_heads > 1 else i]

  def num_blocks(i):
    return jnp.maximum(pl.cdiv(length(i), size), 1)

  def after(i, n):
    last = n + 1 >= num_blocks(jnp.minimum(i, plan.sequences - 1))
    return jnp.where(last, i + 1, i), jnp.where(last, 0, n + 1)

  whole = plan.max_len - plan.max_len % GRANULE

  def copies(i, n, slot):
    """(condition or None, copy) of all that block n of sequence i needs."""
    begin = pl.multiple_of(n * size, size)
    left = jnp.clip(length(i) - begin, 1, size)
    upto = lambda grain: pl.multiple_of(pl.cdiv(left, grain) * grain, grain)
    for number, name in enumerate(streams):
      ref, to, arrived = refs[name], block(name).at[slot], refs["fetched"].at[slot, number]
      copy = lambda source, target: pltpu.make_async_copy(source, target, arrived)
      if name == "query":
        yield None, copy(ref.at[i], to)
      elif name.endswith("_scales"):
        lanes = upto(LANES)
        yield None, copy(ref.at[i, :, pl.ds(begin, lanes)], to.at[:, pl.ds(0, lanes)])
      elif whole == plan.max_len:
        yield None, copy(ref.at[i, pl.ds(begin, upto(GRANULE))], to.at[pl.ds(0, upto(GRANULE))])
      else:
        rows = pl.multiple_of(jnp.minimum(upto(GRANULE), whole - begin), GRANULE)
        rest = plan.max_len - whole
        yield rows > 0, copy(ref.at[i, pl.ds(begin, rows)], to.at[pl.ds(0, rows)])
        yield begin + left > whole, copy(
            ref.at[i, pl.ds(whole, rest)],
            to.at[pl.ds(pl.multiple_of(whole - begin, GRANULE), rest)])

  def fetch(i, n, slot, fresh):
    @pl.when(fresh & (length(i) - n * size < size))
    def _():
      clear_stale(refs, slot)
    for condition, copy in copies(i, n, slot):
      copy.start() if condition is None else pl.when(condition)(copy.start)

  def wait(i, n, slot):
    for condition, copy in copies(i, n, slot):
      copy.wait() if condition is None else pl.when(condition)(copy.wait)

  first, end = (jnp.int32(0), jnp.int32(0)), (jnp.int32(plan.sequences), jnp.int32(0))
  before = lambda at, end: (at[0] < end[0]) | (at[0] == end[0]) & (at[1] < end[1])

  def prefetch(t, at):
    @pl.when(before(at, end))
    def _():
      fetch(*at, jax.lax.rem(t, slots), t < slots)
    return after(*at)

  def written(i):
    slot = jax.lax.rem(i, 2)
    return pltpu.make_async_copy(refs["result"].at[slot], refs["out"].at[i], refs["written"].at[slot])

  def body(carry):
    t, at, ahead = carry
    i, n = at
    ahead = prefetch(t + slots - 1, ahead)
    slot = jax.lax.rem(t, slots)
    wait(i, n, slot)

    @pl.when((n == 0) | (t == 0))
    def _():
      start(refs, slot)

    left = length(i) - n * size
    low = -1
    for part in plan.parts:
      fits = (left > low) if part == size else (left > low) & (left <= part)
      pl.when(fits)(lambda: step(refs, plan, i, slot, left, part))
      low = part

    nxt = after(i, n)
    @pl.when((nxt[1] == 0))
    def _():
      pl.when(i - 2 >= first[0])(lambda: written(i - 2).wait())
      total = refs["total"][...].sum(axis=1, keepdims=True)
      refs["result"][jax.lax.rem(i, 2)] = (refs["accum"][...] / jnp.where(total > 0, total, 1)).astype(refs["out"].dtype)
      written(i).start()
      @pl.when(i + 1 == plan.sequences)
      def _():
        pl.when(i > first[0])(lambda: written(i - 1).wait())
        written(i).wait()

    return t + 1, nxt, ahead

  ahead = jax.lax.fori_loop(0, slots - 1, prefetch, first)
  jax.lax.while_loop(lambda c: before(c[1], end), body, (jnp.int32(0), first, ahead))


def clear_stale(refs, slot):
  """What no copy will have written is multiplied by 0: it has to be finite."""
  for name in ("key", "value", "key_scales", "value_scales"):
    ref = refs.get(f"{name}_block")
    if ref is not None and ref.dtype != jnp.int8:
      ref[slot] = jnp.zeros(ref.shape[1:], ref.dtype)


def start(refs, slot):
  refs["rows"][...] = refs["query_block"][slot]
  refs["top"][...] = jnp.full_like(refs["top"], LOWEST)
  refs["total"][...] = jnp.zeros_like(refs["total"])
  refs["accum"][...] = jnp.zeros_like(refs["accum"])


def step(refs, plan, i, slot, left, part):
  """The first `part` positions of a block, `left` of which are filled."""
  query = refs["rows"][...]
  dim = query.shape[-1]
  dot = functools.partial(
      jax.lax.dot_general, preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None)
  key = refs["key_block"][slot, :part].astype(query.dtype)
  scores = dot(query, key, (((1,), (1,)), ((), ())))
  value = refs["value_block"][slot, :part].astype(query.dtype) if "value_block" in refs else key

  shape = plan.rows, LANES
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  behind = 0
  if plan.num_queries > 1:
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    behind = plan.num_queries - 1 - jax.lax.div(row, plan.group)
  if "slopes" in refs:
    slopes = jnp.broadcast_to(refs["slopes"][jax.lax.rem(i, plan.kv_heads)], shape)
  tiles = []
  for j in range(0, part, LANES):
    x = scores[:, j : j + LANES] * (plan.scale * LOG2E)
    if "key_scales" in refs:
      x *= refs["key_scales_block"][slot, :, j : j + LANES]
    distance = lane + (j + 1 - left) + behind
    if "slopes" in refs:
      x += slopes * distance.astype(jnp.float32)
    tiles.append(jnp.where(jnp.broadcast_to(distance, shape) <= 0, x, -jnp.inf))

  old = refs["top"][...]
  new = functools.reduce(jnp.maximum, tiles).max(axis=1, keepdims=True)
  new = jnp.maximum(old, jnp.broadcast_to(new, shape))
  shrink = jnp.exp2(old - new)
  tiles = [jnp.exp2(x - new) for x in tiles]
  refs["top"][...] = new
  refs["total"][...] = refs["total"][...] * shrink + sum(tiles)
  scales = refs.get("value_scales_block" if "value" in refs else "key_scales_block")
  if scales is not None:
    tiles = [x * scales[slot, :, n * LANES : (n + 1) * LANES] for n, x in enumerate(tiles)]
  weights = jnp.concatenate([x.astype(query.dtype) for x in tiles], axis=1)
  product = dot(weights, value, (((1,), (0,)), ((), ())))
  refs["accum"][...] = refs["accum"][...] * wide(shrink, dim) + product


def wide(x, dim):
  if dim <= LANES:
    return x[:, :dim]
  return jnp.concatenate([x] * -(-dim // LANES), axis=1)[:, :dim]


def round_up(n: int, multiple: int) -> int:
  return -(-n // multiple) * multiple
