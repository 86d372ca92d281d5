"""The TPU kernels in JAX's TPU interpreter, and compiled ahead of time.

The interpreter looks for races and reads out of bounds, and fills fresh memory with NaN.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.experimental.pallas import tpu as pltpu

from palm_haiku.kernels.cross_entropy import mosaic_tpu
from palm_haiku.kernels.tuning import CrossEntropyTpu

from tests.kernels.cross_entropy import contract
from tests.kernels.cross_entropy.contract import Case

# Small enough that little has several blocks, and a block several tiles.
BLOCKS = (
    CrossEntropyTpu(tokens=256, rows=256, tile=128, chunk=128, together=3),
    CrossEntropyTpu(tokens=128, rows=128, tile=128, chunk=128, together=1),
)


def backend(blocks):
  """The module, with its block sizes fixed."""
  fixed = lambda f: functools.partial(f, blocks=blocks, chip=None)
  return types.SimpleNamespace(forward=fixed(mosaic_tpu.forward),
                               logit_gradient=fixed(mosaic_tpu.logit_gradient))


def results(case, arrays, blocks=BLOCKS[0]):
  params = pltpu.InterpretParams(
      detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan")
  # Every case is a compilation; optimizing it would cost more than it saves.
  run = jax.jit(functools.partial(contract.run, backend(blocks), case),
                compiler_options={"xla_backend_optimization_level": 0})
  try:
    with pltpu.force_tpu_interpret_mode(params):
      return jax.block_until_ready(run(arrays))
  finally:
    pltpu.reset_tpu_interpret_mode_state()


@settings(max_examples=12)
@given(case=contract.cases(dims=(64, 128, 192), dtypes=("bfloat16", "float32"), max_tokens=300,
                           max_vocabulary=600),
       blocks=st.sampled_from(BLOCKS))
def test_right_on_drawn_cases(case, blocks):
  arrays = contract.inputs(case)
  contract.check(case, arrays, results(case, arrays, blocks))
