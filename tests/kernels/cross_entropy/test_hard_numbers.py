"""The loss and its gradients where roundings that are harmless elsewhere are not: beside XLA's.

The logits' gradient g adds up to a number near 0 for each token, and is stored in the dtype of x.
Rows of the embedding that have something in common make its rounding the largest part of a
gradient, as does a log Z that is rounded before it is subtracted from large logits. The loss of a
token that is predicted well is a small difference of two large numbers.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from palm_haiku.kernels import interpret, linear_cross_entropy
from palm_haiku.kernels.triton import call as triton_call

TOKENS, VOCABULARY, DIM = 20, 300, 64


def inputs(dtype, seed=0):
  """{what is hard: (x, embedding, targets, weights)}, all of one shape for one program."""
  rng = np.random.default_rng(seed)
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


@functools.cache
def xla_errors(dtype, z_loss, mesh=None):
  """{what is hard: (largest, root mean square) for each result}, the worst of some draws.

  Of one draw the largest error is that of one number, and as large as chance has it.
  """
  compare, worst = gradients("xla", z_loss), {}
  for seed in range(6):
    for name, arrays in inputs(dtype, seed).items():
      with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        base = compare(*arrays)
      errors = np.array([sizes(np.asarray(a, np.float64) - right) for a, right in zip(
          base, exact(*arrays, z_loss), strict=True)])
      worst[name] = np.maximum(worst.get(name, 0), errors)
  return worst


def sizes(array):
  return np.abs(array).max(), np.sqrt(np.square(array).mean())


def check(got, xla, want, dtype, name):
  """At most twice XLA's error, or a rounding of the result; of a loss, one of log Z beside that.

  Of log Z three: the logits are sums of 64 products in float32 as well.
  """
  for i, (result, base, right) in enumerate(zip(got, xla, want, strict=True)):
    floor = float(jnp.finfo(dtype if i > 1 else np.float32).eps) * (3 if i == 1 else 1)
    allowed = np.maximum(2 * base, floor * np.array(sizes(right)))
    if i == 0:
      allowed += floor * np.array(sizes(want[1]))
    error = np.array(sizes(np.asarray(result, np.float64) - right))
    assert (error <= allowed).all(), (
        name, ("loss", "log_z", "dx", "dembedding")[i], error, allowed)


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
  function, xla = gradients(implementation, z_loss), xla_errors(dtype, z_loss)
  for name, arrays in inputs(dtype).items():
    with interpret():
      got = jax.block_until_ready(function(*arrays))
    check(got, xla[name], exact(*arrays, z_loss), dtype, name)


@pytest.mark.full
def test_over_a_mesh_that_divides_the_vocabulary():
  mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
  function, xla = gradients("triton", 1e-4), xla_errors("bfloat16", 1e-4, mesh)
  for name, arrays in inputs("bfloat16").items():
    with interpret(), jax.set_mesh(mesh):
      got = jax.block_until_ready(function(*arrays))
    check(got, xla[name], exact(*arrays, 1e-4), "bfloat16", name)


def test_a_tiny_weight_beside_a_large_one_in_float16():
  x, embedding, targets, _ = inputs("float16")["neither"]
  weights = jnp.where(jnp.arange(TOKENS) == 3, 1e4, 1.0)
  arrays = x, embedding, targets, weights
  with interpret():
    got = gradients("triton", 0.0)(*arrays)
  want = exact(*arrays, 0.0)
  xla = [np.array(sizes(np.asarray(a, np.float64) - right)) for a, right in zip(
      gradients("xla", 0.0)(*arrays), want, strict=True)]
  check(got, xla, want, "float16", "weights")
