"""Integers beyond 32 bits: ids by equality, offsets and lengths by where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku.kernels import decode_attention, flash_attention, parallel_attention_ffn
from palm_haiku.kernels.core import integers
from tests.kernels import draws

VALUES = [0, 1, 7, -1, 7 + 2**32, -2**31, 2**31, 2**31 - 1, 2**32 - 1, 2**63 - 1, -2**63, 3 - 2**32,
          2**63, 2**64 - 1]
WIDTHS = ["int8", "uint32", "int32", "int64", "uint64"]


def ids(dtype, n):
  limits = np.iinfo(dtype)
  values = [x for x in VALUES if limits.min <= x <= limits.max]
  return np.resize(np.array(values, dtype), (1, n))


@pytest.mark.parametrize("key_dtype", WIDTHS)
def test_ids_keep_their_order_and_their_equality(key_dtype):
  key = ids(key_dtype, 9)
  with jax.enable_x64(True):
    traced = jax.jit(lambda pairs, key: [integers.same_ids(query, key) for query in pairs])(
        [ids(dtype, 14) for dtype in WIDTHS], key)
    for dtype, pair in zip(WIDTHS, traced):
      query = ids(dtype, 14)
      mixed = integers.same_ids(jnp.asarray(query), key)
      for got in (pair, mixed, integers.same_ids(query, key)):
        assert all(x.dtype == jnp.int32 for x in got)
        given = [int(x) for x in (*query[0], *key[0])]
        small = [int(x) for x in (*got[0][0], *got[1][0])]
        order = lambda numbers: [[(a > b) - (a < b) for a in numbers] for b in numbers]
        assert order(given) == order(small), (dtype, key_dtype)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_numbers_are_clamped_before_they_are_cut(dtype):
  numbers = ids(dtype, 14)[0]
  want = [min(max(int(x), -3), 50) for x in numbers]
  assert integers.clamped(numbers, -3, 50).tolist() == want
  with jax.enable_x64(True):
    assert integers.clamped(jnp.asarray(numbers), -3, 50).tolist() == want


def test_documents_far_apart_do_not_see_each_other():
  query = draws.normal(0, (1, 8, 1, 16))
  attend = lambda ids: flash_attention(query, query, query, is_causal=False, segment_ids=ids)
  far = np.array([[7] * 4 + [7 + 2**32] * 4])
  want = attend(jnp.array([[7] * 4 + [8] * 4]))
  np.testing.assert_array_equal(attend(far), want)
  np.testing.assert_array_equal(attend((far, far.astype(np.uint64))), want)
  with jax.enable_x64(True):
    np.testing.assert_allclose(jax.jit(attend)(jnp.asarray(far)), want, atol=1e-6)


@pytest.mark.parametrize("offset", [2**32, np.int64(2**32), np.uint64(2**63), -2**40])
def test_an_offset_far_away_sees_nothing(offset):
  query = draws.normal(0, (1, 8, 1, 16))
  attend = lambda offset: flash_attention(query, query, query, local_window_size=(2, 0),
                                          query_offset=offset)
  assert not attend(offset).any()
  if offset < 2**63:
    with jax.enable_x64(True):
      assert not jax.jit(attend)(jnp.int64(int(offset))).any()


def test_a_length_or_an_offset_beyond_the_cache():
  query, cache = jnp.ones((1, 1, 2, 16)), jnp.ones((1, 16, 1, 16))
  for length in (2**32 + 3, -2**32 + 3):
    with pytest.raises(ValueError, match=f"length {length} is outside the cache"):
      decode_attention(query, cache, cache, np.array([length]))
    with jax.enable_x64(True):
      out = jax.jit(lambda n: decode_attention(query, cache, cache, n))(jnp.array([length]))
      assert jnp.isnan(out).all()
  weights = dict(norm=jnp.ones(8), query=jnp.ones((8, 2, 4)), key=jnp.ones((8, 4)),
                 gate=jnp.ones((8, 8)), up=jnp.ones((8, 8)), attn_out=jnp.ones((2, 4, 8)),
                 ff_out=jnp.ones((8, 8)))
  with pytest.raises(ValueError, match="query_offset must fit in 32 bits; got 4294967296"):
    parallel_attention_ffn(jnp.ones((1, 8)), weights, query_offset=2**32)
