"""What the supported releases of jax and jax-triton lack or do differently."""

from jax._src import config


def interpreting() -> bool:
  """Whether a context such as `pltpu.force_tpu_interpret_mode()` is active.

  JAX (0.11.2 to 0.12.0) has no public name for that.
  """
  return config.pallas_tpu_interpret_mode_context_manager.value is not None
