"""kernels.interpret: on a CPU, kernels asked for by name give XLA's values and gradients."""

import functools
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from palm_haiku.kernels import (
  decode_attention,
  flash_attention,
  interpret,
  interpreters,
  linear_cross_entropy,
)
from palm_haiku.kernels.interpreters import mode
from palm_haiku.kernels.triton import call as triton_call

needs_triton = pytest.mark.skipif(bool(triton_call.problem()), reason=f"{triton_call.problem()}")


def normal(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape).astype(jnp.bfloat16)


def check(call, implementation):
  """`call(implementation)` inside of contexts is XLA's, and outside of them refused."""
  want = [np.asarray(x, np.float32) for x in jax.tree.leaves(call("xla"))]
  for _ in range(2):
    with pytest.raises(ValueError, match=r"needs a device of .*run it in kernels\.interpret\(\)"):
      call(implementation)
    with interpret():
      got = call(implementation)
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
      assert np.linalg.norm(np.asarray(a, np.float32) - b) < 0.01 * np.linalg.norm(b)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("implementation", [
    pytest.param("triton", marks=needs_triton),
    pytest.param("mosaic_tpu", marks=pytest.mark.full),
    pytest.param("mosaic_gpu", marks=pytest.mark.full)])
def test_values_and_gradients_are_those_of_xla(implementation, jitted):
  def loss(query, key, implementation):
    out = flash_attention(query, key, key, implementation=implementation)
    return jnp.square(out.astype(jnp.float32)).sum(), out

  f = jax.value_and_grad(loss, (0, 1), has_aux=True)
  f = jax.jit(f, static_argnums=2) if jitted else f
  check(functools.partial(f, normal(1, 40, 2, 64), normal(1, 40, 1, 64)), implementation)


def decode(implementation):
  cache = normal(1, 16, 1, 64)
  return decode_attention(
      normal(1, 1, 2, 64), cache, cache, np.array([9]), implementation=implementation)


def loss(implementation):
  return linear_cross_entropy(
      normal(8, 128), normal(128, 128), np.arange(8) + 9, implementation=implementation)


@pytest.mark.parametrize("call, implementation", [(loss, "mosaic_tpu"), (decode, "mosaic_gpu")])
def test_a_program_of_one_side_is_not_taken_on_the_other(call, implementation):
  check(call, implementation)


def test_the_missing_triton_is_named(monkeypatch):
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  message = "flash_attention: triton needs triton, .* pip install 'triton>="
  with interpret(), pytest.raises(ValueError, match=message):
    flash_attention(*[normal(1, 4, 1, 16)] * 3, implementation="triton")


def test_a_race_raises_also_if_another_kernel_follows():
  def call(semantics, x):
    return pl.pallas_call(
        lambda x, out: out.__setitem__(..., x[...]), grid=(2,), interpret=mode.mosaic_tpu(cores=2),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)), out_shape=x,
        compiler_params=pltpu.CompilerParams(dimension_semantics=(semantics,)))(x)

  x = jnp.zeros((16, 128))
  with interpret(detect_races=True):
    call("arbitrary", x)
  with pytest.raises(interpreters.Race), interpret(detect_races=True):
    call("parallel", x)
    call("arbitrary", x)
