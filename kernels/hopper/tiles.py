"""Layouts and copies of Hopper kernels.

Of the three warpgroups of a block of the grid, two compute, on 64 rows each, and the third issues
the copies.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..interpreters import mode

WARPGROUP_ROWS = 64  # M of one wgmma
COMPUTE = 2  # compute warpgroups; warpgroup COMPUTE issues the copies
ROWS = COMPUTE * WARPGROUP_ROWS
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24  # 2 * 240 + 24 = 3 * 168, what a launch is given
QUAD = 8  # columns that the four threads of a quad hold of one wgmma tile, two to a thread
TILING = 8  # rows of an array that TMA copies are a multiple of this

TILE = plgpu.Layout.WGMMA
ROW, COL = TILE.reduce(1), TILE.reduce(0)
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Layouts are set by hand where they matter: the inference of the default semantics runs out of
# fuel on the forward kernel at head_dim 256.
COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, unsafe_no_auto_barriers=True,
    lowering_semantics=plgpu.LoweringSemantics.Lane)


def pad_rows(x, multiple=TILING, axis=0):
  """The array with zeros behind it along an axis, up to a multiple of rows.

  A copy into swizzled shared memory takes 8 rows at a time, and refuses an array whose rows are
  no multiple of that, though not a tile that reaches over the end of one.
  """
  missing = -x.shape[axis] % multiple
  widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
  return jnp.pad(x, widths) if missing else x


# Inside the kernels. ---------------------------------------------------------------------------


def feed(steps, streams):
  """Work of the copying warpgroup: keeps the slots of each stream full, in order.

  A stream is (stages, copies, ready, free), and copies(i, slot) lists (source, target) pairs.
  """
  lax.fori_loop(0, steps, lambda i, _: fill(i, streams), None)
  drain(steps, streams)


def fill(i, streams):
  """Step i of `feed`."""
  for stages, copies, ready, free in streams:
    slot = lax.rem(i, stages)

    @pl.when(i >= stages)
    def _():
      plgpu.barrier_wait(free.at[slot])  # mutant: wait for a free slot

    for source, target in copies(i, slot):
      plgpu.copy_gmem_to_smem(source, target, ready.at[slot])


def drain(steps, streams):
  """The end of `feed`: no barrier may be left behind with an arrival unseen."""
  for stages, _, _, free in streams:
    lax.fori_loop(jnp.maximum(steps - stages, 0), steps,
                  lambda i, _, n=stages, b=free: plgpu.barrier_wait(b.at[lax.rem(i, n)]), None)


def store(target, x, own):
  """Writes a result; `own` is shared memory that this warpgroup alone reads, and no more."""
  if target.dtype == jnp.float32:  # whole sectors from registers; there is no room in `own`
    target[...] = x
  else:
    own[...] = x.astype(target.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own, target)
    plgpu.wait_smem_to_gmem(0)


def product(shape, a, b):
  """a @ b in float32; `a` is shared memory or registers, `b` is shared memory."""
  def run(acc):
    plgpu.wgmma(acc, a, b)
    return acc[...]

  return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def product_onto(start, a, b):
  """start + a @ b, accumulated in the registers of `start`."""
  if mode.current.value is not None:
    return mode.product_onto(start, a, b)
  return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(start))


def zeros(columns):
  """float32[64, columns] in registers, for sums."""
  return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, columns), jnp.float32), TILE)


def across(x, shape):
  """A value per row, broadcast over columns."""
  return lax.broadcast_in_dim(x, shape, [0])


def down(x, shape):
  """A value per column, broadcast over rows."""
  return lax.broadcast_in_dim(x, shape, [1])


def columns(n):
  """Column numbers as (fixed, lane): fixed is a constant of the code, lane of the thread.

  Column 8 g + 2 t + b lies in thread t of its quad. Split like this, `fixed` folds into immediate
  operands and `lane` takes one register; whole column numbers take n / 4.
  """
  column = plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=COL)
  return column & ~6, column & 6


def fold(x, op):
  """[64, n] -> [64, 8]: `op` over the columns that each thread holds, before any shuffle."""
  parts = [x[:, i:i + QUAD] for i in range(0, x.shape[1], QUAD)]
  while len(parts) > 1:
    parts = [op(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
  return parts[0]


def clear_rows(tile, count, first=None):
  """Zeros in rows from `count` on, and before `first`, of 64 rows of 16 bits in shared memory, for
  wgmma to read.

  The weights there are 0, and 0 * NaN is not.
  """
  rows, dim = tile.shape
  row = plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=ROW)
  for column in range(0, dim, 64):
    part = tile.at[:, pl.ds(column, 64)]
    x = plgpu.load(part, layout=TILE, optimized=False)
    kept = across(row, x.shape) < count
    if first is not None:
      kept &= across(row, x.shape) >= first
    part[...] = jnp.where(kept, x, jnp.zeros_like(x))
  plgpu.commit_smem()


def sigmoid(x):
  """1 / (1 + exp(-x)) by two fast instructions; a division would take ten."""
  root = lax.rsqrt(1 + jnp.exp(-x))
  return root * root
