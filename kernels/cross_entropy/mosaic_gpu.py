"""Linear cross-entropy for Hopper in Pallas Mosaic GPU.

Two epilogues of one product of tokens and embedding, whose tiles never leave the chip. How it
works, and what it costs: docs/loss.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core import chips, partition, tile_order
from ..core.constants import LOG2E
from ..hopper import product, softmax, tiles
from ..hopper.product import CHUNK, STORE
from ..hopper.tiles import (
  COMPUTE,
  ROW,
  ROWS,
  WARPGROUP_ROWS,
  across,
  down,
  pad_rows,
)
from ..interpreters import mode
from . import configs
from .fused import merged


def unsupported(x: jax.Array | jax.ShapeDtypeStruct, embedding: jax.Array | jax.ShapeDtypeStruct, *,
                chip: str | None):
  """The first requirement that the operands fail, or None."""
  if chip not in (None, *chips.HOPPER):
    return f"a Hopper GPU (h100, h200); got {chip}"
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"bfloat16 or float16; got {x.dtype}"
  if x.shape[-1] % CHUNK:
    return f"a last dimension that is a multiple of {CHUNK}; got {x.shape[-1]}"
  return None


def _place(index, tokens, splits):
  """(tile of tokens, split of the vocabulary) of a block of the grid."""
  group = lax.div(index, tile_order.TOGETHER * splits)
  index -= group * (tile_order.TOGETHER * splits)
  size = jnp.minimum(tokens - group * tile_order.TOGETHER, tile_order.TOGETHER)
  return group * tile_order.TOGETHER + lax.rem(index, size), lax.div(index, size)


def _walk_over(x_ref, rows_ref, bounds_ref, scratch, compute, *, walk):
  """The tiles x @ rows.T of this block of the grid: 128 tokens by `walk` blocks of rows.

  compute(row0, split, blocks) is what a compute warpgroup does with its 64 tokens from row0 on;
  blocks(step, carry) gives each tile of logits to step(logits, column0, carry, masked). Only in
  masked tiles may there be columns past the valid ones.
  """
  ring = product.Ring(scratch.x, scratch.rows, None, scratch.ready, scratch.free, together=False,
                      down=1, across=walk)
  columns, depth = ring.b.shape[1], x_ref.shape[1] // CHUNK
  wg = lax.axis_index("wg")
  tile, split = _place(
      lax.axis_index("block"), pl.cdiv(x_ref.shape[0], ROWS),
      pl.cdiv(pl.cdiv(rows_ref.shape[0], columns), walk))
  lo = split * walk
  hi = jnp.clip(bounds_ref[1], lo, lo + walk)
  full = jnp.clip(lax.div(bounds_ref[0], columns), lo, hi)  # mutant: full blocks

  @pl.when(wg == COMPUTE)
  def copy():
    plgpu.set_max_registers(tiles.COPY_REGISTERS, action="decrease")

    def copies(i, slot):
      block, chunk = lo + lax.div(i, depth), pl.ds(lax.rem(i, depth) * CHUNK, CHUNK)
      return [(x_ref.at[pl.ds(tile * ROWS, ROWS), chunk], ring.a.at[slot]),
              (rows_ref.at[pl.ds(block * columns, columns), chunk], ring.b.at[slot])]

    tiles.feed((hi - lo) * depth, [(ring.stages, copies, ring.ready, ring.free)])

  @pl.when(wg < COMPUTE)
  def multiply():
    plgpu.set_max_registers(tiles.COMPUTE_REGISTERS, action="increase")

    def one_block(block, carry, step, masked):
      logits, = product.accumulate(
          ring, (block - lo) * depth, depth, lambda slot: [ring.b.at[slot].T])
      return step(logits, block * columns, carry, masked)

    def blocks(step, carry):
      for start, stop, masked in ((lo, full, False), (full, hi, True)):
        carry = lax.fori_loop(
            start, stop, functools.partial(one_block, step=step, masked=masked), carry)
      return carry

    compute(tile * ROWS + wg * WARPGROUP_ROWS, split, blocks)


def _before(end, column0, shape):
  """Whether a tile's columns, of which the first is `column0`, stand before `end`, one a row."""
  fixed, lane = (down(c, shape) for c in tiles.columns(shape[1]))
  return fixed < across(end - column0, shape) - lane  # mutant: valid columns


def _picked(logits, target, found):
  """The logits of the targets' columns, one number in a row of float32[64, 8]; else `found`."""
  shape = found.shape
  fixed, lane = (down(c, shape) for c in tiles.columns(tiles.QUAD))
  wanted = across(target, shape) - lane
  for i in range(0, logits.shape[1], tiles.QUAD):
    found = jnp.where(fixed + i == wanted, logits[:, i:i + tiles.QUAD], found)
  return found


class _Scratch(NamedTuple):
  """Shared memory and barriers."""

  free: Any
  out: Any  # results on their way out
  ready: Any
  rows: Any  # [stages, columns, 64]
  x: Any  # [stages, ROWS, 64]


def _forward_kernel(x_ref, rows_ref, bounds_ref, targets_ref, parts_ref, scratch, *, walk, scale):
  """The maximum, the sum and the target's logit of 128 tokens over `walk` blocks of rows."""
  def compute(row0, split, blocks):
    ends = jnp.broadcast_to(bounds_ref[0], (WARPGROUP_ROWS,))
    target = plgpu.load(
        targets_ref.at[pl.ds(row0, WARPGROUP_ROWS)], layout=ROW, optimized=False)

    def step(logits, column0, carry, masked):
      *state, found = carry
      found = _picked(logits, target - column0, found)  # mutant: target's logit
      if masked:
        valid = _before(plgpu.layout_cast(ends, ROW), column0, logits.shape)
        logits = jnp.where(valid, logits, -jnp.inf)
      return *softmax.update_exactly(logits, *state, factor=scale * LOG2E), found

    top, total, found = blocks(step, (*softmax.start(), tiles.zeros(tiles.QUAD)))
    for i, part in enumerate((top, total.sum(axis=1), found.sum(axis=1))):
      slot = scratch.out.at[i, pl.ds(lax.axis_index("wg") * WARPGROUP_ROWS, WARPGROUP_ROWS)]
      slot[...] = part
      plgpu.commit_smem()  # mutant: written
      plgpu.copy_smem_to_gmem(slot, parts_ref.at[i, split, pl.ds(row0, WARPGROUP_ROWS)])
    plgpu.wait_smem_to_gmem(0)

  _walk_over(x_ref, rows_ref, bounds_ref, scratch, compute, walk=walk)


def _gradient_kernel(x_ref, rows_ref, bounds_ref, targets_ref, table_ref, g_ref, scratch, *, walk,
                     scale):
  """The gradient of the logits of 128 tokens by `walk` blocks of rows."""
  g_smem = scratch.out

  def compute(row0, split, blocks):
    del split
    own, here = g_smem.at[lax.axis_index("wg")], pl.ds(row0, WARPGROUP_ROWS)
    load = lambda ref: plgpu.load(ref, layout=ROW, optimized=False)
    target, (top, spread, peak) = load(targets_ref.at[here]), (
        load(table_ref.at[i, here]) for i in range(3))

    def step(logits, column0, carry, masked):
      shape = logits.shape
      fixed, lane = (down(c, shape) for c in tiles.columns(shape[1]))
      hit = fixed == across(target - column0, shape) - lane  # mutant: target
      g = jnp.exp2((logits - across(top, shape)) * (scale * LOG2E)) * across(spread, shape)
      g += jnp.where(hit, across(peak, shape), 0.0)
      if masked:
        ends = jnp.broadcast_to(bounds_ref[0], (WARPGROUP_ROWS,))
        g = jnp.where(_before(plgpu.layout_cast(ends, ROW), column0, shape), g, 0.0)
      g = g.astype(g_smem.dtype)
      for i, column in enumerate(range(0, shape[1], STORE)):
        slot = own.at[i % own.shape[0]]
        plgpu.wait_smem_to_gmem(own.shape[0] - 1, wait_read_only=True)  # mutant: copied
        slot[...] = g[:, column:column + STORE]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, g_ref.at[here, pl.ds(column0 + column, STORE)])
      return carry

    blocks(step, None)
    plgpu.wait_smem_to_gmem(0)

  _walk_over(x_ref, rows_ref, bounds_ref, scratch, compute, walk=walk)


def _launch(kernel, name, x, rows, operands, out_type, out, *, walk, config):
  """Runs a kernel over all tiles; `out` is the shared memory that its results leave by."""
  tokens, blocks = pl.cdiv(x.shape[0], ROWS), pl.cdiv(rows.shape[0], config.columns)
  smem = functools.partial(plgpu.SMEM, dtype=x.dtype, transforms=tiles.TRANSFORMS)
  result = plgpu.kernel(
      functools.partial(kernel, walk=walk),
      out_type=out_type,
      grid=(tokens * pl.cdiv(blocks, walk),),
      grid_names=("block",),
      num_threads=COMPUTE + 1,
      thread_name="wg",
      kernel_name=name,
      interpret=mode.mosaic_gpu(),
      compiler_params=tiles.COMPILER_PARAMS,
      scratch_types=[_Scratch(
          free=plgpu.Barrier(num_barriers=config.stages, num_arrivals=COMPUTE),
          out=out,
          ready=plgpu.Barrier(num_barriers=config.stages, num_arrivals=2),
          rows=smem((config.stages, config.columns, CHUNK)),
          x=smem((config.stages, ROWS, CHUNK)),
      )],
  )(x, rows, *operands)
  # Inside shard_map what JAX knows of a kernel's results is their shapes.
  return partition.varying_together(result, x, rows, *operands)[0]


def _walk(x, rows, config, chip):
  return tile_order.walk(pl.cdiv(x.shape[0], ROWS), pl.cdiv(rows.shape[0], config.columns),
                         x.shape[1] // CHUNK, config.stages, chips.hopper(chip).multiprocessors)


def forward(x: jax.Array, embedding: jax.Array, targets: jax.Array, *, scale: float,
            num_valid: int | jax.Array, chip: str | None, config: Any = None):
  """(top, total, logit), each float32[N]; the contract of every backend, in `fused`."""
  config = config or configs.mosaic_gpu(chip)
  tokens, rows = pad_rows(x), pad_rows(embedding)
  walk = _walk(tokens, rows, config, chip)
  valid = jnp.asarray(num_valid, jnp.int32)
  targets = jnp.where(targets < valid, targets, -1)
  parts = _launch(
      functools.partial(_forward_kernel, scale=scale), "cross_entropy_forward", tokens, rows,
      [jnp.stack([valid, pl.cdiv(valid, config.columns)]), pad_rows(targets, ROWS)],
      jax.ShapeDtypeStruct((3, pl.cdiv(pl.cdiv(rows.shape[0], config.columns), walk),
                            pl.cdiv(x.shape[0], ROWS) * ROWS), jnp.float32),
      plgpu.SMEM((3, ROWS), jnp.float32), walk=walk, config=config)
  top, total, found = parts[:, :, :x.shape[0]]
  return *merged(top, total, scale), scale * found.sum(0)


def logit_gradient(x: jax.Array, rows: jax.Array, targets: jax.Array, top: jax.Array,
                   spread: jax.Array, peak: jax.Array, *, first: int | jax.Array, scale: float,
                   num_valid: int | jax.Array, chip: str | None, config: Any = None):
  """A block of columns of the gradient of x @ embedding.T; the contract in `fused`."""
  config = config or configs.mosaic_gpu(chip)
  shape = x.shape[0], rows.shape[0]
  bounds = jnp.stack([jnp.clip(jnp.asarray(num_valid - first, jnp.int32), 0, shape[1]),
                      jnp.asarray(pl.cdiv(shape[1], config.columns), jnp.int32)])
  table = jnp.stack([top, spread, peak], axis=1)
  x, rows = pad_rows(x), pad_rows(rows)
  g = _launch(
      functools.partial(_gradient_kernel, scale=scale), "cross_entropy_gradient", x, rows,
      [bounds, pad_rows(targets - first, ROWS), pad_rows(table, ROWS).T],
      jax.ShapeDtypeStruct((x.shape[0], pl.cdiv(shape[1], STORE) * STORE), x.dtype),
      plgpu.SMEM((COMPUTE, min(2, config.columns // STORE), WARPGROUP_ROWS, STORE), x.dtype,
                 transforms=tiles.TRANSFORMS),
      walk=_walk(x, rows, config, chip), config=config)
  return g[:shape[0], :shape[1]]
