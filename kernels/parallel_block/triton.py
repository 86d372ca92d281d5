"""The parallel block's products in Triton, through jax-triton: for any CUDA GPU.

Nothing is added atomically, so the same inputs give the same bits.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ..core import tile_order
from ..triton import call as triton_call
from . import configs
from .fused import unfused

_DTYPES = ("bfloat16", "float16", "float32")
_STEP = 64  # The contraction is walked in steps that divide this: no product masks its ends.
HIDDEN = _STEP
_MOST = 32_768  # A row of x is in the registers of one program.


def unsupported(x: jax.Array | jax.ShapeDtypeStruct, params: Mapping[str, Any], *,
                chip: str | None) -> str | None:
  """The first requirement that shapes and dtypes fail, in words, or None.

  Args:
    x, params: arrays or `jax.ShapeDtypeStruct`, as for `in_projection`.
    chip: a name such as "a100"; None for any GPU.
  """
  if trouble := triton_call.unfit(chip):
    return trouble
  if x.dtype.name not in _DTYPES:
    return f"dtype in {{{', '.join(_DTYPES)}}}; got {x.dtype.name}"
  if problem := unfused(params):
    return problem
  sizes = dict(dim=x.shape[-1], dim_head=params["query"].shape[-1])
  for name, size in sizes.items():
    if size % _STEP:
      return f"{name} a multiple of {_STEP}; got {size}"
  if sizes["dim_head"] not in (64, 128, 256):  # of these, what attention has
    return f"dim_head in {{64, 128, 256}}; got {sizes['dim_head']}"
  if sizes["dim"] > _MOST:
    return f"dim at most {_MOST}; got {sizes['dim']}"
  return triton_call.problem()


def in_projection(x: jax.Array, params: Mapping[str, jax.Array],
                  rotation: tuple[jax.Array, jax.Array] | None, *, norm: str, eps: float,
                  keep: bool, chip: str | None):
  """All that the layer computes from h = norm(x), before attention.

  Args:
    x: [M, D], the dtype of all matrices and results.
    params: norm float32[D]; query [D, H, Dh]; key [D, K Dh]; value [D, K Dh] or absent; gate, up
      [D, F].
    rotation: (cos, sin), each float32[M, Dh / 2], by which query and key are rotated; or None.
    norm, eps: as of `norms.normalize`; h is rounded as there.
    keep: whether gate and up are wanted.
    chip: as for `unsupported`.

  Returns:
    query [M, H, Dh]; key [M, K Dh]; value [M, K Dh] or None; act = silu(gate) * up [M, F], from
    gate and up in float32; gate, up [M, F], or None.
  """
  (m, d), (_, heads, dim_head) = x.shape, params["query"].shape
  hidden, keys, has_value = params["gate"].shape[1], params["key"].shape[1], "value" in params
  h = _normalize(x, params["norm"], norm=norm, eps=eps, chip=chip)
  blocks = configs.triton(chip, x.dtype.itemsize, d)
  pairs = blocks.columns // 2
  tiles = sum(-(-count // pairs) for count in (
      heads * dim_head // 2, (1 + has_value) * keys // 2, hidden))
  array = lambda *shape, needed=True: jax.ShapeDtypeStruct(shape if needed else (1,), x.dtype)
  value = params.get("value", params["key"])
  cos, sin = rotation or (params["norm"], params["norm"])
  query, key, value, act, gate, up = _call(
      "in_projection", blocks, h, params["query"], params["key"], value, params["gate"],
      params["up"], cos, sin, m, tokens=m, tiles=tiles, chip=chip,
      out_types=(array(m, heads, dim_head), array(m, keys),
                 array(m, keys, needed=has_value), array(m, hidden),
                 *[array(m, hidden, needed=keep)] * 2),
      D=d, HEADS=heads, KV_HEADS=keys // dim_head, DIM_HEAD=dim_head, F=hidden, VALUE=has_value,
      ROTATED=rotation is not None, KEEP=keep)
  return query, key, value if has_value else None, act, *((gate, up) if keep else (None, None))


def _normalize(x, gain, *, norm, eps, chip):
  """`norms.normalize`, which reads x once however long its rows are."""
  triton_call.check()
  from . import triton_kernels  # and with it Triton, which may be absent

  m, d = x.shape
  columns = 1 << (d - 1).bit_length()
  rows = max(1, configs.NORM // columns)
  warps = min(16, max(4, columns * rows // 1024))
  return triton_call.call(
      triton_kernels.normalize_kernel, x, gain, m,
      out_types=(jax.ShapeDtypeStruct(x.shape, x.dtype),), grid=-(-m // rows), num_warps=warps,
      num_stages=1, chip=chip, D=d, EPS=eps, CENTRED=norm == "layer", BLOCK_M=rows,
      BLOCK_D=columns)[0]


def out_projection(x: jax.Array | None, attended: jax.Array, act: jax.Array, attn_out: jax.Array,
                   ff_out: jax.Array, *, chip: str | None):
  """x + attended @ attn_out + act @ ff_out, [M, D], rounded once.

  Args:
    x: [M, D]; or None, and nothing is added.
    attended: [M, H, Dh].
    act: [M, F].
    attn_out, ff_out: [H, Dh, D] and [F, D].
    chip: as for `unsupported`.
  """
  (m, hidden), d = act.shape, ff_out.shape[1]
  inner = math.prod(attended.shape[1:])
  blocks = configs.triton(chip, act.dtype.itemsize, inner + hidden)
  return _call(
      "out_projection", blocks, act if x is None else x, attended, act, attn_out, ff_out, m,
      tokens=m, tiles=-(-d // blocks.columns), chip=chip,
      out_types=(jax.ShapeDtypeStruct((m, d), act.dtype),), D=d,
      ATTENDED=inner, F=hidden, WITH_X=x is not None)[0]


def swiglu_gradient(dy: jax.Array, gate: jax.Array, up: jax.Array, ff_out: jax.Array, *,
                    chip: str | None):
  """(dgate, dup, act), each [M, F]: the gradients through act = silu(gate) * up, and act.

  The gradient of act, dy [M, D] @ ff_out.T, is never written.
  """
  (m, d), hidden = dy.shape, gate.shape[1]
  blocks = configs.triton(chip, dy.dtype.itemsize, d)
  return _call(
      "swiglu_gradient", blocks, dy, gate, up, ff_out, m, tokens=m,
      tiles=-(-hidden // blocks.columns), chip=chip,
      out_types=(jax.ShapeDtypeStruct(gate.shape, dy.dtype),) * 3, D=d, F=hidden)


def input_gradient(dquery: jax.Array, dkey: jax.Array, dvalue: jax.Array | None, dgate: jax.Array,
                   dup: jax.Array, params: Mapping[str, jax.Array], *, chip: str | None):
  """The gradient [M, D] of norm(x) through all of `in_projection`, in one sum, rounded once.

  Args:
    dquery: [M, H, Dh], before rotation, as is dkey [M, K Dh].
    dvalue: [M, K Dh], or None where params have no value.
    dgate, dup: [M, F].
    params: as for `in_projection`.
    chip: as for `unsupported`.
  """
  (m, heads, dim_head), (d, hidden) = dquery.shape, params["gate"].shape
  keys = dkey.shape[1]
  blocks = configs.triton(
      chip, dquery.dtype.itemsize, heads * dim_head + keys + 2 * hidden)
  return _call(
      "input_gradient", blocks, dquery, dkey, dkey if dvalue is None else dvalue, dgate, dup,
      params["query"], params["key"], params.get("value", params["key"]), params["gate"],
      params["up"], m, tokens=m, tiles=-(-d // blocks.columns), chip=chip,
      out_types=(jax.ShapeDtypeStruct((m, d), dquery.dtype),), D=d, QUERIES=heads * dim_head,
      KEYS=keys, F=hidden, VALUE=dvalue is not None)[0]


def _call(name, blocks, *inputs, tokens, tiles, out_types, chip, **constants):
  triton_call.check()
  from . import triton_kernels

  return triton_call.call(
      getattr(triton_kernels, f"{name}_kernel"), *inputs, out_types=out_types,
      grid=-(-tokens // blocks.tokens) * tiles, num_warps=blocks.warps, num_stages=blocks.stages,
      chip=chip, BLOCK_M=blocks.tokens, BLOCK_N=blocks.columns, BLOCK_K=blocks.depth,
      TOGETHER=tile_order.TOGETHER,
      PRECISION="tf32x3" if out_types[0].dtype == jnp.float32 else "tf32", **constants)
