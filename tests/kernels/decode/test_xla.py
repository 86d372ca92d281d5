"""The XLA path, against a numpy version of the formula in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from palm_haiku.kernels import decode_attention
from palm_haiku.kernels.decode import xla
from tests.kernels.decode import contract
from tests.kernels.decode.contract import Case


@settings(max_examples=8)
@given(case=contract.cases(dims=(1, 6), dtypes=("float64",), max_len=23))
def test_the_formula_in_float64(case):
  with jax.enable_x64(True):
    arrays = contract.inputs(case)
    got = jax.jit(functools.partial(xla.attend, scale=case.scale, left=case.left))(**arrays)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, contract.exact(case, arrays), atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [
    ("float32", 1e-5), ("bfloat16", 3e-2), ("float16", 4e-3)])
@pytest.mark.parametrize("int8", [False, True])
def test_in_the_dtypes_of_a_model(dtype, tolerance, int8):
  case = Case(lengths=(0, 1, 63, 200), max_len=200, num_queries=3, dtype=dtype, int8=int8)
  arrays = contract.inputs(case)
  got = xla.attend(**arrays, scale=case.scale)
  assert got.dtype == dtype
  np.testing.assert_allclose(
      np.asarray(got, np.float64), contract.exact(case, arrays), atol=tolerance)


def test_alibi_is_exact_far_out():
  # By the difference of positions: slope * position alone would be off by its own rounding.
  max_len = 2**20 + 3
  query, key = jnp.zeros((1, 1, 1, 1)), jnp.zeros((1, max_len, 1, 1))
  value = jnp.zeros((1, max_len, 1, 1)).at[0, -2:, 0, 0].set(jnp.array([1.0, 0.0]))
  got = decode_attention(query, key, value, jnp.array([max_len]), alibi_slopes=jnp.array([0.37]),
                         implementation="xla")
  distance = np.arange(max_len, dtype=np.float64) - (max_len - 1)
  weights = np.exp(np.float64(np.float32(0.37)) * distance)
  np.testing.assert_allclose(got.item(), weights[-2] / weights.sum(), rtol=2e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_nothing_outside_of_a_window_has_influence(int8):
  case = Case(lengths=(5, 17, 0), max_len=20, dtype="float32", num_queries=2, left=3, int8=int8)
  arrays = contract.inputs(case)
  contract.check(case, arrays, xla.attend(
      **contract.poisoned(case, arrays), scale=case.scale, left=case.left))


def test_what_is_not_filled_has_no_influence():
  case = Case(lengths=(5, 17), max_len=20, dtype="float32")
  arrays = contract.inputs(case)
  short = arrays | {name: arrays[name][:, :17] for name in ("key", "value")}
  np.testing.assert_allclose(xla.attend(**arrays, scale=0.1), xla.attend(**short, scale=0.1),
                             rtol=1e-6, atol=1e-6)
