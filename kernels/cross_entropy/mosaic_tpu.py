"""The cross-entropy kernels for TPUs, in Pallas Mosaic: products whose logits stay in VMEM.

A block of tokens stays in VMEM while the rows of the embedding pass by. A step multiplies tile
after tile of the two; in program order the products of the next tile come before what is done to
this one's logits, so that the matrix units work while the vector units do.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import cost, partition
from ..core.constants import LOG2E, LOWEST
from ..interpreters import mode
from ..tpu import vmem
from ..tpu.layout import LANES, SUBLANES, pad, round_up, widen
from ..tpu.product import ahead, clear, dot
from . import configs


def unsupported(x: jax.Array | jax.ShapeDtypeStruct, embedding: jax.Array | jax.ShapeDtypeStruct, *,
                chip: str | None) -> str | None:
  """The first requirement that these shapes and dtypes fail, in words; None if they fit.

  Args:
    x, embedding: arrays or their types, as for `forward`; the embedding in any dtype.
    chip: "v4", "v5e", "v5p", "v6e" or "tpu7x"; None asks whether any of them could.
  """
  if problem := vmem.unfit(x.dtype, chip):
    return problem
  if chip is None:
    return None
  dim, itemsize = round_up(x.shape[-1], LANES), x.dtype.itemsize
  for name, config in zip(("forward", "backward"), configs.mosaic_tpu(chip)):
    taken = fit(config, chip, x.shape[0], embedding.shape[0], dim, itemsize).vmem_bytes
    if problem := vmem.exceeded(
        taken, chip, f"tiles of {LANES} tokens", name, f" for a dimension of {dim}"):
      return problem
  return None


def forward(x: jax.Array, embedding: jax.Array, targets: jax.Array, *, scale: float,
            num_valid: int | jax.Array, chip: str | None, config: Any = None):
  """(top, total, logit), each float32[N]; the contract of every backend, in `fused`.

  Logits are held transposed, [rows of the embedding, tokens]: what belongs to a token is one
  lane, and a running maximum and sum of 8 rows at a time is plain vector arithmetic.
  """
  x, embedding = widen(x), widen(embedding)
  num_tokens, dim = x.shape
  plan = fit(config or configs.mosaic_tpu(chip)[0], chip, num_tokens,
             embedding.shape[0], dim, x.dtype.itemsize)
  padded = plan.token_blocks * plan.tokens
  vector = lambda: pl.BlockSpec((1, plan.tokens), lambda i, j, *_: (0, i))

  def kernel(valid, x, rows, targets, largest, sums, logit, top, total, found):
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
      top[...] = jnp.full_like(top, LOWEST)
      clear(total)
      clear(found)

    def tile(at, chunk):
      # [rows, tokens]
      return dot(rows[chunk, :], x[at, :], transposed=True)

    def update(logits, at, chunk):
      first = block * plan.rows + chunk.start
      logits = logits.reshape(-1, SUBLANES, plan.tile)
      row = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, plan.tile), 0)
      wanted = targets[:, at] - first - row
      left = valid[0] - first - row
      picked = found[:, at]
      scores = []
      for i in range(logits.shape[0]):
        picked = jnp.where(wanted == i * SUBLANES, logits[i], picked)
        scores.append(jnp.where(left > i * SUBLANES, logits[i], -jnp.inf))
      found[:, at] = picked
      old = top[:, at]
      new = functools.reduce(jnp.maximum, scores, old)
      top[:, at] = new
      # The maximum is subtracted before the scale is applied, where the difference is exact.
      power = lambda score: jnp.exp2((score - new) * (scale * LOG2E))
      total[:, at] = sum(map(power, scores), total[:, at] * power(old))

    each_tile(plan, tile, update)

    @pl.when(block == pl.num_programs(1) - 1)
    def _():
      largest[...] = top[...].max(axis=0, keepdims=True)
      decay = jnp.exp2((top[...] - largest[...]) * (scale * LOG2E))
      sums[...] = (total[...] * decay).sum(axis=0, keepdims=True)
      logit[...] = scale * found[...].sum(axis=0, keepdims=True)

  here = (targets >= 0) & (targets < num_valid)
  # The kernel compares with the numbers of rows alone.
  targets = pad(jnp.where(here, targets, -1), 0, padded)[None]
  out_shape = [partition.out_shape((1, padded), jnp.float32, x, embedding, targets)] * 3
  logits = num_tokens * embedding.shape[0]
  results = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(plan.token_blocks, plan.row_blocks),
          in_specs=[pl.BlockSpec((plan.tokens, dim), lambda i, j, *_: (i, 0)),
                    pl.BlockSpec((plan.rows, dim), lambda i, j, *_: (j, 0)), vector()],
          out_specs=[vector()] * 3,
          scratch_shapes=[pltpu.VMEM((SUBLANES, plan.tokens), jnp.float32)] * 3),
      out_shape=out_shape,
      cost_estimate=cost.estimate(2 * dim * logits, logits, [x, embedding, targets, *out_shape]),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=plan.vmem_bytes),
      interpret=mode.mosaic_tpu(),
      name="cross_entropy_forward",
  )(jnp.asarray(num_valid, jnp.int32).reshape(1), x, embedding, targets)
  return tuple(result[0, :num_tokens] for result in results)


def logit_gradient(x: jax.Array, rows: jax.Array, targets: jax.Array, top: jax.Array,
                   spread: jax.Array, peak: jax.Array, *, first: int | jax.Array, scale: float,
                   num_valid: int | jax.Array, chip: str | None, config: Any = None):
  """A block of columns of the gradient of x @ embedding.T; the contract in `fused`."""
  x, rows = widen(x), widen(rows)
  (num_tokens, dim), num_rows = x.shape, rows.shape[0]
  plan = fit(config or configs.mosaic_tpu(chip)[1], chip, num_tokens, num_rows, dim,
             x.dtype.itemsize)
  padded = plan.token_blocks * plan.tokens
  vector = lambda: pl.BlockSpec((1, plan.tokens), lambda i, j, *_: (0, i))
  groups = range(0, plan.chunk, LANES)

  def kernel(valid, x, rows, targets, top, spread, peak, g, *columns):
    block = pl.program_id(1)

    @pl.when(block == 0)
    def _():
      # A token's numbers are one sublane here: broadcast along the lanes once.
      for vector, column in zip((targets, top, spread, peak), columns, strict=True):
        for at in range(0, plan.tokens, LANES):
          part = jnp.broadcast_to(vector[:, at : at + LANES], (LANES, LANES))
          column[at : at + LANES, :] = part.T

    def tile(at, chunk):
      # [tokens, rows]
      return dot(x[at, :], rows[chunk, :], transposed=True)

    def update(logits, at, chunk):
      begin = block * plan.rows + chunk.start
      target, top, spread, peak = (column[at, :] for column in columns)
      lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
      wanted = target - begin - lane
      for i in groups:
        score = (logits[:, i : i + LANES] - top) * (scale * LOG2E)
        change = jnp.exp2(score) * spread + jnp.where(wanted == i, peak, 0)
        change = jnp.where(lane < valid[0] - begin - i, change, 0)
        g[at, pl.ds(chunk.start + i, LANES)] = change.astype(g.dtype)

    each_tile(plan, tile, update)

  targets = jnp.where((targets >= 0) & (targets < num_valid), targets - first, -1)
  vectors = [pad(v, 0, padded)[None] for v in (targets, top, spread, peak)]
  out_shape = partition.out_shape((num_tokens, num_rows), x.dtype, x, rows, *vectors)
  logits = num_tokens * num_rows
  g = pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1,
          grid=(plan.token_blocks, plan.row_blocks),
          in_specs=[pl.BlockSpec((plan.tokens, dim), lambda i, j, *_: (i, 0)),
                    pl.BlockSpec((plan.rows, dim), lambda i, j, *_: (j, 0)),
                    *(vector() for _ in vectors)],
          out_specs=pl.BlockSpec((plan.tokens, plan.rows), lambda i, j, *_: (i, j)),
          scratch_shapes=[pltpu.VMEM((plan.tokens, LANES), v.dtype) for v in vectors]),
      out_shape=out_shape,
      cost_estimate=cost.estimate(2 * dim * logits, logits, [x, rows, *vectors, out_shape]),
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"),
          vmem_limit_bytes=plan.vmem_bytes),
      interpret=mode.mosaic_tpu(),
      name="cross_entropy_gradient",
  )(jnp.asarray(num_valid - first, jnp.int32).reshape(1), x, rows, *vectors)
  return g


class Plan(NamedTuple):
  """The division of a kernel's problem."""

  tokens: int  # in a block, which stays in VMEM
  rows: int  # of the embedding in a block
  tile: int  # tokens in a tile of logits
  chunk: int  # rows in a tile of logits
  together: int  # tiles in straight-line code
  token_blocks: int
  row_blocks: int
  vmem_bytes: int


def fit(config, chip, num_tokens, num_rows, dim, itemsize) -> Plan:
  """Block sizes no larger than the problem and, if it can be, than a chip's VMEM."""
  tile = min(config.tile, round_up(num_tokens, LANES))
  chunk = min(config.chunk, round_up(num_rows, LANES))
  tokens = min(config.tokens, round_up(num_tokens, tile))
  rows = min(config.rows, round_up(num_rows, chunk))

  def vmem_bytes():
    # Operands that change between steps have two buffers; the gradient's block, four vectors and
    # their columns count for both kernels. Tiles that wait for their turn are spilled, and operands
    # are staged: rows are turned, and a float32 is three bfloat16 parts for each tile in flight.
    staged = (2 * chunk if itemsize == 2 else 6 * (config.together + 1) * (tile + chunk)) * dim
    return (2 * itemsize * (dim * (tokens + rows) + tokens * rows)
            + 4 * 4 * (LANES + 2 * SUBLANES) * tokens
            + 4 * tile * chunk * (config.together + 2) + max(staged, 2**21))

  while vmem_bytes() > vmem.limit(chip):
    # More tokens are fewer passes over the embedding, so they are the last to go.
    if rows > chunk:
      rows = round_up(rows // 2, chunk)
    elif tokens > tile:
      tokens = round_up(tokens // 2, tile)
    elif max(chunk, tile) > LANES:
      chunk, tile = (round_up(max(LANES, n // 2), LANES) for n in (chunk, tile))
      rows, tokens = chunk, tile
    else:
      break
  tiles = (tokens // tile) * (rows // chunk)
  taken = vmem.with_slack(vmem_bytes(), 2**22, chip)  # out by up to 1 MiB (a v5p, 8192 wide)
  return Plan(tokens, rows, tile, chunk, min(config.together, tiles),
              -(-num_tokens // tokens), -(-num_rows // rows), taken)


def each_tile(plan, tile, update):
  """Calls update(tile(at, chunk), at, chunk) for each tile of a step; both are slices."""
  chunks = plan.rows // plan.chunk
  tiles = chunks * (plan.tokens // plan.tile)

  def place(n):
    # Not floor division, which Mosaic can't lower with `jax_enable_x64`.
    row, column = divmod(n, chunks) if isinstance(n, int) else (
        jax.lax.div(n, chunks), jax.lax.rem(n, chunks))
    at = pl.ds(pl.multiple_of(row * plan.tile, plan.tile), plan.tile)
    return at, pl.ds(pl.multiple_of(column * plan.chunk, plan.chunk), plan.chunk)

  def group(first, number):
    ahead([place(first + i) for i in range(number)], lambda at: tile(*at),
          lambda logits, at: update(logits, *at))

  whole, rest = divmod(tiles, plan.together)
  if whole == 1:
    group(0, plan.together)
  else:
    jax.lax.fori_loop(0, whole, lambda i, _: group(i * plan.together, plan.together), None)
  if rest:
    group(whole * plan.together, rest)
