"""The TPU kernel in JAX's TPU interpreter, and compiled ahead of time.

The interpreter looks for races and reads out of bounds, and fills fresh memory with NaN.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.experimental.pallas import tpu as pltpu

from palm_haiku.kernels import alibi_slopes, aot, decode_attention, tuning
from palm_haiku.kernels.decode import mosaic_tpu
from palm_haiku.kernels.tuning import DecodeTpu

from tests.kernels.decode import contract
from tests.kernels.decode.contract import Case

# Small enough that short sequences have several blocks, and blocks several parts and products.
BLOCKS = (DecodeTpu(size=128, slots=3, chunk=128, cores=1),
          DecodeTpu(size=256, slots=4, chunk=128, cores=2),
          DecodeTpu(size=128, slots=4, chunk=128, cores=2))


def attention(case, arrays, blocks=BLOCKS[0]):
  params = pltpu.InterpretParams(
      detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan",
      num_cores_or_threads=blocks.cores)
  # Every case is a compilation; optimizing it would cost more than it saves.
  run = jax.jit(functools.partial(mosaic_tpu.forward, scale=case.scale, chip=None, blocks=blocks),
                compiler_options={"xla_backend_optimization_level": 0})
  try:
    with pltpu.force_tpu_interpret_mode(params):
      return jax.block_until_ready(run(**arrays))
  finally:
    pltpu.reset_tpu_interpret_mode_state()


@settings(max_examples=10)
@given(case=contract.cases(max_len=600), blocks=st.sampled_from(BLOCKS))
def test_right_on_drawn_cases(case, blocks):
  arrays = contract.inputs(case)
  contract.check(case, arrays, attention(case, arrays, blocks))
