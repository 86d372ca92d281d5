"""The rule for `vmap` of what works on rows."""

import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku.kernels.core.vmap import folding_vmap


def test_mapped_rows_become_more_rows():
  seen = []

  def per_row(rows, _):
    x, y = rows
    seen.append((x.shape, y.shape))
    return x.sum(-1) + y, {"product": x * y[:, None]}

  folded = lambda *rows: folding_vmap(per_row)(rows, ())
  x, y = jnp.arange(24.0).reshape(2, 3, 4), jnp.arange(3.0)
  total, products = jax.vmap(folded, in_axes=(0, None))(x, y)
  np.testing.assert_array_equal(total, x.sum(-1) + y)
  np.testing.assert_array_equal(products["product"], x * y[:, None])
  assert seen[-1] == ((6, 4), (6,))
  # Twice over, the second axis not in front.
  twice = jax.vmap(jax.vmap(folded), in_axes=(3, None))
  z = jnp.arange(120.0).reshape(2, 3, 4, 5)
  total, _ = twice(z, jnp.stack([y, y]))
  np.testing.assert_array_equal(total, jnp.moveaxis(z, 3, 0).sum(-1) + y)
  assert seen[-1] == ((30, 4), (30,))
