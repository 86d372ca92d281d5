"""Everything that decides how a training run goes."""

import dataclasses
import functools
import math
from typing import Any

import haiku as hk
import jax.numpy as jnp
import numpy as np
import optax

from palm_haiku import optim, sharding
from palm_haiku.config import PaLMConfig
from palm_haiku.kernels import Implementation
from palm_haiku.model import PaLM


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Settings of a run; plain values, so that a checkpoint can keep them.

  A batch has a number, counted from 0; step k trains on the k-th of those that are not skipped.

  Raises:
    ValueError: a value out of range.
  """

  model: PaLMConfig
  data: str = "pydoc"  # see `corpus.mixture.parse` and `data.load_corpus`
  tokenizer: str = "bytes"  # see `data.load_tokenizer`
  eval_fraction: float = 0.1
  eval_tokens: int | None = None  # see `data.load_corpus`
  mask_documents: bool = False  # attention stays within a document
  packing: str = "end-to-end"  # of documents in sequences; see `corpus.mixture.Mixture.windows`
  steps: int = 2000
  batch_size: int = 16  # sequences in a step
  batch_ramp: str = ""  # "50000:1024,115000:2048": from these batches on, these sizes
  accumulate: int = 1  # parts of a batch that are computed one after another
  seq_len: int = 256
  optimizer: str = "adamw"  # "adamw" | "palm"
  learning_rate: float | None = None  # None: the optimizer's own
  z_loss: float = 1e-4
  seed: int = 0
  dtype: str = "float32"  # of activations and matrix products; "float32" | "bfloat16"
  remat: str = "none"
  implementation: Implementation = "auto"
  mesh: str = ""  # see `sharding.parse_mesh`; "" for one device
  shard_residual: bool = False  # between layers, over the model axis
  skip_batches: str = ""  # "1200:1500": batches 1200..1499 are left out; more, by commas
  spike: float = 0.0  # nats above the recent median at which a run goes back; 0 for never
  init: str = ""  # run or hub directory whose weights the first step starts from
  lora_rank: int = 0  # of the adapters that alone are trained (`lora`); 0 trains all parameters
  log_every: int = 10
  eval_every: int = 250
  checkpoint_every: int = 500

  def __post_init__(self):
    for name in ("steps", "batch_size", "accumulate", "seq_len", "log_every", "eval_every",
                 "checkpoint_every"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
      if getattr(self, name) >= 2**31:
        raise ValueError(f"{name} must be less than 2^31; got {getattr(self, name)}")
    if self.eval_tokens is not None and self.eval_tokens < 2:
      raise ValueError(f"eval_tokens must be at least 2; got {self.eval_tokens}")
    for size in self.batch_sizes.values():
      if size % self.accumulate:
        raise ValueError(f"accumulate must divide batch_size; got {self.accumulate} and {size}")
    if self.packing not in ("end-to-end", "best-fit"):
      raise ValueError(f"packing must be end-to-end or best-fit; got {self.packing!r}")
    if not 0 <= self.seed < 2**32:
      raise ValueError(f"seed must be from 0 to 2^32 - 1; got {self.seed}")
    if self.optimizer not in ("adamw", "palm"):
      raise ValueError(f"optimizer must be adamw or palm; got {self.optimizer!r}")
    if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
      raise ValueError(f"learning_rate must be positive and finite; got {self.learning_rate}")
    if self.dtype not in ("float32", "bfloat16"):
      raise ValueError(f"dtype must be float32 or bfloat16; got {self.dtype!r}")
    if not 0 <= self.z_loss < math.inf:
      raise ValueError(f"z_loss must be at least 0 and finite; got {self.z_loss}")
    if self.lora_rank < 0:
      raise ValueError(f"lora_rank must not be negative; got {self.lora_rank}")
    if self.lora_rank and not self.init:
      raise ValueError("lora_rank trains adapters of a model that there is; name it with init")
    if not self.spike >= 0:
      raise ValueError(f"spike must not be negative; got {self.spike}")
    _ = self.skipped  # so that a mistake is told here

  @property
  def of_step(self) -> "TrainConfig":
    """The settings that a compiled step depends on; all others as they are by default."""
    kept = {name: getattr(self, name) for name in (
        "model", "steps", "accumulate", "seq_len", "optimizer", "learning_rate", "z_loss", "seed",
        "dtype", "remat", "implementation", "mesh", "shard_residual", "init", "lora_rank")}
    if self.optimizer == "palm":
      del kept["steps"]  # Its learning rate falls with the steps that were, not with those to be.
    return TrainConfig(**kept, batch_size=self.accumulate)

  @property
  def rules(self) -> sharding.Rules:
    """The division of arrays over the mesh."""
    return sharding.SHARDED_RESIDUAL if self.shard_residual else sharding.Rules()

  @functools.cached_property
  def batch_sizes(self) -> dict[int, int]:
    """Sequences in a batch, by the first batch of that size."""
    ramp = _pairs(self.batch_ramp, "batch_ramp", "BATCH:SIZE, such as 50000:1024,115000:2048")
    if [b for b, _ in ramp] != sorted({b for b, _ in ramp}) or any(min(p) < 1 for p in ramp):
      raise ValueError(f"batch_ramp must name growing batches and positive sizes; "
                       f"got {self.batch_ramp!r}")
    return {0: self.batch_size} | dict(ramp)

  @functools.cached_property
  def skipped(self) -> tuple[tuple[int, int], ...]:
    """Ranges of batches that are left out: apart from each other, in order."""
    ranges = []
    for first, end in sorted(_pairs(self.skip_batches, "skip_batches",
                                    "FIRST:END, such as 1200:1500")):
      if first >= end:
        raise ValueError(f"skip_batches must be FIRST:END with FIRST < END; got {first}:{end}")
      if ranges and first <= ranges[-1][1]:
        before = ranges.pop()
        first, end = before[0], max(end, before[1])
      ranges.append((first, end))
    return tuple(ranges)

  def batch_of(self, step: int) -> int:
    """The number of the batch that a step trains on."""
    batch = step
    for first, end in self.skipped:
      if batch >= first:  # mutant: skipped batch
        batch += end - first
    return batch

  def skipping(self, more: str) -> "TrainConfig":
    """These settings with more batches left out, each of them named once."""
    both = dataclasses.replace(self, skip_batches=f"{self.skip_batches},{more}")
    return dataclasses.replace(
        both, skip_batches=",".join(f"{first}:{end}" for first, end in both.skipped))

  def sequences_of(self, batch: int) -> range:
    """The numbers of the sequences that a batch holds."""
    first, starts = 0, [start for start in self.batch_sizes if start <= batch]
    for start, end in zip(starts, starts[1:] + [batch]):
      first += (end - start) * self.batch_sizes[start]  # mutant: batch ramp
    return range(first, first + self.batch_sizes[starts[-1]])

  def build_model(self) -> hk.Transformed:
    """The model as a pure function (params, tokens, targets, segment_ids) -> (nll, log Z)."""
    return hk.without_apply_rng(hk.transform(
        lambda tokens, targets, segment_ids=None: PaLM.from_config(
            self.model, dtype=jnp.dtype(self.dtype), remat=self.remat, rules=self.rules,
            lora_rank=self.lora_rank, implementation=self.implementation,
        ).loss(tokens, targets, segment_ids=segment_ids)))

  def build_optimizer(self) -> optax.GradientTransformation:
    """The optimizer with its schedule."""
    rate = self.peak_learning_rate
    return optim.palm(rate) if self.optimizer == "palm" else optim.adamw(rate, steps=self.steps)

  @property
  def peak_learning_rate(self) -> float:
    """The highest learning rate of the schedule."""
    given = self.learning_rate
    return optim.LEARNING_RATES[self.optimizer] if given is None else given


# Settings that may differ on resume: they change how a step is computed or logged, how many
# there are, or where files are; docs/training.md has the table.
FREE_ON_RESUME = {"data", "tokenizer", "eval_tokens", "steps", "accumulate", "remat",
                  "implementation", "mesh", "shard_residual", "skip_batches", "spike", "log_every",
                  "eval_every", "checkpoint_every"}

# The way out for those who want to change what a run keeps.
_NEW_RUN = "for another, begin a new run from these weights with --init, in another --out"


def resumed(now: TrainConfig, before: TrainConfig, step: int) -> TrainConfig:
  """The settings of a run that goes on.

  Args:
    now: settings that are asked for.
    before: those of the run's checkpoint.
    step: that the checkpoint was made after.

  Raises:
    ValueError: the run cannot go on like that.
  """
  was, asked = _flatten(before), _flatten(now)
  changed = [name for name in was if name not in FREE_ON_RESUME and was[name] != asked[name]]
  if changed:
    raise ValueError(
        "the run was trained with "
        + ", ".join(f"{name} = {was[name]!r}, not {asked[name]!r}" for name in changed)
        + f", and keeps {'that' if len(changed) == 1 else 'those'}; {_NEW_RUN}")
  if now.steps < step:
    raise ValueError(f"the run is at step {step} already, beyond --steps {now.steps}; name more "
                     f"steps than {step}, or sample from it as it is")
  trained = before.batch_of(step - 1)
  both = now.skipping(before.skip_batches)
  if both.batch_of(step - 1) != trained:
    raise ValueError(f"batches up to {trained} were trained on already; skip later ones")
  return both


def change_of_rate(now: TrainConfig, before: TrainConfig, step: int) -> str | None:
  """A line on what another number of steps does to the learning rate of a run that goes on."""
  if now.optimizer != "adamw" or now.steps in (before.steps, step):
    return None
  rates = [np.asarray(optim.schedule(c.peak_learning_rate, steps=c.steps)(step)).item()
           for c in (before, now)]
  if math.isclose(*rates, rel_tol=1e-3):
    return None
  return (f"{now.steps} steps instead of {before.steps} move the learning rate's cosine: from step "
          f"{step} on it is {rates[1]:.2g}, where it was to be {rates[0]:.2g}")


def _flatten(config: TrainConfig) -> dict[str, Any]:
  fields = dataclasses.asdict(dataclasses.replace(config, learning_rate=config.peak_learning_rate))
  return fields | fields.pop("model")


def load_config(metadata: dict[str, Any]) -> TrainConfig:
  """The configuration that a checkpoint's metadata describe.

  Raises:
    ValueError: a field that is unknown here.
  """
  fields = dict(metadata["config"])
  for kind, given in ((TrainConfig, fields), (PaLMConfig, fields["model"])):
    unknown = given.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown:
      raise ValueError("the checkpoint has settings that are unknown here, because a newer version "
                       f"wrote it: {', '.join(sorted(unknown))}")
  return TrainConfig(model=PaLMConfig.from_dict(fields.pop("model")), **fields)


def _pairs(text: str, name: str, form: str) -> list[tuple[int, int]]:
  pairs = [entry.split(":") for entry in text.split(",") if entry]
  if any(len(pair) != 2 or not all(x.strip().isdecimal() for x in pair) for pair in pairs):
    raise ValueError(f"{name} must be written {form}; got {text!r}")
  return [(int(a), int(b)) for a, b in pairs]
