"""The training loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Loss(NamedTuple):
  """The training loss and its parts; all float32[] and means over weighted tokens."""

  total: jax.Array  # nll + z_loss * log_z_squared
  nll: jax.Array  # negative log-likelihood of the targets, in nats per token
  log_z_squared: jax.Array  # squared log of the softmax normaliser


def next_token_loss(logits: jax.Array, targets: jax.Array, *, weights: jax.Array | None = None,
                    z_loss: float = 0.0) -> Loss:
  """Cross-entropy of the next token, plus the auxiliary z-loss.

  Args:
    logits: float[..., T, num_tokens].
    targets: int[..., T]. One outside the vocabulary makes the loss NaN, unless its weight is 0.
    weights: float[..., T], how much each token counts; None for all alike. If all are zero,
      so is the loss.
    z_loss: weight of log^2 Z, which keeps the softmax normaliser near 1; the paper's is 1e-4.

  Raises:
    ValueError: targets or weights that are not shaped like the logits without their last axis.

  References:
    PaLM (arXiv:2204.02311, section 5).
  """
  for name, array in (("targets", targets), ("weights", weights)):
    if array is not None and jnp.shape(array) != logits.shape[:-1]:
      raise ValueError(f"{name} must be {logits.shape[:-1]}, as the logits are; "
                       f"got {jnp.shape(array)}")
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  if weights is not None:  # 0 * NaN is NaN, in the loss and in its gradient
    nothing = (weights == 0) & ~jnp.isfinite(logits).all(-1)
    logits = jnp.where(nothing[..., None], 0, logits)
  log_z = jax.nn.logsumexp(logits, axis=-1)
  # Wide enough to be compared with the vocabulary: 256 is 0 among bytes.
  targets = jnp.asarray(targets, jnp.result_type(targets, jnp.int32))
  here = (targets >= 0) & (targets < logits.shape[-1])  # a negative index would count from the end
  logit = jnp.take_along_axis(logits, jnp.where(here, targets, 0)[..., None], axis=-1)[..., 0]
  counts = True if weights is None else weights != 0
  nll = log_z - jnp.where(counts & ~here, jnp.nan, logit)
  return mean_loss(nll, log_z, weights=weights, z_loss=z_loss)


def mean_loss(nll: jax.Array, log_z: jax.Array, *, weights: jax.Array | None = None,
              count: jax.Array | None = None, z_loss: float = 0.0) -> Loss:
  """The same from what `PaLM.loss` returns, which never holds the logits.

  Args:
    nll: float[..., T], negative log-likelihood of each target.
    log_z: float[..., T], log of each softmax normaliser.
    weights, z_loss: as for `next_token_loss`.
    count: float[], what sums are divided by; None for the sum of the weights.
  """
  weights = jnp.ones_like(nll) if weights is None else weights.astype(nll.dtype)
  count = weights.sum() if count is None else count  # mutant: weighted tokens
  count = jnp.maximum(count, jnp.finfo(nll.dtype).tiny)

  def mean(x):
    x = jnp.where((weights == 0) & ~jnp.isfinite(x), 0, x)
    return (x * weights).sum() / count

  nll, log_z_squared = mean(nll), mean(jnp.square(log_z))
  return Loss(nll + z_loss * log_z_squared, nll, log_z_squared)
