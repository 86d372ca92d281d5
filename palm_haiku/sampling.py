"""The distribution that logits describe, and draws from it."""

import jax
import jax.numpy as jnp


def sample(logits: jax.Array, key: jax.Array, *, temperature: float | jax.Array | None = 1.0,
           top_k: int | None = None, top_p: float | jax.Array | None = None):
  """Draws a token from the distribution that the logits describe.

  Args:
    logits: float[..., num_tokens].
    key: PRNG key.
    temperature: divides the logits, before anything is cut off; must be positive (greedy
      choice is `argmax`).
    top_k: only the k most likely tokens can be drawn.
    top_p: only the smallest set of most likely tokens that together have at least this
      probability can be drawn (nucleus sampling, arXiv:1904.09751).

  Returns:
    int32[...].
  """
  kept, index = _kept(logits, temperature, top_k, top_p)
  choice = jax.random.categorical(key, kept)
  if index is not None:
    choice = jnp.take_along_axis(index, choice[..., None], -1)[..., 0]
  return choice.astype(jnp.int32)


def log_probabilities(logits: jax.Array, *, temperature: float | jax.Array | None = 1.0,
                      top_k: int | None = None, top_p: float | jax.Array | None = None):
  """The logarithms of what `sample` draws from.

  Args:
    logits: float[..., num_tokens].
    temperature: None for the likeliest token alone.
    top_k, top_p: see `sample`.

  Returns:
    float[..., num_tokens], -inf where a token cannot be drawn.
  """
  if temperature is None:
    best = jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1], dtype=bool)
    return jnp.where(best, 0.0, -jnp.inf)
  kept, index = _kept(logits, temperature, top_k, top_p)
  if index is not None:
    kept = jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), index, kept, -1, inplace=False)
  return jax.nn.log_softmax(kept)


def _kept(logits, temperature, top_k, top_p):
  """Logits of the tokens that can be drawn, and which those are; None for all in their order."""
  # A tiny temperature must not overflow, nor become 0: the most likely token would be lost.
  tiny = jnp.finfo(logits.dtype).tiny
  # mutant: temperature
  logits = (logits - logits.max(-1, keepdims=True)) / jnp.maximum(temperature, tiny)
  if top_k is not None and top_k < logits.shape[-1]:
    best, index = jax.lax.top_k(logits, top_k)
  elif top_p is not None:
    best, index = jax.lax.top_k(logits, logits.shape[-1])
  else:
    return logits, None
  if top_p is not None:
    # A token stays if the more likely ones have not reached top_p: the first one always does.
    probability = jax.nn.softmax(best)
    before = jnp.cumsum(probability, -1) - probability  # mutant: nucleus
    best = jnp.where(before < jnp.maximum(top_p, tiny), best, -jnp.inf)
  return best, index
