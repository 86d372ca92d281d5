"""JAX's plugin for CUDA where only CPUs are asked for: loaded when something is compiled by it.

JAX loads the library of every plugin that is installed, whatever platforms it will start. That of
CUDA takes 95 MB of a process's memory, for a compiler that most processes never call.
"""

import functools
import importlib.util
import pkgutil
from typing import Any

import jax

_wanted = False
_postponed = []


def postpone() -> None:
  """Has JAX pass over the plugin when it first computes, if its CPU platform alone is asked for.

  `load` makes up for it; until then JAX knows no topologies of the platform.
  """
  for name in installed():
    module: Any = pkgutil.resolve_name(name)
    if not hasattr(module.initialize, "__wrapped__"):
      module.initialize = _unless_postponed(module.initialize)


def load() -> None:
  """Loads what was postponed, now or when JAX looks for plugins."""
  global _wanted
  _wanted = True
  while _postponed:
    _postponed.pop()()


def installed() -> list[str]:
  """Names of the plugin's modules."""
  if not importlib.util.find_spec("jax_plugins"):
    return []
  names = [f"jax_plugins.xla_cuda{n}" for n in (12, 13)]
  return [name for name in names if importlib.util.find_spec(name)]


def _unless_postponed(initialize):
  @functools.wraps(initialize)
  def wrapped():
    # Asked when JAX looks: what is set may change until then.
    if _wanted or jax.config.jax_platforms != "cpu":
      initialize()
    else:
      _postponed.append(initialize)

  return wrapped
