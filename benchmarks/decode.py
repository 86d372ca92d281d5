"""Attention of one token of each sequence to its cache: memory's speed is the limit."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku import kernels
from palm_haiku.kernels.core import dispatch

from . import measure, results
from .shapes import sizes

CPU_SHAPES = ["2x256x4x64"]
# 256k cached tokens, in many short sequences, some, and one.
SHAPES = ["128x2048x16x256", "32x8192x16x128", "32x8192x48x256", "1x262144x16x128"]


@dataclasses.dataclass(frozen=True)
class Shape:
  batch: int
  length: int
  heads: int
  dim_head: int

  @classmethod
  def parse(cls, text: str) -> "Shape":
    """From "32x8192x16x128": sequences, positions of a cache, query heads, dim_head."""
    return cls(*sizes(text, "decoding's", "BATCHxLENGTHxHEADSxDIM_HEAD"))

  def __str__(self):
    return "x".join(str(size) for size in dataclasses.astuple(self))

  def lengths(self, ragged: bool) -> np.ndarray:
    """Positions filled: all of the cache, or from half of it to all, evenly."""
    first = self.length // 2 if ragged and self.batch > 1 else self.length
    return np.linspace(first, self.length, self.batch).astype(np.int32)

  def bytes(self, lengths, cache_dtype: str, itemsize: int) -> float:
    """Bytes of the filled keys and values with their int8 scales, of queries and of the result."""
    position = 2 * self.dim_head * jnp.dtype(cache_dtype).itemsize + 8 * (cache_dtype == "int8")
    return lengths.sum() * position + 2 * self.batch * self.heads * self.dim_head * itemsize


def main(argv: list[str] | None = None, deadline: float | None = None) -> int:
  names = ("xla", *measure.own("decode_attention"))
  parser = argparse.ArgumentParser(prog="python -m benchmarks decode", description=__doc__)
  parser.add_argument("--shapes", nargs="+", metavar="BxSxHxDh", help="sequences, positions of a "
                      f"cache, query heads, dim_head; default {' '.join(SHAPES)}")
  parser.add_argument("--implementations", nargs="+", metavar="NAME", choices=(*names, "auto"),
                      help=f"of {', '.join(names)}, auto; default all, and auto on an accelerator")
  parser.add_argument("--dtype", default="bfloat16", help="of queries (default bfloat16)")
  parser.add_argument("--cache-dtypes", nargs="+", default=["bfloat16", "int8"], metavar="DTYPE",
                      help="the dtype of queries, or int8; default both")
  parser.add_argument("--rounds", type=int, default=measure.ROUNDS)
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  args = parser.parse_args(argv)
  cpu = dispatch.target().platform == "cpu"
  wanted = args.implementations or (names[:1] if cpu else (*names, "auto"))
  cases = [functools.partial(case, Shape.parse(shape), args.dtype, cache, ragged, wanted)
           for shape in args.shapes or (CPU_SHAPES if cpu else SHAPES)
           for cache in args.cache_dtypes for ragged in (False, True)]
  return int(bool(measure.run(results.document("decode"), cases, args.out, args.rounds, deadline)))


def case(shape: Shape, dtype: str, cache_dtype: str, ragged: bool, names) -> measure.Case:
  keys = jax.random.split(jax.random.key(0), 3)
  draw = lambda key, *sizes: jax.random.normal(key, sizes, dtype)
  query = draw(keys[0], shape.batch, 1, shape.heads, shape.dim_head)
  caches = [draw(key, shape.batch, shape.length, 1, shape.dim_head) for key in keys[1:]]
  scales = [None, None]
  if cache_dtype == "int8":
    scales = [jnp.abs(cache).max(-1).astype(jnp.float32) / 127 for cache in caches]
    caches = [jnp.round(cache / scale[..., None]).astype(jnp.int8)
              for cache, scale in zip(caches, scales)]
  lengths = shape.lengths(ragged)
  arrays = (query, *caches, jnp.asarray(lengths), *scales)
  expected = functools.cache(lambda: _reference(arrays))
  return measure.Case(
      about={"shape": str(shape), "dtype": dtype, "pass": "forward", "variant":
             f"alibi, {cache_dtype} cache, {'half full to full' if ragged else 'full'}"},
      arrays=arrays, implementations={name: functools.partial(_attend, name) for name in names},
      flops=4.0 * lengths.sum() * shape.heads * shape.dim_head,
      flops_full=4.0 * shape.batch * shape.length * shape.heads * shape.dim_head,
      bytes=shape.bytes(lengths, cache_dtype, query.dtype.itemsize),
      error=lambda out: float(np.abs(np.asarray(out[0], np.float64) - expected()).max()
                              / np.abs(expected()).max()))


def _attend(name, query, keys, values, lengths, key_scales, value_scales):
  return kernels.decode_attention(
      query, keys, values, lengths, key_scales=key_scales, value_scales=value_scales,
      alibi_slopes=jnp.asarray(kernels.alibi_slopes(query.shape[2])), implementation=name)


def _reference(arrays):
  """The first sequence in float64, from the formula."""
  query, keys, values, lengths, *scales = (None if a is None else np.asarray(a[0], np.float64)
                                           for a in arrays)
  n = int(lengths)
  keys, values = (x[:n, 0] * (1 if scale is None else scale[:n]) for x, scale in
                  zip((keys, values), scales))
  scores = query[0] @ keys.T * keys.shape[1]**-0.5
  slopes = kernels.alibi_slopes(len(scores)).astype(np.float64)
  scores += slopes[:, None] * (np.arange(n) - (n - 1))
  p = np.exp(scores - scores.max(-1, keepdims=True))
  return (p / p.sum(-1, keepdims=True) @ values)[None]
