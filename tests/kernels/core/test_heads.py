"""Key heads where the devices that divide query heads do not divide them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from palm_haiku.kernels.core import heads
from tests.mutants import Mistake, planted


def check(axes, num_heads, kv_heads):
  """Each query head meets its key head: that of its group, of all heads."""
  mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
  names = tuple(axes)
  devices = int(np.prod(list(axes.values())))
  divided, _ = heads.key_heads(kv_heads, names, mesh)

  def met(query, key):
    key = key if divided else heads.own(key, 1, names, mesh)
    assert key.shape[1] == heads.held(kv_heads, devices)
    return query, jnp.repeat(key, query.shape[0] // key.shape[1], 1)

  query, key = jnp.arange(num_heads), jnp.arange(kv_heads)[None]
  query, key = jax.jit(jax.shard_map(
      met, mesh=mesh, in_specs=(P(names), P(None, divided or None)),
      out_specs=(P(names), P(None, names))))(query, key)
  np.testing.assert_array_equal(key[0], query // (num_heads // kv_heads))


CASES = [  # devices fewer than key heads, as many, more; groups cut by the edge of a device
    (dict(model=2), 8, 4), (dict(model=4), 8, 4), (dict(model=8), 8, 2), (dict(model=2), 6, 3),
    (dict(data=2, model=2), 12, 6), (dict(model=4), 4, 1), (dict(data=2, model=4), 8, 2)]


def test_a_device_holds_the_key_heads_of_its_query_heads():
  for case in CASES:
    check(*case)


@pytest.mark.parametrize("pattern, replacement, case", [
    (r"axis_index\(heads\)", "axis_index(heads[:1])", CASES[-1]), (r"\* count", "", CASES[3])])
def test_a_planted_mistake_is_noticed(pattern, replacement, case):
  with planted(heads, Mistake("first key head", pattern, replacement)), pytest.raises(
      AssertionError):
    check(*case)
