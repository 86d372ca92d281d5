"""One check: a kernel's results beside XLA's in float32, and its time beside XLA's."""

import contextlib
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku import kernels
from palm_haiku.doctor import cases
from palm_haiku.doctor.cases import Case

# A kernel's largest error may be this many times that of XLA in the same dtype, or so many
# roundings of the largest value; the tests' contracts have the same two bounds, against float64.
TIMES, FLOOR = 2, 4
# Sums in float32 of thousands of terms, in another order and with a chip's own exp.
FLOAT32_FLOOR = 256
ROUNDS, ROUND_SECONDS = 3, 0.02


def run(case: Case) -> dict[str, Any]:
  """Runs a check in this process.

  Returns:
    status: "passed", "failed", or of a kernel that would not run here "unfit" (shapes or the chip
      do not fit), "xla" (`auto` takes plain JAX) or "absent" (an extra is not installed).
    why: one line, unless it passed.
    implementation: that ran, and of those that did:
    ulps, xla_ulps, allowed: largest error as a multiple of eps(dtype) of the largest value, by
      result; XLA's in the same dtype; the bound.
    ms, xla_ms: of a call, both passes where there are two; None of small and interpreted ones.
  """
  try:
    try:
      choice = kernels.explain(case.op, *cases.operands(case),
                               implementation=case.implementation)
    except ValueError as error:
      return dict(status="unfit", why=_line(error))
    if case.implementation == "auto" and choice.implementation == "xla":
      return dict(status="xla", why=choice.reason)
    # A program that runs once, and in an interpreter, is not worth optimizing.
    with kernels.interpret() if case.interpreted else contextlib.nullcontext():
      return _compare(case, choice.implementation, cases.arrays(case))
  except ImportError as error:
    return dict(status="absent", why=f"{_line(error)}; an extra that this needs is not installed")
  except Exception as error:  # whatever a compiler or a driver throws is the result
    return dict(status="failed", why=f"{type(error).__name__}: {_line(error)}")


def _compare(case, implementation, given):
  cotangent = _cotangent(case, given)
  wide = lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
  plain, kernel = (jax.jit(cases.program(case, name)) for name in ("xla", implementation))
  with jax.default_matmul_precision("highest"):
    exact = jax.device_get(plain(jax.tree.map(wide, given), cotangent))
  rough = jax.device_get(plain(given, cotangent))
  got = rough if implementation == "xla" else jax.device_get(kernel(given, cotangent))
  ulps, xla_ulps, allowed = {}, {}, {}
  for name, expected in exact.items():
    ulps[name], xla_ulps[name] = _ulps(got[name], expected), _ulps(rough[name], expected)
    floor = FLOAT32_FLOOR if got[name].dtype == np.float32 else FLOOR
    allowed[name] = floor if implementation == "xla" else max(floor, TIMES * xla_ulps[name])
  wrong = [name for name in ulps if not ulps[name] <= allowed[name]]
  figures = dict(implementation=implementation, ulps=ulps, xla_ulps=xla_ulps, allowed=allowed)
  if wrong:
    worst = max(wrong, key=lambda name: ulps[name] / allowed[name])
    return dict(status="failed", why=f"{worst} is {ulps[worst]:.3g} ulps from XLA in float32, "
                f"{allowed[worst]:.3g} are allowed", **figures)
  timed = case.label != "small" and not case.interpreted
  programs = [plain] if implementation == "xla" else [plain, kernel]
  ms = _milliseconds(programs, given, cotangent) if timed else [None]
  return dict(status="passed", **figures, ms=ms[-1], xla_ms=ms[0])


def _cotangent(case, given):
  """One draw for all implementations and dtypes."""
  if not case.backward:
    return None
  forward = cases.program(dataclasses.replace(case, backward=False), "xla")
  out = jax.eval_shape(forward, given, None)["out"]
  drawn = np.random.default_rng(1).standard_normal(out.shape, np.float32)
  return jnp.asarray(drawn.astype(out.dtype))


def _ulps(got, expected) -> float:
  got, expected = np.asarray(got), np.asarray(expected, np.float64)
  largest = np.abs(expected).max() or 1.0
  error = np.abs(np.asarray(got, np.float64) - expected).max()
  return float(error / (float(jnp.finfo(got.dtype).eps) * largest))


def _milliseconds(programs, given, cotangent) -> list[float]:
  """Medians of rounds in turns, each of as many calls as take a while."""
  def seconds(program, calls):
    start = time.perf_counter()
    for _ in range(calls):
      out = program(given, cotangent)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls

  calls = [max(1, min(1000, round(ROUND_SECONDS / seconds(program, 1)))) for program in programs]
  rounds = [[seconds(program, n) for program, n in zip(programs, calls, strict=True)]
            for _ in range(ROUNDS)]
  return [float(f"{1e3 * statistics.median(times):.3g}") for times in zip(*rounds, strict=True)]


def _line(error) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return (lines[0] if lines else "no message")[:300]
