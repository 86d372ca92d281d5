"""Causal attention: this project's backends and everything one would use instead."""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku import kernels
from palm_haiku.kernels import attention
from palm_haiku.kernels.core import dispatch

from . import measure, peers, results
from .shapes import Attention

SHAPES = [str(Attention(batch, length, 16, 1, dim)) for dim in (128, 64, 256)
          for batch, length in ((8, 2048), (4, 4096), (2, 8192), (1, 16384))]
CPU_SHAPES = [str(Attention(1, 512, 8, 1, 64))]
TAIL = 64  # queries and keys at the end whose results are compared


def main(argv: list[str] | None = None, deadline: float | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks attention", description=__doc__)
  parser.add_argument("--shapes", nargs="+", metavar="BxTxHxKxD", help="batch, length, heads, key "
                      f"heads, dim_head; default {' '.join(SHAPES[:4])} and more")
  parser.add_argument("--implementations", nargs="+", metavar="NAME", choices=[*_all_names()],
                      help=f"of {', '.join(_all_names())}; default all of this platform")
  parser.add_argument("--passes", nargs="+", default=["forward", "backward"],
                      choices=["forward", "backward"], help="backward: with the forward pass")
  parser.add_argument("--variants", nargs="+", default=["alibi", "plain"],
                      choices=["alibi", "plain"])
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--rounds", type=int, default=measure.ROUNDS)
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  args = parser.parse_args(argv)

  platform = dispatch.target().platform
  shapes = args.shapes or (CPU_SHAPES if platform == "cpu" else SHAPES)
  names = args.implementations or [name for name in _all_names() if _fits(name, platform)]
  cases = [functools.partial(case, shape, variant == "alibi", what == "backward", args.dtype, names)
           for shape, what, variant in itertools.product(
               map(Attention.parse, shapes), args.passes, args.variants)]
  return int(bool(measure.run(results.document("attention"), cases, args.out, args.rounds,
                              deadline)))


def _all_names():
  return ("xla", *attention.OP.backends, *peers.PEERS)


def _fits(name, platform):
  if name in peers.PLATFORMS:
    return platform in peers.PLATFORMS[name]
  return name == "xla" or name in measure.own("flash_attention")


def case(shape: Attention, alibi: bool, backward: bool, dtype: str, names) -> measure.Case:
  keys = jax.random.split(jax.random.key(0), 4)
  rows = shape.batch, shape.length, shape.heads, shape.dim_head
  columns = shape.batch, shape.length, shape.kv_heads, shape.dim_head
  arrays = tuple(jax.random.normal(key, sizes, dtype) for key, sizes in zip(
      keys, (rows, columns, columns, rows)[:4 if backward else 3], strict=False))
  reference = functools.cache(lambda: _reference(shape, alibi, backward, arrays))
  return measure.Case(
      about=dict(shape=str(shape), dtype=dtype, variant="alibi" if alibi else "plain",
                 **{"pass": "backward" if backward else "forward"}),
      arrays=arrays,
      implementations={name: _function(name, alibi, backward) for name in names},
      flops=shape.flops(backward), flops_full=shape.flops(backward, causal=False),
      bytes=shape.bytes(backward, jnp.dtype(dtype).itemsize),
      error=lambda out: _error(reference(), out if backward else (out,)))


def _function(name, alibi, backward):
  attend = functools.partial(
      peers.PEERS.get(name) or functools.partial(peers.ours, implementation=name), alibi=alibi)
  if not backward:
    return attend

  def both(query, key, value, cotangent):
    out, pull = jax.vjp(attend, query, key, value)
    return out, *pull(cotangent)

  return both


def _reference(shape, alibi, backward, arrays):
  """The last rows of each result in float64, of the first sequence.

  The last TAIL keys are seen by the last TAIL queries alone, so these rows of all three gradients
  need no other ones.
  """
  tail = min(TAIL, shape.length)
  q, k, v, *dout = (np.asarray(a[0], np.float64) for a in arrays)
  length, heads, dim = q.shape
  groups = heads // k.shape[1]
  k, v = (np.repeat(x, groups, axis=1) for x in (k, v))
  q = q[-tail:]
  scores = np.einsum("thd,shd->hts", q, k) * dim**-0.5
  distance = np.arange(length) - np.arange(length - tail, length)[:, None]
  if alibi:
    scores += kernels.alibi_slopes(heads).astype(np.float64)[:, None, None] * distance
  scores = np.where(distance <= 0, scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum("hts,shd->thd", weights, v)
  if not backward:
    return (out,)
  dout = dout[0][-tail:]
  dweights = np.einsum("thd,shd->hts", dout, v)
  dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) * dim**-0.5
  dq = np.einsum("hts,shd->thd", dscores, k)
  one_head = lambda x: x.reshape(tail, heads // groups, groups, dim).sum(2)
  dk = one_head(np.einsum("hts,thd->shd", dscores[:, :, -tail:], q))
  dv = one_head(np.einsum("hts,thd->shd", weights[:, :, -tail:], dout))
  return out, dq, dk, dv


def _error(expected, got):
  """The largest difference, as a fraction of the largest value; the worst of the results."""
  return max(float(np.abs(np.asarray(g[0, -len(e):], np.float64) - e).max() / np.abs(e).max())
             for e, g in zip(expected, got, strict=True))
