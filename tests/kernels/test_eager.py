"""Calls outside of jit: compiled once, where the arrays are, with checks of what is here."""

import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku import kernels
from tests.kernels import draws
from tests.short_runs import compilations


def array(*shape):
  return draws.normal(len(shape), shape)


def weights(dim=8):
  return dict(norm=array(dim), query=array(dim, 2, 4), key=array(dim, 4), gate=array(dim, 8),
              up=array(dim, 8), attn_out=array(2, 4, dim), ff_out=array(8, dim))


def calls():
  """Each op, with more rows than one block has: there XLA's paths are loops."""
  x, query, params = array(1, 70, 8), array(1, 70, 2, 4), weights()
  mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  heads = jax.NamedSharding(mesh, jax.P(None, None, "model"))
  slopes, ids = kernels.alibi_slopes(2), np.zeros((1, 70), np.int64)
  targets = np.zeros((1, 70), int)
  cache = array(1, 90, 1, 4)
  attend = lambda q: kernels.flash_attention(q, q, q, alibi_slopes=slopes, segment_ids=ids)
  loss = lambda x: kernels.linear_cross_entropy(x, params["norm"][None], targets)[0]
  block = lambda x: kernels.parallel_attention_ffn(x, params, alibi_slopes=slopes)
  return dict(
      attention=lambda: jax.grad(lambda q: attend(q).sum())(query),
      mapped=lambda: jax.vmap(attend)(query[None]),
      loss=lambda: jax.value_and_grad(lambda x: loss(x).sum())(x),
      decode=lambda: kernels.decode_attention(query[:, :1], cache, cache, np.array([70])),
      block=lambda: jax.grad(lambda x: block(x).sum())(x),
      divided=lambda: jax.grad(lambda q: kernels.flash_attention(
          q, q[:, :, :1], q[:, :, :1]).sum())(jax.device_put(query, heads)))


@pytest.mark.full
@pytest.mark.parametrize("name", calls())
def test_a_second_equal_call_compiles_nothing(name):
  call = calls()[name]
  call()
  with compilations() as programs:
    jax.block_until_ready(call())
  assert not programs


def test_a_loop_that_decodes_compiles_one_program():
  x, params, cache = array(1, 1, 8), weights(), (array(1, 9, 4),) * 2
  step = lambda i: kernels.parallel_attention_ffn(x, params, kv_cache=cache, query_offset=i)[0]
  step(1)
  with compilations() as programs:
    outs = [step(i) for i in range(2, 5)]
  assert not programs and not jnp.allclose(outs[0], outs[1])


def test_auto_looks_where_the_arrays_are():
  devices = jax.devices
  gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
  query = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
  here = jax.device_put(query, jax.devices()[0])
  x = jax.device_put(jnp.ones((1, 128, 64)), jax.devices()[0])
  with mock.patch.object(jax, "devices", lambda *a: devices(*a) if a else [gpu]):
    assert kernels.explain("flash_attention", query, query).implementation == "mosaic_gpu"
    assert kernels.explain("flash_attention", np.ones((1, 128, 2, 64), jnp.bfloat16),
                           query).implementation == "mosaic_gpu"
    assert kernels.explain("flash_attention", query, here).implementation == "xla"
    assert kernels.flash_attention(here, here, here).shape == here.shape
    # The attention in a block is where the block is.
    params = {name: w.astype(jnp.float32) for name, w in weights(64).items()}
    assert kernels.parallel_attention_ffn(x, params).shape == x.shape


def test_checks_read_no_array_of_other_processes():
  x, embedding = array(3, 8), array(5, 8)
  targets, cache = jnp.array([0, 1, 99]), array(1, 9, 1, 4)
  with mock.patch.object(type(x), "is_fully_addressable", property(lambda self: False)):
    loss, _ = kernels.linear_cross_entropy(x, embedding, targets, weights=jnp.ones(3))
    out = kernels.decode_attention(array(1, 1, 2, 4), cache, cache, jnp.array([99]))
    y, _ = kernels.parallel_attention_ffn(
        array(1, 1, 8), weights(), kv_cache=(cache[:, :, 0],) * 2, query_offset=jnp.int32(99))
  assert jnp.isnan(loss).tolist() == [False, False, True] and jnp.isnan(out).all()
  assert jnp.isfinite(y).all()
