"""The loss from the last hidden states, forward and backward, with and without logits in memory."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku import kernels
from palm_haiku.kernels.core import dispatch

from . import loss_training, measure, results
from .shapes import sizes

SHAPES = ["8192x4096x256000", "16384x2048x32000"]  # PaLM-8B's, and a smaller vocabulary
CPU_SHAPES = ["256x128x2000"]
Z_LOSS = 1e-4
ROWS = 16  # tokens at the end that are compared with float64


@dataclasses.dataclass(frozen=True)
class Shape:
  tokens: int
  dim: int
  vocabulary: int

  @classmethod
  def parse(cls, text: str) -> "Shape":
    """From "8192x4096x256000": tokens, dim, vocabulary."""
    return cls(*sizes(text, "a loss's", "TOKENSxDIMxVOCABULARY"))

  def __str__(self):
    return "x".join(str(size) for size in dataclasses.astuple(self))

  def flops(self, backward: bool) -> float:
    """One product forward, two more backward; the logits computed again are no useful work."""
    return (3 if backward else 1) * 2 * self.tokens * self.dim * self.vocabulary

  def bytes(self, backward: bool, itemsize: int) -> float:
    """States and embedding read once; backward: again, and their gradients written."""
    return (3 if backward else 1) * (self.tokens + self.vocabulary) * self.dim * itemsize


def main(argv: list[str] | None = None, deadline: float | None = None) -> int:
  names = ("xla", *measure.own("linear_cross_entropy"), "logits")
  parser = argparse.ArgumentParser(prog="python -m benchmarks loss", description=__doc__)
  parser.add_argument("--shapes", nargs="+", metavar="NxDxV", help="tokens, dim, vocabulary; "
                      f"default {' '.join(SHAPES)}")
  parser.add_argument("--implementations", nargs="+", metavar="NAME", choices=names, default=names,
                      help=f"of {', '.join(names)}; logits: in memory, as one writes it; "
                      "default all")
  parser.add_argument("--passes", nargs="+", default=["forward", "backward"],
                      choices=["forward", "backward"])
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--rounds", type=int, default=measure.ROUNDS)
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  parser.add_argument("--training", action="store_true", help="PaLM-lite's training step beside "
                      "one that keeps the logits; --shapes are then BATCHxLENGTHxVOCABULARY")
  args = parser.parse_args(argv)
  if args.training:
    return loss_training.main(args)
  cpu = dispatch.target().platform == "cpu"
  cases = [functools.partial(case, Shape.parse(shape), what == "backward", args.dtype,
                             args.implementations)
           for shape in args.shapes or (CPU_SHAPES if cpu else SHAPES) for what in args.passes]
  return int(bool(measure.run(results.document("loss"), cases, args.out, args.rounds, deadline)))


def case(shape: Shape, backward: bool, dtype: str, names) -> measure.Case:
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (shape.tokens, shape.dim), dtype)
  embedding = jax.random.normal(keys[1], (shape.vocabulary, shape.dim), dtype)
  targets = jax.random.randint(keys[2], (shape.tokens,), 0, shape.vocabulary)
  expected = functools.cache(lambda: _reference(shape, x, embedding, targets, backward))
  return measure.Case(
      about=dict(shape=str(shape), dtype=dtype, variant="z-loss",
                 **{"pass": "backward" if backward else "forward"}),
      arrays=(x, embedding, targets),
      implementations={name: _function(name, shape, backward) for name in names},
      flops=shape.flops(backward), flops_full=shape.flops(backward),
      bytes=shape.bytes(backward, jnp.dtype(dtype).itemsize),
      error=lambda out: _error(expected(), out if backward else (out,)))


def _function(name, shape, backward):
  scale = shape.dim**-0.5

  def losses(x, embedding, targets):
    if name != "logits":
      return kernels.linear_cross_entropy(
          x, embedding, targets, z_loss=Z_LOSS, scale=scale, implementation=name)[0]
    logits = scale * jnp.einsum("nd,vd->nv", x, embedding, preferred_element_type=jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return (log_z - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            + Z_LOSS * jnp.square(log_z))

  if not backward:
    return losses

  def both(x, embedding, targets):
    out, pull = jax.vjp(lambda x, e: losses(x, e, targets), x, embedding)
    return out, *pull(jnp.ones_like(out))

  return both


def _reference(shape, x, embedding, targets, backward):
  """The last tokens' loss, and its gradient with respect to their states, in float64."""
  x, targets = np.asarray(x[-ROWS:], np.float64), np.asarray(targets[-ROWS:])
  embedding = np.asarray(embedding, np.float64)
  scale = shape.dim**-0.5
  logits = scale * x @ embedding.T
  top = logits.max(-1)
  log_z = top + np.log(np.exp(logits - top[:, None]).sum(-1))
  loss = log_z - logits[np.arange(len(x)), targets] + Z_LOSS * log_z**2
  if not backward:
    return (loss,)
  weights = np.exp(logits - log_z[:, None]) * (1 + 2 * Z_LOSS * log_z[:, None])
  weights[np.arange(len(x)), targets] -= 1
  return loss, scale * weights @ embedding


def _error(expected, got):
  return max(float(np.abs(np.asarray(g[-len(e):], np.float64) - e).max() / np.abs(e).max())
             for e, g in zip(expected, got, strict=False))
