"""Sampling from a PaLM with a key/value cache, as one compiled program."""

import functools
from typing import Callable

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku.config import PaLMConfig
from palm_haiku.model import KVCache, PaLM


def sample(logits, key, *, temperature=1.0, top_k: int | None = None, top_p=None):
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
  logits = logits / temperature
  if top_k is not None and top_k < logits.shape[-1]:
    best, index = jax.lax.top_k(logits, top_k)
  elif top_p is not None:
    best, index = jax.lax.top_k(logits, logits.shape[-1])
  else:
    return jax.random.categorical(key, logits).astype(jnp.int32)
  if top_p is not None:
    # A token stays if the more likely ones have not reached top_p: the first one always does.
    probability = jax.nn.softmax(best)
    before = jnp.cumsum(probability, -1) - probability
    best = jnp.where(before < top_p, best, -jnp.inf)
  choice = jax.random.categorical(key, best)
  return jnp.take_along_axis(index, choice[..., None], -1)[..., 0].astype(jnp.int32)


def generate(params, config: PaLMConfig, prompt, length: int, *, prompt_lengths=None, key=None,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             eod: int | None = None, dtype=jnp.float32, implementation: str = "auto",
             on_token: Callable[[np.ndarray], None] | None = None):
  """Continues prompts by up to `length` tokens.

  Args:
    params: parameters of `PaLM.from_config(config)`.
    prompt: int[..., T], T >= 1.
    length: tokens to add, at least 1.
    prompt_lengths: int[...], tokens of each prompt, where they are not all T; what stands behind
      them does not count.
    key: PRNG key; not needed where temperature is 0.
    temperature: 0 takes the most likely token each time.
    top_k, top_p: see `sample`.
    eod: end-of-document token. A sequence that drew it is filled up with it, and generation
      ends when all have.
    dtype, implementation: see `PaLM`.
    on_token: called with int32[...] as soon as each token of the batch is known.

  Returns:
    int32[..., T + length]: each prompt, right behind it what was drawn, then eod (0 without one).

  Raises:
    ValueError: an empty prompt, tokens outside the vocabulary, prompt lengths that do not fit, or a
      parameter out of range.
  """
  prompt = np.asarray(prompt)
  if not np.issubdtype(prompt.dtype, np.integer) or prompt.ndim < 1 or 0 in prompt.shape:
    raise ValueError(f"prompt must be int[..., T] with at least one token; got "
                     f"{prompt.dtype}{list(prompt.shape)}")
  for name, token in (("prompt token", prompt.min()), ("prompt token", prompt.max()), ("eod", eod)):
    if token is not None and not 0 <= token < config.num_tokens:
      raise ValueError(f"{name} {token} is outside the vocabulary of {config.num_tokens} tokens")
  if prompt_lengths is not None:
    lengths = np.asarray(prompt_lengths)
    if not np.issubdtype(lengths.dtype, np.integer) or lengths.shape != prompt.shape[:-1]:
      raise ValueError(f"prompt_lengths must be int{list(prompt.shape[:-1])}, one per prompt; "
                       f"got {lengths.dtype}{list(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > prompt.shape[-1]:
      bad = lengths.min() if lengths.min() < 1 else lengths.max()
      raise ValueError(f"prompt length {bad} is outside 1 to {prompt.shape[-1]}")
    prompt_lengths = jnp.asarray(lengths, jnp.int32)
  if length < 1:
    raise ValueError(f"length must be at least 1; got {length}")
  if not temperature >= 0:
    raise ValueError(f"temperature must not be negative; got {temperature}")
  if top_k is not None and top_k < 1:
    raise ValueError(f"top_k must be at least 1; got {top_k}")
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
  greedy = temperature == 0
  if key is None:
    if not greedy:
      raise ValueError("sampling needs a key; pass one, or temperature=0 for the likeliest tokens")
    key = jax.random.key(0)
  return _generate(
      params, jnp.asarray(prompt, jnp.int32), prompt_lengths, key,
      None if greedy else float(temperature), top_p, config=config, length=length, top_k=top_k,
      eod=eod, dtype=jnp.dtype(dtype), implementation=implementation, on_token=on_token)


@functools.partial(jax.jit, static_argnames=(
    "config", "length", "top_k", "eod", "dtype", "implementation", "on_token"))
def _generate(params, prompt, lengths, key, temperature, top_p, *, config, length, top_k, eod,
              dtype, implementation, on_token):
  lead, start = prompt.shape[:-1], prompt.shape[-1]
  model = hk.without_apply_rng(hk.transform(lambda tokens, cache: PaLM.from_config(
      config, dtype=dtype, implementation=implementation)(tokens, cache=cache)))

  def choose(logits, key, done):
    if temperature is None:
      token = jnp.argmax(logits, -1).astype(jnp.int32)
    else:
      token = sample(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)
    if eod is not None:
      token = jnp.where(done, eod, token)
      done |= token == eod
    if on_token is not None:
      jax.debug.callback(on_token, token, ordered=True)
    return token, done

  def step(carry):
    i, token, drawn, cache, done = carry
    logits, cache = model.apply(params, token[..., None], cache)
    token, done = choose(logits[..., 0, :], jax.random.fold_in(key, i), done)
    return i + 1, token, drawn.at[..., i].set(token), cache, done

  cache = KVCache.empty(config, lead, start + length, dtype)
  logits, cache = model.apply(params, prompt, cache)
  if lengths is None:
    logits = logits[..., -1, :]
  else:
    # What the padding left in the cache is overwritten before a query comes to its position.
    cache = cache._replace(length=lengths)
    logits = jnp.take_along_axis(logits, lengths[..., None, None] - 1, -2)[..., 0, :]
  token, done = choose(logits, jax.random.fold_in(key, 0), jnp.zeros(lead, bool))
  filler = 0 if eod is None else eod
  drawn = jnp.full((*lead, length), filler, jnp.int32).at[..., 0].set(token)
  drawn = jax.lax.while_loop(
      lambda carry: (carry[0] < length) & ~jnp.all(carry[4]), step,
      (1, token, drawn, cache, done))[2]
  if lengths is None:
    return jnp.concatenate([prompt, drawn], -1)
  position = jnp.arange(start + length)
  behind = position - lengths[..., None]
  tokens = jnp.where(behind < 0, jnp.pad(prompt, [(0, 0)] * len(lead) + [(0, length)]),
                     jnp.take_along_axis(drawn, jnp.clip(behind, 0, length - 1), -1))
  return jnp.where(behind < length, tokens, filler)
