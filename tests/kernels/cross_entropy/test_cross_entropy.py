"""The fused loss, against a numpy version of the formula in float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from palm_haiku.kernels import linear_cross_entropy
from palm_haiku.kernels.cross_entropy import xla
from tests.kernels import draws


def numpy_loss(x, embedding, targets, *, z_loss, scale, weights, dloss, dlog_z):
  """Loss, log Z, and the gradients of sum(dloss * loss + dlog_z * log_z)."""
  logits = scale * x @ embedding.T
  top = logits.max(-1, keepdims=True)
  log_z = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
  rows = np.arange(len(x))
  loss = weights * (log_z - logits[rows, targets] + z_loss * log_z**2)
  slope = weights * dloss
  dlogits = np.exp(logits - log_z[:, None]) * (
      slope * (1 + 2 * z_loss * log_z) + dlog_z)[:, None]
  dlogits[rows, targets] -= slope
  return loss, log_z, scale * dlogits @ embedding, scale * dlogits.T @ x


@settings(max_examples=12)
@given(num_tokens=st.integers(1, 40), vocabulary=st.integers(1, 90), dim=st.integers(1, 9),
       weighted=st.sampled_from(["no", "some", "none"]), z_loss=st.sampled_from([0.0, 0.1]),
       block=st.sampled_from([1, 7, 16, 64]), seed=st.integers(0, 9))
def test_matches_numpy_in_float64(num_tokens, vocabulary, dim, weighted, z_loss, block, seed):
  rng = np.random.default_rng(seed)
  x, embedding = rng.normal(size=(num_tokens, dim)), rng.normal(size=(vocabulary, dim))
  targets = rng.choice([0, vocabulary - 1, rng.integers(vocabulary)], num_tokens)
  weights = {"no": np.ones(num_tokens), "none": np.zeros(num_tokens),
             "some": rng.integers(0, 3, num_tokens) / 2.0}[weighted]
  dloss, dlog_z = rng.normal(size=(2, num_tokens))
  want = numpy_loss(x, embedding, targets, z_loss=z_loss, scale=0.7, weights=weights,
                    dloss=dloss, dlog_z=dlog_z)
  before = xla.BLOCK_LOGITS
  xla.BLOCK_LOGITS = block * vocabulary
  try:
    with jax.enable_x64(True):
      f = lambda x, embedding: linear_cross_entropy(
          x, embedding, jnp.asarray(targets), z_loss=z_loss, scale=0.7,
          weights=None if weighted == "no" else jnp.asarray(weights))

      @jax.jit
      def value_and_gradients(x, embedding, *cotangents):
        out, pull = jax.vjp(f, x, embedding)
        return *out, *pull(cotangents)

      got = value_and_gradients(x, embedding, dloss, dlog_z)
  finally:
    xla.BLOCK_LOGITS = before
  for result, expected in zip(got, want, strict=True):
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, expected, atol=1e-12)


full = functools.partial(pytest.param, marks=pytest.mark.full)


def random_problem(lead=(8, 6), vocabulary=50, dim=16, dtype=jnp.float32):
  return (draws.normal(0, (*lead, dim), dtype),
          draws.normal(1, (vocabulary, dim)),
          draws.integers(2, lead, 0, vocabulary))


def total(x, embedding, targets, **options):
  loss, log_z = linear_cross_entropy(x, embedding, targets, z_loss=1e-2, scale=0.25, **options)
  return (loss * jnp.cos(jnp.arange(loss.size).reshape(loss.shape))).sum() + log_z.sum()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("vocabulary", [50, full(48), full(3)])
def test_a_mesh_divides_tokens_and_vocabulary(kind, vocabulary):
  x, embedding, targets = random_problem(vocabulary=vocabulary)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  sharded = place(x, "data"), place(embedding), place(targets, "data")
  f = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
  want = f(x, embedding, targets)
  chex.assert_trees_all_close(f(*sharded), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [
    P("data", "model"), P(("data", "model")), P("model"), P(None, "data")], ids=str)
@pytest.mark.parametrize("vocabulary", [3, 50])
@pytest.mark.full
def test_tokens_may_be_divided_over_the_model_axis(spec, vocabulary):
  x, embedding, targets = random_problem(lead=(8, 4), vocabulary=vocabulary)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  f = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
  want = f(x, embedding, targets)
  got = f(place(x, *spec), place(embedding), place(targets, *spec))
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_second_derivatives_where_a_device_has_no_rows_of_the_vocabulary():
  x, embedding, targets = random_problem(lead=(4,), vocabulary=5)
  f = jax.grad(lambda x: jnp.square(jax.grad(total)(x, embedding, targets)).sum())
  want = jax.jit(f)(x)
  with jax.set_mesh(jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))):
    chex.assert_trees_all_close(jax.jit(f)(x), want, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_weights_is_the_loss():
  x, embedding, targets = random_problem(lead=(5,))
  loss, _ = jax.jit(linear_cross_entropy)(x, embedding, targets)
  total = lambda weights: linear_cross_entropy(x, embedding, targets, weights=weights)[0].sum()
  gradient = jax.jit(jax.grad(total))
  for weights in (jnp.zeros(5), jnp.ones(5)):
    np.testing.assert_allclose(gradient(weights), loss, rtol=1e-6)


@pytest.mark.parametrize("dtype, vocabulary", [("uint8", 256), ("uint8", 300), ("int16", 40_000)])
def test_narrow_targets(dtype, vocabulary):
  x, embedding, _ = random_problem(lead=(5,), vocabulary=vocabulary)
  targets = jnp.array([0, 5, 44, 100, 127])
  want = linear_cross_entropy(x, embedding, targets)
  chex.assert_trees_all_equal(linear_cross_entropy(x, embedding, targets.astype(dtype)), want)


def test_logits_do_not_exist():
  shapes = (jax.ShapeDtypeStruct((4096, 64), jnp.bfloat16),
            jax.ShapeDtypeStruct((32_000, 64), jnp.float32),
            jax.ShapeDtypeStruct((4096,), jnp.int32))
  compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
  logits = 4096 * 32_000 * 4
  assert compiled.memory_analysis().temp_size_in_bytes < logits / 5


def test_low_precision_accumulates_in_float32():
  x, embedding, targets = random_problem(lead=(300,), vocabulary=700, dtype=jnp.bfloat16)
  before, xla.BLOCK_LOGITS = xla.BLOCK_LOGITS, 10 * 700
  try:
    got = jax.jit(jax.grad(total, argnums=1))(x, embedding, targets)
  finally:
    xla.BLOCK_LOGITS = before
  want = jax.jit(jax.grad(total, argnums=1))(x.astype(jnp.float32), embedding, targets)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())


def test_a_target_outside_the_vocabulary():
  x, embedding, targets = random_problem(lead=(5,))
  for wrong in (-1, 50):
    bad = targets.at[2].set(wrong)
    with pytest.raises(ValueError, match=f"target {wrong} is outside the vocabulary of 50"):
      linear_cross_entropy(x, embedding, bad)
    loss, _ = jax.jit(linear_cross_entropy)(x, embedding, bad)
    np.testing.assert_array_equal(np.isnan(loss), np.arange(5) == 2)
    # A token that does not count may have any target.
    weights = jnp.ones(5).at[2].set(0)
    f = lambda x: linear_cross_entropy(x, embedding, bad, weights=weights)[0].sum()
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(f))(x))


@pytest.mark.parametrize("change, message", [
    (dict(x=np.zeros((5, 7), np.float32)), "agree in their last dimension"),
    (dict(embedding=np.zeros((50, 4, 16), np.float32)), "embedding .V, D."),
    (dict(targets=np.zeros(4, int)), r"targets must be \(5,\)"),
    (dict(targets=np.zeros(5)), "targets must be integers"),
    (dict(weights=np.ones((5, 1))), r"weights must be \(5,\)"),
    (dict(weights=-np.ones(5)), "weights must not be negative; got -1"),
    (dict(x=np.zeros((5, 16), int)), "x must be floating point"),
    (dict(implementation="mosaic_gpu"), "mosaic_gpu needs bfloat16 or float16; got float32"),
])
def test_bad_input_is_named(change, message):
  x, embedding, targets = random_problem(lead=(5,))
  with pytest.raises(ValueError, match=message):
    linear_cross_entropy(**(dict(x=x, embedding=embedding, targets=targets) | change))
