"""The XLA path, against a numpy version of the formula in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from palm_haiku.kernels import alibi_slopes, flash_attention
from palm_haiku.kernels.attention import xla
from tests.kernels import draws


def numpy_attention(q, k, v, *, scale, causal, slopes, q_segments, k_segments, window, offset):
  heads, group = q.shape[2], q.shape[2] // k.shape[2]
  out = np.zeros(q.shape)
  for b, h, i in np.ndindex(q.shape[0], heads, q.shape[1]):
    position = offset + i
    seen = [j for j in range(k.shape[1])
            if (not causal or j <= position)
            and (window is None or -window[0] <= j - position <= window[1])
            and (q_segments is None or q_segments[b, i] == k_segments[b, j])]
    if not seen:
      continue
    keys, values = k[b, seen, h // group], v[b, seen, h // group]
    s = scale * keys @ q[b, i, h]
    if slopes is not None:
      s += slopes[h] * (np.array(seen) - position)
    p = np.exp(s - s.max())
    out[b, i, h] = p @ values / p.sum()
  return out


@st.composite
def cases(draw):
  kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (1, 8), (2, 2), (3, 1)]))
  num_queries, num_keys = draw(st.tuples(st.integers(1, 19), st.integers(1, 23)))
  return dict(
      heads=kv_heads * group, kv_heads=kv_heads, num_queries=num_queries, num_keys=num_keys,
      dim_head=draw(st.sampled_from([1, 4, 6])), causal=draw(st.booleans()),
      alibi=draw(st.booleans()), segments=draw(st.booleans()),
      window=draw(st.none() | st.tuples(st.integers(0, 6), st.integers(0, 6))),
      offset=draw(st.integers(-5, 9)), traced_offset=draw(st.booleans()),
      shared=draw(st.booleans()), block_q=draw(st.sampled_from([3, 8, 32])),
      seed=draw(st.integers(0, 9)))


def check_against_numpy(case):
  rng = np.random.default_rng(case["seed"])
  q = rng.normal(size=(2, case["num_queries"], case["heads"], case["dim_head"]))
  k, v = rng.normal(size=(2, 2, case["num_keys"], case["kv_heads"], case["dim_head"]))
  v = k if case["shared"] else v
  slopes = alibi_slopes(case["heads"]).astype(np.float64) if case["alibi"] else None
  segments = (np.sort(rng.integers(0, 3, (2, case["num_queries"]))),
              np.sort(rng.integers(0, 3, (2, case["num_keys"])))) if case["segments"] else None
  want = numpy_attention(
      q, k, v, scale=0.3, causal=case["causal"], slopes=slopes, window=case["window"],
      q_segments=segments and segments[0], k_segments=segments and segments[1],
      offset=case["offset"])
  with jax.enable_x64(True):
    offset = dict(query_offset=case["offset"])
    traced, static = (offset, {}) if case["traced_offset"] else ({}, offset)
    got = jax.jit(functools.partial(
        xla.attention, is_causal=case["causal"], scale=0.3, window=case["window"],
        block_q=case["block_q"], span=2 * case["block_q"], **static))(
            q, k, v, alibi_slopes=slopes, segment_ids=segments, **traced)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, want, atol=1e-12)


@settings(max_examples=4)
@given(cases())
def test_matches_numpy_in_float64(case):
  check_against_numpy(case)


@pytest.mark.full
@settings(max_examples=30)
@given(cases())
def test_matches_numpy_in_more_cases(case):
  check_against_numpy(case)


def random_qkv(num_queries=40, num_keys=None, heads=3, kv_heads=1, dim_head=8, lead=(2,),
               dtype=jnp.float32):
  num_keys = num_keys or num_queries
  return (draws.normal(0, (*lead, num_queries, heads, dim_head), dtype),
          draws.normal(1, (*lead, num_keys, kv_heads, dim_head), dtype),
          draws.normal(2, (*lead, num_keys, kv_heads, dim_head), dtype))


@pytest.mark.full
@pytest.mark.parametrize("options", [
    dict(alibi_slopes=alibi_slopes(3)),
    dict(local_window_size=(20, 0)),
    dict(is_causal=False, alibi_slopes=alibi_slopes(3)),
], ids=["alibi", "window", "bidirectional"])
def test_blocks_and_their_gradients_equal_the_formula(options):
  q, k, v = random_qkv(num_queries=700)  # several blocks and spans, the last one partial

  def with_blocks(block_q):
    def f(q, k, v):
      window = options.get("local_window_size")
      out = xla.attention(
          q, k, v, is_causal=options.get("is_causal", True), scale=0.3, segment_ids=None,
          alibi_slopes=options.get("alibi_slopes"), window=window, query_offset=0,
          block_q=block_q, span=128)
      return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out
    return jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(q, k, v)

  chex.assert_trees_all_close(with_blocks(64), with_blocks(1024), atol=2e-4)


@pytest.mark.full
def test_gradients_of_every_order():
  with jax.enable_x64(True):
    q, k, v = random_qkv(num_queries=7, lead=(1,), dtype=jnp.float64)
    f = jax.jit(lambda q, k, v: flash_attention(q, k, v, alibi_slopes=alibi_slopes(3)).sum())
    jax.test_util.check_grads(f, (q, k, v), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize("num_queries", [
    pytest.param(1, marks=pytest.mark.full), 5, pytest.param(300, marks=pytest.mark.full)])
def test_no_gradient_flows_from_the_future(num_queries):
  q, k, v = random_qkv(num_queries=num_queries, lead=())
  row = num_queries // 2
  f = lambda k, v: flash_attention(q, k, v)[row].sum()
  for gradient in jax.grad(f, argnums=(0, 1))(k, v):
    assert not np.any(gradient[row + 1:])
    assert num_queries == 1 or np.all(np.any(np.asarray(gradient[: row + 1]) != 0, axis=(1, 2)))


def test_alibi_depends_on_distance_alone_and_is_exact_far_out():
  q, k, v = random_qkv(num_queries=32)
  slopes = alibi_slopes(3)
  attend = jax.jit(lambda positions: xla.attend(
      q, k, v, positions, positions, None, is_causal=True, alibi_slopes=slopes, scale=8**-0.5,
      window=None))
  near = attend(jnp.arange(32))
  np.testing.assert_allclose(flash_attention(q, k, v, alibi_slopes=slopes), near, atol=1e-6)
  # The same keys, 2^20 positions later, behind keys that a window hides.
  np.testing.assert_array_equal(near, attend(2**20 + jnp.arange(32)))
  assert np.abs(near - flash_attention(q, k, v)).max() > 1e-2


@pytest.mark.full
def test_packed_segments_equal_separate_sequences():
  q, k, v = random_qkv(num_queries=300)
  ids = jnp.broadcast_to(jnp.arange(300) >= 130, (2, 300)).astype(jnp.int32)
  slopes = alibi_slopes(3)
  packed = flash_attention(q, k, v, segment_ids=ids, alibi_slopes=slopes)
  apart = [flash_attention(*(x[:, rows] for x in (q, k, v)), alibi_slopes=slopes)
           for rows in (slice(0, 130), slice(130, 300))]
  np.testing.assert_allclose(packed, jnp.concatenate(apart, 1), atol=1e-5)


def test_a_row_that_sees_nothing_is_zero_with_zero_gradient():
  q, k, v = random_qkv(num_queries=6)
  ids = jnp.zeros((2, 6), jnp.int32)
  f = jax.jit(lambda q, k, v: flash_attention(q, k, v, segment_ids=(ids.at[:, 2].set(7), ids)))
  out = f(q, k, v)
  assert not np.any(out[:, 2]) and np.all(np.any(out[:, 3] != 0, axis=-1))
  gradients = jax.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2))(q, k, v)
  assert not np.any(gradients[0][:, 2])
  chex.assert_tree_all_finite(gradients)


@pytest.mark.full
@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
def test_low_precision_inputs_accumulate_in_float32(dtype, tolerance):
  q, k, v = random_qkv(num_queries=200, dtype=dtype)
  out = flash_attention(q, k, v)
  assert out.dtype == dtype
  want = flash_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
  np.testing.assert_allclose(out.astype(jnp.float32), want, atol=tolerance)


@pytest.mark.full
def test_leading_dimensions_and_vmap():
  q, k, v = random_qkv(num_queries=5, lead=(2, 3))
  want = flash_attention(q, k, v)
  assert want.shape == q.shape
  np.testing.assert_allclose(flash_attention(q[1, 2], k[1, 2], v[1, 2]), want[1, 2], atol=1e-6)
  np.testing.assert_allclose(jax.vmap(flash_attention)(q, k, v), want, atol=1e-6)


@pytest.mark.full
def test_memory_grows_with_the_length_not_its_square():
  def temporaries(length):
    q, k, v = (jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (4, 1, 1))
    grad = jax.grad(lambda *x: flash_attention(*x).sum(), argnums=(0, 1, 2))
    return jax.jit(grad).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

  # Both have the most spans that there are.
  assert temporaries(16384) < 2.6 * temporaries(8192)


@pytest.mark.parametrize("change, message", [
    (dict(query=(5, 3, 8)), "agree in leading dimensions"),
    (dict(key=(2, 5, 1, 4), value=(2, 5, 1, 4)), "agree in leading dimensions and dim_head"),
    (dict(value=(2, 6, 1, 8)), "key and value must have one shape"),
    (dict(key=(2, 5, 2, 8), value=(2, 5, 2, 8)), "2 key/value heads do not divide 3"),
    (dict(key=(2, 0, 1, 8), value=(2, 0, 1, 8)), "no dimension may be empty"),
    (dict(query=(5, 8)), r"query must be \[..., length, heads, dim_head\]"),
    (dict(alibi_slopes=alibi_slopes(4)), r"alibi_slopes must be \[3\]"),
    (dict(segment_ids=np.zeros((2, 4), int)), r"segment_ids must be \(2, 5\)"),
    (dict(segment_ids=(np.zeros((2, 5), int),)), "a pair of them, of queries and of keys; got 1"),
    (dict(segment_ids=[[0] * 5] * 2), "segment_ids must be arrays of integers; got list"),
    (dict(local_window_size=-1), "must not be negative"),
    (dict(local_window_size=1.5), r"an integer or two, \(left, right\); got 1.5"),
    (dict(local_window_size=(1, 2, 3)), r"an integer or two, \(left, right\); got \(1, 2, 3\)"),
    (dict(dtype=jnp.int32), "query must be floating point"),
    (dict(dtype=jnp.float8_e4m3fn), "16 bits or more; got float8_e4m3fn"),
    (dict(query_offset=0.0), "query_offset must be one integer"),
    (dict(implementation="cuda"), "implementation must be one of"),
])
def test_bad_input_is_named(change, message):
  shapes = dict(query=(2, 5, 3, 8), key=(2, 5, 1, 8), value=(2, 5, 1, 8))
  dtype = change.pop("dtype", jnp.float32)
  arrays = {name: jnp.zeros(change.pop(name, shape), dtype) for name, shape in shapes.items()}
  with pytest.raises(ValueError, match=message):
    flash_attention(**arrays, **change)


def test_mixed_dtypes_are_refused():
  q, k, v = random_qkv()
  with pytest.raises(ValueError, match="one dtype"):
    flash_attention(q, k.astype(jnp.bfloat16), v)
