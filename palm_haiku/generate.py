"""Sampling from a PaLM with a key/value cache, as one compiled program."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from palm_haiku import decoder, speculative
from palm_haiku.cache import empty_cache
from palm_haiku.config import PaLMConfig
from palm_haiku.kernels import Implementation
from palm_haiku.kernels.core.compat import promoting
from palm_haiku.model import palm_params
from palm_haiku.sampling import log_probabilities, sample


def generate(params: Any, config: PaLMConfig, prompt: ArrayLike | list[Any], length: int, *,
             prompt_lengths: ArrayLike | None = None, key: chex.PRNGKey | None = None,
             temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
             eod: int | None = None, dtype: DTypeLike = jnp.float32, weights: str | None = None,
             cache_dtype: DTypeLike | None = None, prefix: str | None = None,
             draft: tuple | None = None, draft_length: int = 4,
             implementation: Implementation = "auto",
             on_token: Callable[[np.ndarray], None] | None = None):
  """Continues prompts by up to `length` tokens.

  Args:
    params: parameters of `PaLM.from_config(config)`, alone or within other modules, or what
      `decoder.prepare` makes of them, which saves making it again in each call.
    prompt: int[..., T], T >= 1.
    length: tokens to add, at least 1.
    prompt_lengths: int[...], tokens of each prompt, where they are not all T; what stands behind
      them does not count.
    key: PRNG key; not needed where temperature is 0.
    temperature: 0 takes the most likely token each time.
    top_k, top_p: see `sample`.
    eod: end-of-document token. A sequence that drew it is filled up with it, and generation
      ends when all have.
    dtype: of products and activations.
    weights: None, or "int8": of matrices, with a scale for each column; activations stay in dtype.
    cache_dtype: of keys and values; "int8" keeps a scale for each position. None means dtype.
    prefix: the module's name in params; None where they hold one PaLM.
    draft: (params, config) of a smaller model with the same vocabulary, which guesses
      `draft_length` tokens at a time for this one to check (`speculative`): the same distribution
      sooner, where its guesses are good.
    implementation: see `PaLM`.
    on_token: called with int32[...] as soon as each token of the batch is known; with a draft, of a
      single sequence only.

  Returns:
    int32[..., T + length]: each prompt, right behind it what was drawn, then eod (0 without one).

  Raises:
    ValueError: an empty prompt, tokens outside the vocabulary, prompt lengths that do not fit, a
      draft with another vocabulary, or a parameter out of range.
  """
  try:
    prompt = np.asarray(prompt)
  except ValueError as error:
    raise ValueError("prompts of different lengths must be padded to one, with prompt_lengths"
                     ) from error
  if not np.issubdtype(prompt.dtype, np.integer) or prompt.ndim < 1 or 0 in prompt.shape:
    raise ValueError(f"prompt must be int[..., T] with at least one token; got "
                     f"{prompt.dtype}{list(prompt.shape)}")
  if prompt_lengths is not None:
    lengths = np.asarray(prompt_lengths)
    if not np.issubdtype(lengths.dtype, np.integer) or lengths.shape != prompt.shape[:-1]:
      raise ValueError(f"prompt_lengths must be int{list(prompt.shape[:-1])}, one per prompt; "
                       f"got {lengths.dtype}{list(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > prompt.shape[-1]:
      bad = lengths.min() if lengths.min() < 1 else lengths.max()
      raise ValueError(f"prompt length {bad} is outside 1 to {prompt.shape[-1]}")
    prompt_lengths = jnp.asarray(lengths, jnp.int32)
    prompt = np.where(np.arange(prompt.shape[-1]) < lengths[..., None], prompt, 0)
  for name, token in (("prompt token", prompt.min()), ("prompt token", prompt.max()), ("eod", eod)):
    if token is not None and not 0 <= token < config.num_tokens:
      raise ValueError(f"{name} {token} is outside the vocabulary of {config.num_tokens} tokens")
  length = _count("length", length)
  if prompt.shape[-1] + length >= 2**31:
    raise ValueError(f"prompt and length must make fewer than 2^31 positions; got "
                     f"{prompt.shape[-1]} and {length}")
  top_k = None if top_k is None else _count("top_k", top_k)
  if not temperature >= 0:
    raise ValueError(f"temperature must not be negative; got {temperature}")
  if top_p is not None and not 0 < top_p <= 1:
    raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
  if weights not in (None, "int8"):
    raise ValueError(f"weights must be None or 'int8'; got {weights!r}")
  if draft is not None:
    if draft[1].num_tokens != config.num_tokens:
      raise ValueError(f"the draft must have the vocabulary of the model, {config.num_tokens} "
                       f"tokens; it has {draft[1].num_tokens}")
    draft_length = _count("draft_length", draft_length)
    if on_token is not None and prompt.ndim > 1:
      raise ValueError("with a draft, sequences of a batch do not come to their tokens together: "
                       "on_token is for a single sequence")
  greedy = temperature == 0
  if key is None:
    if not greedy:
      raise ValueError("sampling needs a key; pass one, or temperature=0 for the likeliest tokens")
    key = jax.random.key(0)
  models = [(params, config)] if draft is None else [(params, config), draft]
  for number, (one, of) in enumerate(models):
    if not isinstance(one, decoder.Weights):
      palm_params(one, None if number else prefix, of)  # so that a mistake is told here
  dtype = jnp.dtype(dtype)
  cache_dtype = dtype if cache_dtype is None else jnp.dtype(cache_dtype)
  if cache_dtype != jnp.int8 and not jnp.issubdtype(cache_dtype, jnp.floating):
    raise ValueError(f"cache_dtype must be floating point or int8; got {cache_dtype}")
  options = _Options(
      configs=tuple(c for _, c in models), length=length, top_k=top_k, eod=eod, dtype=dtype,
      weights=weights, cache_dtype=cache_dtype, prefix=prefix, draft_length=draft_length,
      implementation=implementation, on_token=on_token)
  return _generate(options, tuple(p for p, _ in models), jnp.asarray(prompt, jnp.int32),
                   prompt_lengths, key, None if greedy else float(temperature), top_p)


def _count(name: str, value) -> int:
  try:
    count = operator.index(value)
  except TypeError as error:
    raise ValueError(f"{name} must be an integer; got {value!r}") from error
  if count < 1:
    raise ValueError(f"{name} must be at least 1; got {count}")
  return count


class _Options(NamedTuple):
  """Static arguments of a program."""

  configs: tuple[PaLMConfig, ...]  # the model's, and the draft's
  length: int
  top_k: int | None
  eod: int | None
  dtype: np.dtype
  weights: str | None
  cache_dtype: np.dtype
  prefix: str | None
  draft_length: int
  implementation: Implementation
  on_token: Callable[[np.ndarray], None] | None


@functools.partial(jax.jit, static_argnums=0)
@promoting()
def _generate(options, params, prompt, lengths, key, temperature, top_p):
  lead, start, length, eod = prompt.shape[:-1], prompt.shape[-1], options.length, options.eod
  step = options.draft_length + 1 if len(params) > 1 else 1
  room = start + length + (step if len(params) > 1 else 0)
  models, caches = [], []
  for one, config in zip(params, options.configs):
    if not isinstance(one, decoder.Weights):
      one = decoder.prepare(one, config, options.dtype, options.weights,
                            None if models else options.prefix)
    models.append(speculative.Model(
        functools.partial(decoder.run, one, config, dtype=options.dtype,
                          implementation=options.implementation),
        functools.partial(decoder.logits, one, config)))
    caches.append(empty_cache(config, lead, room, options.cache_dtype, step))

  if len(models) > 1:
    ends = jnp.full(lead, start, jnp.int32) if lengths is None else lengths
    drawn = speculative.continuation(
        models[0], models[1], prompt, caches, ends, key, length=length,
        draft_length=options.draft_length, eod=eod, on_token=options.on_token,
        distribution=functools.partial(
            log_probabilities, temperature=temperature, top_k=options.top_k, top_p=top_p))
    if eod is not None:
      ended = jnp.cumsum(drawn == eod, -1) - (drawn == eod) > 0
      drawn = jnp.where(ended, eod, drawn)
  else:
    draw = functools.partial(sample, temperature=temperature, top_k=options.top_k, top_p=top_p)
    if temperature is None:
      draw = lambda logits, key: jnp.argmax(logits, -1).astype(jnp.int32)
    drawn = _continuation(models[0], prompt, caches[0], lengths, key, draw=draw, length=length,
                          eod=eod, on_token=options.on_token)
  if lengths is None:
    return jnp.concatenate([prompt, drawn], -1)
  behind = jnp.arange(start + length) - lengths[..., None]
  tokens = jnp.where(behind < 0, jnp.pad(prompt, [(0, 0)] * len(lead) + [(0, length)]),
                     jnp.take_along_axis(drawn, jnp.clip(behind, 0, length - 1), -1))
  return jnp.where(behind < length, tokens, 0 if eod is None else eod)


def _continuation(model, prompt, cache, lengths, key, *, draw, length, eod, on_token):
  lead = prompt.shape[:-1]

  def choose(x, key, done):
    token = draw(model.logits(x), key)
    if eod is not None:
      token = jnp.where(done, eod, token)
      done |= token == eod
    if on_token is not None:
      jax.debug.callback(on_token, token, ordered=True)
    return token, done

  def step(carry):
    i, token, drawn, cache, done = carry
    x, cache = model.run(token[..., None], cache)
    token, done = choose(x[..., 0, :], jax.random.fold_in(key, i), done)  # mutant: key
    return i + 1, token, drawn.at[..., i].set(token), cache, done

  x, cache = model.run(prompt, cache, fresh=True, prompt_lengths=lengths)
  if lengths is None:
    x = x[..., -1, :]
  else:
    x = jnp.take_along_axis(x, lengths[..., None, None] - 1, -2)[..., 0, :]
  token, done = choose(x, jax.random.fold_in(key, 0), jnp.zeros(lead, bool))
  drawn = jnp.full((*lead, length), 0 if eod is None else eod, jnp.int32).at[..., 0].set(token)
  return jax.lax.while_loop(
      lambda carry: (carry[0] < length) & ~jnp.all(carry[4]), step,
      (1, token, drawn, cache, done))[2]
