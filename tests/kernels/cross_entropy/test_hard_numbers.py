"""The loss and its gradients where roundings that are harmless elsewhere are not: beside XLA's.

The logits' gradient g adds up to a number near 0 for each token, and is stored in the dtype of x.
Rows of the embedding that have something in common make its rounding the largest part of a
gradient, as does a log Z that is rounded before it is subtracted from large logits. The loss of a
token that is predicted well is a small difference of two large numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from palm_haiku.kernels import interpret, linear_cross_entropy
from palm_haiku.kernels.triton import call as triton_call

TOKENS, VOCABULARY, DIM = 20, 300, 64


def inputs(dtype):
  """{what is hard: (x, embedding, targets, weights)}, all of one shape for one program."""
  rng = np.random.default_rng(0)
  x, embedding = rng.normal(size=(TOKENS, DIM)), rng.normal(size=(VOCABULARY, DIM))
  targets, ones = rng.integers(0, VOCABULARY, TOKENS), np.ones(TOKENS)
  channel = embedding.copy()
  channel[:, 3] = 100
  common = embedding + 10 * rng.normal(size=DIM)
  ramp = np.linspace(0, 2, TOKENS)
  situations = {
      "a mean over many tokens": (0.2 * x, embedding, targets, ones / 2**20),
      "large logits": (40 * x, 40 * embedding, targets, ones),
      "large logits of what was predicted": (
          6 * x, 6 * embedding, np.argmax(x @ embedding.T, 1), ones),
      "a target's own direction": (50 * embedding[targets], embedding, targets, ones),
      "a channel of all rows": (0.3 * x, channel, targets, ramp),
      "a common mean": (0.1 * x, common, targets, ramp),
      "neither": (0.3 * x, embedding, targets, ramp)}
  return {name: (jnp.asarray(x, dtype), jnp.asarray(embedding, dtype), jnp.asarray(targets),
                 jnp.asarray(weights, jnp.float32))
          for name, (x, embedding, targets, weights) in situations.items()}


def exact(x, embedding, targets, weights, z_loss):
  """(losses, log Z, dx, dembedding) of the weighted sum of losses, in float64."""
  x, embedding, weights = (np.asarray(a, np.float64) for a in (x, embedding, weights))
  logits = x @ embedding.T
  top = logits.max(1)
  log_z = top + np.log(np.exp(logits - top[:, None]).sum(1))
  loss = (log_z - logits[np.arange(TOKENS), targets] + z_loss * log_z**2) * weights
  g = np.exp(logits - log_z[:, None]) * (weights * (1 + 2 * z_loss * log_z))[:, None]
  g[np.arange(TOKENS), targets] -= weights
  return loss, log_z, g @ embedding, g.T @ x


def gradients(implementation, z_loss, scale=1.0):
  def total(x, embedding, targets, weights):
    loss, log_z = linear_cross_entropy(
        x, embedding, targets, z_loss=z_loss, weights=weights, scale=scale,
        implementation=implementation)
    return loss.sum(), (loss, log_z)

  def f(*arrays):
    (_, values), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(*arrays)
    return *values, *gradients
  return jax.jit(f)


def check(got, compare, want, dtype, name):
  """At most twice XLA's error, or a rounding of the result; of a loss, one of log Z beside that."""
  for i, (result, base, right) in enumerate(zip(got, compare, want, strict=True)):
    result, base = (np.asarray(a, np.float64) - right for a in (result, base))
    floor = float(jnp.finfo(dtype if i > 1 else np.float32).eps)
    for measure in (lambda a: np.abs(a).max(), lambda a: np.sqrt(np.square(a).mean())):
      allowed = max(2 * measure(base), floor * measure(right))
      if i == 0:
        allowed += floor / 2 * measure(want[1])
      assert measure(result) <= allowed, (
          name, ("loss", "log_z", "dx", "dembedding")[i], measure(result), allowed)


@pytest.mark.parametrize("z_loss", [0.0, pytest.param(1e-4, marks=pytest.mark.full)])
@pytest.mark.parametrize("implementation, dtype", [
    ("triton", "float32"), ("triton", "bfloat16"), ("triton", "float16"),
    pytest.param("mosaic_tpu", "float32", marks=pytest.mark.full),
    pytest.param("mosaic_tpu", "bfloat16", marks=pytest.mark.full),
    pytest.param("mosaic_gpu", "bfloat16", marks=pytest.mark.full),
    pytest.param("mosaic_gpu", "float16", marks=pytest.mark.full)])
def test_gradients_are_as_exact_as_xlas(implementation, dtype, z_loss):
  if implementation == "triton" and triton_call.problem():
    pytest.skip(f"needs {triton_call.problem()}")
  function, compare = gradients(implementation, z_loss), gradients("xla", z_loss)
  for name, arrays in inputs(dtype).items():
    with interpret():
      got = jax.block_until_ready(function(*arrays))
    check(got, compare(*arrays), exact(*arrays, z_loss), dtype, name)


@pytest.mark.full
def test_over_a_mesh_that_divides_the_vocabulary():
  mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
  function, compare = gradients("triton", 1e-4), gradients("xla", 1e-4)
  for name, arrays in inputs("bfloat16").items():
    with interpret(), jax.set_mesh(mesh):
      got, base = jax.block_until_ready((function(*arrays), compare(*arrays)))
    check(got, base, exact(*arrays, 1e-4), "bfloat16", name)


def test_a_tiny_weight_beside_a_large_one_in_float16():
  x, embedding, targets, _ = inputs("float16")["neither"]
  weights = jnp.where(jnp.arange(TOKENS) == 3, 1e4, 1.0)
  arrays = x, embedding, targets, weights
  with interpret():
    got = gradients("triton", 0.0)(*arrays)
  check(got, gradients("xla", 0.0)(*arrays), exact(*arrays, 0.0), "float16", "weights")
