"""Speculative decoding: a small model drafts, the large one checks several tokens at once.

The large model reads its weights once for all drafted tokens of a round, and with one key and
value head its cache too. What comes out is distributed as if it had drawn alone
(arXiv:2211.17192, theorem 1); without randomness it is token for token the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from palm_haiku.kernels.cache import write


class Model(NamedTuple):
  """A model as a round uses it."""

  run: Callable  # (tokens, cache, **options) -> hidden state, cache; see `decoder.run`
  logits: Callable  # hidden state -> float32[..., V]


def continuation(target: Model, draft: Model, prompt: jax.Array, caches, lengths: jax.Array,
                 key: chex.PRNGKey, *, length: int, draft_length: int, distribution: Callable,
                 eod: int | None, on_token: Callable | None):
  """The continuation of the prompts.

  Args:
    prompt: int32[..., T].
    caches: empty ones of both models, with room for T + length + draft_length + 1 positions and
      steps of draft_length + 1 tokens.
    lengths: int32[...], tokens of each prompt.
    distribution: logits -> log-probabilities to draw from, -inf for what cannot be drawn.
    eod: the token that ends a sequence.
    on_token: None, or called with each token of a single sequence.

  Returns:
    int32[..., length]; behind an eod anything.
  """
  lead = lengths.shape
  at = lambda x, i: jnp.take_along_axis(x, i[..., None, None], -2)[..., 0, :]

  def tell(tokens, n):
    for token in tokens[:n]:
      assert on_token
      on_token(token)

  def prefill(model, cache):
    return model.run(prompt, cache, fresh=True, prompt_lengths=lengths)

  x, cache = prefill(target, caches[0])
  _, draft_cache = prefill(draft, caches[1])
  first = jax.random.categorical(jax.random.fold_in(key, 0), distribution(
      target.logits(at(x, lengths - 1)))).astype(jnp.int32)
  if on_token is not None:
    jax.debug.callback(tell, first[None], 1, ordered=True)
  drawn = jnp.zeros((*lead, length + draft_length + 1), jnp.int32).at[..., 0].set(first)

  def guess(carry, key):
    token, cache = carry
    x, cache = draft.run(token[..., None], cache)
    log_q = distribution(draft.logits(x[..., 0, :]))
    token = jax.random.categorical(key, log_q).astype(jnp.int32)
    return (token, cache), (token, log_q)

  def turn(carry):
    i, last, drawn, count, done, cache, draft_cache = carry
    keys = jax.random.split(jax.random.fold_in(key, i), 3)
    # One guess more than is used, so that the last used one is in the draft's cache.
    (_, draft_cache), (guesses, log_q) = jax.lax.scan(
        guess, (last, draft_cache), jax.random.split(keys[0], draft_length + 1))
    guesses = jnp.moveaxis(guesses, 0, -1)[..., :-1]
    log_q = jnp.moveaxis(log_q, 0, -2)[..., :-1, :]
    x, cache = target.run(jnp.concatenate([last[..., None], guesses], -1), cache)
    log_p = distribution(target.logits(x))

    pick = lambda log: jnp.take_along_axis(log, guesses[..., None], -1)[..., 0]
    odds = jnp.exp(pick(log_p[..., :-1, :]) - pick(log_q))
    accepted = jax.random.uniform(keys[1], guesses.shape) < odds  # mutant: acceptance
    # Guesses before the first that is refused.
    right = jnp.cumprod(accepted, -1, dtype=jnp.int32).sum(-1, dtype=jnp.int32)
    # The first refused token is drawn again, from what the draft does not offer often enough.
    p = jnp.exp(at(log_p, right))
    q = jnp.exp(at(jnp.pad(log_q, [(0, 0)] * len(lead) + [(0, 1), (0, 0)],
                           constant_values=-jnp.inf), right))
    missing = jnp.maximum(p - q, 0)  # mutant: residual
    missing = jnp.where(missing.sum(-1, keepdims=True) > 0, missing, p)  # but for rounding, never
    token = jax.random.categorical(keys[2], jnp.log(missing)).astype(jnp.int32)

    tokens = jnp.concatenate([guesses, token[..., None]], -1)
    tokens = jnp.where(jnp.arange(draft_length + 1) < right[..., None], tokens, token[..., None])
    new = jnp.where(done, 0, jnp.minimum(right + 1, length - count))
    drawn = write(drawn[..., None], tokens[..., None], count)[..., 0]
    if eod is not None:
      shown = jnp.arange(draft_length + 1) < new[..., None]
      ends = (tokens == eod) & shown
      new = jnp.where(ends.any(-1), jnp.argmax(ends, -1).astype(jnp.int32) + 1, new)
      done |= ends.any(-1)
    if on_token is not None:
      jax.debug.callback(tell, tokens, new, ordered=True)
    count += new
    last = jnp.where(new > 0, jnp.take_along_axis(
        tokens, jnp.maximum(new - 1, 0)[..., None], -1)[..., 0], last)
    # All that was drawn but the last token is in the caches; what was refused is written over.
    filled = lengths + count - 1  # mutant: filled
    return (i + 1, last, drawn, count, done | (count == length),
            cache._replace(length=filled), draft_cache._replace(length=filled))

  count = jnp.ones(lead, jnp.int32)
  done = count == length if eod is None else (count == length) | (first == eod)
  carry = jax.lax.while_loop(
      lambda carry: ~jnp.all(carry[4]), turn, (1, first, drawn, count, done, cache, draft_cache))
  return carry[2][..., :length]
