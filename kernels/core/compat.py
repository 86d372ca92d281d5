"""Differences between the supported releases of jax and jax-triton, and settings of theirs."""

import contextlib
import inspect
from typing import Any

import jax
import jax.core
import numpy as np
from jax._src import config, core

# Of arguments that need not be on a device: slopes, ids, offsets, targets.
Array = jax.Array | np.ndarray


def interpreting() -> bool:
  """Whether a context such as `pltpu.force_tpu_interpret_mode()` is active.

  JAX (0.11.2 to 0.12.0) has no public name for that.
  """
  return config.pallas_tpu_interpret_mode_context_manager.value is not None


@contextlib.contextmanager
def in_32_bits():
  """A context in which programs are traced as if `jax_enable_x64` were off; or `@in_32_bits()`.

  Kernels are written for indices of 32 bits; with 64 they would not compile. Promotion is that of
  `promoting`.
  """
  with jax.enable_x64(False), promoting():
    yield


@contextlib.contextmanager
def promoting():
  """A context of JAX's default promotion of ranks and dtypes; or a decorator, `@promoting()`.

  The strict settings are for the caller's code to find its mistakes by.
  """
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def under_jit() -> bool:
  """Whether operations are being recorded for a program; JAX has no public name for that."""
  return core.unsafe_am_i_under_a_jit()


def on_device(arrays: Any) -> Any:
  """The tree with its numpy arrays on the device.

  Explicitly, for implicit transfers may be disallowed. Beside arrays of several processes they stay
  as they are.
  """
  if not all(x.is_fully_addressable for x in jax.tree.leaves(arrays) if is_known(x)):
    return arrays
  return jax.tree.map(
      lambda x: jax.device_put(x) if isinstance(x, np.ndarray | np.generic) else x, arrays)


def is_known(x: Any) -> bool:
  """Whether x is an array of JAX with a value, not one that stands for it while tracing."""
  return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


def mend_jax_triton() -> None:
  """Gives jax-triton's call the dead-code rule that jax 0.12 asks for.

  jax-triton 0.4.1 registers a rule of two arguments; jax 0.12 passes three, so that any
  `triton_call` under `jit` is a TypeError. To go when jax-triton registers one of three.
  """
  import jax_triton.triton_lib as jax_triton
  from jax._src.interpreters import partial_eval

  rules, call = partial_eval.dce_rules, jax_triton.triton_kernel_call_p
  wanted = len(inspect.signature(partial_eval.dce_jaxpr_closed_call_rule).parameters)
  if call in rules and len(inspect.signature(rules[call]).parameters) != wanted:
    rules[call] = lambda *arguments: ([True] * len(arguments[-1].invars), arguments[-1])
