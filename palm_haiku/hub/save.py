"""A trained PaLM as a directory that transformers, vLLM and llama.cpp load."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from palm_haiku.config import PaLMConfig
from palm_haiku.hub import configs, layouts
from palm_haiku.hub.errors import HubError, library
from palm_haiku.model import palm_params

SHARD = 4 * 2**30  # bytes of tensors in a file


def save(path, config: PaLMConfig, params: Mapping[str, Mapping[str, Any]],
         tokenizer=None, *, prefix: str | None = None) -> None:
  """Writes a model as a Cohere model: config.json, float32 safetensors and the tokenizer.

  Args:
    path: a new directory, which is there only when it is complete.
    config: of the model.
    params: of `PaLM.from_config(config)`, alone or within other modules.
    tokenizer: of the run; its `save(directory)` writes the files of the hub's layout.
    prefix: the module's name in params; None where they hold one PaLM.

  Raises:
    HubError: an architecture that Cohere's cannot express, with the field's name; a path that is
      taken; a tokenizer that the hub's layout cannot express.
    ValueError: params that are not of the config, or hold several models and no prefix is given.
  """
  path = pathlib.Path(path).expanduser()
  fields = configs.to_json(config)
  if path.exists():
    raise HubError(f"{path} exists already; choose another directory")
  draft = path.with_name(f".{path.name}.draft")
  shutil.rmtree(draft, ignore_errors=True)
  draft.mkdir(parents=True)
  try:
    if tokenizer is not None:
      fields |= tokenizer.save(draft)
    (draft / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    _write_tensors(draft, config, palm_params(params, prefix, config))
    os.replace(draft, path)
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def _write_tensors(directory, config, params):
  shards, size, current = [], 0, {}
  for name, shape, get in _tensors(config, params):
    if current and size + 4 * int(np.prod(shape)) > SHARD:
      shards.append(_write_shard(directory, len(shards), current))
      size, current = 0, {}
    current[name] = get()
    size += current[name].nbytes
  shards.append(_write_shard(directory, len(shards), current))
  if len(shards) == 1:
    os.replace(directory / shards[0][0], directory / "model.safetensors")
    return
  names = {}
  for i, (file, tensors, _) in enumerate(shards, 1):
    final = f"model-{i:05}-of-{len(shards):05}.safetensors"
    os.replace(directory / file, directory / final)
    names |= dict.fromkeys(tensors, final)
  (directory / "model.safetensors.index.json").write_text(json.dumps(
      {"metadata": {"total_size": sum(size for *_, size in shards)}, "weight_map": names},
      indent=2) + "\n")


def _write_shard(directory, number, tensors):
  file = f"shard-{number}"
  library("safetensors.numpy").save_file(tensors, directory / file, metadata={"format": "pt"})
  return file, list(tensors), sum(x.nbytes for x in tensors.values())


def _tensors(config, params):
  """Each tensor's name, shape, and a function that makes it."""
  model, stack = params
  for (module, name), stored in layouts.layout(config, "cohere").items():
    source = name
    if name == "value" and config.shared_kv:  # the keys before rotary, in their own order
      source = "key"
    array = (stack if module == layouts.STACK else model)[source]
    for i in range(config.depth) if module == layouts.STACK else [None]:
      yield (stored.name.format(i=i), stored.stored_shape,
             lambda array=array, i=i, stored=stored: _stored(array if i is None else array[i],
                                                             stored))


def _stored(parameter: jax.Array, stored) -> np.ndarray:
  array = np.asarray(parameter, np.float32)
  if stored.halves:
    array = array[..., np.argsort(layouts.to_halves(array.shape[-1]))]
  if isinstance(stored, layouts.Matrix):
    array = array.reshape(stored.stored_shape[::-1]).T
  return np.ascontiguousarray(array)
