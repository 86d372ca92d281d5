"""A trained model by its directory: a run of this project, or a model of the hub."""

import logging
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from palm_haiku.config import PaLMConfig

if TYPE_CHECKING:
  from palm_haiku.recipe import TrainConfig


class Pretrained(NamedTuple):
  """A model to sample from, to evaluate or to train further."""

  config: PaLMConfig
  params: Any  # of `PaLM.from_config(config)`, adapters merged
  tokenizer: Any
  seq_len: int | None  # tokens that it was trained at; None where nothing says


def load_run(path: str | os.PathLike) -> tuple[PaLMConfig, Any, Any]:
  """The config, parameters and tokenizer of a run's newest checkpoint, or of a hub directory.

  Args:
    path: directory of a run, or of a model of the hub (see `palm_haiku.hub.load`).

  Returns:
    (config, float32 parameters of `PaLM.from_config(config)`, tokenizer).

  Raises:
    ValueError, CheckpointError: there is no model, or it cannot be read.
  """
  model = load(path)
  return model.config, model.params, model.tokenizer


def beyond_training(model: Pretrained, tokens: int) -> str | None:
  """The warning for a model that reads so many tokens at once; None where nothing is amiss."""
  trained = model.seq_len if model.config.position == "rotary" else None
  if trained is None or tokens <= trained:
    return None
  return (f"the model was trained at {trained} tokens and {tokens} are asked for: rotary positions "
          "do not reach beyond what was trained, and predictions get worse there")


class Description(NamedTuple):
  """A model without its weights."""

  config: PaLMConfig
  tokenizer: str  # name for `data.load_tokenizer`


def describe(path: str | os.PathLike, *, tokenizer: str | None = None) -> Description:
  """The architecture and tokenizer of a model, its weights unread; arguments as of `load`."""
  from palm_haiku import hub
  from palm_haiku.recipe import load_config
  from palm_haiku.rundir import RunDirectory

  path = pathlib.Path(path).expanduser()
  if hub.is_model(path):
    config, read = hub.read_config(path), _hub_tokenizer(path, tokenizer)
  else:
    directory = RunDirectory(path)
    metadata = directory.metadata()
    config = load_config(metadata).model
    read = directory.tokenizer(tokenizer or metadata["config"]["tokenizer"], metadata)
  _check_tokens(read, config)
  return Description(config, "bytes" if read.name == "bytes" else os.path.abspath(read.name))


def load(path: str | os.PathLike, *, tokenizer: str | None = None, mesh=None, rules=None,
         warn: Callable[[str], None] = logging.warning) -> Pretrained:
  """A trained model.

  Args:
    path: as of `load_run`.
    tokenizer: name or path of the tokenizer, where the model does not bring it.
    mesh, rules: how parameters are divided; None for one device.
    warn: receives a line for each checkpoint that is refused.
  """
  from palm_haiku import hub

  path = pathlib.Path(path).expanduser()
  load_any = _load_hub if hub.is_model(path) else _load_run
  return load_any(path, tokenizer, mesh, rules, warn)


def load_with_tokenizer(path: str | os.PathLike, *, tokenizer: str | None = None,
                        warn: Callable[[str], None] = logging.warning) -> Pretrained:
  """A trained model whose tokenizer is known to be its own; arguments as of `load`.

  Raises:
    ValueError: as `load`; or weights that were converted without a tokenizer and are not of bytes,
      or that are no directory yet.
  """
  if os.path.isfile(os.path.expanduser(path)):
    raise ValueError(f"{path} is a file; make a run of a peer's arrays with palm-haiku convert "
                     "--from PEER --tokenizer NAME")
  model = load(path, tokenizer=tokenizer, warn=warn)
  wide = model.config.num_tokens != model.tokenizer.num_tokens
  if tokenizer is None and model.seq_len is None and model.tokenizer.name == "bytes" and wide:
    raise ValueError(f"{path} was converted without a tokenizer, and its {model.config.num_tokens} "
                     "tokens are no bytes; convert it again with --tokenizer, or name bytes here "
                     "with --tokenizer bytes")
  return model


def settings(path: str | os.PathLike) -> "tuple[TrainConfig, str] | None":
  """A run's settings and the fingerprint of its data; None for converted weights and for the hub.

  Raises:
    ValueError, CheckpointError: there is no model, or it cannot be read.
  """
  from palm_haiku import hub
  from palm_haiku.recipe import load_config
  from palm_haiku.rundir import RunDirectory

  path = pathlib.Path(path).expanduser()
  if hub.is_model(path):
    return None
  metadata = RunDirectory(path).metadata()
  fingerprint = metadata["data_fingerprint"]
  return None if fingerprint is None else (load_config(metadata), fingerprint)


def _load_hub(path, name, mesh, rules, warn):
  from palm_haiku import hub
  from palm_haiku.sharding import Rules

  tokenizer = _hub_tokenizer(path, name)
  config, params = hub.load(path, mesh=mesh, rules=rules or Rules())
  _check_tokens(tokenizer, config)
  return Pretrained(config, params, tokenizer, None)


def _hub_tokenizer(path, name):
  from palm_haiku import data, hub

  names = [path / file for file in ("tokenizer.json", "tokenizer.model") if path.is_dir()]
  name = name or next((str(file) for file in names if file.is_file()), None)
  if name is None:
    raise hub.HubError(f"{path} has no tokenizer.json; name its tokenizer with --tokenizer")
  return data.load_tokenizer(name)


def _check_tokens(tokenizer, config):
  if tokenizer.num_tokens > config.num_tokens:
    raise ValueError(f"the tokenizer {tokenizer.name} has {tokenizer.num_tokens} tokens, the model "
                     f"only {config.num_tokens}; name the model's own with --tokenizer")


def _load_run(path, name, mesh, rules, warn):
  import jax

  from palm_haiku import lora, sharding
  from palm_haiku.recipe import load_config
  from palm_haiku.rundir import RunDirectory
  from palm_haiku.sharding import Rules

  directory = RunDirectory(path, warn=warn)

  def like(params):
    if mesh is None:
      return params
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), params,
        sharding.params_shardings(params, mesh, rules or Rules()))

  metadata, params = directory.load(like)
  settings = load_config(metadata)
  tokenizer = directory.tokenizer(name or settings.tokenizer, metadata)
  imported = metadata["data_fingerprint"] is None
  return Pretrained(settings.model, lora.merge(params), tokenizer,
                    None if imported else settings.seq_len)

