"""The contract of attention: drawn cases, the oracle in float64, the floor of the error bound.

A backend's test draws `cases(...)`, computes `inputs(case)`, runs its forward and backward on
them, and calls `check(case, arrays, results)`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from palm_haiku.kernels import alibi_slopes
from palm_haiku.kernels.attention import xla
from tests.kernels import contract as bound


@dataclasses.dataclass(frozen=True)
class Case:
  """One attention: shapes, mask and bias."""

  batch: int = 1
  num_queries: int = 33
  num_keys: int = 33
  heads: int = 4
  kv_heads: int = 1
  dim_head: int = 64
  dtype: str = "bfloat16"
  is_causal: bool = True
  alibi: bool = True
  window: tuple[int, int] | None = None
  segments: str | None = None  # "packed" (sorted runs) | "shuffled" (any order) | None
  query_offset: int = 0
  traced_offset: bool = False
  shared_kv: bool = False
  scale: float | None = None
  seed: int = 0
  dslopes: bool = False  # whether the gradient of the slopes is asked for


@st.composite
def cases(draw, *, dim_heads=(64, 128, 256), dtypes=("bfloat16", "float16"), max_queries=150,
          max_keys=200, groups=((1, 1), (1, 3), (1, 8), (2, 2), (3, 1), (2, 5)), max_batch=2):
  """Cases as varied as the contract; groups are (kv_heads, query heads of each)."""
  kv_heads, group = draw(st.sampled_from(groups))
  length = lambda most: st.one_of(st.integers(1, most), st.sampled_from([1, 2, 63, 64, 65, 127,
                                                                         128, 129]))
  num_queries = min(draw(length(max_queries)), max_queries)
  num_keys = num_queries if draw(st.booleans()) else min(draw(length(max_keys)), max_keys)
  # Mostly offsets at which something is visible, sometimes ones at which whole blocks are not.
  offset = draw(st.one_of(st.just(0), st.just(num_keys - num_queries),
                          st.integers(-num_queries - 3, num_keys + 3)))
  window = draw(st.none() | st.none() | st.tuples(st.integers(0, 90), st.integers(0, 90)))
  alibi = draw(st.booleans())
  return Case(
      batch=draw(st.integers(1, max_batch)), num_queries=num_queries, num_keys=num_keys,
      heads=kv_heads * group, kv_heads=kv_heads, dim_head=draw(st.sampled_from(dim_heads)),
      dtype=draw(st.sampled_from(dtypes)), is_causal=draw(st.booleans()),
      alibi=alibi, window=window,
      segments=draw(st.sampled_from([None, None, "packed", "shuffled"])), query_offset=offset,
      traced_offset=draw(st.booleans()), shared_kv=draw(st.booleans()),
      scale=draw(st.sampled_from([None, 0.3])), seed=draw(st.integers(0, 9)),
      dslopes=alibi and draw(st.booleans()))


@st.composite
def variants(draw, case: Case) -> Case:
  """The same program on other inputs: what is not a shape or known when it is compiled."""
  changes = dict(seed=draw(st.integers(0, 10**6)))
  if case.segments:
    changes["segments"] = draw(st.sampled_from(["packed", "shuffled"]))
  if case.traced_offset:
    changes["query_offset"] = draw(st.integers(-case.num_queries - 3, case.num_keys + 3))
  return dataclasses.replace(case, **changes)


def variations(case: Case, number: int):
  """The case and others of its program: as `variants`, of which a single example is the simplest.

  Where segments and offset, which decide what is visible, can't vary, the case alone.
  """
  yield case
  rng = np.random.default_rng(case.num_queries)
  for seed in range(1, number if case.segments or case.traced_offset else 1):
    offset = int(rng.integers(-case.num_queries - 3, case.num_keys + 3))
    yield dataclasses.replace(
        case, seed=seed, segments=case.segments and ("shuffled" if seed % 2 else "packed"),
        query_offset=offset if case.traced_offset else case.query_offset)


def inputs(case: Case) -> dict:
  """Random arrays of a case, as a backend's `forward` takes them, and dout.

  Values are rounded to the case's dtype: the oracle computes with the same numbers.
  """
  rng = np.random.default_rng(case.seed)

  def normal(length, heads):
    shape = (case.batch, length, heads, case.dim_head)
    return jnp.asarray(rng.normal(size=shape).astype(jnp.dtype(case.dtype)))

  def ids(length):
    drawn = rng.integers(0, 3, (case.batch, length))
    drawn = np.sort(drawn) if case.segments == "packed" else drawn
    return jnp.asarray(drawn.astype(np.int32))

  offset = jnp.asarray(case.query_offset, jnp.int32) if case.traced_offset else case.query_offset
  segments = (ids(case.num_queries), ids(case.num_keys)) if case.segments else None
  return dict(
      query=normal(case.num_queries, case.heads),
      key=normal(case.num_keys, case.kv_heads),
      value=None if case.shared_kv else normal(case.num_keys, case.kv_heads),
      dout=normal(case.num_queries, case.heads),
      options=dict(
          segment_ids=segments,
          alibi_slopes=jnp.asarray(alibi_slopes(case.heads)) if case.alibi else None,
          query_offset=offset, is_causal=case.is_causal,
          scale=case.dim_head**-0.5 if case.scale is None else case.scale, window=case.window))


GRADIENTS = ("dquery", "dkey", "dvalue", "dslopes")


def named(gradients) -> dict:
  """A backend's gradients by their names, those of the slopes over all sequences."""
  found = dict(zip(GRADIENTS, gradients))
  return found | {name: found[name].sum(0) for name in GRADIENTS[3:] if name in found}


# Every case is a compilation; optimizing it would cost more than it saves.
@functools.partial(jax.jit, static_argnames=("is_causal", "scale", "window"),
                   compiler_options={"xla_backend_optimization_level": 0})
def reference(query, key, value, dout, *, segment_ids, alibi_slopes, query_offset, is_causal,
              scale, window):
  """The formula of `xla.attend` in the arrays' dtype: out and all gradients by name."""
  def f(query, key, value, alibi_slopes):
    return xla.attend(
        query, key, key if value is None else value, query_offset + jnp.arange(query.shape[1]),
        jnp.arange(key.shape[1]), segment_ids, is_causal=is_causal, alibi_slopes=alibi_slopes,
        scale=scale, window=window)

  out, pull = jax.vjp(f, query, key, value, alibi_slopes)
  return dict(zip(("out", *GRADIENTS), (out, *pull(dout)), strict=True))


def exact(case: Case, arrays: dict) -> dict:
  """The results in float64, by numpy: out, lse and the gradients; also "dslopes_size"."""
  query, key, value, dout = (None if arrays[name] is None else np.asarray(arrays[name], np.float64)
                             for name in ("query", "key", "value", "dout"))
  group, options = case.heads // case.kv_heads, arrays["options"]
  keys = np.repeat(key, group, 2)
  values = keys if value is None else np.repeat(value, group, 2)
  scale = options["scale"]
  scores = scale * np.einsum("bthd,bshd->bhts", query, keys)
  distance = (np.arange(case.num_keys) - int(options["query_offset"])
              - np.arange(case.num_queries)[:, None])
  if case.alibi:
    slopes = np.asarray(options["alibi_slopes"], np.float64)
    scores += slopes[:, None, None] * distance
  visible = np.ones(scores.shape[:1] + distance.shape, bool)
  if case.is_causal:
    visible &= distance <= 0
  if case.window is not None:
    visible &= (distance >= -case.window[0]) & (distance <= case.window[1])
  if case.segments:
    query_ids, key_ids = (np.asarray(ids) for ids in options["segment_ids"])
    visible &= query_ids[:, :, None] == key_ids[:, None, :]
  scores = np.where(visible[:, None], scores, -np.inf)
  top = scores.max(-1, keepdims=True)
  with np.errstate(divide="ignore"):
    lse = np.log(np.exp(scores - np.where(np.isfinite(top), top, 0)).sum(-1, keepdims=True)) + top
  weights = np.exp(scores - np.where(np.isfinite(lse), lse, 0))
  out = np.einsum("bhts,bshd->bthd", weights, values)
  dweights = np.einsum("bthd,bshd->bhts", dout, values)
  delta = np.einsum("bthd,bthd->bht", out, dout)[..., None]
  dscores = weights * (dweights - delta)
  dslopes = (dscores * distance).sum((0, 2, 3))
  # Each row's share, had nothing in it been subtracted; roundings of the rows are independent.
  size = (weights * (np.abs(dweights) + np.abs(delta)) * np.abs(distance)).sum(-1)
  size = np.sqrt(np.square(size).sum((0, 2)))
  dscores *= scale
  of_each_group = lambda x: x.reshape(*x.shape[:2], case.kv_heads, group, -1).sum(3)
  dkey = of_each_group(np.einsum("bhts,bthd->bshd", dscores, query))
  dvalue = of_each_group(np.einsum("bhts,bthd->bshd", weights, dout))
  if value is None:
    dkey, dvalue = dkey + dvalue, None
  return dict(out=out, lse=lse[..., 0], dquery=np.einsum("bhts,bshd->bthd", dscores, keys),
              dkey=dkey, dvalue=dvalue, dslopes=dslopes, dslopes_size=size)


def _cancelled(name, arrays) -> float:
  """Size of what is subtracted in a gradient, which may itself be zero: one key has weight 1."""
  other = {"dquery": "key", "dkey": "query"}.get(name)
  if other is None:
    return 0.0
  deviation = lambda x: float(np.std(np.asarray(x, np.float64)))
  value = arrays["key"] if arrays["value"] is None else arrays["value"]
  dweights = deviation(arrays["dout"]) * deviation(value) * value.shape[-1]**0.5
  return abs(arrays["options"]["scale"]) * dweights * float(np.abs(arrays[other]).max())


def errors(case: Case, arrays: dict, results: dict) -> dict[str, str]:
  """Which results are out of bounds, and how far.

  Args:
    case: what was computed.
    arrays: its `inputs`.
    results: any of "out", "lse" and `GRADIENTS`, as the backend returned them.
  """
  want, found = exact(case, arrays), {}
  data = {name: arrays[name] for name in ("query", "key", "value", "dout")}
  # Asked for only where an error is above the floor: each is a compilation.
  rough = functools.cache(lambda: reference(**data, **arrays["options"]))
  largest_lse = np.abs(want["lse"][np.isfinite(want["lse"])]).max(initial=0)
  for name, got in results.items():
    if name == "lse":
      if not np.allclose(np.asarray(got, np.float64), want["lse"], rtol=2e-3, atol=2e-3):
        found[name] = "differs by more than 2e-3"
      continue
    if want[name] is None:
      assert got is None, f"{name} must be None where the value is the key"
      continue
    dtype = "float32" if name == "dslopes" else case.dtype
    assert got.shape == want[name].shape and got.dtype == jnp.dtype(dtype), name
    # A few roundings of the largest value. In float32 they are those of the computation, not of its
    # result. Those grow with lse, a float32 that weights are recomputed from: it is rounded when
    # summed and to base e and back with both constants, five times half an eps; the rest is the
    # scores'.
    roundings = 8 + 3 * largest_lse if case.dtype == "float32" else 2
    largest = np.abs(want["dslopes_size" if name == "dslopes" else name]).max(initial=0)
    floor = roundings * bound.eps(case.dtype) * largest
    # The kernels keep `out` rounded to this dtype. Over many keys that is less than what the XLA
    # path rounds, 0.9 of its error from 4 keys on; over 2 keys it was up to 2.2 times that.
    kept = bound.eps(case.dtype) / case.num_keys
    floor += max(16 * bound.eps("float32"), kept) * _cancelled(name, arrays)
    if excess := bound.excess(got, want[name], lambda: rough()[name], floor=floor):
      found[name] = excess
  return found


def check(case: Case, arrays: dict, results: dict) -> None:
  bound.check(errors(case, arrays, results), case)
