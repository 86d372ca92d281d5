"""The training loop."""

import collections
import contextlib
import dataclasses
import math
import pathlib
import signal
import statistics
import threading
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.console

from palm_haiku import (
  data,
  distributed,
  lora,
  memory,
  prefetch,
  pretrained,
  runlog,
  sharding,
  terminal,
)
from palm_haiku.checkpoint import CheckpointError
from palm_haiku.config import PaLMConfig
from palm_haiku.corpus import mixture, verify
from palm_haiku.kernels.core import chips
from palm_haiku.recipe import TrainConfig, change_of_rate, load_config, resumed
from palm_haiku.rundir import RunDirectory
from palm_haiku.train_step import TrainState, program

_ERRORS = (ValueError, CheckpointError, OSError)  # of the run's directory

# After a spike of the loss (PaLM, section 5.1): where a run goes back to, and what it leaves out.
GO_BACK = 100  # steps before the spike, at least
SKIP = 200  # batches from there on, at least
RECENT = 20  # logged losses whose median is not a spike


class Score(NamedTuple):
  """A loss, and what it is across tokenizers."""

  nats_per_token: float
  bits_per_byte: float


class Result(NamedTuple):
  """The end of a run."""

  step: int
  train: Score  # of the last step that was logged
  held_out: Score | None  # after the last step
  interrupted_by: signal.Signals | None


def train(config: TrainConfig, out: str | pathlib.Path, *, resume: bool = False,
          console: rich.console.Console | None = None) -> Result:
  """Trains a model, leaving its settings, checkpoints and metrics under `out`.

  SIGINT and SIGTERM save a checkpoint and end the run. A run that was interrupted at any moment
  and resumed goes through the same states, bit for bit, as one that was not.

  All processes of a job call this; each feeds its own devices, all write the checkpoints, and the
  first one prints and logs. `out` is a directory that they share.

  Args:
    config: of the run.
    out: directory of the run.
    resume: go on from the newest whole checkpoint under `out`, on any mesh; without one, begin
      anew, whatever the settings of a run that had not come that far. docs/training.md says which
      settings may differ.
    console: where progress goes; None for standard output.

  Raises:
    ValueError: data that do not fit the model, a mesh that does not fit the devices, the model or
      the batch, settings that a run cannot go on with, or a directory that is in use, another
      run's or somebody else's.
    CheckpointError: a checkpoint could not be written or read.
    FloatingPointError: the loss is not finite any more.
  """
  console = console or terminal.Console(enduring=True)
  if not distributed.is_leader():
    console = rich.console.Console(quiet=True)
  warn = lambda line: terminal.say(console, f"warning: {line}", style="yellow")
  mesh = _mesh(config)
  with sharding.in_context(mesh), RunDirectory(out, warn) as directory:
    before = distributed.from_leader(lambda: directory.open(resume), _ERRORS)
    return _Run(config, mesh, directory, before, console, warn).go(resume)


class _Run:
  """Shared state of the loop's parts."""

  read_ahead: prefetch.Prefetch | None = None  # while it trains

  def __init__(self, config, mesh, directory, before, console, warn):
    self.start = 0
    if before is not None:
      self.start, settings = before["step"], load_config(before)
      config = resumed(config, settings, self.start)
      if line := change_of_rate(config, settings, self.start):
        warn(line)
    self.config, self.directory, self.console = config, directory, console
    self.checkpoints, self.out = directory.checkpoints, directory.path
    self.program = program(config, mesh)
    self.tokenizer = directory.tokenizer(config.tokenizer, before)
    self.corpus = _corpus(config, self.tokenizer, before)
    _check_vocabulary(config.model, self.corpus.max_token)
    if self.corpus.loses_newlines:
      warn(data.losing_newlines(self.tokenizer.name))
    self.eod = self.corpus.eod if config.mask_documents else None
    self.verification = verify.Verification()
    distributed.from_leader(
        lambda: self.verification.begin(corpus for corpus, _ in self.corpus.parts), _ERRORS)
    self.windows = self.corpus.windows(
        seq_len=config.seq_len, seed=config.seed, eod=self.eod, packing=config.packing)

  def go(self, resume) -> Result:
    start, config = self.start, self.config
    distributed.from_leader(
        lambda: self.directory.begin(dataclasses.asdict(config), self.tokenizer), _ERRORS)
    if start:
      self.state = self._restore(start)
      terminal.say(self.console, f"resuming from step {start}")
    else:
      if resume:
        terminal.say(self.console, f"no checkpoint in {self.out}: beginning anew")
      self.state = self._initial_state()
    if config.packing == "best-fit":
      terminal.say(self.console, f"packing leaves {self.windows.padding:.2%} of the targets empty")
    recent = self._recent(start)
    any_process = distributed.AnyProcess()
    with (_Interrupts() as interrupts, self._log(start) as log, self.verification,
          prefetch.Prefetch(self._rows, config.steps) as self.read_ahead):
      saved = step = start
      clock, tokens = None, []
      while step < config.steps and not any_process(self._stopped_by(interrupts) is not None):
        self.verification.raise_problem()
        batch = self._batch(step)
        self.state, metrics = self.program.step(self.state, batch)
        step += 1
        tokens.append(metrics.pop("targets", batch["tokens"].shape[0] * config.seq_len))
        last = step == config.steps
        evaluated = bool(self.corpus.held_out) and (last or step % config.eval_every == 0)
        saves = last or step % config.checkpoint_every == 0
        # To go back from what is not finite, it must be seen before it is saved.
        if (evaluated or last or step == 1 or step % config.log_every == 0
            or saves and config.spike):
          row = {"step": step, **{name: float(x) for name, x in metrics.items()}}
          if self._is_spike(row, recent):
            back = self._before(step)
            if back is not None:
              self._go_back(back, step, row["loss"], log)
              saved = step = back
              recent = self._recent(back)
              clock, tokens = None, []
              self.read_ahead.forget()
              continue
          _check_finite(row, step, saved)
          now = time.perf_counter()
          if clock is not None:  # The first interval would count compilation.
            row |= self._speed(sum(map(float, tokens)) / (now - clock))
            row["data_wait"] = self.read_ahead.waited / (now - clock)
          used = memory.peak(jax.local_devices()[0])
          if used is not None:
            row["memory_bytes"] = used
          if evaluated:
            row["eval_loss"] = self._evaluate()
          if log:
            log.write(row)
          clock, tokens, self.read_ahead.waited = time.perf_counter(), [], 0.0
        if log:
          log.advance(step)
        if saves:
          self._save(step, metrics, saved)
          saved = step
      if step > saved:
        self._save(step, metrics, saved)
      stopped = self._stopped_by(interrupts)
    distributed.barrier("the log is written")
    rows = runlog.read_metrics(self.out / runlog.METRICS)
    end = rows[-1] if rows else {}
    eval_loss = end.get("eval_loss") if end.get("step") == step else None
    return Result(
        step, _score(end.get("loss", math.nan), self.corpus.train_bytes_per_token),
        None if eval_loss is None else _score(eval_loss, self.corpus.eval_bytes_per_token),
        stopped or (signal.SIGTERM if step < config.steps else None))

  def _stopped_by(self, interrupts) -> signal.Signals | None:
    if interrupts.received is None and getattr(self.console, "lost", None):
      return signal.SIGPIPE
    return interrupts.received

  def _initial_state(self) -> TrainState:
    """The state before the first step, its parameters those of `config.init` if that is given."""
    state = self.program.init()
    if not self.config.init:
      return state
    # Fresh parameters make room for the others before these are read.
    adapters = lora.split(state.params)[0] if self.config.lora_rank else {}
    state = state._replace(params=None)
    mesh = jax.sharding.get_mesh() if self.program.batch_sharding is not None else None
    start = pretrained.load(self.config.init, tokenizer=self.config.tokenizer, mesh=mesh,
                            rules=self.config.rules)
    if start.config != self.config.model:
      raise ValueError(f"{self.config.init} is another model than config.model")
    terminal.say(self.console, f"weights of {self.config.init}")
    params = start.params if mesh else jax.device_put(start.params, sharding.default_device())
    return state._replace(params=lora.join(adapters, params))

  def _batch(self, step):
    """The batch of a step, where its devices take it."""
    rows = self._rows(step) if self.read_ahead is None else self.read_ahead(step)
    where, numbers = self.program.batch_sharding, self._numbers(step)
    stack = lambda name, wanted: np.stack([rows[number][name] for number in wanted])
    return {
        name: stack(name, numbers) if where is None else jax.make_array_from_callback(
            (len(numbers), *row.shape), where,
            lambda index, name=name: stack(name, numbers[index[0]]))
        for name, row in next(iter(rows.values())).items()}

  def _rows(self, step) -> dict[int, dict[str, np.ndarray]]:
    """The sequences of a step by number; on a mesh, those of this process's devices alone."""
    numbers, where = self._numbers(step), self.program.batch_sharding
    parts = [numbers] if where is None else [numbers[index[0]] for index in (
        where.addressable_devices_indices_map((len(numbers), self.config.seq_len + 1)).values())]
    return {number: self.windows[number] for number in sorted(set().union(*parts))}

  def _numbers(self, step) -> range:
    return self.config.sequences_of(self.config.batch_of(step))  # mutant: batch of a step

  def _evaluate(self) -> float:
    return self.corpus.mean_held_out(lambda corpus: self._evaluate_on(corpus.eval))

  def _evaluate_on(self, tokens) -> float:
    where = self.program.batch_sharding
    sums = [
        self.program.evaluate(
            self.state.params, {name: distributed.place(x, where) for name, x in batch.items()})
        for batch in data.eval_batches(tokens, batch_size=self.config.batch_size,
                                       seq_len=self.config.seq_len, eod=self.eod)]
    nll, count = np.sum(jax.device_get(sums), axis=0, dtype=np.float64)  # mutant: evaluation
    return float(nll / count)

  def _speed(self, tokens_per_second) -> dict[str, float]:
    """Throughput and, on a chip of known peak, its utilisation (PaLM, appendix B)."""
    config, speed = self.config, {"tokens_per_second": tokens_per_second}
    peak = chips.peak(jax.devices()[0].device_kind)
    if peak:
      model, hardware = (config.model.train_flops_per_token(config.seq_len),
                         config.model.train_flops_per_token(config.seq_len, remat=config.remat))
      devices = 1 if self.program.batch_sharding is None else jax.device_count()
      speed["mfu"] = tokens_per_second * model / (peak * devices)
      speed["hfu"] = tokens_per_second * hardware / (peak * devices)
    return speed

  def _is_spike(self, row, recent) -> bool:
    """Whether the loss has left the recent ones by more than `config.spike`."""
    if not self.config.spike:
      return False
    loss = row["loss"]
    if not all(math.isfinite(x) for x in row.values()):
      return True
    # mutant: spike
    if len(recent) == RECENT and loss > statistics.median(recent) + self.config.spike:
      return True
    recent.append(loss)
    return False

  def _recent(self, step) -> collections.deque[float]:
    """The losses that those after a step are compared with: what a run up to there would have."""
    def replay():
      recent = collections.deque(maxlen=RECENT)
      for row in runlog.read_metrics(self.out / runlog.METRICS):
        if row["step"] <= step:
          self._is_spike(row, recent)
      return list(recent)

    return collections.deque(distributed.from_leader(replay, ()), maxlen=RECENT)

  def _before(self, step) -> int | None:
    """The newest checkpoint far enough before a spike, else the oldest there is."""
    def choose():
      whole = [s for s in self.checkpoints.steps() if self.checkpoints.problem(s) is None]
      # mutant: back
      return max((s for s in whole if s <= step - GO_BACK), default=min(whole, default=None))

    return distributed.from_leader(choose, ())

  def _go_back(self, back, step, loss, log):
    first = self.config.batch_of(back)
    end = max(first + SKIP, self.config.batch_of(step))  # mutant: left out
    self.config = self.config.skipping(f"{first}:{end}")
    self.checkpoints.forget_after(back)
    del self.state  # Room for the other.
    self.state = self._restore(back)
    if log:
      self.directory.write_settings(dataclasses.asdict(self.config))
      log.rewind(back)
      log.say(f"loss {loss:.3f} at step {step} is a spike: going back to step {back} and leaving "
              f"out batches {first} to {end - 1}")

  def _metadata(self) -> dict[str, Any]:
    return {"config": dataclasses.asdict(self.config), "data_fingerprint": self.corpus.fingerprint,
            "tokenizer_fingerprint": self.tokenizer.fingerprint}

  def _save(self, step, metrics, saved):
    _check_finite(metrics, step, saved)
    self.checkpoints.save(step, self.state._asdict(), {**self._metadata(), "step": step})

  def _restore(self, step) -> TrainState:
    return TrainState(**self.checkpoints.restore(step, self.program.state._asdict()))

  def _log(self, start):
    if not distributed.is_leader():
      return contextlib.nullcontext()
    return runlog.RunLog(self.out, steps=self.config.steps, start=start, console=self.console)


def _mesh(config):
  """The mesh of a run, once it is sure that model and batches can be divided over it."""
  if not config.mesh or config.mesh == "one-chip":
    if jax.process_count() > 1:
      raise ValueError(f"a job of {jax.process_count()} processes needs a mesh, such as "
                       "--mesh fsdp")
    return None
  mesh = sharding.make_mesh(config.mesh)
  for size in config.batch_sizes.values():
    sharding.check(config.model, mesh, config.rules, batch_size=size // config.accumulate,
                   seq_len=config.seq_len)
  return mesh


def _score(nats_per_token, bytes_per_token) -> Score:
  return Score(nats_per_token, nats_per_token / math.log(2) / bytes_per_token)


def _check_finite(metrics, step, saved):
  for name, value in metrics.items():
    value = float(value)
    if not math.isfinite(value):
      raise FloatingPointError(
          f"{name} is {value} at step {step}; "
          + (f"checkpoint {saved} is intact" if saved else "nothing was saved yet")
          + "; a lower learning rate or another seed may help")


def _corpus(config, tokenizer, before) -> mixture.Mixture:
  """The data of a run, known by their fingerprint wherever they are if it goes on."""
  try:
    corpus = mixture.load(config.data, tokenizer, config.eval_fraction, config.eval_tokens)
  except ValueError as error:
    if before is None:
      raise
    raise ValueError(f"{error}; if the data have moved, name their place with --data") from error
  if before is not None and before["data_fingerprint"] != corpus.fingerprint:  # mutant: other data
    raise ValueError(
        f"the run was trained on other data than {config.data} holds now"
        + ("" if "tokenizer_fingerprint" in before else ", or with another tokenizer"))
  return corpus


def _check_vocabulary(model: PaLMConfig, largest: int):
  if largest >= model.num_tokens:
    raise ValueError(f"the data hold token {largest}, outside the model's vocabulary of "
                     f"{model.num_tokens}; use num_tokens of at least {largest + 1}")


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
