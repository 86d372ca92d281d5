"""The error of a model that cannot be read or written."""


import importlib
import types


class HubError(ValueError):
  """A model's files are incomplete, damaged, or describe an architecture that is not supported."""


def library(name: str) -> types.ModuleType:
  """A library of the `hub` extra; raises a `HubError` that says how to install it."""
  try:
    return importlib.import_module(name)
  except ImportError:
    raise HubError(f"models of the hub need {name}: pip install safetensors tokenizers") from None
