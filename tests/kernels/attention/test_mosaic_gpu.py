"""The Hopper attention kernels, in the interpreter with race detection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from palm_haiku.kernels.attention import mosaic_gpu

from tests.kernels import hopper
from tests.kernels.attention import contract


def run(case, *, detect_races=True, gradients=True):
  """The case's inputs and the kernels' results on them."""
  arrays = contract.inputs(case)
  query, key, value, dout, options = (
      arrays[name] for name in ("query", "key", "value", "dout", "options"))
  with hopper.interpret(detect_races):
    out, lse = mosaic_gpu.forward(query, key, value, chip=None, **options)
    results = dict(out=out, lse=lse)
    if gradients:
      grads = mosaic_gpu.backward(query, key, value, out, lse, dout, chip=None, **options)
      results |= dict(zip(("dquery", "dkey", "dvalue"), grads))
    jax.block_until_ready(results)
  return arrays, results


def verify(case, **kwargs):
  contract.check(case, *run(case, **kwargs))


@settings(max_examples=6)
@given(contract.cases(max_queries=70, max_keys=140, max_batch=1))
def test_drawn(case):
  verify(case)
