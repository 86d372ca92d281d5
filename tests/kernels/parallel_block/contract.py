"""The contract of the block: drawn cases, the oracle in float64, the floor of the error bound.

A backend's test draws `cases(...)`, computes `inputs(case)`, runs its four functions on them
(`run` does), and calls `check(case, results)`; a planted error is sought by `errors`.
Compiling is most of the time: cases of one `program` share theirs, and `variants` of a case are
such.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from palm_haiku.kernels import norms, rotary
from palm_haiku.kernels.parallel_block import steps
from tests.kernels import contract as bound

EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
  """One layer's products, of both passes."""

  tokens: int = 33
  dim: int = 128
  heads: int = 2
  dim_head: int = 64
  hidden: int = 256
  dtype: str = "bfloat16"
  norm: str = "layer"
  value: bool = True  # has a weight of its own
  kv_heads: int = 1
  rotated: bool = True
  keep: bool = True
  with_x: bool = True  # out_projection adds x
  mean: float = 0.0  # of x
  spread: float = 1.0  # of x
  seed: int = 0

  @property
  def program(self) -> "Case":
    """The case that all have in common that differ in their inputs alone."""
    return dataclasses.replace(self, mean=0.0, spread=1.0, seed=0)


@st.composite
def cases(draw, *, dims=(128, 256, 384), hiddens=(128, 256, 384), dim_heads=(64, 128),
          dtypes=("bfloat16", "float16"), max_tokens=150, max_heads=3):
  """Cases as varied as the contract."""
  heads = draw(st.integers(1, max_heads))
  known = [n for n in (1, 8, 63, 64, 65, 127, 128, 129, 256) if n <= max_tokens]
  return Case(
      tokens=draw(st.one_of(st.integers(1, max_tokens), st.sampled_from(known))),
      dim=draw(st.sampled_from(dims)), heads=heads,
      kv_heads=draw(st.sampled_from([n for n in range(1, heads + 1) if not heads % n])),
      dim_head=draw(st.sampled_from(dim_heads)), hidden=draw(st.sampled_from(hiddens)),
      dtype=draw(st.sampled_from(dtypes)), norm=draw(st.sampled_from(["layer", "rms"])),
      value=draw(st.booleans()), rotated=draw(st.booleans()), keep=draw(st.booleans()),
      with_x=draw(st.booleans()), mean=draw(st.sampled_from([0.0, 0.0, 30.0])),
      spread=draw(st.sampled_from([1.0, 10.0])), seed=draw(st.integers(0, 10**6)))


def variants(case: Case, draw, number: int):
  """The case, and others of its program with drawn inputs."""
  for _ in range(number):
    yield case
    case = dataclasses.replace(
        case, mean=draw(st.sampled_from([0.0, 0.0, 30.0])), seed=draw(st.integers(0, 10**6)),
        spread=draw(st.sampled_from([1.0, 10.0])))


@functools.lru_cache(maxsize=2)
def inputs(case: Case) -> dict:
  """Random arrays of a case, rounded to its dtype: the oracle computes with the same numbers.

  Those of the backward functions are drawn too, not computed by the forward ones, so that each
  is judged by itself.
  """
  rng = np.random.default_rng(case.seed)
  m, d, h, dh, f = case.tokens, case.dim, case.heads, case.dim_head, case.hidden
  kv = case.kv_heads * dh
  normal = lambda *shape, scale=1.0, mean=0.0: (
      mean + scale * rng.normal(size=shape)).astype(jnp.dtype(case.dtype))
  weights = dict(query=normal(d, h, dh, scale=d**-0.5), key=normal(d, kv, scale=d**-0.5),
                 value=normal(d, kv, scale=d**-0.5), gate=normal(d, f, scale=d**-0.5),
                 up=normal(d, f, scale=d**-0.5))
  if not case.value:
    del weights["value"]
  weights["norm"] = rng.uniform(0.5, 1.5, d).astype(np.float32)
  angles = rng.uniform(0, 2 * np.pi, (m, dh // 2))
  rotation = tuple(f(angles).astype(np.float32) for f in (np.cos, np.sin))
  return jax.device_put(dict(
      x=normal(m, d, scale=case.spread, mean=case.mean), weights=weights,
      rotation=rotation if case.rotated else None, attended=normal(m, h, dh), act=normal(m, f),
      attn_out=normal(h, dh, d, scale=(h * dh)**-0.5), ff_out=normal(f, d, scale=f**-0.5),
      dy=normal(m, d), gate=normal(m, f, scale=2.0), up=normal(m, f), dquery=normal(m, h, dh),
      dkey=normal(m, kv), dvalue=normal(m, kv) if case.value else None, dgate=normal(m, f),
      dup=normal(m, f)))


def run(backend, case: Case, arrays: dict, *, chip=None,
        of=("in_projection", "out_projection", "swiglu_gradient", "input_gradient")) -> dict:
  """The results of a backend's functions by name: "query", "y", "dh" and so on."""
  a, out = arrays, {}
  if "in_projection" in of:
    made = backend.in_projection(a["x"], a["weights"], a["rotation"], norm=case.norm, eps=EPS,
                                 keep=case.keep, chip=chip)
    out |= zip(("query", "key", "value", "act", "gate", "up"), made, strict=True)
    assert (out["value"] is None) == (not case.value)
    assert (out["gate"] is None) == (out["up"] is None) == (not case.keep)
  if "out_projection" in of:
    out["y"] = backend.out_projection(a["x"] if case.with_x else None, a["attended"], a["act"],
                                      a["attn_out"], a["ff_out"], chip=chip)
  if "swiglu_gradient" in of:
    made = backend.swiglu_gradient(a["dy"], a["gate"], a["up"], a["ff_out"], chip=chip)
    out |= zip(("dgate", "dup", "act of gradient"), made, strict=True)
  if "input_gradient" in of:
    gradients = (a[n] for n in ("dquery", "dkey", "dvalue", "dgate", "dup"))
    out["dh"] = backend.input_gradient(*gradients, a["weights"], chip=chip)
  return {name: array for name, array in out.items() if array is not None}


@functools.lru_cache(maxsize=2)
def exact(case: Case) -> dict:
  """All results in float64, by numpy, from the formulas."""
  a = jax.tree.map(lambda array: np.asarray(array, np.float64), inputs(case))
  w, x = a["weights"], a["x"]
  centred = x - x.mean(-1, keepdims=True) * (case.norm == "layer")
  h = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS) * w["norm"]

  def rotated(y):
    if a["rotation"] is None:
      return y
    cos, sin = (table[:, None] for table in a["rotation"])
    first, second = np.split(y, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

  sigmoid = lambda y: 1 / (1 + np.exp(-y))
  gate, up = h @ w["gate"], h @ w["up"]
  out = dict(query=rotated(np.einsum("md,dhe->mhe", h, w["query"])),
             key=rotated((h @ w["key"]).reshape(len(x), -1, case.dim_head)).reshape(len(x), -1),
             act=gate * sigmoid(gate) * up)
  if case.value:
    out["value"] = h @ w["value"]
  if case.keep:
    out |= dict(gate=gate, up=up)
  out["y"] = (np.einsum("mhe,hed->md", a["attended"], a["attn_out"]) + a["act"] @ a["ff_out"]
              + x * case.with_x)
  gate, up, dact = a["gate"], a["up"], a["dy"] @ a["ff_out"].T
  s = sigmoid(gate)
  out |= {"dgate": dact * up * s * (1 + gate * (1 - s)), "dup": dact * gate * s,
          "act of gradient": gate * s * up}
  out["dh"] = np.einsum("mhe,dhe->md", a["dquery"], w["query"]) + sum(
      a[f"d{name}"] @ w[name].T for name in ("key", "value", "gate", "up") if name in w)
  return out


@functools.lru_cache(maxsize=2)
def rough(case: Case) -> dict:
  """All results by the XLA path, in the case's dtype."""
  return jax.device_get(_rough(inputs(case), case=case.program))


@functools.partial(jax.jit, static_argnames="case")
def _rough(arrays, *, case):
  a, w = arrays, arrays["weights"]
  h = norms.normalize(a["x"], w["norm"], kind=case.norm, eps=EPS)
  made = {name: steps.project(h, w[name]) for name in w if name != "norm"}
  if case.rotated:
    made["query"] = rotary.rotate_by(made["query"], a["rotation"])
    key = made["key"].reshape(case.tokens, -1, case.dim_head)
    made["key"] = rotary.rotate_by(key, a["rotation"]).reshape(case.tokens, -1)
  swiglu = lambda gate, up: jax.nn.silu(gate) * up
  made["act"] = swiglu(made["gate"], made["up"])
  made["y"] = steps.project(a["attended"], a["attn_out"], 2) + steps.project(a["act"], a["ff_out"])
  if case.with_x:
    made["y"] = a["x"] + made["y"]
  made["act of gradient"], pull = jax.vjp(swiglu, a["gate"], a["up"])
  made["dgate"], made["dup"] = pull(a["dy"] @ a["ff_out"].T)
  made["dh"] = a["dquery"].reshape(case.tokens, -1) @ w["query"].reshape(case.dim, -1).T + sum(
      a[f"d{name}"] @ w[name].T for name in ("key", "value", "gate", "up") if name in w)
  return made


def errors(case: Case, results: dict) -> dict[str, str]:
  """Which results of `run` are out of bounds, and how far."""
  want, found = exact(case), {}
  for name, got in results.items():
    assert got.shape == want[name].shape and got.dtype == jnp.dtype(case.dtype), name
    # A rounding of the largest value, and eight of a sum in float32 of any order, those of the mean
    # as large as the norm makes them.
    floor = np.abs(want[name]).max() * (
        bound.eps(case.dtype) + 8 * (1 + case.mean / case.spread) * bound.eps("float32"))
    if excess := bound.excess(
        got, want[name], lambda: rough(case)[name], floor=floor, mean_square=0.25):
      found[name] = excess
  return found


def check(case: Case, results: dict) -> None:
  bound.check(errors(case, results), case)
