import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku.loss import next_token_loss
from tests.kernels import draws


def random_case(shape=(2, 5), num_tokens=7):
  logits = 3 * draws.normal(0, (*shape, num_tokens))
  return logits, draws.integers(1, shape, 0, num_tokens)


def test_matches_numpy():
  logits, targets = random_case()
  weights = np.array([[1, 0, 2, 1, 0], [0, 0, 0, 1, 0.5]])
  loss = next_token_loss(logits, targets, weights=jnp.asarray(weights), z_loss=0.1)
  wide = np.asarray(logits, np.float64)
  log_z = np.log(np.exp(wide).sum(-1))
  nll = log_z - np.take_along_axis(wide, np.asarray(targets)[..., None], -1)[..., 0]
  mean = lambda x: (x * weights).sum() / weights.sum()
  np.testing.assert_allclose(loss.nll, mean(nll), rtol=1e-6)
  np.testing.assert_allclose(loss.log_z_squared, mean(log_z**2), rtol=1e-6)
  np.testing.assert_allclose(loss.total, mean(nll + 0.1 * log_z**2), rtol=1e-6)


def test_z_loss_pulls_the_normaliser_towards_one():
  logits, targets = random_case()
  gradient = jax.grad(lambda shift: next_token_loss(
      logits + shift, targets, z_loss=1e-4).total)(5.0)
  assert gradient > 0
  assert abs(jax.grad(lambda shift: next_token_loss(logits + shift, targets).total)(5.0)) < 1e-6


def test_all_weights_zero():
  logits, targets = random_case()
  loss, gradient = jax.value_and_grad(lambda x: next_token_loss(
      x, targets, weights=jnp.zeros((2, 5))).total)(logits)
  assert loss == 0 and not np.any(gradient)


@pytest.mark.parametrize("padding", [-100, -1, 7])
def test_targets_outside_the_vocabulary_count_only_with_a_weight(padding):
  logits, targets = random_case()
  weights = jnp.ones((2, 5)).at[1, 2:].set(0)
  padded = targets.at[1, 2:].set(padding)
  loss_of = lambda targets, weights: jax.value_and_grad(lambda x: next_token_loss(
      x, targets, weights=weights, z_loss=0.1).total)(logits)
  chex.assert_trees_all_equal(loss_of(padded, weights), loss_of(targets, weights))
  assert np.isnan(loss_of(padded, jnp.ones((2, 5)))[0])
  assert np.isnan(next_token_loss(logits, padded).total)


def test_targets_may_be_bytes():
  logits, targets = random_case(num_tokens=256)
  targets = targets.at[0, 0].set(255)
  assert next_token_loss(logits, targets.astype(jnp.uint8)) == next_token_loss(logits, targets)


def test_low_precision_logits_are_widened():
  logits, targets = random_case()
  logits = logits.astype(jnp.bfloat16)
  loss = next_token_loss(logits, targets)
  assert loss.total.dtype == jnp.float32
  np.testing.assert_allclose(loss.nll, next_token_loss(logits.astype(jnp.float32), targets).nll)


@pytest.mark.parametrize("inputs, message", [
    (dict(targets=jnp.zeros((2, 4), int)), r"targets must be \(2, 5\)"),
    (dict(weights=jnp.zeros((5,))), r"weights must be \(2, 5\)"),
])
def test_bad_shapes_are_named(inputs, message):
  logits, targets = random_case()
  with pytest.raises(ValueError, match=message):
    next_token_loss(logits, **(dict(targets=targets) | inputs))
