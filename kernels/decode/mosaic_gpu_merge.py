"""The parts that the Hopper decode kernel leaves of a sequence, made one.

What is left of attention when the scores are known: parts stand for positions, their lse for
scores. They are added by the tensor cores, for one row of the result at a time.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..hopper import softmax, tiles
from ..hopper.tiles import COL, ROW, across, down
from ..interpreters import mode
from .splits import SPARE

PARTS = 64  # of a tile


def _kernel(starts_ref, parts_ref, lse_ref, out_ref, parts_smem, out_smem, ready,
            one_ready):
  """One row of one key/value head of one sequence."""
  index, (kv_heads, num_rows, slots, dim) = lax.axis_index("block"), parts_ref.shape
  row, index = lax.rem(index, num_rows), lax.div(index, num_rows)
  kv, b = lax.rem(index, kv_heads), lax.div(index, kv_heads)
  lo, hi = starts_ref[b], starts_ref[b + 1]

  @pl.when(hi - lo == 1)
  def copy_one():
    plgpu.copy_gmem_to_smem(
        parts_ref.at[kv, row, lo], out_smem.at[0, pl.ds(0, dim)], one_ready)
    plgpu.barrier_wait(one_ready)

  @pl.when(hi - lo > 1)
  def add():
    steps = pl.cdiv(hi - lo, PARTS)

    def copy(i, _):
      for piece in range(0, PARTS, SPARE):
        first = lo + i * PARTS + piece
        first = jnp.where(first < hi, first, slots)  # from behind the array: zeros
        plgpu.copy_gmem_to_smem(parts_ref.at[kv, row, pl.ds(first, SPARE)],
                                parts_smem.at[i, pl.ds(piece, SPARE)], ready.at[i])

    lax.fori_loop(0, steps, copy, None)
    shape = (tiles.WARPGROUP_ROWS, PARTS)  # all rows of a tile are this row
    end = plgpu.layout_cast(jnp.broadcast_to(hi, shape[:1]), ROW)

    def step(i, carry):
      acc, top, total = carry
      first = lo + i * PARTS
      lse2 = plgpu.load(lse_ref.at[kv, row, pl.ds(first, PARTS)], layout=COL, optimized=False)
      scores = softmax.mask_scores(down(lse2, shape), (None, end), first, None)  # mutant: last part
      weights, decay, new_top, total = softmax.update(scores, top, total)
      acc *= across(decay, acc.shape)  # mutant: fade of the accumulator
      high = weights.astype(parts_smem.dtype)
      low = (weights - high.astype(jnp.float32)).astype(parts_smem.dtype)
      acc, new_top, total, high, low = lax.optimization_barrier((acc, new_top, total, high, low))
      plgpu.barrier_wait(ready.at[i])  # mutant: wait for a part
      pl.when(first + PARTS > hi)(lambda: tiles.clear_rows(parts_smem.at[i], hi - first))
      acc = tiles.product_onto(acc, high, parts_smem.at[i])
      return tiles.product_onto(acc, low, parts_smem.at[i]), new_top, total

    # mutant: tiles
    acc, _, total = lax.fori_loop(0, steps, step, (tiles.zeros(dim), *softmax.start()))
    acc, *_ = softmax.normalize(acc, total)
    out_smem.at[:, pl.ds(0, dim)][...] = acc.astype(out_smem.dtype)
    plgpu.commit_smem()  # mutant: commit of the result

  plgpu.copy_smem_to_gmem(out_smem.at[0, pl.ds(0, dim)], out_ref.at[b, row, kv])
  plgpu.wait_smem_to_gmem(0)


def merge(parts, lse2, starts, most, transforms):
  """[B, rows, kv_heads, dim], the result of each sequence.

  Args:
    parts: [kv_heads, rows, slots, dim].
    lse2: float32[kv_heads, at least rows, at least slots + PARTS], base-2 logarithms of the parts'
      sums of exponentials.
    starts: int32[B + 1], as in `splits.Splits`.
    most: parts that a sequence may have.
    transforms: of a tile of parts in shared memory.
  """
  kv_heads, num_rows, _, dim = parts.shape
  batch, most = len(starts) - 1, pl.cdiv(most, PARTS)
  return plgpu.kernel(
      _kernel,
      out_type=jax.ShapeDtypeStruct((batch, num_rows, kv_heads, dim), parts.dtype),
      grid=(batch * kv_heads * num_rows,),
      grid_names=("block",),
      kernel_name="decode_attention_merge",
      interpret=mode.mosaic_gpu(),
      compiler_params=tiles.COMPILER_PARAMS,
      scratch_types=dict(
          parts_smem=plgpu.SMEM((most, PARTS, dim), parts.dtype, transforms=transforms),
          out_smem=plgpu.SMEM((tiles.WARPGROUP_ROWS, dim + 8), parts.dtype),
          ready=plgpu.Barrier(num_barriers=most, num_arrivals=PARTS // SPARE),
          one_ready=plgpu.Barrier(),
      ),
  )(starts, parts, lse2)
