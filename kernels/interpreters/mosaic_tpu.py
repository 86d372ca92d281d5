"""JAX's interpreter of TPU kernels."""

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from . import callbacks, races
from .mode import Mode


def params(settings: Mode, cores: int) -> pltpu.InterpretParams:
  """Parameters of a kernel interpreted for a TPU of so many cores."""
  callbacks.mend()
  races.watch(interpret_pallas_call.reset_tpu_interpret_mode_state)
  return pltpu.InterpretParams(
      detect_races=settings.detect_races, num_cores_or_threads=cores,
      out_of_bounds_reads="raise", uninitialized_memory="nan")
