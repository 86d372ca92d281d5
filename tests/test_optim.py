import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from palm_haiku import PaLM, PaLMConfig, optim


def tree(seed=0):
  """Parameters shaped as a model's: a table, a gain, and two stacked layers."""
  normal = lambda *shape: np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return {
      "palm": {"embedding": normal(5, 4), "norm": np.ones(4, np.float32)},
      "palm/layers/parallel_block": {
          "norm": np.ones((2, 4), np.float32), "query": normal(2, 4, 3) * 0.5},
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


def gradients(step):
  """Above and below the norm at which they are clipped."""
  return jax.tree.map(lambda x: np.float32((0.05, 0.5, 3.0)[step % 3]) * x, tree(seed=step + 1))


def assert_optimizes_as(optimizer, restated, steps):
  """Compares parameters after each step with `restated(key, value, step, gradient, norm)`.

  That is called for each parameter of each layer; the norm is that of all gradients.
  """
  params = tree()
  params["palm"]["norm"] = np.zeros(4, np.float32)  # Its root mean square is below any floor.
  state, update = jax.jit(optimizer.init)(params), jax.jit(optimizer.update)
  apply = jax.jit(optax.apply_updates)
  want = {}
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    layers = x if "/layers/" in path[0].key else [x]
    want |= {(path[0].key, path[1].key, i): np.float64(x) for i, x in enumerate(layers)}
  for step in range(steps):
    grads = gradients(step)
    updates, state = update(grads, state, params)
    params = apply(params, updates)
    norm = np.sqrt(sum((np.float64(g) ** 2).sum() for g in jax.tree.leaves(grads)))
    for (module, name, i), w in want.items():
      pick = lambda tree: tree[module][name][i] if "/layers/" in module else tree[module][name]
      w = restated((module, name, i), w, step, np.float64(pick(grads)), norm)
      want[module, name, i] = w
      np.testing.assert_allclose(pick(params), w, rtol=2e-5, atol=1e-6, err_msg=f"{name} {step}")


def adamw(steps, learning_rate=3e-3, warmup=100, b2=0.99, weight_decay=0.1, clip=1.0):
  """AdamW with its schedule (arXiv:1711.05101, algorithm 2), restated."""
  moments, warmup = {}, min(warmup, steps // 10)

  def update(key, w, step, g, norm):
    m, v = moments.get(key, (0, 0))
    g = g * min(1, clip / norm)
    moments[key] = m, v = 0.9 * m + 0.1 * g, b2 * v + (1 - b2) * g**2
    step_size = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - b2 ** (step + 1))) + 1e-8)
    decay = 0 if key[1] == "norm" else weight_decay
    return w - rate(step, steps, learning_rate, warmup) * (step_size + decay * w)

  return update


def rate(step, steps, highest, warmup):
  if step < warmup:
    return highest * step / warmup
  cosine = np.cos(np.pi * min(1, (step - warmup) / (steps - warmup)))
  return highest * (0.1 + 0.9 * (1 + cosine) / 2)


@pytest.mark.parametrize("options", [
    dict(steps=30), dict(steps=60, learning_rate=0.02, warmup=4, b2=0.9, weight_decay=0.5,
                         clip=0.3)], ids=["defaults", "other options"])
def test_adamw_is_its_formula(options):
  assert_optimizes_as(optim.adamw(**options), adamw(**options), 7)


def test_the_schedule_is_its_formula():
  for steps, warmup in ((1000, 100), (1000, 30), (50, 100), (9, 100)):
    got = optim.schedule(2.0, steps=steps, warmup=warmup)(jnp.arange(1002))
    want = [rate(k, steps, 2.0, min(warmup, steps // 10)) for k in range(1002)]
    np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parametrize("options", [
    {}, dict(learning_rate=0.03, constant_steps=2, clip=0.3)], ids=["defaults", "other options"])
def test_palm_is_the_papers_formula(options):
  """Adafactor without factoring (arXiv:2204.02311, section 5), restated."""
  highest, constant, clip = {"learning_rate": 1e-2, "constant_steps": 10_000, "clip": 1.0,
                             **options}.values()
  moments = {}

  def update(key, w, step, g, norm):
    m, v = moments.get(key, (0, 0))
    g = g * min(1, clip / norm)
    beta2 = 1 - (step + 1) ** -0.8
    v = beta2 * v + (1 - beta2) * g**2
    m = 0.9 * m + 0.1 * g / np.sqrt(v + 1e-30)
    moments[key] = m, v
    rate = highest * min(1, (constant / (step + 1)) ** 0.5)
    return w - rate * max(np.sqrt((w**2).mean()), 1e-3) * m - rate**2 * w

  assert_optimizes_as(optim.palm(**options), update, 6)


def test_palm_schedule_is_continuous():
  """1e-2 for 10,000 steps, then 1/sqrt(k)."""
  optimizer = optim.palm()
  state, update = optimizer.init(tree()), jax.jit(optimizer.update)

  def decay_at(step):
    # With no gradient, all that is left of the update is the weight decay.
    late = jax.tree.map(
        lambda x: jnp.full_like(x, step - 1) if x.dtype == jnp.int32 else x, state)
    zeros = jax.tree.map(jnp.zeros_like, tree())
    updates, _ = update(zeros, late, tree())
    return float(-updates["palm"]["norm"][0]) ** 0.5

  np.testing.assert_allclose([decay_at(step) for step in (1, 10_000, 10_001, 40_000)],
                             [1e-2, 1e-2, 10_001**-0.5, 40_000**-0.5], rtol=2e-6)
