"""The matrix product of Hopper kernels: persistent blocks, fed by a ring of slots.

A block of the grid walks over tiles of 128 rows by some columns. Of its three warpgroups two
compute, on 64 rows each, and the third fills the slots of a ring, which run on from tile to tile.
What an epilogue reads comes through the same slots. Costs and figures: docs/parallel_block.md.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..core import chips, partition, tile_order
from ..interpreters import mode
from . import tiles
from .tiles import COMPUTE, ROWS, TILE, TILING, WARPGROUP_ROWS

CHUNK = 64  # of the contraction in a slot: the 128 bytes of a swizzle
STORE = 64  # columns of a store
# Of 504, as for attention, but with 24 the copies of several products spill 12 bytes.
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40


class Ring(NamedTuple):
  """State that the copying and the computing warpgroups share, and the extent of the tiles.

  Steps count from 0 over all tiles of a block of the grid; step n is in slot n % stages.
  """

  a: Any  # [stages, 128, 64] of shared memory, rows of A
  b: Any  # [stages, ...], the weights
  stores: Any  # [COMPUTE, 2, 64, 64], on their way out
  ready: Any  # a barrier for each slot: it is full
  free: Any  # nobody reads it any more, in either block of a pair
  together: bool  # two blocks of the grid, with tiles of rows one below the other, share copies
  down: int  # tiles
  across: int

  @property
  def stages(self) -> int:
    return self.ready.shape[0]

  def slot(self, step):
    return lax.rem(step, self.stages)

  def wait(self, step):
    """The slot of a step, which is full then."""
    slot = self.slot(step)
    plgpu.barrier_wait(self.ready.at[slot])  # mutant: full
    return slot

  def release(self, step):
    plgpu.barrier_arrive(self.free.at[self.slot(step)])


def run(ring, parts, compute):
  """Walks over the tiles.

  Args:
    ring: the slots.
    parts: what a tile's slots hold, [(steps, fill)]: fill(row, column, i, slot, put) puts the
      i-th of these steps into a slot, by as many put(source, target, shared=False) as `launch` was
      told. Of a shared copy each block of a pair makes half, for both.
    compute: compute(row, column, first) is what a warpgroup does with a tile, whose steps begin
      with `first`.
  """
  wg, size = lax.axis_index("wg"), 2 if ring.together else 1
  shape, steps = (pl.cdiv(ring.down, size), ring.across), sum(count for count, _ in parts)
  num_tiles = shape[0] * shape[1]

  def each_tile(body):
    @plgpu.nd_loop((num_tiles,), collective_axes="block")
    def _(info):
      row, column = plgpu.planar_snake(info.index[0], shape, 0, tile_order.TOGETHER // size)
      row = row * size + (lax.axis_index("pair") if ring.together else 0)  # mutant: pair
      body(row, column, info.local_index * steps)

  def fill_tile(row, column, first):
    for count, fill in parts:
      def step(i, _, fill=fill, first=first):
        slot = ring.slot(first + i)

        @pl.when(first + i >= ring.stages)
        def _():
          plgpu.barrier_wait(ring.free.at[slot])  # mutant: free

        def put(source, target, shared=False):
          plgpu.copy_gmem_to_smem(
              source, target, ring.ready.at[slot],
              collective_axes="pair" if shared and ring.together else None)

        fill(row, column, i, slot, put)

      lax.fori_loop(0, count, step, None)
      first += count

  @pl.when(wg == COMPUTE)
  def copying():
    plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
    each_tile(fill_tile)
    blocks = lax.axis_size("block")
    total = steps * lax.div(num_tiles - 1 - lax.axis_index("block") + blocks, blocks)
    # No barrier may be left behind with an arrival unseen, nor a block while its partner sends.
    lax.fori_loop(jnp.maximum(total - ring.stages, 0), total,
                  lambda i, _: plgpu.barrier_wait(ring.free.at[ring.slot(i)]), None)

  @pl.when(wg < COMPUTE)
  def computing():
    plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
    each_tile(compute)  # mutant: accumulator
    plgpu.wait_smem_to_gmem(0)


def part(ring, a_ref, b_ref):
  """The steps of A @ B, or of A @ B.T if the slots have [columns, 64] of B."""
  _, depth, columns = ring.b.shape
  transposed = columns == CHUNK != depth

  def fill(row, column, i, slot, put):
    chunk = pl.ds(i * CHUNK, CHUNK)
    put(a_ref.at[pl.ds(row * ROWS, ROWS), chunk], ring.a.at[slot])
    put(b_ref.at[pl.ds(column * depth, depth), chunk] if transposed
        else b_ref.at[chunk, pl.ds(column * columns, columns)], ring.b.at[slot], shared=True)

  return a_ref.shape[1] // CHUNK, fill


def accumulate(ring, first, steps, operands):
  """The sums over `steps` slots of this warpgroup's rows of A times each of the operands.

  operands(slot) lists them, [64, columns] each; the results are float32[64, columns].
  """
  mine = _my_rows()  # out of the loop, which the compiler does not take it out of

  def multiply(*sums):
    def chunk(k, previous):
      slot = ring.wait(first + k)
      for total, b in zip(sums, operands(slot), strict=True):
        plgpu.wgmma(total, ring.a.at[slot, mine], b)
      plgpu.wgmma_wait(len(sums))  # all but these are done, so that the slot before it is free

      @pl.when(k > 0)
      def _():
        plgpu.barrier_arrive(ring.free.at[previous])

      return slot

    lax.fori_loop(0, steps, chunk, ring.slot(first))
    return [total[...] for total in sums]

  sums = pl.run_scoped(multiply, *[  # mutant: accumulator
      plgpu.ACC((WARPGROUP_ROWS, b.shape[1]), jnp.float32) for b in operands(0)])
  ring.release(first + steps - 1)
  return sums


def _my_rows():
  return pl.ds(lax.axis_index("wg") * WARPGROUP_ROWS, WARPGROUP_ROWS)


def rows_of(row):
  """Those of an array that are this warpgroup's in a row of tiles."""
  return pl.ds(row * ROWS + lax.axis_index("wg") * WARPGROUP_ROWS, WARPGROUP_ROWS)


def take(ring, step, *slots):
  """This warpgroup's rows of what a step brought for an epilogue, in float32."""
  slot = ring.wait(step)
  values = [plgpu.load(smem.at[slot, _my_rows()], layout=TILE).astype(jnp.float32)
            for smem in slots]
  # All has been read before the next copy writes there.
  plgpu.commit_smem()  # mutant: taken
  ring.release(step)
  return values


def store(ring, i, value, *targets):
  """Sends 64 x 64 numbers to an array by TMA; of a warpgroup's stores for a tile the i-th.

  Of several targets, (condition, array) each, exactly one condition is true.
  """
  slot = ring.stores.at[lax.axis_index("wg"), i % 2]
  # The slot's last tile has left it.
  plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)  # mutant: copied
  slot[...] = value.astype(slot.dtype)
  plgpu.commit_smem()  # mutant: written
  for condition, target in targets:
    pl.when(condition)(functools.partial(plgpu.copy_smem_to_gmem, slot, target))


def fastest(configs, rows: int, across, processors: int):
  """The tiles whose waves together read the fewest bytes from the L2 cache.

  Args:
    configs, across: as for `launch`.
    rows: tiles of 128 rows.
  """
  def time(config):  # in bytes from the L2 cache for each step of the contraction
    waves = -(-rows * across(config.columns) // processors)
    return waves * (128 + config.columns // 2)

  return min((config for config in configs if across(config.columns)), key=time)


def launch(kernel, name, operands, widths, slot, *, copies, across, num_tokens, dtype, chip,
           configs):
  """Results of kernel(*operands, *results, ring): [num_tokens, width] for each of `widths`.

  Args:
    operands: arrays or None.
    widths: None for a result that is not wanted.
    slot: slot(columns) is the shape of what a slot has beside A.
    copies: that fill a slot.
    across: across(columns) is how many tiles wide the result is, 0 if tiles can't be so narrow.
    configs: tiles to choose from, each with columns, stages and together (two tiles of rows share
      the copies of B).
  """
  down, processors = pl.cdiv(num_tokens, ROWS), chips.hopper(chip).multiprocessors
  config = fastest(configs, down, across, processors)
  together = config.together and down > 1
  size = 2 if together else 1
  smem = functools.partial(plgpu.SMEM, dtype=dtype, transforms=tiles.TRANSFORMS)
  barriers: dict[str, Any] = dict(num_barriers=config.stages)
  free: Any = plgpu.Barrier(num_arrivals=COMPUTE, **barriers)
  if together:
    free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=COMPUTE, **barriers)

  def body(*refs):
    *refs, b, a, stores, ready, free = refs
    kernel(*refs, Ring(a, b, stores, ready, free, together, down, across(config.columns)))

  rows = pl.cdiv(num_tokens, TILING) * TILING
  results = plgpu.kernel(
      body,
      out_type=[None if width is None else jax.ShapeDtypeStruct((rows, width), dtype)
                for width in widths],
      grid=(min(pl.cdiv(down, size) * across(config.columns),
                processors // size),),
      grid_names=("block",),
      cluster=(2,) if together else (),
      cluster_names=("pair",) if together else (),
      num_threads=COMPUTE + 1,
      thread_name="wg",
      kernel_name=name,
      interpret=mode.mosaic_gpu(),
      compiler_params=tiles.COMPILER_PARAMS,
      scratch_types=[
          # First the weights: at the beginning of shared memory, they cost the main loop one to
          # four instructions less than behind A.
          smem((config.stages, *slot(config.columns))),
          smem((config.stages, ROWS, CHUNK)),
          smem((COMPUTE, 2, WARPGROUP_ROWS, STORE)),
          plgpu.Barrier(num_arrivals=copies, **barriers),
          free,
      ],
  )(*operands)
  # Inside shard_map what JAX knows of a kernel's results is their shapes.
  results = partition.varying_together(*results, *operands)[:len(results)]
  return [None if result is None else result[:num_tokens] for result in results]
