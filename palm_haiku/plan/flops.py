"""FLOPs of a training step, counted in the program as JAX traces it."""

import dataclasses
import math

import haiku as hk
import jax
import jax.numpy as jnp

from palm_haiku.config import PaLMConfig
from palm_haiku.kernels.core import heads
from palm_haiku.model import PaLM
from palm_haiku.recipe import TrainConfig
from palm_haiku.train_step import init, train_step


def flops_per_token(config: TrainConfig, model_axis: int = 1) -> float:
  """FLOPs of one token that the hardware does: products counted in the step as it is traced.

  The step of plain JAX is counted; kernels do the same products but leave out blocks that the
  causal mask hides.

  Args:
    config: of the run.
    model_axis: devices that share a layer; `repeated_flops_per_token` is for all but one of them.
  """
  one = dataclasses.replace(config, batch_size=1, batch_ramp="", accumulate=1,
                            implementation="xla", mesh="", shard_residual=False)
  state = jax.eval_shape(lambda: init(one))
  batch = {"tokens": jax.ShapeDtypeStruct((1, config.seq_len + 1), "int32")}
  closed = jax.make_jaxpr(lambda *args: train_step(one, *args))(state, batch)
  return count_flops(closed.jaxpr) / config.seq_len + repeated_flops_per_token(config, model_axis)


def repeated_flops_per_token(config: TrainConfig, model_axis: int) -> float:
  """FLOPs of one token that devices of the model axis do once more than is needed.

  A key and value head that several of them share belongs to all of those, and so do its
  projections. A divided residual stream divides their products too, but for the gradient of their
  weights.
  """
  model = config.model
  product = 2 * model.depth * sum(
      count for name, count in model.layer_params.items() if name in ("key", "value"))
  products = 1 if config.shard_residual else 3 if config.remat == "none" else 4
  copies = heads.held(model.kv_heads, model_axis) * model_axis // model.kv_heads
  return (copies - 1) * products * product


def model_flops_per_token(model: PaLMConfig, seq_len: int) -> float:
  """FLOPs of one token that the model needs, counted in the gradient of its plain logits."""
  apply = hk.without_apply_rng(hk.transform(
      lambda tokens: PaLM.from_config(model, implementation="xla")(tokens)))
  tokens = jax.ShapeDtypeStruct((1, seq_len), "int32")
  params = jax.eval_shape(apply.init, jax.random.key(0), tokens)
  grad = jax.grad(lambda params, tokens: jnp.square(apply.apply(params, tokens)).sum())
  return count_flops(jax.make_jaxpr(grad)(params, tokens).jaxpr) / seq_len


def count_flops(jaxpr) -> float:
  """FLOPs of the matrix products of a jaxpr, those in a scan as often as it runs.

  Raises:
    ValueError: a loop of unknown length holds a product.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
      continue
    inner = [count_flops(getattr(sub, "jaxpr", sub)) for value in eqn.params.values()
             for sub in (value if isinstance(value, (tuple, list)) else (value,))
             if hasattr(getattr(sub, "jaxpr", sub), "eqns")]
    if eqn.primitive.name == "while" and any(inner):
      raise ValueError("a loop whose length is not known holds matrix products")
    if eqn.primitive.name == "cond":
      total += max(inner, default=0)
    else:
      total += sum(inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
  return total
