"""The softmax normaliser and the target's logit in plain JAX: the oracle of every test.

`logits_statistics` is the formula. `statistics` applies it to blocks of tokens, so that the
logits of one block at a time exist.
"""

import functools

import jax
import jax.core
import jax.numpy as jnp

# Logits that exist at one time, 32 MiB in float32. Loss and gradients of 2048 tokens, dim 512,
# vocabulary 32,000, of the time with all logits in memory (500 MiB of temporaries), on two cores
# of a CPU: 2**22 1.33 and 78 MiB, 2**23 1.20 and 94 MiB, 2**24 1.17 and 142 MiB.
BLOCK_LOGITS = 2**23


def logits_statistics(x, embedding, targets, *, scale, num_valid):
  """Statistics of all logits that a softmax cross-entropy needs.

  Args:
    x: float[N, D].
    embedding: float[V, D].
    targets: int[N]; one outside [0, V) has no logit here.
    scale: multiplies x @ embedding.T.
    num_valid: int or int32[]; rows of the embedding from here on are padding.

  Returns:
    float32[N] log of the sum of exponentials, float32[N] the target's logit or 0.
  """
  accum = jnp.promote_types(x.dtype, jnp.float32)
  scale = scale if isinstance(scale, float) else jnp.asarray(scale, accum)
  logits = scale * jnp.einsum(
      "nd,vd->nv", x, embedding.astype(x.dtype), preferred_element_type=accum)
  column = jnp.arange(embedding.shape[0])
  # Of no valid row, the first stands in, for the second derivative of an empty sum is NaN.
  logits = jnp.where(column < jnp.maximum(num_valid, 1), logits, -jnp.inf)
  here = (targets >= 0) & (targets < num_valid)
  target = jnp.take_along_axis(logits, jnp.where(here, targets, 0)[:, None], axis=1)[:, 0]
  log_z = jnp.where(num_valid > 0, jax.nn.logsumexp(logits, axis=1), -jnp.inf)
  return log_z, jnp.where(here, target, 0)


def statistics(x, embedding, targets, *, scale, num_valid, block=None):
  """`logits_statistics`, a block of tokens at a time; arguments and results as there.

  The logits of a block are computed again in the backward pass, never kept. The gradient of the
  embedding is summed over blocks in float32 at least.
  """
  num_tokens, vocabulary = x.shape[0], embedding.shape[0]
  # In a program that is exported for any size, of a large vocabulary.
  block = block or max(1, BLOCK_LOGITS // (vocabulary if isinstance(vocabulary, int) else 2**16))
  formula = functools.partial(logits_statistics, scale=scale, num_valid=num_valid)
  if isinstance(num_tokens, int) and num_tokens <= block:
    return formula(x, embedding, targets)
  block = jax.core.min_dim(num_tokens, block)
  num_blocks = -(-num_tokens // block)
  if isinstance(num_tokens, int):
    block = -(-num_tokens // num_blocks)
  padding = num_blocks * block - num_tokens
  x = jnp.pad(x, ((0, padding), (0, 0))).reshape(num_blocks, block, x.shape[1])
  targets = jnp.pad(targets, (0, padding)).reshape(num_blocks, block)
  wide = embedding.astype(jnp.promote_types(embedding.dtype, jnp.float32))
  one_block = jax.checkpoint(lambda args: formula(args[0], wide, args[1]), prevent_cse=False)
  results = jax.lax.map(one_block, (x, targets))
  return tuple(y.reshape(num_blocks * block)[:num_tokens] for y in results)
