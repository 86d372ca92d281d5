"""Which implementation of an op runs, and why."""

from typing import NamedTuple

IMPLEMENTATIONS = ("auto", "xla", "pallas", "mosaic_gpu", "mosaic_tpu", "triton")

# The backends that each op has a file for. "xla" is the fallback of every one.
_AVAILABLE = {
    "flash_attention": ("xla",),
    "parallel_attention_ffn": ("xla",),
}


class Choice(NamedTuple):
  """An implementation and the reason that it was chosen."""

  implementation: str
  reason: str


def explain(op: str, implementation: str = "auto") -> Choice:
  """The implementation that `op` would run here, and why.

  Args:
    op: the name of a public op, such as "flash_attention".
    implementation: what the caller would pass to it.

  Raises:
    ValueError: an unknown op or implementation, or a backend asked for by name that this
      op cannot run on.
  """
  if op not in _AVAILABLE:
    raise ValueError(f"no op is called {op!r}; there are {', '.join(sorted(_AVAILABLE))}")
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
        f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {implementation!r}")
  if implementation == "auto":
    return Choice("xla", f"{op} has no fused kernel for any chip yet")
  if implementation not in _AVAILABLE[op]:
    raise ValueError(
        f"{op} has no {implementation} kernel; it runs on {', '.join(_AVAILABLE[op])} (or auto)")
  return Choice(implementation, "asked for by name")
