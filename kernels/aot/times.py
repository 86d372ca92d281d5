"""Predicted times of TPU kernels, with the error that they had on programs that others timed.

A kernel takes the cycles of its bundles at the chip's clock, and for each step of its grid what
starting and awaiting the next block's copies takes. `python -m benchmarks calibrate` fits the
constants to half of the published timings and judges them on the other half; docs/static_times.md
has the result.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Model:
  """Constants of one chip and kind of kernel.

  Attributes:
    clock: Hz, of a core.
    step: seconds of a step of the grid beyond its cycles.
    launch: seconds of a call beyond its steps.
    error: median relative error on timings that the constants were not fitted to.
    ninetieth: its 90th percentile, the error bar.
  """

  clock: float
  step: float
  launch: float
  error: float
  ninetieth: float

  def seconds(self, cycles: float, steps: float) -> float:
    """Of a call whose core with the most to do runs so many bundles in so many steps."""
    return self.launch + cycles / self.clock + self.step * steps


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A time and its error bar, the 90th percentile of the model's relative error."""

  seconds: float
  error: float

  def __str__(self):
    return f"{self.seconds * 1e6:.1f} us +- {100 * self.error:.1f}%"


# By chip and kind of kernel: what `python -m benchmarks calibrate` found, with libtpu 0.0.52.
MODELS: dict[tuple[str, str], Model] = {
    ("v5p", "loss"): Model(1.751e9, 0.4811e-6, 32.12e-6, 0.008, 0.013),
    ("v6e", "loss"): Model(1.751e9, 0.3816e-6, 14.06e-6, 0.007, 0.009),
    ("tpu7x", "loss"): Model(1.8774e9, 0.1656e-6, 0.0, 0.005, 0.011),
}

# Substrings of the names of a kind's kernels.
_KINDS = {"loss": r"cross_entropy_forward|lce_fwd"}


def model(chip: str, kernel: str) -> Model | None:
  """The model of a kernel by its name, if its kind was calibrated on the chip."""
  kind = next((kind for kind, names in _KINDS.items() if re.search(names, kernel)), "")
  return MODELS.get((chip, kind))
