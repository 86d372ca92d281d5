"""The contract of decode attention: drawn cases, the oracle in float64, the floor of the bound.

A backend's test draws `cases(...)`, computes `inputs(case)`, and calls
`check(case, arrays, result)` with what its `forward` made of them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from palm_haiku.kernels import alibi_slopes
from palm_haiku.kernels.decode import xla
from tests.kernels import contract as bound


@dataclasses.dataclass(frozen=True)
class Case:
  """One call."""

  lengths: tuple[int, ...] = (5, 40)
  max_len: int = 40
  num_queries: int = 1
  heads: int = 8
  kv_heads: int = 1
  dim_head: int = 128
  dtype: str = "bfloat16"
  int8: bool = False
  shared: bool = False  # the values are the keys
  alibi: bool = True
  scale: float = 0.1
  left: int | None = None
  seed: int = 0


@st.composite
def cases(draw, *, dims=(64, 128), dtypes=("bfloat16", "float32"), max_len=300,
          heads=((1, 1), (8, 1), (3, 1), (4, 2), (3, 3))):
  """Cases as varied as the contract: lengths 0, 1, odd and full, fewer than the queries too."""
  max_len = draw(st.one_of(st.integers(4, max_len), st.sampled_from(
      [n for n in (16, 127, 128, 129, 256) if n <= max_len])))
  length = st.one_of(st.integers(0, max_len), st.sampled_from([0, 1, max_len - 1, max_len]))
  num_heads, kv_heads = draw(st.sampled_from(heads))
  return Case(
      lengths=tuple(draw(st.lists(length, min_size=1, max_size=3))), max_len=max_len,
      num_queries=draw(st.integers(1, 4)), heads=num_heads, kv_heads=kv_heads,
      dim_head=draw(st.sampled_from(dims)), dtype=draw(st.sampled_from(dtypes)),
      int8=draw(st.booleans()), shared=draw(st.booleans()), alibi=draw(st.booleans()),
      scale=draw(st.sampled_from([0.1, -0.2])),
      left=draw(st.one_of(st.none(), st.integers(0, max_len), st.sampled_from([0, 63, 64, 128]))),
      seed=draw(st.integers(0, 10**6)))


def inputs(case: Case) -> dict:
  """Random arrays of a case, by `xla.attend`'s names; what no query sees is large."""
  rng = np.random.default_rng(case.seed)
  cache = (len(case.lengths), case.max_len, case.kv_heads)
  position = np.arange(case.max_len)[:, None, None]
  lengths = np.reshape(case.lengths, (-1, 1, 1, 1))
  empty = position >= lengths
  if case.left is not None:
    empty |= position < lengths - case.num_queries - case.left

  # By numpy: JAX would compile it.
  rounded = lambda numbers, dtype: jnp.asarray(np.asarray(numbers).astype(jnp.dtype(dtype)))

  def one_cache():
    if case.int8:
      numbers = rng.integers(-127, 128, (*cache, case.dim_head))
      return (rounded(np.where(empty, 127, numbers), jnp.int8),
              rounded(rng.uniform(0.002, 0.02, cache), jnp.float32))
    numbers = rng.normal(size=(*cache, case.dim_head))
    return rounded(np.where(empty, 1e4, numbers), case.dtype), None

  key, key_scales = one_cache()
  value, value_scales = (None, None) if case.shared else one_cache()
  query = rng.normal(size=(len(case.lengths), case.num_queries, case.heads, case.dim_head))
  return dict(
      query=rounded(query, case.dtype), key=key, value=value,
      lengths=rounded(case.lengths, jnp.int32), key_scales=key_scales, value_scales=value_scales,
      alibi_slopes=rounded(alibi_slopes(case.heads), jnp.float32) if case.alibi else None)


def poisoned(case: Case, arrays: dict) -> dict:
  """The arrays with NaN in place of what no query sees, in an int8 cache in its scales."""
  position, lengths = np.arange(case.max_len)[:, None], np.reshape(case.lengths, (-1, 1, 1))
  unseen = position >= lengths
  if case.left is not None:
    unseen |= position < lengths - case.num_queries - case.left
  names = ("key_scales", "value_scales") if case.int8 else ("key", "value")
  return arrays | {
      name: jnp.where(unseen.reshape(*unseen.shape, *[1] * (x.ndim - 3)), jnp.nan, x)
      for name in names if (x := arrays[name]) is not None}


def exact(case: Case, arrays: dict) -> np.ndarray:
  """The result in float64, by numpy, one row at a time from the formula."""
  wide = {name: None if x is None else np.asarray(x, np.float64) for name, x in arrays.items()}
  key, value = wide["key"], wide["value"]
  if case.int8:
    key = key * wide["key_scales"][..., None]
    value = None if value is None else value * wide["value_scales"][..., None]
  value = key if value is None else value
  out = np.zeros(wide["query"].shape)
  for b, i, h in np.ndindex(out.shape[:3]):
    position = case.lengths[b] - case.num_queries + i
    if position < 0:
      continue
    first = 0 if case.left is None else max(position - case.left, 0)
    seen, kv_head = slice(first, position + 1), h // (case.heads // case.kv_heads)
    scores = case.scale * key[b, seen, kv_head] @ wide["query"][b, i, h]
    if case.alibi:
      scores += wide["alibi_slopes"][h] * (np.arange(first, position + 1) - position)
    weights = np.exp(scores - scores.max())
    out[b, i, h] = weights @ value[b, seen, kv_head] / weights.sum()
  return out


reference = jax.jit(xla.attend, static_argnames=("scale", "left"))


def errors(case: Case, arrays: dict, got) -> dict[str, str]:
  """Whether a result is out of bounds, and how far."""
  want = exact(case, arrays)
  assert got.shape == want.shape and got.dtype == case.dtype
  nothing = np.asarray(case.lengths)[:, None] - case.num_queries + np.arange(case.num_queries) < 0
  if np.any(np.asarray(got, np.float64)[nothing]):
    return dict(out="not 0 where a query sees nothing")
  rough = lambda: reference(**arrays, scale=case.scale, left=case.left)
  # A few roundings of the largest value, and of a sum in float32 of any order.
  floor = np.abs(want).max(initial=0) * (4 * bound.eps(case.dtype) + 8 * bound.eps("float32"))
  excess = bound.excess(got, want, rough, floor=floor)
  return dict(out=excess) if excess else {}


def check(case: Case, arrays: dict, got) -> None:
  bound.check(errors(case, arrays, got), case)
