"""Attention to a cache for TPUs, in Pallas Mosaic: a stream of the cache through VMEM.

The queries of all heads of one key/value head are the rows of one matrix. The positions of a
sequence are divided into blocks, and the blocks of all sequences, one after the other, are one
list, of which each core walks its share: blocks ahead of it are fetched, over the ends of
sequences too, and of a sequence's last block only what is filled. A step computes the scores of
the next block and, from the scores of the step before, the sum over the values of this one: two
chains that do not wait for each other.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import cost, partition
from ..core.constants import LOWEST
from ..interpreters import mode
from ..tpu import vmem
from ..tpu.layout import LANES, round_up
from ..tpu.product import dot
from .mosaic_tpu_plan import deal, fit, merge, powers

GRANULE = 32  # positions: a tile of int8, two of bfloat16; the end of a sequence is fetched to it


def unsupported(query: jax.Array | jax.ShapeDtypeStruct, key: jax.Array | jax.ShapeDtypeStruct,
                value: jax.Array | jax.ShapeDtypeStruct | None, *, chip: str | None) -> str | None:
  """The first requirement that these shapes and dtypes fail, in words; None if they fit.

  Args:
    query, key, value: arrays or their types, as for `forward`.
    chip: "v4", "v5e", "v5p", "v6e" or "tpu7x"; None asks whether any of them could.
  """
  if problem := vmem.unfit(query.dtype, chip):
    return problem
  if key.shape[1] % 8:
    return f"a cache of a multiple of 8 positions, which copies end with; got {key.shape[1]}"
  if chip is None:
    return None
  if chip == "v4" and key.dtype == jnp.int8:
    return "caches in the dtype of query on a v4, which widens int8 too slowly; got int8"
  plan = fit(query, key, value, chip)
  return vmem.exceeded(plan.vmem_bytes, chip, f"a block of {plan.size} positions",
                       f"with {plan.rows} rows for a key/value head it")


def forward(query: jax.Array, key: jax.Array, value: jax.Array | None, lengths: jax.Array, *,
            alibi_slopes: jax.Array | None, scale: float, left: int | None = None,
            key_scales: jax.Array | None, value_scales: jax.Array | None, chip: str | None,
            config: Any = None):
  """Attention to the cache; the contract of every backend, in `fused`.

  Args:
    config: to use instead of that for the chip.
  """
  plan = fit(query, key, value, chip, config, left)
  batch, (rows, dim, max_len) = query.shape[0], (plan.rows, plan.dim, plan.max_len)
  grouped = batch, plan.num_queries, plan.kv_heads, plan.group, dim
  cache = lambda x: x.swapaxes(1, 2).reshape(plan.sequences, max_len, dim)
  streams = dict(query=query.reshape(grouped).swapaxes(1, 2).reshape(plan.sequences, rows, dim),
                 key=cache(key))
  if value is not None:
    streams["value"] = cache(value)
  for name, x in dict(key_scales=key_scales, value_scales=value_scales).items():
    if x is not None:
      x = x.swapaxes(1, 2).reshape(plan.sequences, 1, max_len)
      streams[name] = jnp.pad(x, ((0, 0), (0, 0), (0, -max_len % LANES)))
  tables = {} if alibi_slopes is None else dict(
      slopes=row_slopes(plan, alibi_slopes) * powers(query.dtype)[2])

  f32, vmem = jnp.float32, pltpu.VMEM
  block = dict(query=(rows, dim), key=(plan.size, dim), value=(plan.size, dim),
               key_scales=(1, plan.size), value_scales=(1, plan.size))
  scratch = {f"{name}_block": vmem((plan.slots, *block[name]), x.dtype)
             for name, x in streams.items()}
  scratch |= dict(
      scores=vmem((rows, plan.size), f32), peak=vmem((rows, LANES), f32),
      top=vmem((rows, LANES), f32), total=vmem((rows, LANES), f32), accum=vmem((rows, dim), f32),
      result=vmem((2, rows, dim), query.dtype),
      fetched=pltpu.SemaphoreType.DMA((plan.slots, len(streams))),
      written=pltpu.SemaphoreType.DMA((2,)))
  outputs: dict[str, Any] = dict(out=((plan.sequences, rows, dim), query.dtype))
  if plan.cores > 1:
    piece = rows, round_up(dim, LANES) + LANES
    outputs["pieces"] = (plan.cores, *piece), f32
    scratch |= dict(piece=vmem(piece, f32), sent=pltpu.SemaphoreType.DMA)

  def kernel(*refs):
    names = ("ranges", "lengths", *streams, *tables, *outputs, *scratch)
    _kernel(dict(zip(names, refs, strict=True)), plan, list(streams), scale)

  ranges, common = deal(plan, lengths)
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  out_shape = [partition.out_shape(*x, query, key, value, lengths) for x in outputs.values()]
  # At most: only the device knows the lengths.
  pairs = plan.sequences * rows * min(max_len, plan.span or max_len)
  out, *pieces = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=2, grid=(plan.cores,),
          in_specs=[anywhere] * len(streams) + [
              pl.BlockSpec(x.shape, lambda *_: (0, 0, 0)) for x in tables.values()],
          out_specs=[anywhere] * len(outputs),
          scratch_shapes=list(scratch.values())),
      out_shape=out_shape,
      cost_estimate=cost.estimate(2 * 2 * dim * pairs, pairs, [*streams.values(), *out_shape]),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",), vmem_limit_bytes=plan.vmem_bytes),
      interpret=mode.mosaic_tpu(plan.cores),
      name="decode_attention",
  )(ranges, lengths, *streams.values(), *tables.values())
  if pieces:
    out = merge(out, *pieces, *common)
  grouped = batch, plan.kv_heads, plan.num_queries, plan.group, dim
  return out.reshape(grouped).swapaxes(1, 2).reshape(query.shape)


def row_slopes(plan, slopes):
  """float32[kv_heads, rows, 1]: the slope of each row."""
  slopes = slopes.astype(jnp.float32).reshape(plan.kv_heads, 1, plan.group)
  return jnp.tile(slopes, (1, plan.num_queries, 1)).reshape(plan.kv_heads, plan.rows, 1)


def _kernel(refs, plan, streams, scale):
  """The blocks of one core, one after the other."""
  core = pl.program_id(0)
  first, end = ((refs["ranges"][core, i], refs["ranges"][core, i + 1]) for i in (0, 2))
  before_end = lambda i, n: (i < end[0]) | (i == end[0]) & (n < end[1])
  _, log, _ = powers(refs["result"].dtype)
  own = first[0] + (core > 0).astype(jnp.int32)  # the first sequence that is this core's alone

  def length(i):
    i = jnp.minimum(i, plan.sequences - 1)
    return refs["lengths"][jax.lax.div(i, plan.kv_heads) if plan.kv_heads > 1 else i]

  def left(i, n):
    """Filled positions from block n of sequence i on."""
    return length(i) - plan.begin(length(i))[0] - n * plan.size

  def copy(at, slot, filled, act):
    begin = plan.begin(length(at[0]))[0] + at[1] * plan.size
    copy_block(refs, plan, streams, at[0], begin, slot, filled, act)

  def fetch(t, at):
    @pl.when(before_end(*at))
    def _():
      copy(at, jax.lax.rem(t, plan.slots), left(*at), "start")
    return following(*at, left(*at), plan.size)

  def written(i):
    slot = jax.lax.rem(i, 2)
    return pltpu.make_async_copy(
        refs["result"].at[slot], refs["out"].at[i], refs["written"].at[slot])

  def finish(i, is_common):
    total = refs["total"][...].sum(axis=1, keepdims=True)
    sums = jnp.where(total > 0, total, 1)
    out = refs["accum"][...] / sums

    def store():
      pl.when(i - 2 >= own)(lambda: written(i - 2).wait())
      refs["result"][jax.lax.rem(i, 2)] = out.astype(refs["result"].dtype)
      written(i).start()

    if plan.cores == 1:
      return store()
    pl.when(~is_common)(store)

    @pl.when(is_common)
    def _():
      lse = jnp.where(total > 0, refs["top"][...] + log(sums), -jnp.inf)
      refs["piece"][:, : plan.dim], refs["piece"][:, -LANES:] = out, lse
      copy = pltpu.make_async_copy(refs["piece"], refs["pieces"].at[core], refs["sent"])
      copy.start()
      copy.wait()

  def turn(carry):
    t, now, then, ahead = carry
    ahead = fetch(t + plan.slots - 1, ahead)
    slot, next_slot = jax.lax.rem(t + plan.slots, plan.slots), jax.lax.rem(t + 1, plan.slots)
    more, filled = before_end(*then), left(*then)
    pl.when(more)(lambda: copy(then, next_slot, filled, "wait"))

    fresh = (t == 0) | (now[1] == 0)
    needed = jnp.maximum(jnp.where(t < 0, 0, left(*now)), jnp.where(more, filled, 0))
    part = functools.reduce(
        lambda smaller, n: jnp.where(needed <= n, n, smaller), reversed(plan.parts))
    pl.when((t >= 0) & (left(*now) < part))(lambda: clear_behind(refs, slot, left(*now), part))
    if plan.span is not None:
      _, unseen = plan.begin(length(now[0]))
      pl.when((t >= 0) & (now[1] == 0) & (unseen > 0))(
          lambda: clear_before(refs, slot, unseen))
    for n in plan.parts:
      pl.when(part == n)(functools.partial(
          step, refs, plan, scale, n, slot, fresh, next_slot, then[0], filled))

    whole = then[1] == 0  # the sequence ends with this block

    @pl.when((t >= 0) & (whole | ~more))
    def _():
      finish(now[0], ~whole | (core > 0) & (now[0] == first[0]))

    return t + 1, then, following(*then, filled, plan.size), ahead

  ahead = jax.lax.fori_loop(0, plan.slots - 2, fetch, first)
  # Each turn leaves no scores above -inf beyond what the next one computes on.
  refs["scores"][...] = jnp.full_like(refs["scores"], -jnp.inf)
  # The turn before the first block computes nothing but its scores.
  jax.lax.while_loop(lambda carry: before_end(*carry[1]), turn,
                     (jnp.int32(-1), (first[0], first[1] - 1), first, ahead))
  for i in (end[0] - 2, end[0] - 1):
    pl.when(i >= own)(lambda: written(i).wait())


def following(i, n, left, size):
  """(sequence, block) after block n of sequence i, from which on `left` positions are filled."""
  last = left <= size
  return jnp.where(last, i + 1, i), jnp.where(last, 0, n + 1)


def copy_block(refs, plan, streams, i, begin, slot, left, act):
  """Starts the copies of sequence i's block from `begin` on, `left` positions of it, or waits for
  them."""
  begin = pl.multiple_of(begin, LANES)
  left = jnp.clip(left, 1, plan.size)
  upto = lambda grain: pl.multiple_of(pl.cdiv(left, grain) * grain, grain)
  rest = plan.max_len % GRANULE  # where a cache does not end with a granule
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
      most = pl.multiple_of(plan.max_len - rest - begin, GRANULE)
      rows = pl.multiple_of(jnp.minimum(upto(GRANULE), most), GRANULE)
      pl.when(rows > 0)(lambda: copy(source.at[pl.ds(begin, rows)], target.at[pl.ds(0, rows)]))
      pl.when(left > most)(lambda: copy(
          source.at[pl.ds(plan.max_len - rest, rest)], target.at[pl.ds(most, rest)]))


def clear_behind(refs, slot, filled, end):
  """Zeros for the values of positions [filled, end): the weights are 0, and 0 * NaN is not."""
  jax.lax.fori_loop(
      jax.lax.div(filled, LANES), jax.lax.div(end, LANES),
      lambda i, _: keep_where(refs, slot, i, lambda position: position < filled), None)


def clear_before(refs, slot, unseen):
  """The same for positions [0, unseen), fewer than LANES."""
  keep_where(refs, slot, 0, lambda position: position >= unseen)


def keep_where(refs, slot, i, kept):
  """Zeros for other values of positions [i * LANES, (i + 1) * LANES)."""
  values = "value" if "value_block" in refs else "key"
  scaled = f"{values}_scales_block" in refs  # int8 is no NaN, but its scale may be
  block = refs[f"{values}_scales_block" if scaled else f"{values}_block"]
  begin = pl.multiple_of(i * LANES, LANES)
  at = (slot, slice(None), pl.ds(begin, LANES)) if scaled else (slot, pl.ds(begin, LANES))
  old = block[at].astype(jnp.float32)
  position = begin + jax.lax.broadcasted_iota(jnp.int32, old.shape, int(scaled))
  block[at] = jnp.where(kept(position), old, 0).astype(block.dtype)


def step(refs, plan, scale, part, slot, fresh, next_slot, sequence, left):
  """The values of the block in `slot`, and the scores of the first `part` positions of the next.

  Args:
    fresh: whether the block in `slot` is the first that this core sees of its sequence.
    sequence, left: of the next block; its filled positions.
  """
  query = refs["query_block"][next_slot]
  dtype, tile = query.dtype, (plan.rows, LANES)
  exp, _, factor = powers(dtype)
  scale *= factor
  values = "value" if "value_block" in refs else "key"
  value, value_scales = f"{values}_block", f"{values}_scales_block"

  old = carried(fresh, refs["top"][...], LOWEST)
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
    scores = dot(query, key, transposed=True)

    weights = []
    for j in range(begin, chunk.stop, LANES):
      at = slice(j, j + LANES)
      weight = exp(refs["scores"][:, at] - new)
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
      x = hide(x, jnp.broadcast_to(distance, tile))
      if plan.span is not None:
        x = hide_before(x, jnp.broadcast_to(distance, tile), plan.span - plan.num_queries)
      refs["scores"][:, at] = x
      peak = jnp.maximum(peak, x)
    weights = jnp.concatenate(weights, axis=1).astype(dtype)  # Packed one by one, it takes longer.
    product += dot(weights, refs[value][slot, chunk].astype(dtype))

  refs["peak"][...] = jnp.broadcast_to(peak.max(axis=1, keepdims=True), tile)
  shrink = exp(old - new)
  refs["total"][...] = carried(fresh, refs["total"][...], 0) * shrink + total
  shrink = jnp.concatenate([shrink] * -(-plan.dim // LANES), axis=1)[:, : plan.dim]
  refs["accum"][...] = carried(fresh, refs["accum"][...], 0) * shrink + product


def carried(fresh, state, first):
  """The state that a sequence's blocks so far have left; `first` before there are any."""
  return jnp.where(fresh, first, state)


def hide(scores, distance):
  """Scores without those of later positions."""
  return jnp.where(distance <= 0, scores, -jnp.inf)


def hide_before(scores, distance, left):
  """Scores without those of positions before the window."""
  return jnp.where(distance >= -left, scores, -jnp.inf)
