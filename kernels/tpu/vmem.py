"""The VMEM of a chip: how much a kernel may take, and whether it fits."""

import jax
import jax.numpy as jnp

from ..core import chips


def limit(chip: str | None) -> int:
  """Bytes of VMEM of one core; those of the chip that has the least where it is None."""
  return chips.tpu(chip).vmem * 2**20


def with_slack(counted: int, slack: int, chip: str | None) -> int:
  """Bytes to ask for: a count of them is rough, so a kernel may take some of what is left."""
  return max(counted, min(counted + slack, limit(chip)))


def unfit(dtype: jax.typing.DTypeLike, chip: str | None) -> str | None:
  """The reason why TPU kernels can't take a dtype or a chip, in words, or None."""
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"bfloat16 or float32, for the matrix unit takes no float16; got {dtype}"
  if chip is not None and chip not in chips.TPUS:
    return f"one of the chips {', '.join(chips.TPUS)}; got {chip}"
  return None


def exceeded(taken: int, chip: str, blocks: str, kernel: str, of: str = "") -> str | None:
  """The complaint of a kernel that takes more bytes of VMEM than there are; None if it fits."""
  if taken <= limit(chip):
    return None
  return (f"{blocks} within the {chips.tpu(chip).vmem} MiB of VMEM of a {chip}; {kernel} takes "
          f"{taken / 2**20:.1f} MiB{of}")
