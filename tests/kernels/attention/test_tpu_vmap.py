"""The TPU's attention under `vmap`, by what of it is mapped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku.kernels import flash_attention, interpret
from tests.kernels import draws


@pytest.mark.full
@pytest.mark.parametrize("mapped", ["", "ids", "offset", "slopes"])
def test_gradients_where_ids_offset_and_slopes_are_mapped_or_not(mapped):
  query, key, value = (draws.normal(i, (2, 1, 24, n, 64))
                       for i, n in enumerate((2, 1, 1)))
  others = dict(ids=jnp.arange(24)[None] // 10, offset=jnp.int32(2), slopes=jnp.array([0.5, 0.1]))
  axes = dict.fromkeys(others)
  if mapped:
    others[mapped] = jnp.stack([others[mapped], others[mapped] * 2])
    axes[mapped] = 0

  def gradients(implementation):
    def loss(query, key, value, others):
      out = flash_attention(
          query, key, value, segment_ids=others["ids"], query_offset=others["offset"],
          alibi_slopes=others["slopes"], implementation=implementation)
      return jnp.square(out).sum()

    loss_of = lambda query, key, value, slopes, others: loss(
        query, key, value, dict(others, slopes=slopes))
    per_example = lambda *x: jax.vmap(
        jax.value_and_grad(loss_of, (0, 1, 2, 3)), (0, 0, 0, axes["slopes"], axes))(
            *x[:3], x[3]["slopes"], x[3])
    return jax.jit(per_example)(query, key, value, others)

  with interpret():
    got = gradients("mosaic_tpu")
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients("xla"))):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)
