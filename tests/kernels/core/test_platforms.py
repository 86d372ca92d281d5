"""Choices of `auto` when a program is lowered, and those that it leaves to plain JAX."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from palm_haiku import kernels
from palm_haiku.kernels.core import dispatch, platforms
from tests.kernels import draws

SLOPES = jnp.array([0.5, 0.1])


def array(*shape, dtype="bfloat16"):
  return draws.normal(len(shape), shape, dtype)


def ops():
  """Values, and gradients by all arguments where there are any."""
  attend = lambda q, slopes: kernels.flash_attention(q, q, q, alibi_slopes=slopes)
  loss = lambda x, e: kernels.linear_cross_entropy(x, e, jnp.arange(256)[None] % 300)[0]
  decode = lambda q, k: kernels.decode_attention(q, k, k, jnp.array([3, 100]))
  gradients = lambda f: jax.value_and_grad(
      lambda *arrays: f(*arrays).astype(jnp.float32).sum(), argnums=(0, 1))
  query = array(1, 128, 2, 64)
  return dict(
      attention=(attend, gradients(attend), (query, SLOPES)),
      loss=(loss, gradients(loss), (array(1, 256, 128), array(300, 128, dtype="float32"))),
      decode=(decode, decode, (array(2, 1, 2, 64), array(2, 128, 1, 64))))


@pytest.fixture
def hopper(monkeypatch):
  """A machine whose default device is an H100; programs run on its CPU."""
  devices, gpu = jax.devices, types.SimpleNamespace(
      platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
  monkeypatch.setattr(jax, "devices", lambda *a: devices(*a) if a else [gpu])


@pytest.mark.full
@pytest.mark.parametrize("name", ops())
def test_one_program_has_the_kernels_of_each_platform(name):
  value, _, arrays = ops()[name]
  program = export.export(jax.jit(value), platforms=("cpu", "cuda", "tpu"))(*arrays)
  assert "tpu_custom_call" in program.mlir_module()
  assert jnp.array_equal(program.call(*arrays), jax.jit(value)(*arrays))
  alone = export.export(jax.jit(value), platforms=("cpu",))(*arrays)
  assert "tpu_custom_call" not in alone.mlir_module() and "case" not in alone.mlir_module()


def modules_of(program):
  return {name for name in ("tpu_custom_call", "mosaic_gpu", "triton_kernel_call")
          if name in program.mlir_module()}


@pytest.mark.full
@pytest.mark.parametrize("name", ops())
def test_a_program_for_named_chips_has_their_kernels_and_gradients(name):
  _, f, arrays = ops()[name]
  program = jax.jit(f)
  want = program(*arrays)
  with kernels.export_for("h100", "v5e"):
    exported = export.export(program, platforms=("cpu", "cuda", "tpu"))(*arrays)
  assert modules_of(exported) == {"tpu_custom_call", "mosaic_gpu"}
  for a, b in zip(jax.tree.leaves(exported.call(*arrays)), jax.tree.leaves(want)):
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (a, b)), rtol=1e-2, atol=1e-2)
  assert not modules_of(export.export(program, platforms=("cpu", "cuda"))(*arrays))


@pytest.mark.full
def test_a_program_for_a_tpu_that_is_traced_beside_a_gpu_has_the_kernels_of_both(hopper):
  query = array(1, 128, 2, 64)
  attend = jax.jit(lambda q: kernels.flash_attention(q, q, q))
  with kernels.export_for("v5e"):
    program = export.export(attend, platforms=("cuda", "tpu"))(query)
  assert modules_of(program) == {"tpu_custom_call", "mosaic_gpu"}


@pytest.mark.full
def test_a_program_over_a_mesh_of_no_device_is_plain_jax():
  mesh = jax.sharding.AbstractMesh((2,), ("model",))
  query = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16, sharding=jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(None, None, "model")))
  attend = jax.jit(lambda q: kernels.flash_attention(q, q, q))
  for context in (contextlib.nullcontext(), kernels.export_for("h100", "v5e")):
    with jax.sharding.use_abstract_mesh(mesh), context:
      assert not modules_of(export.export(attend, platforms=("cpu", "cuda", "tpu"))(query))


def test_chips_that_programs_are_not_exported_for():
  with pytest.raises(ValueError, match="one chip of a platform"):
    kernels.export_for("h100", "a100")
  with pytest.raises(ValueError, match="chip must be one of"):
    kernels.export_for("h1000")


@pytest.mark.full
@pytest.mark.parametrize("name", ops())
def test_a_program_for_the_cpu_of_a_machine_with_a_gpu(name, hopper):
  _, f, arrays = ops()[name]
  program = jax.jit(f)
  cuda = program.trace(arrays[0], *arrays[1:]).lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in cuda
  got = program(*arrays)
  with jax.default_device("cpu"):
    want = jax.jit(lambda *arrays: f(*arrays))(*arrays)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(*(x.astype(jnp.float32) for x in (a, b)), rtol=1e-2, atol=1e-2)


@pytest.mark.full
def test_a_gradient_by_slopes_is_the_kernels(hopper):
  query = array(1, 128, 2, 64)
  total = lambda q, slopes: kernels.flash_attention(
      q, q, q, alibi_slopes=slopes).astype(jnp.float32).sum()
  by_slopes = jax.jit(jax.grad(total, 1)).trace(query, SLOPES)
  assert "mosaic_gpu" in by_slopes.lower(lowering_platforms=("cuda",)).as_text()
  reason = kernels.explain("flash_attention", query, query).reason
  assert "second derivatives" in reason and "alibi_slopes" not in reason


@pytest.mark.parametrize("scale", [
    pytest.param(0.5, marks=pytest.mark.full), jnp.float32(0.5)], ids=["number", "array"])
def test_kernels_are_compiled_for_a_scale_that_is_a_number(scale):
  calls = dict(
      attention=lambda q, x: kernels.flash_attention(q, q, q, scale=scale),
      loss=lambda q, x: kernels.linear_cross_entropy(x, x[0], jnp.arange(256)[None], scale=scale),
      decode=lambda q, x: kernels.decode_attention(q[:, :1], q, q, jnp.array([128]), scale=scale))
  for name, call in calls.items():
    traced = jax.jit(call).trace(array(1, 128, 2, 64), array(1, 256, 128))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == isinstance(scale, float), name


def test_derivatives_and_maps_are_those_of_plain_jax():
  plain = lambda x, y, c: {"a": jnp.sin(x) * y + c}
  f = lambda x, y: platforms.by_platform(plain, [(("tpu",), plain, None)], (x, y), 3.0)["a"]
  want = lambda x, y: plain(x, y, 3.0)["a"]
  x = jnp.arange(3.0)

  def results(f):
    total = lambda x, y: f(x, y).sum()
    return (f(x, x), jax.grad(total, (0, 1))(x, x), jax.hessian(total)(x, x),
            jax.vmap(f, (None, 1), 1)(x, jnp.ones((3, 2))), jax.jvp(f, (x, x), (x, x)))

  for got, wanted in zip(jax.tree.leaves(jax.jit(results, static_argnums=0)(f)),
                         jax.tree.leaves(results(want))):
    np.testing.assert_allclose(got, wanted, rtol=1e-6)


@pytest.mark.full
def test_the_block_for_the_cpu_of_a_machine_with_a_tpu(monkeypatch):
  devices, tpu = jax.devices, types.SimpleNamespace(platform="tpu", device_kind="TPU v5p")
  monkeypatch.setattr(jax, "devices", lambda *a: devices(*a) if a else [tpu])
  monkeypatch.setattr(dispatch, "_unasked", lambda *a: None)
  x, gain, query, weight = array(1, 16, 128), array(128), array(128, 1, 128), array(128, 128) / 16
  params = dict(norm=gain, query=query / 16, key=weight, value=weight, gate=weight, up=weight,
                attn_out=query.reshape(1, 128, 128), ff_out=weight)
  assert kernels.explain("parallel_attention_ffn", x, params).implementation == "mosaic_tpu"

  def f(x, norm, implementation):
    weights = params | dict(norm=norm)  # the others are constants, which decide nothing
    y = kernels.parallel_attention_ffn(x, weights, implementation=implementation)
    return jnp.square(y.astype(jnp.float32)).sum()

  gradients = jax.jit(jax.value_and_grad(f, (0, 1)), static_argnums=2)
  for got, want in zip(*(jax.tree.leaves(gradients(x, gain, name)) for name in ("auto", "xla"))):
    np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=0.02,
                               atol=0.02 * np.abs(np.float32(want)).max())
