import jax
import pytest

from palm_haiku import kernels


def test_auto_says_what_it_chose_and_why():
  choice = kernels.explain("flash_attention")
  assert choice.implementation == "xla"
  assert "no fused kernel" in choice.reason


@pytest.mark.parametrize("op, implementation, message", [
    ("flash_attention", "cuda", "implementation must be one of"),
    ("flash_attention", "mosaic_gpu", "flash_attention has no mosaic_gpu kernel"),
    ("matmul", "auto", "no op is called 'matmul'"),
])
def test_what_cannot_run_is_refused(op, implementation, message):
  with pytest.raises(ValueError, match=message):
    kernels.explain(op, implementation)


def test_the_chip_is_that_of_the_abstract_mesh():
  def on(platform, kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))

  assert kernels.backend.target() == ("cpu", None)
  with on("tpu", "TPU v5 lite"):
    assert kernels.backend.target() == ("tpu", "v5e")
  with on("gpu", "NVIDIA H200"):
    assert kernels.backend.target() == ("gpu", "h200")
  with on("gpu", "NVIDIA GeForce GTX 1080"):
    assert kernels.backend.target() == ("gpu", None)
