import jax
import pytest

from palm_haiku import kernels


def test_auto_says_what_it_chose_and_why():
  choice = kernels.explain("flash_attention")
  assert choice.implementation == "xla"
  assert "no fused kernel" in choice.reason


@pytest.mark.parametrize("op, implementation, message", [
    ("flash_attention", "cuda", "implementation must be one of"),
    ("flash_attention", "pallas", "no Pallas kernel is for cpu"),
    ("matmul", "auto", "no op is called 'matmul'"),
])
def test_what_cannot_run_is_refused(op, implementation, message):
  with pytest.raises(ValueError, match=message):
    kernels.explain(op, implementation)


def on(platform, kind):
  device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  return jax.sharding.use_abstract_mesh(
      jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


def test_the_chip_is_that_of_the_abstract_mesh():
  assert kernels.backend.target() == ("cpu", None)
  with on("tpu", "TPU v5 lite"):
    assert kernels.backend.target() == ("tpu", "v5e")
  with on("gpu", "NVIDIA H200"):
    assert kernels.backend.target() == ("gpu", "h200")
  with on("gpu", "NVIDIA GeForce GTX 1080"):
    assert kernels.backend.target() == ("gpu", None)


@pytest.mark.parametrize("platform, kind, implementation", [
    ("tpu", "TPU v5 lite", "mosaic_tpu"), ("tpu", "TPU v6 lite", "mosaic_tpu"),
    ("gpu", "NVIDIA H200", "mosaic_gpu"), ("cpu", "cpu", "xla"),
])
def test_auto_takes_the_kernel_of_the_chip_where_it_can(platform, kind, implementation):
  array = lambda length, heads, dim_head=128, dtype="bfloat16": jax.ShapeDtypeStruct(
      (2, length, heads, dim_head), dtype)
  with on(platform, kind):
    choose = lambda *arrays: kernels.explain("flash_attention", "auto", *arrays).implementation
    assert choose(array(2048, 8), array(2048, 1), array(2048, 1)) == implementation
    assert choose(array(1, 8), array(2048, 1), array(2048, 1)) == "xla"
    if implementation == "mosaic_gpu":
      assert choose(*(array(2048, n, 80) for n in (8, 1, 1))) == "xla"
      with pytest.raises(ValueError, match="mosaic_gpu needs dim_head in .*; got 80"):
        kernels.explain("flash_attention", "pallas", *(array(2048, n, 80) for n in (8, 1, 1)))
