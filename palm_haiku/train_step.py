"""One step of training as a pure function, and how it is compiled for a mesh."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding

from palm_haiku import lora, sharding
from palm_haiku.kernels.core.compat import promoting
from palm_haiku.loss import mean_loss
from palm_haiku.recipe import TrainConfig


class TrainState(NamedTuple):
  """All that a step changes."""

  params: Any
  opt_state: Any


def init(config: TrainConfig) -> TrainState:
  """The state before the first step; depends on `config.seed` alone."""
  tokens = jnp.zeros((1, config.seq_len), jnp.int32)
  params = config.build_model().init(jax.random.key(config.seed), tokens, tokens)
  return TrainState(params, config.build_optimizer().init(lora.split(params)[0]))


def train_step(config: TrainConfig, state: TrainState,
               batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict]:
  """One step of the optimizer on one batch, divided over the mesh in context.

  Args:
    batch: {"tokens": int[B, T + 1]}; to keep attention within documents, "segment_ids":
      int[B, T + 1]; where not every target counts, "weights": float[B, T].

  Returns:
    The new state, and scalars: loss (negative log-likelihood), log_z_squared, grad_norm and, of
    targets with weights, their sum as "targets".
  """
  model = config.build_model()
  trained, frozen = lora.split(state.params)
  targets = batch["weights"].sum() if "weights" in batch else None
  # A part of a batch is divided by an equal share, not by what counts in it.
  count = None if targets is None else targets / config.accumulate

  def loss_of(trained, batch):
    params = lora.join(trained, frozen)
    nll, log_z = model.apply(params, *_inputs_and_targets(batch))
    loss = mean_loss(  # mutant: z-loss
        nll, log_z, weights=batch.get("weights"), count=count, z_loss=config.z_loss)
    return loss.total, loss

  if config.accumulate == 1:
    grads, loss = jax.grad(loss_of, has_aux=True)(trained, batch)
  else:
    grads, loss = _accumulated(loss_of, trained, batch, config.accumulate)
  updates, opt_state = config.build_optimizer().update(grads, state.opt_state, trained)
  metrics = {"loss": loss.nll, "log_z_squared": loss.log_z_squared,
             "grad_norm": optax.tree.norm(grads)}
  if targets is not None:
    metrics["targets"] = targets
  trained = optax.apply_updates(trained, updates)
  # mutant: new state
  return TrainState(lora.join(trained, frozen), opt_state), metrics


def _accumulated(loss_of, params, batch, num_parts):
  """Gradient and auxiliary value of `loss_of(params, part)`, means over parts of the batch.

  The backward pass adds each layer's gradient where it belongs in one sum, so that no part has a
  gradient of its own.
  """
  # Every device keeps its sequences: a part takes some from each.
  parts = jax.tree.map(
      lambda x: x.reshape(-1, num_parts, *x.shape[1:]).swapaxes(0, 1), batch)
  sums = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), params)

  def add(_, part):
    total, pull, loss = jax.vjp(lambda params: loss_of(params, part), params, has_aux=True)
    pull.with_refs(sums)(jnp.full_like(total, 1 / num_parts))  # mutant: part of a batch
    return None, loss

  _, losses = jax.lax.scan(add, None, parts)
  return jax.tree.map(jax.freeze, sums), jax.tree.map(lambda x: x.mean(0), losses)


def eval_step(config: TrainConfig, params: chex.ArrayTree,
              batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Summed negative log-likelihood of a batch's targets, and the sum of their weights."""
  nll, _ = config.build_model().apply(params, *_inputs_and_targets(batch))
  return (nll * batch["weights"]).sum(), batch["weights"].sum()


def _inputs_and_targets(batch):
  segment_ids = batch["segment_ids"][:, :-1] if "segment_ids" in batch else None  # mutant: segments
  return batch["tokens"][:, :-1], batch["tokens"][:, 1:], segment_ids


class Program(NamedTuple):
  """The functions above for one configuration, compiled when first called."""

  init: Callable[[], TrainState]
  step: Callable[[TrainState, Any], tuple[TrainState, dict]]  # takes the state's memory
  evaluate: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
  state: TrainState  # of ShapeDtypeStruct, with shardings if there is a mesh
  batch_sharding: NamedSharding | None


def program(config: TrainConfig, mesh: Mesh | None = None) -> Program:
  """A model's training on one device or, with each parameter where it belongs, on a mesh.

  Call its functions under `sharding.in_context(mesh)`. Parameters are made where they will lie:
  no host or device ever holds all of them. Runs whose steps are the same share one program.
  """
  return _program(config.of_step, mesh, None if mesh else sharding.default_device())


@functools.lru_cache(maxsize=8)
def _program(config, mesh, device):
  begin, advance, score = (functools.partial(promoting()(f), config)
                           for f in (init, train_step, eval_step))
  state = jax.eval_shape(begin)
  if mesh is None:
    # Where checkpoints are read to: jit would compile a second step for arrays bound to a device.
    place = SingleDeviceSharding(device)
    return Program(jax.jit(begin, out_shardings=place), jax.jit(advance, donate_argnums=0),
                   jax.jit(score), state, None)
  params = sharding.params_shardings(state.params, mesh, config.rules)
  trained = [lora.split(tree)[0] for tree in (state.params, params)]
  shardings = TrainState(params, sharding.opt_state_shardings(
      config.build_optimizer(), trained[0], trained[1], mesh))
  state = jax.tree.map(
      lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), state, shardings)
  whole = NamedSharding(mesh, P())
  return Program(
      jax.jit(begin, out_shardings=shardings),
      jax.jit(advance, donate_argnums=0, out_shardings=(shardings, whole)),
      jax.jit(score, out_shardings=whole), state,
      sharding.batch_sharding(mesh, config.rules))
