"""Softmax cross-entropy straight from the last hidden state: the logits never exist."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..core import integers, op
from ..core.compat import Array
from ..core.dispatch import Implementation
from .fused import OP, Loss


def linear_cross_entropy(
    x: jax.Array,
    embedding: jax.Array,
    targets: Array,
    *,
    z_loss: float | jax.Array = 0.0,
    scale: float | jax.Array = 1.0,
    weights: jax.Array | None = None,
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
  """-log softmax(scale * x @ embedding.T)[target] + z_loss * log^2 Z, per token.

  No [tokens, num_tokens] array exists, forward or backward. Under a mesh the tokens are divided
  over its data axes and the vocabulary over its model axis, whether or not that divides it.
  Blocks are chosen for the tokens of one call: better leading dimensions than `vmap`.

  Args:
    x: float[..., D], any leading dimensions.
    embedding: float[V, D]; cast to the dtype of x for the product.
    targets: int[...].
    z_loss: weight of the squared log of the softmax normaliser; the paper's is 1e-4.
    scale: of the logits, a number; PaLM's is 1/sqrt(D).
    weights: float[...], each token's loss is multiplied by; None for one. A token of weight 0
      adds nothing, whatever its target and be its x NaN or infinite: then log Z is that of x = 0.
    implementation: "auto", or a backend by name.

  Returns:
    The loss and log Z of each token, both float32[...] (float64 for float64 inputs). Inside jit
    a target outside the vocabulary makes its token's loss NaN.

  Raises:
    ValueError: shapes or dtypes that do not fit, a backend that cannot run, or, outside jit, a
      target outside the vocabulary or a negative weight.

  References:
    PaLM (arXiv:2204.02311, section 5) for the z-loss; Cut Cross-Entropy (arXiv:2411.09009).
  """
  targets = targets if isinstance(targets, Array) else np.asarray(targets)
  _check(x, embedding, targets, weights)
  route = op.choose(OP, implementation, x, embedding, needs=op.untraced(scale, "x"))
  route, static_scale, scale = op.scaled(route, scale)
  known, traced = (None, z_loss) if isinstance(z_loss, jax.Array) else (float(z_loss), None)
  # A target that is beyond 32 bits is outside the vocabulary as well.
  targets = integers.clamped(targets, -2**31, 2**31 - 1)
  return op.run(OP, route, Loss(static_scale, known),
                x, embedding, targets, weights, scale, traced)


def _check(x, embedding, targets, weights):
  if x.ndim < 1 or embedding.ndim != 2 or 0 in embedding.shape:
    raise ValueError(f"x must be [..., D] and embedding [V, D]; got {x.shape}, {embedding.shape}")
  if x.shape[-1] != embedding.shape[-1]:
    raise ValueError(f"x and embedding must agree in their last dimension; got {x.shape} and "
                     f"{embedding.shape}")
  for name, array in (("x", x), ("embedding", embedding)):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating point; got {array.dtype}")
  if not jnp.issubdtype(targets.dtype, jnp.integer):
    raise ValueError(f"targets must be integers; got {targets.dtype}")
  for name, array in (("targets", targets), ("weights", weights)):
    if array is not None and np.shape(array) != x.shape[:-1]:
      raise ValueError(f"{name} must be {x.shape[:-1]}, as x is without its last axis; "
                       f"got {np.shape(array)}")
  if not math.prod(x.shape[:-1]):
    raise ValueError(f"there must be at least one token; got x {x.shape}")
  unweighted, targets, weights = weights is None, *map(integers.known, (targets, weights))
  if weights is not None and weights.min() < 0:
    raise ValueError(f"weights must not be negative; got {weights.min()}")
  if targets is not None and (unweighted or weights is not None):
    counted = targets if unweighted else targets[weights != 0]
    low, high = int(counted.min(initial=0)), int(counted.max(initial=0))
    if low < 0 or integers.exceeds(high + 1, embedding.shape[0]):
      raise ValueError(f"target {low if low < 0 else high} is outside the vocabulary of "
                       f"{embedding.shape[0]} tokens")
