"""The training loop."""

import dataclasses
import functools
import math
import pathlib
import signal
import threading
import time
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console

from palm_haiku import data, optim, runlog
from palm_haiku.checkpoint import CheckpointError, Checkpoints
from palm_haiku.config import PaLMConfig
from palm_haiku.loss import mean_loss
from palm_haiku.model import PaLM

# Dense bfloat16 FLOP/s of a chip, from its maker's data sheet, by JAX's name of it.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Everything that decides how a run goes.

  Raises:
    ValueError: a value out of range.
  """

  model: PaLMConfig
  data: str = "pydoc"  # see `data.load_corpus`
  tokenizer: str = "bytes"  # see `data.load_tokenizer`
  eval_fraction: float = 0.1
  mask_documents: bool = False  # attention stays within a document
  steps: int = 2000
  batch_size: int = 16  # sequences in a step
  accumulate: int = 1  # parts of a batch that are computed one after another
  seq_len: int = 256
  optimizer: str = "adamw"  # "adamw" | "palm"
  learning_rate: float | None = None  # None: the optimizer's own
  z_loss: float = 1e-4
  seed: int = 0
  dtype: str = "float32"  # of activations and matrix products; "float32" | "bfloat16"
  remat: str = "none"
  implementation: str = "auto"
  log_every: int = 10
  eval_every: int = 250
  checkpoint_every: int = 500

  def __post_init__(self):
    for name in ("steps", "batch_size", "accumulate", "seq_len", "log_every", "eval_every",
                 "checkpoint_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
    if self.batch_size % self.accumulate:
      raise ValueError(f"accumulate must divide batch_size; got {self.accumulate} "
                       f"and {self.batch_size}")
    if self.optimizer not in ("adamw", "palm"):
      raise ValueError(f"optimizer must be adamw or palm; got {self.optimizer!r}")
    if self.learning_rate is not None and not self.learning_rate > 0:
      raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"dtype must be float32 or bfloat16; got {self.dtype!r}")

  def build_model(self) -> hk.Transformed:
    """The model as a pure function (params, tokens, targets, segment_ids) -> (nll, log Z)."""
    return hk.without_apply_rng(hk.transform(
        lambda tokens, targets, segment_ids=None: PaLM.from_config(
            self.model, dtype=jnp.dtype(self.dtype), remat=self.remat,
            implementation=self.implementation).loss(tokens, targets, segment_ids=segment_ids)))

  def build_optimizer(self) -> optax.GradientTransformation:
    """The optimizer with its schedule."""
    given = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
    return optim.palm(**given) if self.optimizer == "palm" else optim.adamw(
        steps=self.steps, **given)


# What may differ when a run is resumed: it changes how a step is computed, logged or how many
# there are, but not what the checkpoint means.
_FREE_ON_RESUME = {"steps", "accumulate", "remat", "implementation", "log_every", "eval_every",
                   "checkpoint_every"}


class TrainState(NamedTuple):
  """All that a step changes."""

  params: Any
  opt_state: Any


class Score(NamedTuple):
  """A loss, and what it is across tokenizers."""

  nats_per_token: float
  bits_per_byte: float


class Result(NamedTuple):
  """How a run ended."""

  step: int
  train: Score  # of the last step that was logged
  held_out: Score | None  # after the last step
  interrupted_by: signal.Signals | None


def init(config: TrainConfig) -> TrainState:
  """The state before the first step; depends on `config.seed` alone."""
  tokens = jnp.zeros((1, config.seq_len), jnp.int32)
  params = config.build_model().init(jax.random.key(config.seed), tokens, tokens)
  return TrainState(params, config.build_optimizer().init(params))


_init = jax.jit(init, static_argnums=0)


def train_step(config: TrainConfig, state: TrainState, batch) -> tuple[TrainState, dict]:
  """One step of the optimizer on one batch.

  Args:
    batch: {"tokens": int[B, T + 1]} and, to keep attention within documents,
      "segment_ids": int[B, T + 1].

  Returns:
    The new state, and scalars: loss (negative log-likelihood), log_z_squared, grad_norm.
  """
  model = config.build_model()

  def loss_of(params, batch):
    nll, log_z = model.apply(params, *_inputs_and_targets(batch))
    loss = mean_loss(nll, log_z, z_loss=config.z_loss)
    return loss.total, loss

  grad = jax.grad(loss_of, has_aux=True)
  if config.accumulate == 1:
    grads, loss = grad(state.params, batch)
  else:
    parts = jax.tree.map(
        lambda x: x.reshape(config.accumulate, -1, *x.shape[1:]), batch)
    add = functools.partial(jax.tree.map, jnp.add)
    shapes = jax.eval_shape(grad, state.params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(
        lambda total, part: (add(total, grad(state.params, part)), None), zeros, parts)
    grads, loss = jax.tree.map(lambda x: x / config.accumulate, total)
  updates, opt_state = config.build_optimizer().update(grads, state.opt_state, state.params)
  metrics = {"loss": loss.nll, "log_z_squared": loss.log_z_squared,
             "grad_norm": optax.tree.norm(grads)}
  return TrainState(optax.apply_updates(state.params, updates), opt_state), metrics


def eval_step(config: TrainConfig, params, batch) -> tuple[jax.Array, jax.Array]:
  """Summed negative log-likelihood of a batch's targets, and the sum of their weights."""
  nll, _ = config.build_model().apply(params, *_inputs_and_targets(batch))
  return (nll * batch["weights"]).sum(), batch["weights"].sum()


_train_step = jax.jit(train_step, static_argnums=0, donate_argnums=1)
_eval_step = jax.jit(eval_step, static_argnums=0)


def _inputs_and_targets(batch):
  segment_ids = batch["segment_ids"][:, :-1] if "segment_ids" in batch else None
  return batch["tokens"][:, :-1], batch["tokens"][:, 1:], segment_ids


def train(config: TrainConfig, out: str | pathlib.Path, *, resume: bool = False,
          console: rich.console.Console | None = None) -> Result:
  """Trains a model, leaving checkpoints and metrics under `out`.

  SIGINT and SIGTERM save a checkpoint and end the run. A run that was interrupted at any moment
  and resumed goes through the same states, bit for bit, as one that was not.

  Args:
    config: of the run.
    out: directory of the run.
    resume: go on from the newest whole checkpoint under `out`; without one, begin.
    console: where progress goes; None for standard output.

  Raises:
    ValueError: data that do not fit the model, or another run's directory.
    CheckpointError: a checkpoint could not be written or read.
    FloatingPointError: the loss is not finite any more.
  """
  console = console or rich.console.Console()
  out = pathlib.Path(out)
  tokenizer = data.load_tokenizer(config.tokenizer)
  corpus = data.load_corpus(config.data, tokenizer, config.eval_fraction)
  _check_vocabulary(config.model, corpus)
  checkpoints = Checkpoints(out / "checkpoints", warn=lambda line: console.print(
      f"[yellow]warning:[/] {line}", soft_wrap=True))
  run = {"config": dataclasses.asdict(config), "data_fingerprint": corpus.fingerprint}
  start = _starting_step(out, checkpoints, run, resume)
  eod = corpus.eod if config.mask_documents else None
  batches = data.batches(corpus.train, batch_size=config.batch_size, seq_len=config.seq_len,
                         seed=config.seed, eod=eod)

  out.mkdir(parents=True, exist_ok=True)
  state = jax.eval_shape(lambda: init(config)) if start else _init(config)
  if start:
    restored = checkpoints.restore(start, state._asdict())
    state = TrainState(**restored)
    console.print(f"resuming from step {start}", highlight=False)
  has_eval = len(corpus.eval) > 1
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  tokens_per_step = config.batch_size * config.seq_len

  def evaluate(params):
    sums = [_eval_step(config, params, batch) for batch in data.eval_batches(
        corpus.eval, batch_size=config.batch_size, seq_len=config.seq_len, eod=eod)]
    nll, count = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)
    return float(nll / count)

  def save(step):
    checkpoints.save(step, state._asdict(), {**run, "step": step})

  with (_Interrupts() as interrupts,
        runlog.RunLog(out, steps=config.steps, start=start, console=console) as log):
    saved = step = start
    clock, clock_step = None, start
    while step < config.steps and interrupts.received is None:
      state, metrics = _train_step(config, state, batches[step])
      step += 1
      last = step == config.steps
      evaluated = has_eval and (last or step % config.eval_every == 0)
      if evaluated or last or step == 1 or step % config.log_every == 0:
        row = {"step": step, **_finite(metrics, step, saved)}
        now = time.perf_counter()
        if clock is not None:  # The first interval would count compilation.
          rate = (step - clock_step) * tokens_per_step / (now - clock)
          row["tokens_per_second"] = rate
          if peak:
            flops = config.model.train_flops_per_token(config.seq_len)
            row["mfu"] = rate * flops / (peak * jax.device_count())
        if evaluated:
          row["eval_loss"] = evaluate(state.params)
        log.write(row)
        clock, clock_step = time.perf_counter(), step
      log.advance(step)
      if last or step % config.checkpoint_every == 0:
        _finite(metrics, step, saved)
        save(step)
        saved = step
    if step > saved:
      _finite(metrics, step, saved)
      save(step)
  rows = runlog.read_metrics(log.path)
  end = rows[-1] if rows else {}
  eval_loss = end.get("eval_loss") if end.get("step") == step else None
  return Result(
      step, _score(end.get("loss", math.nan), corpus.train_bytes_per_token),
      None if eval_loss is None else _score(eval_loss, corpus.eval_bytes_per_token),
      interrupts.received)


def _score(nats_per_token, bytes_per_token) -> Score:
  return Score(nats_per_token, nats_per_token / math.log(2) / bytes_per_token)


def _finite(metrics, step, saved) -> dict[str, float]:
  """The metrics as numbers, if the run has not diverged."""
  row = {name: float(x) for name, x in metrics.items()}
  for name, value in row.items():
    if not math.isfinite(value):
      raise FloatingPointError(
          f"{name} is {value} at step {step}; "
          + (f"checkpoint {saved} is intact" if saved else "nothing was saved yet")
          + "; a lower learning rate or another seed may help")
  return row


def load_config(metadata: dict[str, Any]) -> TrainConfig:
  """The configuration that a checkpoint's metadata describe."""
  fields = dict(metadata["config"])
  return TrainConfig(model=PaLMConfig.from_dict(fields.pop("model")), **fields)


def _check_vocabulary(model: PaLMConfig, corpus):
  for tokens in (corpus.train, corpus.eval):
    if len(tokens) and int(tokens.max()) >= model.num_tokens:
      raise ValueError(f"the data hold token {int(tokens.max())}, outside the model's vocabulary "
                       f"of {model.num_tokens}; use num_tokens of at least "
                       f"{int(tokens.max()) + 1}")


def _starting_step(out, checkpoints, run, resume) -> int:
  """The step to go on from, once it is sure that `out` is this run's directory."""
  if not resume:
    if checkpoints.steps() or (out / "metrics.jsonl").exists():
      raise ValueError(f"{out} holds another run; continue it with --resume, or choose another "
                       "--out")
    return 0
  step = checkpoints.latest(repair=True)
  if step is None:
    return 0
  then = checkpoints.metadata(step)
  was, now = _flatten(then["config"]), _flatten(run["config"])
  for name in was.keys() | now.keys():
    if name not in _FREE_ON_RESUME and was.get(name) != now.get(name):
      raise ValueError(f"{out} was trained with {name} = {was.get(name)!r}, not "
                       f"{now.get(name)!r}; resume with the same, or choose another --out")
  if then["data_fingerprint"] is None:
    raise ValueError(f"{out} holds imported weights, not a run that could go on")
  if then["data_fingerprint"] != run["data_fingerprint"]:
    raise ValueError(f"{out} was trained on other data: {was['data']!r} has changed since")
  return step


def _flatten(config) -> dict[str, Any]:
  return {**{k: v for k, v in config.items() if k != "model"}, **config["model"]}


class _Interrupts:
  """Turns SIGINT and SIGTERM into a note to stop; a second one is obeyed at once."""

  def __enter__(self):
    self.received: signal.Signals | None = None
    self._previous = {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGINT, signal.SIGTERM):
        self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _note(self, number, frame):
    self.received = signal.Signals(number)
    signal.signal(number, self._previous[number])
