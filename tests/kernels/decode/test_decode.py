"""The public op: its equality with full attention, its errors, transforms and meshes."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from palm_haiku.kernels import alibi_slopes, decode, decode_attention, flash_attention
from palm_haiku.kernels.decode import xla
from tests.kernels import draws
from tests.kernels.decode import contract


def problem(lead=(4,), num_queries=2, max_len=11, heads=4, kv_heads=1, dim=8, dtype=jnp.float32):
  normal = lambda seed, *shape: draws.normal(seed, (*lead, *shape), dtype)
  return (normal(0, num_queries, heads, dim), normal(1, max_len, kv_heads, dim),
          normal(2, max_len, kv_heads, dim),
          draws.integers(3, lead, num_queries, max_len + 1))


@pytest.fixture
def plain(monkeypatch):
  """A backend in plain JAX, so that `fused` runs here."""
  module = types.ModuleType("plain")
  module.unsupported = lambda query, key, value, *, chip: (
      None if query.shape[-1] % 2 == 0 else f"an even dim_head; got {query.shape[-1]}")

  def forward(query, key, value, lengths, *, chip, **options):
    assert query.ndim == 4 and lengths.shape == query.shape[:1]
    return xla.attend(query, key, value, lengths, **options)

  module.forward = forward
  monkeypatch.setitem(decode.OP.backends, "mosaic_gpu", lambda: module)
  monkeypatch.setattr("palm_haiku.kernels.core.guards._PLATFORMS", {"mosaic_gpu": ("cpu",)})
  return module


@pytest.mark.full
@settings(max_examples=6)
@given(case=contract.cases(dims=(4, 6), dtypes=("bfloat16", "float32", "float16"), max_len=40))
def test_the_contract_holds_for_the_op(case):
  a = contract.inputs(case)

  @jax.jit
  def op(query, key, value, *rest, **options):  # Two arguments of a jit are two arrays.
    value = key if value is None else value
    return decode_attention(query, key, value, *rest, scale=case.scale, **options,
                            local_window_size=None if case.left is None else (case.left, 0))

  contract.check(case, a, op(
      a["query"], a["key"], a["value"], a["lengths"], alibi_slopes=a["alibi_slopes"],
      key_scales=a["key_scales"], value_scales=a["value_scales"]))


@pytest.mark.parametrize("heads, kv_heads", [
    (4, 2), pytest.param(4, 1, marks=pytest.mark.full), pytest.param(3, 3, marks=pytest.mark.full)])
@pytest.mark.parametrize("alibi", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("num_queries", [pytest.param(1, marks=pytest.mark.full), 3])
def test_equals_full_attention_at_every_position(heads, kv_heads, alibi, num_queries):
  query, key, value, _ = problem((2,), 11, 11, heads, kv_heads)
  slopes = alibi_slopes(heads) if alibi else None
  full = flash_attention(query, key, value, alibi_slopes=slopes)
  op = jax.jit(functools.partial(decode_attention, alibi_slopes=slopes))
  for end in range(num_queries, 12):
    start = end - num_queries
    got = op(query[:, start:end], key, value, jnp.full(2, end))
    np.testing.assert_allclose(got, full[:, start:end], atol=2e-6)


@pytest.mark.parametrize("implementation", [
    pytest.param("xla", marks=pytest.mark.full), "mosaic_gpu"])
def test_jit_and_vmap(plain, implementation):
  query, key, value, lengths = problem((2, 3))
  slopes = alibi_slopes(4)
  f = jax.jit(lambda *a, s=slopes: decode_attention(
      *a, alibi_slopes=s, scale=0.3, implementation=implementation))
  close = lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6)
  want = f(query, key, value, lengths)
  close(want, decode_attention(query, key, value, lengths, alibi_slopes=slopes, scale=0.3))
  close(jax.vmap(f)(query, key, value, lengths), want)
  close(jax.vmap(jax.vmap(f))(query, key, value, lengths), want)
  one_cache = jax.vmap(f, in_axes=(0, None, None, None))(query, key[0], value[0], lengths[0])
  close(one_cache[1], f(query[1], key[0], value[0], lengths[0]))
  many = jax.vmap(lambda s: f(query, key, value, lengths, s=s))(jnp.stack([slopes, 2 * slopes]))
  close(many[1], f(query, key, value, lengths, s=2 * slopes))


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_a_window_is_that_of_full_attention(plain, implementation):
  query, key, value, _ = problem()
  lengths, slopes = jnp.array([2, 5, 8, 11]), alibi_slopes(4)
  got = decode_attention(query, key, value, lengths, alibi_slopes=slopes, local_window_size=(3, 0),
                         implementation=implementation)
  for b, length in enumerate(lengths.tolist()):
    want = flash_attention(query[b], key[b], value[b], query_offset=length - 2, is_causal=True,
                           alibi_slopes=slopes, local_window_size=(3, 0))
    np.testing.assert_allclose(got[b], want, atol=1e-6)


def test_a_window_as_long_as_the_cache_is_none(plain, monkeypatch):
  monkeypatch.setattr(plain, "forward", lambda query, *_, left, **__: query * (0 if left else 1))
  x = problem()
  for size, none in ((10, True), ((10, 0), True), (2**40, True), (9, False)):
    got = decode_attention(*x, local_window_size=size, implementation="mosaic_gpu")
    assert bool((got == x[0]).all()) == none


@pytest.mark.full
def test_a_value_that_is_the_key(plain):
  query, key, _, lengths = problem()
  for name in ("xla", "mosaic_gpu"):
    np.testing.assert_allclose(
        decode_attention(query, key, key, lengths, implementation=name),
        decode_attention(query, key, key + 0, lengths, implementation=name), atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize("kind", [pytest.param(AxisType.Auto, marks=pytest.mark.full),
                                  AxisType.Explicit])
@pytest.mark.parametrize("kv_heads", [pytest.param(1, marks=pytest.mark.full),
                                      pytest.param(2, marks=pytest.mark.full), 4])
def test_a_mesh_divides_sequences_and_heads(plain, kind, kv_heads, implementation):
  query, key, value, lengths = problem(kv_heads=kv_heads)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  f = lambda *a: decode_attention(*a, alibi_slopes=alibi_slopes(4), implementation=implementation)
  heads = "model" if kv_heads == 4 else None
  got = jax.jit(f)(place(query, "data", None, "model"), place(key, "data", None, heads),
                   place(value, "data", None, heads), place(lengths, "data"))
  np.testing.assert_allclose(got, decode_attention(
      query, key, value, lengths, alibi_slopes=alibi_slopes(4)), atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_a_length_that_no_cache_has(plain, implementation):
  query, key, value, _ = problem()
  f = lambda lengths: decode_attention(query, key, value, lengths, implementation=implementation)
  for lengths, wrong in (([0, 1, 12, 3], 12), ([0, -1, 2, 3], -1)):
    with pytest.raises(ValueError, match=f"length {wrong} is outside the cache of 11 positions"):
      f(jnp.array(lengths))
  got = jax.jit(f)(jnp.array([12, 11, -1, 0]))
  np.testing.assert_array_equal(np.isnan(got).all((1, 2, 3)), [True, False, True, False])
  assert np.all(np.isfinite(got[1])) and np.all(got[3] == 0)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_no_derivative(plain, jit, implementation):
  query, key, value, lengths = problem()
  f = lambda q, k, v, s: decode_attention(
      q, k, v, lengths, alibi_slopes=s, implementation=implementation).sum()
  f = jax.jit(f) if jit else f
  for argument in range(4):
    with pytest.raises(ValueError, match="no derivative; use flash_attention"):
      jax.grad(f, argnums=argument)(query, key, value, jnp.ones(4))


@pytest.mark.parametrize("change, message", [
    (dict(query=jnp.zeros((4, 2))), "query must be"),
    (dict(query=jnp.zeros((4, 2, 4, 8), int)), "query must be floating point"),
    (dict(query=jnp.zeros((4, 2, 4, 8), "bfloat16")), "caches must both be bfloat16"),
    (dict(query=jnp.zeros((4, 2, 4, 6))), "agree in leading dimensions and dim_head"),
    (dict(query=jnp.zeros((4, 12, 4, 8))), "12 queries do not fit in a cache of 11"),
    (dict(value_cache=jnp.zeros((4, 12, 1, 8))), "one shape"),
    (dict(key_cache=jnp.zeros((4, 11, 3, 8)), value_cache=jnp.zeros((4, 11, 3, 8))),
     "3 key/value heads do not divide 4"),
    (dict(lengths=jnp.ones(3, int)), "lengths must be"),
    (dict(lengths=jnp.ones(4)), "lengths must be integers"),
    (dict(alibi_slopes=jnp.ones(3)), "alibi_slopes must be"),
    (dict(key_scales=jnp.ones((4, 11, 1))), "key_scales must be given for int8 caches, and only"),
    (dict(key_cache=jnp.zeros((4, 11, 1, 8), "int8"), value_cache=jnp.ones((4, 11, 1, 8), "int8")),
     "key_scales must be given for int8"),
    (dict(key_cache=jnp.zeros((4, 11, 1, 8), "int8"), value_cache=jnp.ones((4, 11, 1, 8), "int8"),
          key_scales=jnp.ones((4, 11)), value_scales=jnp.ones((4, 11, 1))),
     "key_scales must be float32"),
])
def test_bad_input_is_one_clear_line(change, message):
  names = ("query", "key_cache", "value_cache", "lengths")
  with pytest.raises(ValueError, match=message) as error:
    decode_attention(**dict(zip(names, problem())) | change)
  assert "\n" not in str(error.value)


def test_a_named_backend_says_what_it_lacks(plain):
  with pytest.raises(ValueError, match="mosaic_gpu needs an even dim_head; got 5"):
    decode_attention(*problem(dim=5), implementation="mosaic_gpu")
