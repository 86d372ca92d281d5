"""What the parallel block's Hopper kernels share: a persistent matrix product, fed by a ring.

A block of the grid walks over tiles of 128 rows by some columns. Of its three warpgroups two
compute, on 64 rows each, and the third fills the slots of a ring, which run on from tile to tile.
What an epilogue reads comes through the same slots. Costs and figures: docs/parallel_block.md.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .. import tuning
from ..attention import mosaic_gpu_tiles
from ..attention.mosaic_gpu_tiles import COMPUTE, ROWS, TILE, WARPGROUP_ROWS

CHUNK = 64  # of the contraction in a slot: the 128 bytes of a swizzle
STORE = 64  # columns of a store
TILING = 8  # rows of an array that TMA copies are a multiple of this


class Ring(NamedTuple):
  """The slots between the warpgroup that copies and those that compute.

  Steps count from 0 over all tiles of a block of the grid; step n is in slot n % stages.
  """

  ready: Any  # a barrier for each slot: it is full
  free: Any  # nobody reads it any more, in either block of a pair
  together: bool  # two blocks of the grid, with tiles of rows one below the other, share copies

  @property
  def stages(self) -> int:
    return self.ready.shape[0]

  def slot(self, step):
    return lax.rem(step, self.stages)

  def wait(self, step):
    """The slot of a step, which is full then."""
    slot = self.slot(step)
    plgpu.barrier_wait(self.ready.at[slot])
    return slot

  def release(self, step):
    plgpu.barrier_arrive(self.free.at[self.slot(step)])


def run(ring, rows, columns, parts, compute):
  """Walks over rows x columns tiles.

  Args:
    ring: the slots.
    rows, columns: numbers of tiles.
    parts: what a tile's slots hold, [(steps, fill)]: fill(row, column, i, slot, put) puts the
      i-th of these steps into a slot, by as many put(source, target, shared=False) as `launch` was
      told. Of a shared copy each block of a pair makes half, for both.
    compute: compute(row, column, first) is what a warpgroup does with a tile, whose steps begin
      with `first`.
  """
  wg, size = lax.axis_index("wg"), 2 if ring.together else 1
  groups, steps = pl.cdiv(rows, size), sum(count for count, _ in parts)

  def each_tile(body):
    @plgpu.nd_loop((groups * columns,), collective_axes="block")
    def _(info):
      row, column = plgpu.planar_snake(
          info.index[0], (groups, columns), 0, tuning.TOGETHER // size)
      row = row * size + (lax.axis_index("pair") if ring.together else 0)
      body(row, column, info.local_index * steps)

  def fill_tile(row, column, first):
    for count, fill in parts:
      def step(i, _, fill=fill, first=first):
        slot = ring.slot(first + i)

        @pl.when(first + i >= ring.stages)
        def _():
          plgpu.barrier_wait(ring.free.at[slot])

        def put(source, target, shared=False):
          plgpu.copy_gmem_to_smem(
              source, target, ring.ready.at[slot],
              collective_axes="pair" if shared and ring.together else None)

        fill(row, column, i, slot, put)

      lax.fori_loop(0, count, step, None)
      first += count

  @pl.when(wg == COMPUTE)
  def copying():
    plgpu.set_max_registers(mosaic_gpu_tiles.COPY_REGISTERS, action="decrease")
    each_tile(fill_tile)
    blocks = lax.axis_size("block")
    total = steps * lax.div(groups * columns - 1 - lax.axis_index("block") + blocks, blocks)
    # No barrier may be left behind with an arrival unseen, nor a block while its partner sends.
    lax.fori_loop(jnp.maximum(total - ring.stages, 0), total,
                  lambda i, _: plgpu.barrier_wait(ring.free.at[ring.slot(i)]), None)

  @pl.when(wg < COMPUTE)
  def computing():
    plgpu.set_max_registers(mosaic_gpu_tiles.COMPUTE_REGISTERS, action="increase")
    each_tile(compute)
    plgpu.wait_smem_to_gmem(0)


def part(a_ref, b_ref, a_smem, b_smem):
  """The steps of A @ B, or of A @ B.T if a slot has B's rows as its first dimension."""
  transposed = b_smem.shape[2] == CHUNK != b_smem.shape[1]

  def fill(row, column, i, slot, put):
    chunk = pl.ds(i * CHUNK, CHUNK)
    put(a_ref.at[pl.ds(row * ROWS, ROWS), chunk], a_smem.at[slot])
    if transposed:
      source = b_ref.at[pl.ds(column * b_smem.shape[1], b_smem.shape[1]), chunk]
    else:
      source = b_ref.at[chunk, pl.ds(column * b_smem.shape[2], b_smem.shape[2])]
    put(source, b_smem.at[slot], shared=True)

  return a_ref.shape[1] // CHUNK, fill


def my_rows():
  """Those of a tile that belong to this warpgroup."""
  return pl.ds(lax.axis_index("wg") * WARPGROUP_ROWS, WARPGROUP_ROWS)


def accumulate(ring, first, steps, a_smem, operands, columns):
  """The sums over `steps` slots of this warpgroup's rows of A times each of the operands.

  operands(slot) lists them, [CHUNK, columns] each; the result is float32[64, columns] each.
  """
  mine = my_rows()  # out of the loop, which the compiler does not take it out of

  def multiply(*sums):
    def chunk(k, _):
      slot = ring.wait(first + k)
      for total, b in zip(sums, operands(slot), strict=True):
        plgpu.wgmma(total, a_smem.at[slot, mine], b)
      plgpu.wgmma_wait(len(sums))  # all but these are done, so that the slot before it is free

      @pl.when(k > 0)
      def _():
        ring.release(first + k - 1)

    lax.fori_loop(0, steps, chunk, None)
    return [total[...] for total in sums]

  shape = WARPGROUP_ROWS, columns
  sums = pl.run_scoped(
      multiply, *[plgpu.ACC(shape, jnp.float32) for _ in operands(0)])
  ring.release(first + steps - 1)
  return sums


def my_rows_of(row):
  """Those of an array that are this warpgroup's in a row of tiles."""
  return pl.ds(row * ROWS + lax.axis_index("wg") * WARPGROUP_ROWS, WARPGROUP_ROWS)


def take(ring, step, *slots):
  """This warpgroup's rows of what a step brought for an epilogue, in float32."""
  slot = ring.wait(step)
  values = [plgpu.load(smem.at[slot, my_rows()], layout=TILE).astype(jnp.float32)
            for smem in slots]
  plgpu.commit_smem()  # all has been read before the next copy writes there
  ring.release(step)
  return values


def sigmoid(x):
  """1 / (1 + exp(-x)) by two fast instructions; a division would take ten."""
  root = lax.rsqrt(1 + jnp.exp(-x))
  return root * root


def store(out_smem, i, value, *targets):
  """Sends 64 x 64 numbers to an array by TMA; of a warpgroup's stores for a tile this is the i-th.

  Of several targets, (condition, array) each, exactly one condition is true.
  """
  slot = out_smem.at[lax.axis_index("wg"), i % 2]
  plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)  # what this slot held is on its way
  slot[...] = value.astype(slot.dtype)
  plgpu.commit_smem()
  for condition, target in targets:
    pl.when(condition)(functools.partial(plgpu.copy_smem_to_gmem, slot, target))


def whole(x, multiple):
  """The array with zeros below, up to a multiple of rows."""
  missing = -x.shape[0] % multiple
  return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x


def launch(kernel, name, operands, out_types, slot, *, copies, rows, columns, config):
  """kernel(*operands, *results, a_smem, b_smem, out_smem, ring) over rows x columns tiles.

  Args:
    slot: the shape of what a slot has beside the [128, 64] of A.
    copies: that fill a slot.
  """
  dtype = out_types[0].dtype
  smem = functools.partial(
      plgpu.SMEM, dtype=dtype, transforms=mosaic_gpu_tiles.TRANSFORMS)
  together = config.together and rows > 1
  size = 2 if together else 1
  barriers = dict(num_barriers=config.stages)
  free = plgpu.Barrier(num_arrivals=COMPUTE, **barriers)
  if together:
    free = plgpu.ClusterBarrier(collective_axes=("pair",), num_arrivals=COMPUTE, **barriers)

  def body(*refs):
    *refs, ready, free = refs
    kernel(*refs, Ring(ready, free, together))

  return plgpu.kernel(
      body,
      out_type=out_types,
      grid=(min(pl.cdiv(rows, size) * columns, tuning.HOPPER_PROCESSORS // size),),
      grid_names=("block",),
      **(dict(cluster=(2,), cluster_names=("pair",)) if together else {}),
      num_threads=COMPUTE + 1,
      thread_name="wg",
      kernel_name=name,
      compiler_params=mosaic_gpu_tiles.COMPILER_PARAMS,
      scratch_types=[
          smem((config.stages, ROWS, CHUNK)),
          smem((config.stages, *slot)),
          smem((COMPUTE, 2, WARPGROUP_ROWS, STORE)),
          plgpu.Barrier(num_arrivals=copies, **barriers),
          free,
      ],
  )(*operands)
