"""The error bound that every kernel must keep, whatever the op.

A result is compared with float64, by its largest error and by its mean square. Either may be

* at most twice that of the XLA path in the same dtype: a kernel rounds at the same places, but for
  the order of its sums. Or
* a few roundings of the largest value, the floor: where the XLA path is exact, or nearly so, by
  chance (one key has weight 1; a sum has one term). What is rounded, and how often, differs from op
  to op: each says its floor and why.

An op's contract has `Case`, one problem; `cases`, a strategy that draws them; `inputs(case)`, its
arrays; and `errors`, which of a case's results are out of bounds, and `check`, which asserts that
none is.
"""

import jax.numpy as jnp
import numpy as np


def eps(dtype) -> float:
  """The distance from 1 to the next number: a rounding is at most half of it."""
  return float(jnp.finfo(dtype).eps)


def excess(got, exact, rough, *, floor: float, mean_square: float | None = 0.5) -> str | None:
  """The amount by which a result is out of bounds, in words; None for one that is within.

  Args:
    got: the kernel's result.
    exact: the same in float64. Where it is infinite or NaN, the result must be, too.
    rough: a function of no arguments that returns the XLA path's result; called only where the
      error is above the floor.
    floor: the error that is allowed whatever the XLA path's.
    mean_square: the floor of the mean square error, as a part of `floor`; None for no bound.
  """
  got, exact = np.asarray(got, np.float64), np.asarray(exact, np.float64)
  finite = np.isfinite(exact)
  if not np.array_equal(got[~finite], exact[~finite], equal_nan=True):
    return "finite where the exact result is not"
  if not np.isfinite(got[finite]).all():
    return "not finite"
  difference = lambda x: np.where(finite, x, 0) - np.where(finite, exact, 0)
  norms = [("largest", floor, lambda x: np.abs(x).max(initial=0))]
  if mean_square is not None:
    norms.append(("mean square", mean_square * floor, lambda x: np.sqrt(np.square(x).mean())))
  for norm, least, measure in norms:
    error = measure(difference(got))
    if error > least:
      allowed = 2 * measure(difference(np.asarray(rough(), np.float64)))
      if not error <= allowed:
        return f"{norm} error {error:.3g}, allowed {max(least, allowed):.3g}"
  return None


def check(errors: dict[str, str], case) -> None:
  """Asserts that nothing is out of bounds."""
  assert not errors, f"{errors} for {case}"
