"""One layer of the model: attention and feed-forward side by side."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku import kernels
from palm_haiku.kernels import norms, rotary
from palm_haiku.kernels.core import dispatch, op
from palm_haiku.kernels.parallel_block import fused, steps, xla

from . import measure, peers, results
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
  kv_heads: int = 1
  dim_ff: int = 0  # in place of dim * ff_mult

  @classmethod
  def parse(cls, text: str) -> "Shape":
    """From "4x2048x4096x16x256x4": batch, length, dim, heads, dim_head, ff_mult.

    Behind them kv_heads, and dim_ff in place of dim * ff_mult, may stand.
    """
    form = "BATCHxLENGTHxDIMxHEADSxDIM_HEADxFF_MULT"
    more = text.count("x") - form.count("x")
    return cls(*sizes(text, "a block's", form + "".join(("xKV_HEADS", "xDIM_FF")[:max(more, 0)])))

  def __str__(self):
    numbers = list(dataclasses.astuple(self))
    while len(numbers) > 6 and numbers[-1] == (1, 0)[len(numbers) - 7]:
      numbers.pop()
    return "x".join(map(str, numbers))

  @property
  def weights(self) -> dict[str, tuple[int, ...]]:
    dim, heads, dim_head, ff = self.dim, self.heads, self.dim_head, self.hidden
    key = (dim, self.kv_heads, dim_head) if self.kv_heads > 1 else (dim, dim_head)
    return {"norm": (dim,), "query": (dim, heads, dim_head), "key": key, "value": key,
            "gate": (dim, ff), "up": (dim, ff), "attn_out": (heads, dim_head, dim),
            "ff_out": (ff, dim)}

  @property
  def hidden(self) -> int:
    return self.dim_ff or self.dim * self.ff_mult

  def _weights(self, step: str) -> int:
    """Numbers in the matrices of a step."""
    out = ("attn_out", "ff_out")
    parts = {"layer": self.weights, "out_projection": out,
             "in_projection": set(self.weights) - set(out)}[step]
    return sum(int(np.prod(self.weights[name])) for name in parts if name != "norm")

  def flops(self, backward: bool, causal: bool = True, step: str = "layer") -> float:
    attention = Attention(self.batch, self.length, self.heads, self.kv_heads, self.dim_head)
    return (2 * self._weights(step) * self.batch * self.length * (3 if backward else 1)
            + (attention.flops(backward, causal) if step == "layer" else 0))

  def bytes(self, backward: bool, itemsize: int, step: str = "layer") -> float:
    """Weights and the step's arrays, read and written once; backward: also their gradients."""
    weights, tokens = self._weights(step), self.batch * self.length
    stream = 2 * self.dim * tokens
    if step != "layer":
      stream += (self.heads * self.dim_head + self.hidden - self.dim) * tokens
      keys = 2 * self.kv_heads * self.dim_head
      stream += (keys if step == "in_projection" else self.dim) * tokens
    return (weights + stream + (2 * weights + 1.5 * stream if backward else 0)) * itemsize


# Positions and norms, as a model has them by default.
OPTIONS = dict(norm_eps=1e-5, rope_theta=10_000.0, xpos_scale_base=None)
STEPS = ("layer", "in_projection", "out_projection")
ARCHITECTURES = {"palm": dict(norm="layer", rotary=True),
                 "palm-lite": dict(norm="rms", rotary=False)}
# The alternative, and of which step.
PEERS = {"xla+attention": ("layer",), "xla+cudnn": ("layer",), "xla+tokamax": ("in_projection",)}


def main(argv: list[str] | None = None, deadline: float | None = None) -> int:
  own = measure.own("parallel_attention_ffn")
  names = ("xla", *PEERS, *own)
  parser = argparse.ArgumentParser(
      prog="python -m benchmarks block", description=f"{__doc__} Its first step is all that is "
      "computed from norm(x), its last one the sum with x; what is between is `attention`.")
  parser.add_argument("--shapes", nargs="+", metavar="BxTxDxHxDhxM", help="batch, length, dim, "
                      f"heads, dim_head, ff_mult; default {' '.join(SHAPES)}")
  parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
  parser.add_argument("--architectures", nargs="+", default=["palm"], choices=list(ARCHITECTURES))
  parser.add_argument("--implementations", nargs="+", metavar="NAME", choices=(*names, "auto"),
                      help=f"of {', '.join(names)}, auto; xla+attention is XLA's products with "
                      "this project's attention, xla+cudnn with cuDNN's, xla+tokamax has tokamax's "
                      "gated linear unit; default all, and auto on an accelerator")
  parser.add_argument("--passes", nargs="+", default=["forward", "backward"],
                      choices=["forward", "backward"])
  parser.add_argument("--dtype", default="bfloat16")
  parser.add_argument("--rounds", type=int, default=measure.ROUNDS)
  parser.add_argument("--out", metavar="DIR", help="default benchmarks/results")
  args = parser.parse_args(argv)
  cpu = dispatch.target().platform == "cpu"
  wanted = args.implementations or (names[:1] if cpu else (*names, "auto"))
  cases = [functools.partial(case, Shape.parse(shape), what == "backward", args.dtype, wanted,
                             step=step, architecture=architecture)
           for shape in args.shapes or (CPU_SHAPES if cpu else SHAPES)
           for architecture in args.architectures for step in args.steps for what in args.passes]
  return int(bool(measure.run(results.document("block"), cases, args.out, args.rounds, deadline)))


def case(shape: Shape, backward: bool, dtype: str, names, *, step="layer",
         architecture="palm") -> measure.Case:
  keys = iter(jax.random.split(jax.random.key(0), 24))
  normal = lambda *sizes: jax.random.normal(next(keys), sizes, dtype)
  lead = shape.batch, shape.length
  weights = {name: normal(*sizes) * np.prod(sizes[:-1] if name == "attn_out" else sizes[0])**-0.5
             if name != "norm" else jnp.ones(sizes, jnp.float32)
             for name, sizes in shape.weights.items()
             if architecture == "palm" or name != "value"}
  weights = {name: weight.astype(jnp.float32 if name == "norm" else dtype)
             for name, weight in weights.items()}
  into = {name: w for name, w in weights.items() if name not in ("attn_out", "ff_out")}
  x, act = normal(*lead, shape.dim), lambda: normal(*lead, shape.hidden)
  if step == "layer":
    arrays = x, weights
  elif step == "in_projection":
    arrays = x, into
  else:
    gate, up = act(), act()
    arrays = (x, normal(*lead, shape.heads, shape.dim_head),
              dict(act=jax.nn.silu(gate) * up, gate=gate, up=up),
              {name: w for name, w in weights.items() if name not in into})
  functions = {name: _function(name, step, shape, architecture, backward) for name in names
               if step in PEERS.get(name, (step,))}
  if backward:
    found = jax.eval_shape(_forward("xla", step, shape, architecture, True), *arrays)[0]
    arrays += (jax.tree.map(lambda a: normal(*a.shape), found),)
  expected = functools.cache(
      lambda: _reference(step, architecture, *jax.tree.map(np.asarray, arrays[:4])))
  share = shape.flops(backward, step=step)
  return measure.Case(
      about=dict(shape=str(shape), dtype=dtype,
                 variant=architecture + (step != "layer") * f" {step}",
                 **{"pass": "backward" if backward else "forward"}),
      arrays=arrays, implementations=functions, flops=share,
      flops_full=shape.flops(backward, causal=False, step=step),
      bytes=shape.bytes(backward, jnp.dtype(dtype).itemsize, step),
      error=lambda out: _error(expected(), out[0]))


def _function(name, step, shape, architecture, backward):
  """(results, their `vjp` or None) of a step's arrays, and of its cotangents if `backward`."""
  forward = _forward(name, step, shape, architecture, backward)
  if not backward:
    return lambda *arrays: forward(*arrays)

  def both(*arrays):
    *arrays, cotangents = arrays
    out, pull, more = jax.vjp(forward, *arrays, has_aux=True)
    return out, pull(cotangents), more

  return both


def _forward(name, step, shape, architecture, backward):
  """A function to (what is differentiated, the rest of what a step makes)."""
  options = ARCHITECTURES[architecture]
  chip = functools.partial(_options, name, options["norm"])
  if step == "layer":
    return lambda x, weights: (_layer(name, shape, options, x, weights), None)
  if step == "in_projection":
    def first(x, weights):
      made = _first_step(name, shape, options, chip, x, weights, backward)
      if backward:  # begins at gate and up: the derivative of act is the last step's
        return made, made.pop("act")
      return {name: out for name, out in made.items() if name not in ("gate", "up")}, None
    return first

  def last(x, attended, hidden, weights):
    if name == "xla":
      act = jax.nn.silu(hidden["gate"]) * hidden["up"] if backward else hidden["act"]
      attn = steps.project(attended, weights["attn_out"], axes=2)
      return x + attn + steps.project(act, weights["ff_out"]), None
    rows = lambda a: a.reshape(-1, *a.shape[2:])
    y = fused.project_out(chip(x, weights), *jax.tree.map(rows, (x, attended, hidden)), weights)
    return y.reshape(x.shape), None

  return last


def _options(name, norm, x, weights):
  if name == "auto":
    raise peers.Absent("chosen for whole layers")
  route = op.Route(name, fused.OP.backends[name](), dispatch.target().chip)
  return fused.Options(route, norm, 1e-5)


def _layer(name, shape, options, x, weights):
  slopes = None if options["rotary"] else jnp.asarray(kernels.alibi_slopes(shape.heads))
  if name in ("xla+attention", "xla+cudnn"):
    query, key, value, gate, up = xla.in_projection(
        x, weights, jnp.arange(shape.length), **OPTIONS, **options)
    if name == "xla+cudnn":
      attended = peers.cudnn(query, key, value, alibi=slopes is not None)
    else:
      value = key if steps.values_are_keys(weights, options["rotary"]) else value
      attended = kernels.flash_attention(query, key, value, alibi_slopes=slopes)
    return jax.checkpoint(xla.out_projection, prevent_cse=False)(x, attended, gate, up, weights)
  return kernels.parallel_attention_ffn(
      x, weights, alibi_slopes=slopes, implementation=name, **options)


def _first_step(name, shape, options, chip, x, weights, backward):
  if name in ("xla", "xla+tokamax"):
    query, key, value, gate, up = xla.in_projection(
        x, weights, jnp.arange(shape.length), **OPTIONS, **options)
    made = dict(query=query, key=key[..., 0, :])
    if "value" in weights:
      made["value"] = value[..., 0, :]
    if name == "xla+tokamax":
      if backward:
        raise peers.Absent("its derivative begins at act, that of the other rows at gate and up")
      h = norms.normalize(x, weights["norm"], kind=options["norm"], eps=1e-5)
      return made | dict(act=peers.tokamax_glu(h, weights["gate"], weights["up"]))
    return made | dict(act=jax.nn.silu(gate) * up, gate=gate, up=up)
  rotation = None
  if options["rotary"]:
    positions = jnp.tile(jnp.arange(shape.length), shape.batch)
    rotation = rotary.rotation_at(positions, shape.dim_head // 2)
  made = fused.project_in(chip(x, weights), x.reshape(-1, shape.dim), weights, rotation)
  return {name: out.reshape(*x.shape[:2], *out.shape[1:]) for name, out in made.items()}


def _reference(step, architecture, x, *arrays):
  """The first rows of the first sequence in float64, from the formulas."""
  rows = min(64, x.shape[1])
  wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
  x, w = wide(x[0, :rows]), wide(arrays[-1] if step == "out_projection" else arrays[0])
  if step == "out_projection":
    attended, act = wide((arrays[0][0, :rows], arrays[1]["act"][0, :rows]))
    return x + np.einsum("the,hed->td", attended, w["attn_out"]) + act @ w["ff_out"]
  rotary = ARCHITECTURES[architecture]["rotary"]
  centred = x - x.mean(-1, keepdims=True) * (architecture == "palm")
  h = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["norm"]
  q, k = np.einsum("td,dhe->the", h, w["query"]), h @ w["key"]
  v = h @ w["value"] if "value" in w else k
  if rotary:
    half = k.shape[-1] // 2
    angle = np.arange(rows)[:, None, None] * 10_000.0 ** (-np.arange(half) / half)

    def rotated(y):
      first, second = y[..., :half], y[..., half:]
      return np.concatenate([first * np.cos(angle) - second * np.sin(angle),
                             second * np.cos(angle) + first * np.sin(angle)], -1)

    q, k = rotated(q), rotated(k[:, None])[:, 0]
  gate, up = h @ w["gate"], h @ w["up"]
  act = gate / (1 + np.exp(-gate)) * up
  if step == "in_projection":
    return dict(query=q, key=k, act=act, gate=gate, up=up) | (dict(value=v) if "value" in w else {})
  distance = np.arange(rows) - np.arange(rows)[:, None]
  heads, dim_head = q.shape[1:]
  scores = np.einsum("the,se->hts", q, k) * dim_head**-0.5
  if not rotary:
    scores += kernels.alibi_slopes(heads).astype(np.float64)[:, None, None] * distance
  scores = np.where(distance <= 0, scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  attended = np.einsum("the,hed->td", np.einsum("hts,se->the", p, v), w["attn_out"])
  return x + attended + act @ w["ff_out"]


def _error(expected, out):
  """The largest difference, as a fraction of the largest value; the worst of the results."""
  if not isinstance(expected, dict):
    expected, out = dict(y=expected), dict(y=out)
  return max(
      float(np.abs(np.asarray(got[0, :len(expected[name])], np.float64) - expected[name]).max()
            / np.abs(expected[name]).max()) for name, got in out.items())
