"""Values without influence are so when they are NaN or infinite: 0 times NaN is NaN."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku.kernels import (
  decode_attention,
  interpreters,
  linear_cross_entropy,
  parallel_attention_ffn,
)
from palm_haiku.kernels.decode import configs, splits
from palm_haiku.kernels.triton import call as triton_call
from palm_haiku.loss import next_token_loss

needs_triton = pytest.mark.skipif(bool(triton_call.problem()), reason=f"{triton_call.problem()}")


def normal(*shape, dtype="float32", seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def interpreted(implementation):
  """The interpreters; Hopper's with races found, also of products."""
  hopper = implementation == "mosaic_gpu"
  return interpreters.running(interpreters.Mode(detect_races=hopper, check_products=hopper))


OF_THE_LOSS = [
    ("xla", "float32"), ("xla", "float16"), pytest.param("triton", "bfloat16", marks=needs_triton),
    pytest.param("mosaic_tpu", "float32", marks=pytest.mark.full),
    pytest.param("mosaic_gpu", "float16", marks=pytest.mark.full)]


@pytest.mark.parametrize("implementation, dtype", OF_THE_LOSS)
def test_a_token_of_weight_0_adds_nothing_whatever_its_state(implementation, dtype):
  x, embedding = normal(3, 64, dtype=dtype), normal(30, 64, dtype=dtype, seed=1)
  targets = jnp.array([1, 0, 2])

  @jax.jit
  def results(x, weights):
    def total(x, embedding, weights):
      loss, log_z = linear_cross_entropy(
          x, embedding, targets, weights=weights, z_loss=1e-2, scale=0.1,
          implementation=implementation)
      return loss.sum(), log_z
    return jax.value_and_grad(total, (0, 1, 2), has_aux=True)(x, embedding, weights)

  weights = jnp.array([1, 0, 0.5])
  with interpreted(implementation):
    (loss, log_z), (dx, dembedding, dweights) = results(x, weights)
    for number in (np.nan, np.inf, -np.inf, float(jnp.finfo(dtype).max)):
      (got, _), (*gradients, of_weights) = results(x.at[1, 3].set(number), weights)
      chex.assert_trees_all_equal((got, gradients), (loss, [dx, dembedding]))
      chex.assert_trees_all_equal(of_weights[::2], dweights[::2])
      zero, gradients = results(jnp.full_like(x, number), jnp.zeros(3))
      chex.assert_tree_all_finite((zero, gradients))
      assert zero[0] == 0 and not any(jnp.any(g) for g in gradients[:2])
  assert not jnp.any(dx[1]) and log_z[1] > 0


def test_a_token_of_weight_0_keeps_its_log_z():
  x, embedding = normal(3, 8), normal(30, 8, seed=1)
  of = lambda weights: linear_cross_entropy(x, embedding, jnp.arange(3), weights=weights)[1]
  chex.assert_trees_all_equal(of(jnp.array([1, 0, 1])), of(None))


def test_logits_of_weight_0_add_nothing():
  logits, weights = normal(3, 7), jnp.array([1.0, 0, 2])
  f = jax.value_and_grad(lambda logits: next_token_loss(
      logits, jnp.array([1, -1, 2]), weights=weights, z_loss=0.1).total)
  for number in (np.nan, np.inf):
    chex.assert_trees_all_equal(f(logits.at[1].set(number)), f(logits))


def caches(dtype, int8, shared):
  """A decode problem whose unfilled positions are zero, and the mask of these."""
  lengths, shape = np.array([70, 16, 0, 133]), (4, 136, 1, 64)
  keys = {}
  for i, name in enumerate(("key", "value")[:1 if shared else 2]):
    numbers = normal(*shape, seed=i)
    keys[f"{name}_cache"] = (10 * numbers).astype("int8") if int8 else numbers.astype(dtype)
    if int8:
      keys[f"{name}_scales"] = jnp.abs(normal(*shape[:-1], seed=i + 5)) / 50
  unfilled = np.arange(shape[1]) >= lengths[:, None]
  return lengths, normal(4, 2, 4, 64, dtype=dtype), keys, unfilled


OF_DECODE = [("xla", "float32", False, True), ("xla", "bfloat16", True, False)] + [
    pytest.param(name, dtype, int8, shared, marks=marks)
    for name, marks, dtypes in (("triton", needs_triton, ("float16", "bfloat16")),
                                ("mosaic_tpu", pytest.mark.full, ("float32", "bfloat16")),
                                ("mosaic_gpu", pytest.mark.full, ("float16", "bfloat16")))
    for dtype, int8, shared in zip(dtypes * 2, (False, True) * 2, (True, False, False, True))]


@pytest.mark.parametrize("implementation, dtype, int8, shared", OF_DECODE)
def test_what_a_cache_does_not_hold_yet_has_no_influence(
    implementation, dtype, int8, shared, monkeypatch):
  monkeypatch.setattr(splits, "POSITIONS_PER_ROW", 8)  # several parts
  blocks = configs.TpuConfig(size=128, slots=3, chunk=128, cores=1)
  monkeypatch.setattr(configs, "mosaic_tpu", lambda *_: blocks)
  lengths, query, keys, unfilled = caches(dtype, int8, shared)

  @jax.jit
  def attend(query, keys):
    keys = keys if not shared else keys | dict(value_cache=keys["key_cache"])
    return decode_attention(query, lengths=jnp.asarray(lengths), implementation=implementation,
                            **keys)

  poison = lambda number, where: {
      name: array if array.dtype == jnp.int8 else jnp.where(
          where.reshape(*where.shape, *[1] * (array.ndim - 2)), number, array)
      for name, array in keys.items()}
  with interpreted(implementation):
    want = jax.block_until_ready(attend(query, poison(0, unfilled)))
    chex.assert_tree_all_finite(want)
    for number in (np.nan, np.inf):
      got = jax.block_until_ready(attend(query, poison(number, unfilled)))
      chex.assert_trees_all_equal(got, want)
    # Nor has a sequence that is NaN, on those before and after it.
    other = unfilled | (np.arange(4) == 3)[:, None]
    got = jax.block_until_ready(attend(query, poison(np.nan, other)))
    chex.assert_trees_all_equal(got[:3], want[:3])
    assert jnp.all(jnp.isnan(got[3]))
    other = unfilled | (np.arange(4) == 0)[:, None]
    got = jax.block_until_ready(attend(query, poison(np.nan, other)))
    chex.assert_trees_all_equal(got[1:], want[1:])


@pytest.mark.parametrize("offset", [5, jnp.array([5, 2])], ids=["one offset", "offsets"])
def test_what_the_blocks_cache_does_not_hold_yet_has_no_influence(offset):
  shapes = dict(norm=(16,), query=(16, 2, 8), key=(16, 8), value=(16, 8), gate=(16, 24),
                up=(16, 24), attn_out=(2, 8, 16), ff_out=(24, 16))
  params = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
  x, cache = normal(2, 3, 16), normal(2, 2, 12, 8, seed=20)
  unfilled = np.arange(12)[:, None] >= np.asarray(offset + 3)[..., None, None]

  @jax.jit
  def output(x, params, cache):
    y, _ = parallel_attention_ffn(x, params, query_offset=offset, kv_cache=tuple(cache))
    return y.sum(), y

  f = output if jnp.ndim(offset) else jax.value_and_grad(output, (0, 1, 2), has_aux=True)
  want = f(x, params, jnp.where(unfilled, 0, cache))
  for number in (np.nan, np.inf):
    chex.assert_trees_all_equal(f(x, params, jnp.where(unfilled, number, cache)), want)
