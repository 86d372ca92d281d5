import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from palm_haiku import PaLM, PaLMConfig, optim


def tree(seed=0):
  """Parameters shaped as a model's: a table, a gain, and two stacked layers."""
  keys = jax.random.split(jax.random.key(seed), 4)
  return {
      "palm": {"embedding": jax.random.normal(keys[0], (5, 4)), "norm": jnp.ones(4)},
      "palm/layers/parallel_block": {
          "norm": jnp.ones((2, 4)), "query": jax.random.normal(keys[1], (2, 4, 3)) * 0.5},
  }


def test_the_models_parameters_are_recognised():
  config = PaLMConfig(7, 8, 2, 3, 4, qk_norm=True)
  model = hk.transform(lambda tokens: PaLM.from_config(config)(tokens))
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(3, int))
  decayed = optim._matrices(params)
  assert decayed["palm"] == {"embedding": True, "norm": False}
  layers = decayed["palm/layers/parallel_block"]
  assert {name for name, is_matrix in layers.items() if not is_matrix} == {
      "norm", "query_scale", "key_scale"}


def test_palm_follows_the_papers_formulas():
  """Three steps, restated in numpy for one layer's matrix."""
  optimizer = optim.palm(1e-2, constant_steps=2, clip=1e9)
  params = tree()
  state = optimizer.init(params)
  w = np.asarray(params["palm/layers/parallel_block"]["query"][1], np.float64)
  v = m = np.zeros_like(w)
  for k in range(1, 4):
    grads = tree(seed=k)
    updates, state = jax.jit(optimizer.update)(grads, state, params)
    params = optax.apply_updates(params, updates)

    g = np.asarray(grads["palm/layers/parallel_block"]["query"][1], np.float64)
    beta2 = 1 - k**-0.8
    v = beta2 * v + (1 - beta2) * g**2
    m = 0.9 * m + 0.1 * g / np.sqrt(v)
    rate = 1e-2 * min(1, (2 / k) ** 0.5)
    w = w - rate * np.sqrt((w**2).mean()) * m - rate**2 * w
    np.testing.assert_allclose(
        params["palm/layers/parallel_block"]["query"][1], w, rtol=1e-5)


def test_palm_schedule_is_continuous():
  """1e-2 for 10,000 steps, then 1/sqrt(k)."""
  optimizer = optim.palm()
  state = optimizer.init(tree())

  def decay_at(step):
    # With no gradient, all that is left of the update is the weight decay.
    late = jax.tree.map(
        lambda x: jnp.full_like(x, step - 1) if x.dtype == jnp.int32 else x, state)
    zeros = jax.tree.map(jnp.zeros_like, tree())
    updates, _ = optimizer.update(zeros, late, tree())
    return float(-updates["palm"]["norm"][0]) ** 0.5

  np.testing.assert_allclose(decay_at(1), 1e-2, rtol=1e-4)
  np.testing.assert_allclose(decay_at(10_000), 1e-2, rtol=1e-4)
  np.testing.assert_allclose(decay_at(40_000), 40_000**-0.5, rtol=1e-4)


def test_both_clip_the_global_norm():
  for optimizer in (optim.palm(), optim.adamw(steps=10)):
    params, grads = tree(), tree(seed=1)
    loud = jax.tree.map(lambda g: 1e3 * g, grads)
    unit = jax.tree.map(lambda g: g / optax.tree.norm(grads), grads)
    once, _ = optimizer.update(loud, optimizer.init(params), params)
    want, _ = optimizer.update(unit, optimizer.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), once, want)


def test_adamw_warms_up_then_falls_to_a_tenth():
  optimizer = optim.adamw(1.0, steps=1000, weight_decay=0.0, clip=1e9)
  params = tree()
  state = optimizer.init(params)
  sizes = []
  update = jax.jit(optimizer.update)
  for _ in range(1000):
    updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    sizes.append(float(-updates["palm"]["norm"][0]))
  assert sizes[0] == 0 and np.argmax(sizes) == 100
  np.testing.assert_allclose([sizes[50], sizes[100], sizes[-1]], [0.5, 1.0, 0.1], rtol=1e-2)


def test_adamw_decays_matrices_only():
  optimizer = optim.adamw(1.0, steps=5)
  params = tree()
  state = optimizer.init(params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, state = optimizer.update(zeros, state, params)
  for module, weights in updates.items():
    for name, update in weights.items():
      assert np.any(update) == (name != "norm"), (module, name)
