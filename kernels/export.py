"""The chips that exported programs have kernels for."""

import contextlib

from .core import dispatch
from .explain import target


def export_for(*chips: str) -> contextlib.AbstractContextManager:
  """A context in which what is traced gets the kernels of these chips, on their platforms.

    with kernels.export_for("h100", "v5e"):
      program = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))(*arrays)

  Derivatives are the kernels' own; a platform without a kernel runs plain JAX. Where no TPU is
  named, TPUs have the kernels of the smallest one. For ops under `implementation="auto"`, traced
  where nothing else says on what they will run and no mesh divides them. JAX promises to read
  Pallas's kernels in years to come, but not Triton's, which GPUs other than "h100" and "h200" have:
  pass `export` the `disabled_checks` that its error names. A GPU's kernels run on GPUs of its
  compute capability.

  Args:
    *chips: at most one GPU and one TPU, by `explain`'s names.

  Raises:
    ValueError: an unknown chip, or two of one platform.
  """
  targets = [target(chip) for chip in chips]
  platforms = [on.platform for on in targets]
  if len(set(platforms)) < len(platforms):
    raise ValueError(
        f"export_for needs one chip of a platform, whose kernels a program has; got {chips}")
  if "tpu" not in platforms:
    targets.append(dispatch.ANY_TPU)
  return dispatch.exported(tuple(on for on in targets if on.platform != "cpu"))
