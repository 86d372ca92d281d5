"""The contract of the loss: drawn cases, the oracle in float64, the floor of the error bound.

A backend's test draws `cases(...)`, computes `inputs(case)`, runs its `forward` and its
`logit_gradient` on them (`run` does both), and calls `check(case, results)`. Compiling is
most of the time: cases of one `program` share theirs, and `variants` of a case are such.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from palm_haiku.kernels.core import op
from palm_haiku.kernels.cross_entropy import fused, xla
from tests.kernels import contract as bound


@dataclasses.dataclass(frozen=True)
class Case:
  """One loss, and one block of the gradient of its logits."""

  num_tokens: int = 33
  vocabulary: int = 70
  dim: int = 64
  dtype: str = "bfloat16"
  num_valid: int | None = None  # None for the whole vocabulary
  traced: bool = False  # num_valid and first are arrays
  first: int = 0  # of the block of rows
  rows: int | None = None  # in the block; None for all from `first` on
  scale: float = 0.125
  targets: str = "any"  # "any" | "ends": the first or the last valid one | "elsewhere": mostly none
  weights: str = "any"  # "any" | "zero": no token counts
  spread: float = 1.0  # of x: with a large one, single tokens have nearly all the weight
  seed: int = 0

  @property
  def valid(self) -> int:
    return self.vocabulary if self.num_valid is None else self.num_valid

  @property
  def block(self) -> slice:
    rows = self.vocabulary - self.first if self.rows is None else self.rows
    return slice(self.first, self.first + rows)

  @property
  def program(self) -> "Case":
    """The case that all have in common that differ in their inputs alone."""
    changes = dict(targets="any", weights="any", spread=1.0, seed=0)
    if self.traced:
      changes |= dict(num_valid=None, first=0, rows=self.block.stop - self.first)
    return dataclasses.replace(self, **changes)


@st.composite
def cases(draw, *, dims=(64, 128, 192), dtypes=("bfloat16", "float16"), max_tokens=150,
          max_vocabulary=300):
  """Cases as varied as the contract."""
  size = lambda most: st.one_of(
      st.integers(1, most), st.sampled_from([n for n in (1, 63, 64, 65, 127, 128, 129, 256)
                                             if n <= most]))
  vocabulary = draw(size(max_vocabulary))
  first = draw(st.one_of(st.just(0), st.integers(0, vocabulary - 1)))
  return Case(
      num_tokens=draw(size(max_tokens)), vocabulary=vocabulary, dim=draw(st.sampled_from(dims)),
      dtype=draw(st.sampled_from(dtypes)),
      num_valid=draw(st.one_of(st.none(), st.integers(0, vocabulary))), traced=draw(st.booleans()),
      first=first, rows=draw(st.one_of(st.none(), st.integers(1, vocabulary - first))),
      scale=draw(st.sampled_from([0.125, 0.3, -0.1])),
      targets=draw(st.sampled_from(["any", "ends", "elsewhere"])),
      weights=draw(st.sampled_from(["any", "any", "zero"])),
      spread=draw(st.sampled_from([1.0, 10.0])), seed=draw(st.integers(0, 10**6)))


def variants(case: Case, draw, number: int):
  """The case, and others of its program with drawn inputs."""
  for _ in range(number):
    yield case
    changes = dict(
        seed=draw(st.integers(0, 10**6)), spread=draw(st.sampled_from([1.0, 10.0])),
        targets=draw(st.sampled_from(["any", "ends", "elsewhere"])),
        weights=draw(st.sampled_from(["any", "any", "zero"])))
    if case.traced:
      rows = case.block.stop - case.first
      changes |= dict(rows=rows, first=draw(st.integers(0, case.vocabulary - rows)),
                      num_valid=draw(st.integers(0, case.vocabulary)))
    case = dataclasses.replace(case, **changes)


@functools.lru_cache(maxsize=2)
def inputs(case: Case) -> dict:
  """Random arrays of a case, in the names of a backend's arguments.

  Values are rounded to the case's dtype: the oracle computes with the same numbers. `top` and
  `total` are the exact ones, in float32, so that `logit_gradient` is judged by itself. `rows` is
  the block of the embedding; `num_valid` and `first` are there if they are traced.
  """
  rng = np.random.default_rng(case.seed)
  rounded = lambda x: x.astype(jnp.dtype(case.dtype))
  x = rounded(case.spread * rng.normal(size=(case.num_tokens, case.dim)))
  embedding = rounded(rng.normal(size=(case.vocabulary, case.dim)))
  last = max(0, case.valid - 1)
  targets = {"any": rng.integers(0, last + 1, case.num_tokens),
             "ends": rng.choice([0, last], case.num_tokens),
             "elsewhere": rng.integers(-2 * case.vocabulary, 3 * case.vocabulary, case.num_tokens),
             }[case.targets]
  counts = 0.0 if case.weights == "zero" else 1.0
  sign, scale = positive(case.scale)
  products = sign * x.astype(np.float64) @ embedding[:case.valid].astype(np.float64).T
  top = products.max(-1, initial=-1e30).astype(np.float32)
  arrays = dict(
      top=top, total=np.exp(scale * (products - np.float64(top)[:, None])).sum(-1),
      dlog_z=counts * rng.uniform(0.5, 1.5, case.num_tokens),
      dlogit=-counts * rng.uniform(0, 2, case.num_tokens))
  arrays = {name: array.astype(np.float32) for name, array in arrays.items()} | dict(
      x=x, embedding=embedding, rows=embedding[case.block], targets=targets.astype(np.int32))
  if case.traced:
    arrays |= dict(num_valid=np.int32(case.valid), first=np.int32(case.first))
  return jax.device_put(arrays)


def positive(scale: float) -> tuple[int, float]:
  """A sign for x and the positive scale that a backend gets, as `fused.statistics` has them."""
  return int(np.sign(scale)), abs(scale) or 1.0


def run(backend, case: Case, arrays: dict, *, of=("log_z", "g"), **keywords) -> dict:
  """{"log_z", "logit", "g"} of a backend's module, or what one of its functions returns.

  Args:
    backend: the module.
    case: one of the case's `program`.
    arrays: the case's `inputs`.
    of: "log_z" for `forward`, "g" for `logit_gradient`.
    **keywords: options of both functions, such as chip.
  """
  a, (sign, scale), results = arrays, positive(case.scale), {}
  keywords |= dict(scale=scale, num_valid=a.get("num_valid", case.valid))
  x = jnp.asarray(sign, a["x"].dtype) * a["x"]
  if "log_z" in of:
    top, total, results["logit"] = backend.forward(x, a["embedding"], a["targets"], **keywords)
    results["log_z"] = jnp.where(total == 0, -jnp.inf, scale * top + jnp.log(total))
  if "g" in of:
    spread = jnp.where(a["total"] == 0, 0, scale * a["dlog_z"] / a["total"])
    results["g"] = sign * backend.logit_gradient(
        x, a["rows"], a["targets"], a["top"], spread, scale * a["dlogit"],
        first=a.get("first", case.first), **keywords)
  return results


def run_differentiated(backend, case: Case, arrays: dict, chip=None) -> dict:
  """{"log_z", "logit", "dx", "dembedding"}: the kernels within `fused`'s derivative."""
  def f(x, embedding):
    return fused.statistics(op.Route("", backend, chip), x, embedding, arrays["targets"],
                            scale=case.scale, num_valid=arrays.get("num_valid", case.valid))

  (log_z, logit), pull = jax.vjp(f, arrays["x"], arrays["embedding"])
  dx, dembedding = pull((arrays["dlog_z"], arrays["dlogit"]))
  return dict(log_z=log_z, logit=logit, dx=dx, dembedding=dembedding)


@functools.lru_cache(maxsize=2)
def exact(case: Case) -> dict:
  """All results in float64, by numpy, from the formula."""
  arrays = inputs(case)
  x, embedding = (np.asarray(arrays[n], np.float64) for n in ("x", "embedding"))
  dlog_z, dlogit = (np.asarray(arrays[n], np.float64)[:, None] for n in ("dlog_z", "dlogit"))
  targets, valid = np.asarray(arrays["targets"]), case.valid
  logits = case.scale * x @ embedding[:valid].T
  top = logits.max(-1, initial=-np.inf, keepdims=True)
  top = np.where(np.isfinite(top), top, 0)
  with np.errstate(divide="ignore"):
    log_z = np.log(np.exp(logits - top).sum(-1, keepdims=True)) + top
  onehot = targets[:, None] == np.arange(case.vocabulary)
  onehot[:, valid:] = False
  probability = np.zeros(onehot.shape)
  probability[:, :valid] = np.exp(logits - np.where(valid, log_z, 0))
  g = case.scale * (probability * dlog_z + onehot * dlogit)
  return dict(log_z=log_z[:, 0], logit=(onehot[:, :valid] * logits).sum(-1), g=g[:, case.block],
              dx=g @ embedding, dembedding=g.T @ x)


@functools.lru_cache(maxsize=2)
def rough(case: Case) -> dict:
  """All results by the XLA path, and g from the formula, in the case's dtype."""
  return jax.device_get(_rough(inputs(case), case.valid, case.first, scale=case.scale))


@functools.partial(jax.jit, static_argnames="scale")
def _rough(arrays, num_valid, first, *, scale):
  x, embedding, rows, targets = (arrays[n] for n in ("x", "embedding", "rows", "targets"))

  def f(x, embedding):
    return xla.logits_statistics(x, embedding, targets, scale=scale, num_valid=num_valid)

  (log_z, logit), pull = jax.vjp(f, x, embedding)
  dx, dembedding = pull((arrays["dlog_z"], arrays["dlogit"]))
  columns = first + jnp.arange(len(rows))
  logits = scale * jnp.einsum("nd,vd->nv", x, rows, preferred_element_type=jnp.float32)
  share = arrays["dlog_z"] / jnp.where(arrays["total"] == 0, 1, arrays["total"])
  top = positive(scale)[1] * arrays["top"]
  probability = jnp.exp(logits - top[:, None]) * share[:, None]
  g = scale * (probability + (targets[:, None] == columns) * arrays["dlogit"][:, None])
  g = jnp.where(columns < num_valid, g, 0).astype(x.dtype)
  return dict(log_z=log_z, logit=logit, g=g, dx=dx, dembedding=dembedding)


def errors(case: Case, results: dict) -> dict[str, str]:
  """Which results of `run` or `run_differentiated` are out of bounds, and how far."""
  arrays = inputs(case)
  largest_of = lambda *names: max(float(np.abs(arrays[name]).max()) for name in names)
  factors = dict(g=1.0, dx=largest_of("embedding"), dembedding=largest_of("x"))  # of g
  want, found = exact(case), {}
  scores = np.abs(case.scale * np.asarray(arrays["x"], np.float64)
                  @ np.asarray(arrays["embedding"], np.float64).T).max()
  for name, got in results.items():
    dtype = "float32" if name in ("log_z", "logit") else case.dtype
    assert got.shape == want[name].shape and got.dtype == jnp.dtype(dtype), name
    # A few roundings of the largest value. Those of float32 grow with the logits, which the
    # exponent turns into relative errors: three roundings of each logit and of log Z (product or
    # input, change of base, its constant). g is a difference of two terms, rounded as they are, be
    # the difference as small as it may, and so is what it is multiplied into. log_z is -inf where
    # no row is valid.
    largest = np.abs(want[name], where=np.isfinite(want[name]), out=np.zeros(got.shape)).max()
    terms = max(largest, 1e-30)
    if name in factors:
      terms = max(terms, factors[name] * abs(case.scale) * largest_of("dlog_z", "dlogit"))
    floor = (2 * bound.eps(dtype) * largest
             + (4 + 3 * scores) * bound.eps("float32") * float(terms))
    if name in ("log_z", "logit"):
      floor += 4 * bound.eps("float32") * scores
    if excess := bound.excess(got, want[name], lambda: rough(case)[name], floor=floor):
      found[name] = excess
  return found


def check(case: Case, results: dict) -> None:
  bound.check(errors(case, results), case)
