"""A small model trains alike whichever kernels its layers are made of."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from palm_haiku import PaLM, PaLMConfig
from palm_haiku.kernels import interpret
from palm_haiku.kernels.triton import call as triton_call
from tests.kernels.parallel_block.test_parallel_block import LITE

IMPLEMENTATIONS = ("mosaic_tpu", "mosaic_gpu", pytest.param("triton", marks=pytest.mark.skipif(
    bool(triton_call.problem()), reason=f"needs {triton_call.problem()}")))
GROUPED = dict(kv_heads=2, dim_ff=200, qk_norm="layer", window=5, global_every=2)
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 17))


def losses(architecture, implementation, dtype, steps, restart=None):
  """The loss before each step; from step `restart[0]` on, with the implementation restart[1]."""
  config = PaLMConfig(128, 128, 3, 2, 64, ff_mult=1, **architecture)
  optimizer = optax.adam(1e-2)

  def program(implementation):
    model = hk.without_apply_rng(hk.transform(lambda tokens: PaLM.from_config(
        config, dtype=dtype, implementation=implementation)(tokens)))

    def loss(params):
      logits = model.apply(params, TOKENS[:, :-1])
      return optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:]).mean()

    @jax.jit
    def step(params, state):
      value, gradients = jax.value_and_grad(loss)(params)
      updates, state = optimizer.update(gradients, state)
      return value, optax.apply_updates(params, updates), state

    return model, step

  model, step = program("xla")
  params = model.init(jax.random.key(0), TOKENS[:, :-1])
  state, found = optimizer.init(params), []
  _, step = program(implementation)
  for i in range(steps):
    if restart and i == restart[0]:
      _, step = program(restart[1])
    value, params, state = step(params, state)
    found.append(float(value))
  return np.array(found)


def assert_same_curve(architecture, implementation, steps, **more):
  exact = functools.partial(losses, architecture, "xla", steps=steps)
  want, rough = exact(dtype=jnp.float32), exact(dtype=jnp.bfloat16)
  assert want[-1] < want[0] - 0.5  # it does train
  with interpret():
    got = losses(architecture, implementation, jnp.bfloat16, steps, **more)
  noise = np.abs(rough - want).max()
  assert np.abs(got - want).max() < max(3 * noise, 0.01), (got, rough, want)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("architecture", [{}, LITE, GROUPED], ids=["palm", "palm-lite", "grouped"])
def test_three_layers_train_to_the_same_curve(architecture, implementation):
  assert_same_curve(architecture, implementation, steps=8)


@pytest.mark.slow
def test_what_one_implementation_began_another_continues():
  assert_same_curve({}, "mosaic_tpu", steps=6, restart=(3, "xla"))
