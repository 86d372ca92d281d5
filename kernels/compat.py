"""What the supported releases of jax and jax-triton, and settings of theirs, do differently."""

import functools
import inspect

import jax
from jax._src import config


def interpreting() -> bool:
  """Whether a context such as `pltpu.force_tpu_interpret_mode()` is active.

  JAX (0.11.2 to 0.12.0) has no public name for that.
  """
  return config.pallas_tpu_interpret_mode_context_manager.value is not None


def in_32_bits(function):
  """The function, traced as if `jax_enable_x64` were off.

  Kernels are written for indices of 32 bits; with 64 they would not compile.
  """
  @functools.wraps(function)
  def narrow(*args, **kwargs):
    with jax.enable_x64(False):
      return function(*args, **kwargs)
  return narrow


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
