"""Division of problems by the parallel block's kernels for TPUs, and the loops they share."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..core import cost, partition
from ..interpreters import mode
from ..tpu import vmem
from ..tpu.layout import LANES, round_up
from ..tpu.product import ahead, clear, dot
from . import configs


class Plan(NamedTuple):
  """The division of a kernel's problem."""

  num_tokens: int
  rows: int  # tokens in a block
  tile: int  # of them in straight-line code
  part: int  # of them that are one product
  columns: int  # of the result in a step
  depth: int  # of the contraction in a step, where there is one contraction
  vmem_bytes: int
  query_columns: int = 0
  key_columns: int = 0
  norm_rows: int = 0
  depths: tuple[int, ...] = ()  # the depth of a step of each stage, where there are several


class Pair(NamedTuple):
  """left [M, K] times right [K, N], or [N, K] where that is contracted by columns."""

  left: jax.Array
  right: jax.Array


class Sizes(NamedTuple):
  """Of one layer on one device."""

  num_tokens: int
  dim: int
  heads: int
  kv_heads: int
  dim_head: int
  hidden: int
  itemsize: int

  def plans(self, chip) -> dict[str, Plan]:
    """The plan of each kernel, by its name."""
    tokens, dim, heads, kv_heads, dim_head, hidden, itemsize = self
    config, queries, keys = configs.mosaic_tpu(chip), heads * dim_head, kv_heads * dim_head
    return {
        "in_projection": fit_columns(config.in_projection, chip, tokens, dim, hidden, itemsize,
                                     heads=heads, kv_heads=kv_heads, dim_head=dim_head),
        "out_projection": fit_sum(config.out_projection, chip, tokens, dim,
                                  [(queries, 1), (hidden, 1)], itemsize),
        "swiglu_gradient": fit_columns(config.swiglu_gradient, chip, tokens, dim, hidden, itemsize),
        "input_gradient": fit_sum(config.input_gradient, chip, tokens, dim,
                                  [(queries, 1), (keys, 2), (hidden, 2)], itemsize, True)}


def fit_columns(config, chip, num_tokens, dim, hidden, itemsize, *, heads=0, kv_heads=1,
                dim_head=0) -> Plan:
  """For kernels that hold rows of the whole dim and make columns of the hidden width.

  With heads, it is the in-projection: two products a step, and queries and keys as well.
  """
  limit = vmem.limit(chip)
  products, width = (2, round_up(dim_head, LANES)) if heads else (1, 0)

  def plan(most, depth, columns, query_columns, most_keys):
    query_columns = min(round_up(query_columns, width or 1), round_up(heads * dim_head, LANES))
    key_columns = in_equal_steps(kv_heads * dim_head, most_keys, width) if heads else 0
    together = max(products * columns, query_columns)
    rows, tile, part = fit_rows(config, most, num_tokens, together * depth, chip)
    two = 2 * itemsize  # bytes of what has two buffers
    every = 2 * key_columns + query_columns + products * columns if heads else columns
    taken = two * rows * dim + 2**16 + 8 * dim + staged(part, every, tile // part, itemsize, depth)
    if heads:
      taken += itemsize * rows * dim + two * depth * (query_columns + 2 * key_columns + 2 * columns)
      taken += two * rows * (query_columns + 2 * key_columns + 3 * columns)
      taken += 2 * 2 * 4 * rows * max(LANES, dim_head // 2)  # tables
    else:
      taken += two * (depth * columns + 5 * rows * columns) + itemsize * depth * columns  # turned
    norm_rows = next(n for n in (256, 128, 64, 32, 16)
                     if not rows % n and n * dim <= 2**18 or n == 16)
    if depth < dim:
      taken += 4 * rows * max(together, 2 * key_columns) + 2**19
    return Plan(num_tokens, rows, tile, part, columns, depth, with_slack(taken, chip),
                query_columns, key_columns, norm_rows)

  for most in halves(*rows_of(config, num_tokens)):
    for depth in depths_of(dim):
      wanted = min(config.work // (products * most * depth), config.columns, hidden)
      for columns in halves(max(wanted, LANES), LANES):
        # Queries have more steps than keys, and gain more by longer ones.
        for of_queries, of_keys in ((2, 2), (2, 1), (1, 2)):
          widths = columns, of_queries * columns, of_keys * columns // 2
          found = plan(most, depth, *widths)
          if found.vmem_bytes <= limit:
            twice = plan(2 * most if config.doubled else most, depth, *widths)
            return twice if twice.vmem_bytes <= limit else found
  return found


def in_equal_steps(size, most, unit) -> int:
  """Columns of a step, of the fewest steps of at most `most`, or else of one unit."""
  steps = -(-size // max(unit, most // unit * unit))
  return round_up(-(-size // steps), unit)


def fit_sum(config, chip, num_tokens, dim, stages, itemsize, transposed=False) -> Plan:
  """For sums of products [M, K] x [K, dim]; stages: the K of each, and how many products."""
  limit, least = vmem.limit(chip), min(size for size, _ in stages)

  def plan(most, columns, halvings, shorter):
    def depth(size, number):
      work = config.work >> (halvings + shorter if size == least else halvings)
      return next((d for d in depths_of(size) if d * number * most * columns <= work),
                  depths_of(size)[-1])

    depths = tuple(depth(*stage) for stage in stages)
    deepest = max(d * number for d, (_, number) in zip(depths, stages))
    rows, tile, part = fit_rows(config, most, num_tokens, deepest * columns, chip)
    taken = 2 * itemsize * (rows + columns) * sum(
        max(d, LANES) * number for d, (_, number) in zip(depths, stages))
    taken += (4 + 4 * itemsize) * rows * columns  # the accumulator, the result, what is added
    taken += 2**16 + staged(tile, columns, 1, itemsize, deepest)
    taken += transposed * itemsize * deepest * columns  # turned
    return Plan(num_tokens, rows, tile, tile, columns, 0, with_slack(taken, chip), depths=depths)

  for most in halves(*rows_of(config, num_tokens)):
    for columns in halves(min(config.columns, dim), LANES):
      for halvings in range(8):
        # The shortest stage has the fewest steps, and loses least by short ones.
        for shorter in range(3):
          found = plan(most, columns, halvings, shorter)
          if found.vmem_bytes <= limit:
            return found
  return found


def fit_rows(config, most, num_tokens, area, chip) -> tuple[int, int, int]:
  """Rows of a block, of straight-line code, and of one product; area is multiply-adds a row."""
  cores = 2 if chip in ("v4", "v5p") else 1
  count = round_up(-(-num_tokens // most), cores)
  each = min(most, round_up(-(-num_tokens // count), 16))
  part = min(config.part, each)
  tile = part * max(1, min(config.code // (area * part), each // part))
  return round_up(each, tile), tile, part


def staged(part, columns, parts, itemsize, depth):
  """Bytes of results that wait for their turn, and of operands: a float32 is three bfloat16s."""
  waiting = 4 * part * columns * (parts + 1)
  return max(2**20, waiting + (6 * depth * (part + columns) if itemsize == 4 else 0))


def with_slack(taken, chip):
  return vmem.with_slack(taken, taken // 8 + 2**22, chip)


def halves(size: int, least: int) -> Iterator[int]:
  """size rounded up to a multiple of `least`, its half, and so on down to that."""
  while True:
    yield (size := round_up(size, least))
    if size == least:
      return
    size //= 2


def rows_of(config, num_tokens) -> tuple[int, int]:
  """The most and the least rows of a block: with fewer than 128 it would wait for weights."""
  most = min(config.rows, round_up(num_tokens, 16))
  return most, min(most, LANES)


def depths_of(size: int) -> list[int]:
  """The size, and the multiples of 128 that divide it, from the largest on."""
  return [size] + [n for n in range(size - size % LANES, 0, -LANES) if not size % n and n < size]


def each_part(plan, product, finish):
  """finish(product(at), at) for each part of a block of rows that has tokens in it."""
  def straight(first):
    ahead([pl.ds(first + i, plan.part) for i in range(0, plan.tile, plan.part)], product, finish)

  if plan.tile == plan.rows:
    return straight(0)
  tiles = plan.rows // plan.tile
  if plan.num_tokens % plan.rows:
    left = plan.num_tokens - pl.program_id(0) * plan.rows
    tiles = jnp.minimum(tiles, pl.cdiv(left, plan.tile))
  jax.lax.fori_loop(
      0, tiles, lambda i, _: straight(pl.multiple_of(i * plan.tile, plan.tile)), None)


def contraction(plan, depths, product, finish, sums, widths):
  """Parts of rows whose contraction is the whole dim, at one step or over the last grid axis.

  Args:
    depths: steps of the contraction.
    product: of a slice of rows, a list of products [rows, width].
    finish: takes such a list, summed over all steps, and the slice.
    sums: a scratch buffer for them, if there are several steps.
    widths: of the products.
  """
  if depths == 1:
    each_part(plan, product, finish)
    return
  total, = sums
  deep = pl.program_id(2)
  starts = [sum(widths[:i]) for i in range(len(widths))]
  columns = [pl.ds(start, width) for start, width in zip(starts, widths)]

  @pl.when(deep == 0)
  def _():
    clear(total)

  def add(parts, at):
    for part, c in zip(parts, columns, strict=True):
      total[at, c] += part

  each_part(plan, product, add)

  @pl.when(deep == depths - 1)
  def _():
    each_part(plan, lambda at: [total[at, c] for c in columns], finish)


def sum_of_products(x, stages, plan, *, transposed, name):
  """x, if there is one, and the products of all stages, in one accumulator, rounded once.

  Args:
    x: [M, N] or None.
    stages: lists of `Pair`s, one after another along the contraction; those of a list at one step.
    plan: of `fit_sum`.
    transposed: whether the right operands are contracted by columns.
    name: of the kernel.
  """
  (num_tokens, _), dtype = stages[0][0].left.shape, stages[0][0].left.dtype
  dim = stages[0][0].right.shape[0 if transposed else 1]
  counts = [stage[0].left.shape[1] // depth
            for stage, depth in zip(stages, plan.depths, strict=True)]
  bounds = [sum(counts[:i]) for i in range(len(counts) + 1)]
  tile = pl.BlockSpec((plan.rows, plan.columns), lambda i, j, k: (i, j))

  operands = []
  for stage, depth, first, count in zip(stages, plan.depths, bounds, counts):
    # Only while its stage is active does a block change, so only then is one fetched.
    turn = lambda k, first=first, count=count: jnp.clip(k - first, 0, count - 1)
    left = pl.BlockSpec((plan.rows, depth), lambda i, j, k, turn=turn: (i, turn(k)))
    right = (pl.BlockSpec((plan.columns, depth), lambda i, j, k, turn=turn: (j, turn(k)))
             if transposed else
             pl.BlockSpec((depth, plan.columns), lambda i, j, k, turn=turn: (turn(k), j)))
    operands += [operand for pair in stage for operand in zip(pair, (left, right))]
  if x is not None:
    operands.append((x, tile))
  arrays = [array for array, _ in operands]

  def kernel(*refs):
    *refs, y, total = refs
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
      if x is None:
        clear(total)
      else:
        total[...] = refs[-1][...].astype(jnp.float32)

    left = iter(refs)
    for stage, first, end in zip(stages, bounds, bounds[1:]):
      pairs = [(next(left), next(left)) for _ in stage]

      def product(at):
        now = total[at, :]
        for a, b in pairs:
          now += dot(a[at, :], b[...], transposed)
        return now

      def keep(now, at):
        total[at, :] = now

      @pl.when((k >= first) & (k < end))
      def _():
        each_part(plan, product, keep)

    @pl.when(k == bounds[-1] - 1)
    def _():
      y[...] = total[...].astype(dtype)

  out_shape = partition.out_shape((num_tokens, dim), dtype, *arrays)
  contracted = sum(pair.left.shape[1] for stage in stages for pair in stage)
  return pl.pallas_call(
      kernel,
      grid=(-(-num_tokens // plan.rows), -(-dim // plan.columns), bounds[-1]),
      in_specs=[spec for _, spec in operands],
      out_specs=tile,
      out_shape=out_shape,
      cost_estimate=cost.estimate(2 * num_tokens * contracted * dim, 0, [*arrays, out_shape]),
      scratch_shapes=[pltpu.VMEM((plan.rows, plan.columns), jnp.float32)],
      compiler_params=pltpu.CompilerParams(
          disable_bounds_checks=True,  # of every copy, in every step; blocks end with their arrays
          dimension_semantics=("parallel", "parallel", "arbitrary"),
          vmem_limit_bytes=plan.vmem_bytes),
      interpret=mode.mosaic_tpu(),
      name=name,
  )(*arrays)
