"""The model `palm-haiku` of lm-evaluation-harness.

    python -m palm_haiku.lm_eval --model palm-haiku --model_args path=runs/books --tasks lambada

The harness looks for models nowhere but in its own package, so this module registers the model when
it is imported; as a program it then is the `lm_eval` command.
"""

import collections
import functools
import itertools
import logging
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from palm_haiku import data, decoder, failures, pretrained
from palm_haiku.cache import empty_cache
from palm_haiku.evaluate import Options
from palm_haiku.generate import generate
from palm_haiku.kernels import Implementation
from palm_haiku.kernels.core.compat import promoting

try:
  from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
  from lm_eval.api.registry import MODEL_REGISTRY, register_model  # pyright: ignore[reportMissingImports]
  from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
  )
  from tqdm import tqdm
except ImportError as error:
  raise ImportError("lm-evaluation-harness is not installed: pip install 'palm-haiku[lm-eval]'"
                    ) from error

NAME = "palm-haiku"
MAX_LENGTH = 2048  # tokens, where nothing says at which length a model was trained
_BLOCK = 256  # tokens whose logits exist at one time


class Request(NamedTuple):
  """Tokens to score after others."""

  number: int  # its place among the requests
  prefix: tuple[int, ...]  # before the last token of the context; may be empty
  inputs: tuple[int, ...]  # that token, and all of the continuation but its last one
  targets: tuple[int, ...]  # the continuation


class PaLMHaiku(TemplateLM):
  """A run, or a directory of the hub, as the harness asks it."""

  def __init__(self, path: str, tokenizer: str | None = None, max_length: int | None = None,
               max_gen_toks: int = 256, batch_size: int | str = 16, dtype: str = "float32",
               weights: str | None = None, implementation: Implementation = "auto",
               seed: int = 0, max_batch_size: int | None = None, device: str | None = None):
    """Loads a model.

    Args:
      path: directory of a run or of a model of the hub.
      tokenizer: as of `pretrained.load`.
      max_length: tokens that a request may have; None for those that the model was trained at.
      max_gen_toks: tokens to generate where a task names no number.
      batch_size: sequences of a batch; "auto" for 16.
      dtype: of products and activations, and of the cache.
      weights: None, or "int8" as for `generate`.
      implementation: see `PaLM`.
      seed: of tasks that sample.
      max_batch_size, device: given by the harness, and not needed.

    Raises:
      ValueError, CheckpointError: there is no model, or a value is out of range.
    """
    super().__init__()
    if dtype not in ("float32", "bfloat16"):
      raise ValueError(f"dtype must be float32 or bfloat16; got {dtype!r}")
    if weights not in (None, "int8"):
      raise ValueError(f"weights must be int8 if they are given; got {weights!r}")
    model = pretrained.load_with_tokenizer(path, tokenizer=tokenizer)
    self.batch_size = 16 if str(batch_size).startswith("auto") else int(batch_size)
    self.max_length = max_length or model.seq_len or MAX_LENGTH
    self.max_gen_toks, self._seed = max_gen_toks, seed
    if min(self.batch_size, self.max_length, max_gen_toks) < 1:
      raise ValueError("batch_size, max_length and max_gen_toks must be at least 1")
    self._tokenizer, self._said = model.tokenizer, set()
    if beyond := pretrained.beyond_training(model, self.max_length):
      self._warn_once(beyond)
    self._options = Options(model.config, jnp.dtype(dtype), implementation)
    self._weights = jax.jit(decoder.prepare, static_argnums=(1, 2, 3))(
        model.params, model.config, jnp.dtype(dtype), weights)

  def _warn_once(self, kind: str, more: str = "") -> None:
    """Warns of what a task may hold a thousand times; `more` is of the first time."""
    if kind not in self._said:
      self._said.add(kind)
      logging.warning("palm-haiku: %s%s", kind, more)

  @property
  def eot_token_id(self) -> int:
    """The token that ends a document."""
    return self._tokenizer.eod

  @property
  def prefix_token_id(self) -> int:
    """The token that stands before a text without context."""
    special = self._tokenizer.prompt("")
    return int(special[0]) if len(special) else self.eot_token_id

  @property
  def tokenizer_name(self) -> str:
    """A name for the harness's cache of requests."""
    return self._tokenizer.fingerprint

  def tok_encode(self, string: str, add_special_tokens: bool | None = None,
                 **kwargs: Any) -> list[int]:
    """Tokens of a text, with those that the model expects before it unless that is False."""
    encode = self._tokenizer.encode if add_special_tokens is False else self._tokenizer.prompt
    return [int(token) for token in encode(string)]

  def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
    """Log-likelihood of whole texts, in windows that end with the text."""
    windows, texts = [], []
    for number, request in enumerate(requests):
      if not self._tokenizer.keeps_newlines and "\n" in request.args[0]:
        self._warn_once(data.losing_newlines(self._tokenizer.name))
      tokens = self.tok_encode(request.args[0], add_special_tokens=False)
      for window in get_rolling_token_windows(
          tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1):
        windows.append((None, *make_disjoint_window(window)))
        texts.append(number)
    totals = [0.0] * len(requests)
    scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
    for number, (score, _) in zip(texts, scores):
      totals[number] += score
    for request, total in zip(requests, totals):
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
    return totals

  def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False,
                            **kwargs: Any) -> list[tuple[float, bool]]:
    """Log-likelihoods of continuations, and whether each token of them is the likeliest.

    Continuations of one context share its keys and values.
    """
    groups: dict[tuple[int, ...], list[Request]] = collections.defaultdict(list)
    scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
    for number, (_, context, continuation) in enumerate(requests):
      request = self._request(number, context, continuation)
      if request.targets:
        groups[request.prefix].append(request)
    apart = [one._replace(prefix=(), inputs=one.prefix + one.inputs)
             for prefix, group in groups.items() if not prefix or len(group) == 1 for one in group]
    shared = [one for prefix, group in groups.items() if prefix and len(group) > 1
              for one in group]
    with tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as progress:
      for many in (apart, shared):
        # The longest first; continuations of one context stay together.
        many.sort(key=lambda one: (-len(one.prefix), one.prefix, -len(one.inputs)))
        for batch in itertools.batched(many, self.batch_size):
          for one, score in zip(batch, self._scores(batch)):
            scores[one.number] = score
            if requests[one.number][0] is not None:
              self.cache_hook.add_partial("loglikelihood", requests[one.number][0], score)
          progress.update(len(batch))
    return scores

  def _request(self, number, context, continuation) -> Request:
    """A request within the model's length: of a longer one the beginning is left out."""
    if len(continuation) > self.max_length:
      raise ValueError(f"a continuation of {len(continuation)} tokens is longer than the model's "
                       f"length, {self.max_length}; a larger max_length takes it")
    context = context or [self.prefix_token_id]
    tokens = tuple(context + continuation)
    if len(tokens) > self.max_length + 1:
      self._warn_once("requests are cut to the end that the model's length has room for",
                      f", the first from {len(tokens)} to {self.max_length + 1} tokens")
      tokens = tokens[-(self.max_length + 1):]
    count = len(continuation)
    split = len(tokens) - 1 - count
    return Request(number, tokens[:split], tokens[split:-1], tokens[split + 1:])

  def _scores(self, batch) -> list[tuple[float, bool]]:
    prefixes = list(dict.fromkeys(one.prefix for one in batch))
    of = np.array([prefixes.index(one.prefix) for one in batch], np.int32)
    lengths = np.array([len(prefix) for prefix in prefixes], np.int32)
    # One program for each pair of lengths in powers of two, whatever is left for the last batch.
    rows = self.batch_size
    prefix_lengths = np.ones(rows, np.int32)
    prefix_lengths[:len(lengths)] = np.maximum(lengths, 1)
    logp, greedy = _score(
        self._options, self._weights, _padded(prefixes, rows) if prefixes[0] else None,
        prefix_lengths, np.pad(of, (0, rows - len(of))), _padded([x.inputs for x in batch], rows),
        # Targets stand at the end of what is read.
        _padded([(0,) * (len(x.inputs) - len(x.targets)) + x.targets for x in batch], rows))
    logp, greedy = np.asarray(logp, np.float64), np.asarray(greedy)
    counted = [slice(len(x.inputs) - len(x.targets), len(x.inputs)) for x in batch]
    return [(float(logp[i, part].sum()), bool(greedy[i, part].all()))
            for i, part in enumerate(counted)]

  def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
    """Continuations up to a stop text, the end of the document, or `max_gen_toks` tokens."""
    groups = collections.defaultdict(list)
    for number, request in enumerate(requests):
      context, options = request.args
      settings = _Sampling.of(options, self.max_gen_toks, self._seed)
      room = self.max_length - settings.length
      if room < 1:
        raise ValueError(f"max_gen_toks = {settings.length} must be less than the model's length, "
                         f"{self.max_length}")
      tokens = self.tok_encode(context) or [self.prefix_token_id]
      if len(tokens) > room:
        self._warn_once("contexts are cut to the end that the model's length has room for",
                        f", the first from {len(tokens)} to {room} tokens")
      groups[settings].append((number, tuple(tokens[-room:])))
    texts = [""] * len(requests)
    with tqdm(total=len(requests), disable=disable_tqdm, desc="texts") as progress:
      for settings, group in groups.items():
        group.sort(key=lambda one: -len(one[1]))
        for batch in itertools.batched(group, self.batch_size):
          prompts = [tokens for _, tokens in batch]
          for (number, _), text in zip(batch, self._texts(prompts, settings)):
            texts[number] = text
            self.cache_hook.add_partial("generate_until", requests[number].args, text)
          progress.update(len(batch))
    return texts

  def _texts(self, prompts, settings):
    config, dtype, implementation = self._options
    rows = self.batch_size
    lengths = np.ones(rows, np.int32)
    lengths[:len(prompts)] = [len(prompt) for prompt in prompts]
    tokens = np.asarray(generate(
        self._weights, config, _padded(prompts, rows), settings.length, prompt_lengths=lengths,
        key=jax.random.key(settings.seed), temperature=settings.temperature,
        top_k=settings.top_k, top_p=settings.top_p, eod=self.eot_token_id, dtype=dtype,
        implementation=implementation))
    for row, prompt in zip(tokens, prompts):
      drawn = row[len(prompt): len(prompt) + settings.length]
      ends = np.flatnonzero(drawn == self.eot_token_id)
      text = self._tokenizer.decode(drawn[:ends[0]] if len(ends) else drawn)
      for stop in settings.until:
        text = text.split(stop, 1)[0]
      yield text


class _Sampling(NamedTuple):
  """A task's `generation_kwargs`."""

  length: int
  until: tuple[str, ...]
  temperature: float
  top_k: int | None
  top_p: float | None
  seed: int

  @classmethod
  def of(cls, options: dict[str, Any], length: int, seed: int) -> "_Sampling":
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(stop for stop in until if stop)
    for name in ("max_new_tokens", "max_gen_toks"):
      length = int(options.get(name, length))
    sampled = options.get("do_sample", options.get("temperature", 0) > 0)
    temperature = float(options.get("temperature", 1.0)) if sampled else 0.0
    return cls(length, until, temperature, options.get("top_k") or None if sampled else None,
               options.get("top_p") if sampled else None, seed)


@functools.partial(jax.jit, static_argnums=0)
@promoting()
def _score(options, weights, prefixes, lengths, of, inputs, targets):
  """The log-probability of each target, and whether it is the likeliest token.

  Args:
    prefixes: int32[B, P] of several requests each, or None.
    lengths: int32[B], of the prefixes.
    of: int32[B], the prefix of each request.
    inputs, targets: int32[B, T].

  Returns:
    float32[B, T], bool[B, T].
  """
  config, dtype, implementation = options
  run = functools.partial(
      decoder.run, weights, config, dtype=dtype, implementation=implementation)
  rows, steps = inputs.shape
  if prefixes is None:
    x, _ = run(inputs, empty_cache(config, (rows,), steps, dtype), fresh=True)
  else:
    cache = empty_cache(config, (rows,), prefixes.shape[1] + steps, dtype, steps)
    _, cache = run(prefixes, cache, fresh=True, prompt_lengths=lengths)
    x, _ = run(inputs, jax.tree.map(lambda array: array[of], cache))
  count = min(rows * steps, _BLOCK)
  blocks = -(-rows * steps // count)
  split = lambda array: jnp.pad(
      array, [(0, blocks * count - rows * steps)] + [(0, 0)] * (array.ndim - 1)
  ).reshape(blocks, count, *array.shape[1:])

  def block(part):
    x, targets = part
    logits = decoder.logits(weights, config, x)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], -1)[:, 0]
    return logp, logits.argmax(-1) == targets

  logp, greedy = jax.lax.map(block, (split(x.reshape(-1, x.shape[-1])), split(targets.ravel())))
  return tuple(array.reshape(-1)[:rows * steps].reshape(rows, steps) for array in (logp, greedy))


def _bucket(length):
  """The power of two that a length is padded to, 8 at least."""
  return max(8, 1 << (length - 1).bit_length()) if length else 0


def _padded(sequences, rows) -> np.ndarray:
  """int32[rows, T] with zeros behind each sequence."""
  padded = np.zeros((rows, _bucket(max(map(len, sequences)))), np.int32)
  for row, sequence in zip(padded, sequences):
    row[:len(sequence)] = sequence
  return padded


def main() -> int:
  """The `lm_eval` command with this model; errors of the user are one line on stderr."""
  from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

  try:
    cli_evaluate()
    return 0
  except Exception as error:
    message = failures.line(error, "lm_eval")
    if message is None:
      raise
    print(f"palm_haiku.lm_eval: error: {message}", file=sys.stderr)
    return 2


if NAME not in MODEL_REGISTRY:
  register_model(NAME)(PaLMHaiku)

if __name__ == "__main__":
  sys.exit(main())
