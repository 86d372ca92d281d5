"""Low-rank adapters of a layer's matrices (LoRA, arXiv:2106.09685).

A matrix W [*in_dims, *out_dims] becomes W + A B with A [*in_dims, rank] and B [rank, *out_dims],
which begins as zero. Only A and B are trained. They are parameters of the layer beside W, named
"query_lora_a", "query_lora_b" and so on.
"""

import math
from collections.abc import Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp

# Number of input dimensions of each matrix of a layer that has adapters.
IN_DIMS = {"query": 1, "key": 1, "value": 1, "gate": 1, "up": 1, "attn_out": 2, "ff_out": 1}
_A, _B = "_lora_a", "_lora_b"


def adapted(params: Mapping[str, jax.Array], rank: int, stack: tuple[int, ...]):
  """A layer's parameters with its adapters, made by Haiku, added to the matrices.

  Args:
    params: of one layer, or of layers stacked along `stack`.
  """
  out = dict(params)
  # In a fixed order: each parameter draws the next key of the seed, in every process the same.
  for name in (name for name in IN_DIMS if name in params):
    shape = params[name].shape[len(stack):]
    in_dims, out_dims = shape[:IN_DIMS[name]], shape[IN_DIMS[name]:]
    a = hk.get_parameter(name + _A, (*stack, *in_dims, rank),
                         init=hk.initializers.RandomNormal(math.prod(in_dims)**-0.5))
    b = hk.get_parameter(name + _B, (*stack, rank, *out_dims), init=jnp.zeros)
    out[name] = _sum(params[name], a, b, len(stack))
  return out


def split(params: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
  """Trained and frozen parameters: with adapters these and all else, without them all and none."""
  if not any(is_adapter(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(params)):
    return params, {}
  return hk.data_structures.partition(lambda module, name, _: is_adapter(name), params)


def join(trained, frozen):
  """The parameters that `split` took apart."""
  return hk.data_structures.merge(frozen, trained) if frozen else trained


def merge(params: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
  """Parameters of a PaLM with the adapters of its stacked layers added to their matrices."""
  return {module: {
      name: _sum(x, weights[name + _A], weights[name + _B], 1) if name + _A in weights else x
      for name, x in weights.items() if not is_adapter(name)}
      for module, weights in params.items()}


def is_adapter(name: str) -> bool:
  """Whether a parameter of that name is part of an adapter."""
  return name.endswith((_A, _B))


def _sum(w, a, b, stack: int):
  flat_a = a.reshape(*a.shape[:stack], -1, a.shape[-1])
  flat_b = b.reshape(*b.shape[:stack], b.shape[stack], -1)
  return w + (flat_a @ flat_b).reshape(w.shape)
