"""One layer of the model: attention and feed-forward side by side."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku import kernels
from palm_haiku.kernels import backend

from . import measure, results
from .shapes import Attention, sizes

CPU_SHAPES = ["1x256x256x4x64x4"]
# dim 4096 with 16 heads of 256 is PaLM-8B; the others are what one chip trains.
SHAPES = ["4x2048x4096x16x256x4", "8x2048x2048x16x128x4", "8x2048x1024x16x64x4"]


@dataclasses.dataclass(frozen=True)
class Shape:
  batch: int
  length: int
  dim: int
  heads: int
  dim_head: int
  ff_mult: int

  @classmethod
  def parse(cls, text: str) -> "Shape":
    """From "4x2048x4096x16x256x4": batch, length, dim, heads, dim_head, ff_mult."""
    return cls(*sizes(text, "a block's", "BATCHxLENGTHxDIMxHEADSxDIM_HEADxFF_MULT"))

  def __str__(self):
    return "x".join(str(size) for size in dataclasses.astuple(self))

  @property
  def weights(self) -> dict[str, tuple[int, ...]]:
    dim, heads, dim_head, ff = self.dim, self.heads, self.dim_head, self.dim * self.ff_mult
    return {"norm": (dim,), "query": (dim, heads, dim_head), "key": (dim, dim_head),
            "value": (dim, dim_head), "gate": (dim, ff), "up": (dim, ff),
            "attn_out": (heads, dim_head, dim), "ff_out": (ff, dim)}

  def flops(self, backward: bool, causal: bool = True) -> float:
    products = sum(int(np.prod(s)) for name, s in self.weights.items() if name != "norm")
    attention = Attention(self.batch, self.length, self.heads, 1, self.dim_head)
    return (2 * products * self.batch * self.length * (3 if backward else 1)
            + attention.flops(backward, causal))

  def bytes(self, backward: bool, itemsize: int) -> float:
    """Weights and the residual stream, read and written once; backward: also their gradients."""
    weights = sum(int(np.prod(s)) for s in self.weights.values()) * itemsize
    stream = self.batch * self.length * self.dim * itemsize
    return weights + 2 * stream + (2 * weights + 3 * stream if backward else 0)


def main(argv: list[str] | None = None, deadline: float | None = None) -> int:
  names = ("xla", *measure.own("parallel_attention_ffn"))
  parser = argparse.ArgumentParser(prog="python -m benchmarks block", description=__doc__)
  parser.add_argument("--shapes", nargs="+", metavar="BxTxDxHxDhxM", help="batch, length, dim, "
                      f"heads, dim_head, ff_mult; default {' '.join(SHAPES)}")
  parser.add_argument("--implementations", nargs="+", metavar="NAME", choices=(*names, "auto"),
                      help=f"of {', '.join(names)}, auto; default all, and auto on an accelerator")
  parser.add_argument("--passes", nargs="+", default=["forward", "backward"],
                      choices=["forward", "backward"])
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--rounds", type=int, default=measure.ROUNDS)
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  args = parser.parse_args(argv)
  cpu = backend.target().platform == "cpu"
  wanted = args.implementations or (names[:1] if cpu else (*names, "auto"))
  cases = [functools.partial(case, Shape.parse(shape), what == "backward", args.dtype, wanted)
           for shape in args.shapes or (CPU_SHAPES if cpu else SHAPES) for what in args.passes]
  return int(bool(measure.run(results.document("block"), cases, args.out, args.rounds, deadline)))


def case(shape: Shape, backward: bool, dtype: str, names) -> measure.Case:
  keys = iter(jax.random.split(jax.random.key(0), 16))
  stream = shape.batch, shape.length, shape.dim
  weights = {name: jax.random.normal(next(keys), sizes, dtype) * sizes[0]**-0.5
             if name != "norm" else jnp.ones(sizes, dtype)
             for name, sizes in shape.weights.items()}
  arrays = (jax.random.normal(next(keys), stream, dtype), weights)
  if backward:
    arrays += (jax.random.normal(next(keys), stream, dtype),)
  expected = functools.cache(lambda: _reference(shape, arrays[0], weights))
  return measure.Case(
      about=dict(shape=str(shape), dtype=dtype, variant="alibi",
                 **{"pass": "backward" if backward else "forward"}),
      arrays=arrays, implementations={name: _function(name, shape, backward) for name in names},
      flops=shape.flops(backward), flops_full=shape.flops(backward, causal=False),
      bytes=shape.bytes(backward, jnp.dtype(dtype).itemsize),
      error=lambda out: _error(expected(), out[0] if backward else out))


def _function(name, shape, backward):
  layer = functools.partial(
      kernels.parallel_attention_ffn, norm="rms", rotary=False, implementation=name,
      alibi_slopes=jnp.asarray(kernels.alibi_slopes(shape.heads)))
  if not backward:
    return layer

  def both(x, weights, cotangent):
    out, pull = jax.vjp(layer, x, weights)
    return out, pull(cotangent)

  return both


def _reference(shape, x, weights):
  """The first rows of the first sequence in float64, from the formula."""
  rows = min(64, shape.length)
  x = np.asarray(x[0, :rows], np.float64)
  w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
  h = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w["norm"]
  q = np.einsum("td,dhe->the", h, w["query"])
  k, v = h @ w["key"], h @ w["value"]
  distance = np.arange(rows) - np.arange(rows)[:, None]
  scores = np.einsum("the,se->hts", q, k) * shape.dim_head**-0.5
  scores += kernels.alibi_slopes(shape.heads).astype(np.float64)[:, None, None] * distance
  scores = np.where(distance <= 0, scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  attended = np.einsum("the,hed->td", np.einsum("hts,se->the", p, v), w["attn_out"])
  gate, up = h @ w["gate"], h @ w["up"]
  return x + attended + (gate / (1 + np.exp(-gate)) * up) @ w["ff_out"]


def _error(expected, out):
  got = np.asarray(out[0, :len(expected)], np.float64)
  return float(np.abs(got - expected).max() / np.abs(expected).max())
