"""Loss of a trained model over a text, at the length that it was trained at and at others."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from palm_haiku import data, decoder, kernels
from palm_haiku.cache import empty_cache
from palm_haiku.config import PaLMConfig
from palm_haiku.int8 import Int8
from palm_haiku.kernels import Implementation
from palm_haiku.kernels.core.compat import promoting
from palm_haiku.model import PaLM, palm_params

BATCH_TOKENS = 8192  # of one call of the compiled program


class Text(NamedTuple):
  """Held-out text as tokens."""

  name: str
  tokens: np.ndarray  # unsigned int[N]
  bytes_per_token: float
  eod: int | None = None  # end-of-document token, where no token attends to another document


class Evaluation(NamedTuple):
  """Loss over a text at one length."""

  seq_len: int
  stride: int  # tokens from one window to the next
  nats: np.ndarray  # float64[seq_len], summed over windows, by position of the token read last
  tokens: np.ndarray  # int64[seq_len], targets that were counted there
  bytes_per_token: float

  @property
  def nats_per_token(self) -> float:
    """Mean loss of a token."""
    return float(self.nats.sum() / self.tokens.sum())

  @property
  def bits_per_byte(self) -> float:
    """The same across tokenizers."""
    return self.nats_per_token / math.log(2) / self.bytes_per_token

  def by_position(self, per_octave: int = 1) -> list[dict[str, Any]]:
    """Mean loss over ranges of the number of tokens that were read, each twice as long.

    Args:
      per_octave: ranges that such a range is divided into.

    Returns:
      [{"first", "last", "tokens", "nats_per_token"}], for the ranges with tokens.
    """
    steps = range(math.ceil(math.log2(self.seq_len) * per_octave) + 1)
    ends = sorted({min(math.floor(2**(k / per_octave)), self.seq_len) for k in steps})
    rows = []
    for first, last in zip([0, *ends], ends):
      count = int(self.tokens[first:last].sum())
      if count:
        rows.append({"first": first + 1, "last": last, "tokens": count,
                     "nats_per_token": float(self.nats[first:last].sum() / count)})
    return rows


def prepare(params: Any, config: PaLMConfig, weights: str | None = None) -> Any:
  """Parameters as `evaluate` takes them.

  Args:
    params: of `PaLM.from_config(config)`, alone or within other modules.
    weights: None, or "int8" as for `generate`.

  Raises:
    ValueError: parameters of another model, or an unknown form of weights.
  """
  if weights not in (None, "int8"):
    raise ValueError(f"weights must be None or 'int8'; got {weights!r}")
  model, layers = palm_params(params, None, config)
  if weights is None:
    return {"palm": model, "palm/layers/parallel_block": layers}
  return jax.jit(decoder.prepare, static_argnums=(1, 2, 3))(
      params, config, jnp.dtype("float32"), weights)


def num_windows(num_tokens: int, seq_len: int, stride: int) -> int:
  """Windows that count every token of a text but the first.

  Raises:
    ValueError: a text that is shorter than one window, or a stride outside 1 to seq_len.
  """
  if seq_len < 1:
    raise ValueError(f"seq_len must be at least 1; got {seq_len}")
  if not 1 <= stride <= seq_len:
    raise ValueError(f"stride must be from 1 to seq_len = {seq_len}; got {stride}")
  if num_tokens < seq_len + 1:
    raise ValueError(f"the text has {num_tokens} tokens, fewer than one sequence of seq_len + 1 = "
                     f"{seq_len + 1}")
  return 1 - (seq_len + 1 - num_tokens) // stride


def num_batches(num_tokens: int, seq_len: int, stride: int, batch_tokens: int) -> int:
  """Calls of the compiled program that one evaluation makes; raises as `num_windows`."""
  windows = num_windows(num_tokens, seq_len, stride)
  return -(-windows // _batch_size(windows, seq_len, batch_tokens))


def _batch_size(windows, seq_len, batch_tokens):
  if batch_tokens < 1:
    raise ValueError(f"batch_tokens must be at least 1; got {batch_tokens}")
  return min(windows, max(1, batch_tokens // seq_len))


def evaluate(params: Any, config: PaLMConfig, text: Text, *, seq_len: int,
             stride: int | None = None, batch_tokens: int = BATCH_TOKENS,
             dtype: DTypeLike = jnp.float32, implementation: Implementation = "auto",
             on_batch: Callable[[], Any] = lambda: None) -> Evaluation:
  """The loss of every token of a text but the first, each counted once.

  Windows of `seq_len` tokens begin `stride` tokens apart. The first one counts all of its targets,
  a later one those that no window before has, its last `stride`: so each of them is predicted from
  at least `seq_len - stride + 1` tokens. One program is compiled for a length. It never holds the
  logits, nor the scores of more than a block of queries.

  Args:
    params: of `prepare`.
    text: to evaluate on.
    seq_len: tokens that the model reads.
    stride: None for `seq_len`, windows that do not overlap.
    batch_tokens: tokens that one call of the program reads, as whole windows and at least one.
    dtype: of activations and matrix products.
    implementation: see `PaLM`.
    on_batch: called after each batch, `num_batches` times.

  Raises:
    ValueError: a text shorter than one window, or a stride outside 1 to seq_len.
    FloatingPointError: the loss is not finite.
  """
  stride = seq_len if stride is None else stride
  batch_size = _batch_size(num_windows(len(text.tokens), seq_len, stride), seq_len, batch_tokens)
  nats, count = np.zeros(seq_len), np.zeros(seq_len, np.int64)
  options = Options(config, jnp.dtype(dtype), implementation)
  for batch in data.eval_batches(text.tokens, batch_size=batch_size, seq_len=seq_len,
                                 stride=stride, eod=text.eod):
    counted = batch.pop("weights") > 0
    loss = np.asarray(_losses(options, params, batch), np.float64)
    nats += np.where(counted, loss, 0).sum(0)
    count += counted.sum(0)
    on_batch()
  if not np.isfinite(nats).all():
    raise FloatingPointError(f"the loss at length {seq_len} is not finite")
  return Evaluation(seq_len, stride, nats, count, text.bytes_per_token)


class Options(NamedTuple):
  """Static arguments of a compiled program."""

  config: PaLMConfig
  dtype: np.dtype
  implementation: Implementation


@functools.partial(jax.jit, static_argnums=0)
@promoting()
def _losses(options, params, batch):
  """The loss of each target, float32[B, T], of a batch of `data.eval_batches`."""
  config, dtype, implementation = options
  tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
  segment_ids = batch["segment_ids"][:, :-1] if "segment_ids" in batch else None
  if not isinstance(params, decoder.Weights):
    model = hk.without_apply_rng(hk.transform(lambda: PaLM.from_config(
        config, dtype=dtype, implementation=implementation).loss(
            tokens, targets, segment_ids=segment_ids)))
    return model.apply(params)[0]
  x, _ = decoder.run(
      params, config, tokens, empty_cache(config, tokens.shape[:1], tokens.shape[1], dtype),
      dtype=dtype, fresh=True, segment_ids=segment_ids, implementation=implementation)
  embedding = params.embedding
  if isinstance(embedding, Int8):  # whose products are summed in float32 whatever x is
    embedding, x = (embedding.values * embedding.scales).T, x.astype(jnp.float32)
  return kernels.linear_cross_entropy(
      x, embedding, targets, scale=config.logits_factor, implementation=implementation)[0]
