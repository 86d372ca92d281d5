"""Linear cross-entropy in Triton, through jax-triton: for any CUDA GPU.

Two kernels around one main loop. Nothing is added atomically, so the same inputs give the same
bits.
"""

import jax
import jax.numpy as jnp

from ..core import chips, tile_order
from ..triton import call as triton_call
from . import configs
from .fused import merged

_DTYPES = ("bfloat16", "float16", "float32")


def unsupported(x: jax.Array | jax.ShapeDtypeStruct, embedding: jax.Array | jax.ShapeDtypeStruct, *,
                chip: str | None) -> str | None:
  """The first requirement that shapes and dtypes fail, in words, or None.

  Args:
    x, embedding: arrays or `jax.ShapeDtypeStruct`, as for `forward`.
    chip: a name such as "a100"; None for any GPU.
  """
  if trouble := triton_call.unfit(chip):
    return trouble
  if x.dtype.name not in _DTYPES:
    return f"dtype in {{{', '.join(_DTYPES)}}}; got {x.dtype.name}"
  if x.shape[-1] % 16:
    return f"a last dimension that is a multiple of 16; got {x.shape[-1]}"
  return triton_call.problem()


def forward(x: jax.Array, embedding: jax.Array, targets: jax.Array, *, scale: float,
            num_valid: int | jax.Array, chip: str | None):
  """(top, total, logit), each float32[N]; the contract of every backend, in `fused`."""
  valid = jnp.asarray(num_valid, jnp.int32).reshape(1)
  here = (targets >= 0) & (targets < num_valid)
  token = lambda *lead: jax.ShapeDtypeStruct((*lead, x.shape[0]), jnp.float32)
  top, total, found = _call(
      "forward", x, embedding, (valid, jnp.where(here, targets, -1)),
      lambda splits: (token(splits), token(splits), token()), scale=scale, chip=chip)
  return *merged(top, total, scale), jnp.where(here, scale * found, 0)


def logit_gradient(x: jax.Array, rows: jax.Array, targets: jax.Array, top: jax.Array,
                   spread: jax.Array, peak: jax.Array, *, first: int | jax.Array, scale: float,
                   num_valid: int | jax.Array, chip: str | None):
  """A block of columns of the gradient of x @ embedding.T; the contract in `fused`."""
  valid = jnp.asarray(num_valid - first, jnp.int32).reshape(1)
  return _call(
      "gradient", x, rows, (valid, targets - first, top, spread, peak),
      lambda splits: (jax.ShapeDtypeStruct((x.shape[0], rows.shape[0]), x.dtype),),
      scale=scale, chip=chip)[0]


def _call(name, x, rows, others, out_types, *, scale, chip):
  """Runs a kernel over all tiles; out_types(splits) are the types of its results."""
  triton_call.check()
  from . import triton_kernels  # and with it Triton, which may be absent

  (num_tokens, dim), num_rows = x.shape, rows.shape[0]
  blocks = configs.triton(chip, x.dtype.itemsize)
  tiles, columns = -(-num_tokens // blocks.tokens), -(-num_rows // blocks.columns)
  walk = 1  # A loop around the gradient's epilogue keeps its addresses in registers: 1212 spilled.
  if name == "forward":
    walk = tile_order.walk(tiles, columns, -(-dim // blocks.depth), blocks.stages,
                       chips.gpu(chip).multiprocessors)
  splits = -(-columns // walk)
  return triton_call.call(
      getattr(triton_kernels, f"{name}_kernel"), x, rows, *others, num_tokens, num_rows, splits,
      out_types=out_types(splits), grid=tiles * splits,
      num_warps=blocks.warps, num_stages=blocks.stages, chip=chip, D=dim, SCALE=scale,
      BLOCK_N=blocks.tokens, BLOCK_V=blocks.columns, BLOCK_D=blocks.depth,
      TOGETHER=tile_order.TOGETHER,
      PRECISION="tf32x3" if x.dtype == jnp.float32 else "tf32",
      **({"WALK": walk} if name == "forward" else {}))
