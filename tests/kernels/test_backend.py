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
