"""Softmax cross-entropy straight from the last hidden state: the logits never exist."""

import functools
import math

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ..core import compat, dispatch, guards, integers, partition, platforms
from ..core.compat import Array
from . import fused, xla


def linear_cross_entropy(
    x: jax.Array,
    embedding: jax.Array,
    targets: Array,
    *,
    z_loss: float | jax.Array = 0.0,
    scale: float | jax.Array = 1.0,
    weights: jax.Array | None = None,
    implementation: dispatch.Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
  """-log softmax(scale * x @ embedding.T)[target] + z_loss * log^2 Z, per token.

  No [tokens, num_tokens] array exists, forward or backward. Under a mesh the tokens are divided
  over its data axes and the vocabulary over its model axis, whether or not that divides it.
  Blocks are chosen for the tokens of one call: better leading dimensions than `vmap`.

  Args:
    x: float[..., D], any leading dimensions.
    embedding: float[V, D]; cast to the dtype of x for the product.
    targets: int[...].
    z_loss: weight of the squared log of the softmax normaliser; the paper's is 1e-4.
    scale: of the logits, a number; PaLM's is 1/sqrt(D).
    weights: float[...], each token's loss is multiplied by; None for one. A token of weight 0
      adds nothing, whatever its target and be its x NaN or infinite: then log Z is that of x = 0.
    implementation: "auto", or a backend by name.

  Returns:
    The loss and log Z of each token, both float32[...] (float64 for float64 inputs). Inside jit
    a target outside the vocabulary makes its token's loss NaN.

  Raises:
    ValueError: shapes or dtypes that do not fit, a backend that cannot run, or, outside jit, a
      target outside the vocabulary or a negative weight.

  References:
    PaLM (arXiv:2204.02311, section 5) for the z-loss; Cut Cross-Entropy (arXiv:2411.09009).
  """
  targets = targets if isinstance(targets, Array) else np.asarray(targets)
  _check(x, embedding, targets, weights)
  on = dispatch.target(x, embedding)
  name = dispatch.choose(
      fused.OP, implementation, x, embedding, on=on,
      needs="a scale that is known when it is compiled; multiply x by it, or "
      "pass implementation='xla'"
      if isinstance(scale, jax.core.Tracer) else None).implementation
  if compat.is_known(scale) and name != "xla":
    scale = jax.device_get(scale)
  dynamic = dict(scale=scale, z_loss=z_loss)
  static = {name: float(dynamic.pop(name)) for name in ("scale", "z_loss")
            if not isinstance(dynamic[name], jax.Array)}
  # A target that is beyond 32 bits is outside the vocabulary as well.
  return _loss(x, embedding, integers.clamped(targets, -2**31, 2**31 - 1), weights, dynamic,
               static=tuple(static.items()), name=name, chip=dispatch.chip_for(name, on),
               undecided=implementation == "auto" and dispatch.undecided(x, embedding))


@compat.compiled_once
def _loss(x, embedding, targets, weights, dynamic, *, static, name, chip, undecided):
  options = dynamic | dict(static)
  x, embedding, targets = map(jnp.asarray, (x, embedding, targets))
  vocabulary = embedding.shape[0]
  if weights is not None:
    weights = jnp.asarray(weights, jnp.promote_types(x.dtype, jnp.float32))
    outside = (targets < 0) | (targets >= vocabulary)
    targets = jnp.where((weights == 0) & outside, 0, targets)
    # 0 * NaN is NaN, in the loss and in the gradient of all that the token meets.
    square = jnp.square(jax.lax.stop_gradient(x).astype(weights.dtype)).sum(-1)
    x = jnp.where(((weights == 0) & ~jnp.isfinite(square))[..., None], 0, x)
  # [sequences, T, D]: either may be divided over mesh axes of its own, so they stay apart.
  rows = x.shape[-2] if x.ndim > 2 else 1
  x = x.reshape(-1, rows, x.shape[-1])
  arrays, scale = (x, embedding, targets.reshape(-1, rows)), options["scale"]
  if name == "xla" and undecided and isinstance(scale, float):
    log_z, logit = platforms.by_platform(
        _plain, [(("tpu",), _on_any_tpu)], arrays, scale, dispatch.ANY_TPU_MESH)
  else:
    log_z, logit = _statistics(*arrays, scale, name, chip,
                               guards.platforms(name) if undecided and name != "xla" else ())
  log_z, logit = log_z.reshape(targets.shape), logit.reshape(targets.shape)
  logit = jnp.where((targets >= 0) & (targets < vocabulary), logit, jnp.nan)
  loss = log_z - logit + options["z_loss"] * jnp.square(log_z)
  return (loss if weights is None else weights * loss), log_z


def _plain(x, embedding, targets, scale):
  return _statistics(x, embedding, targets, scale, "xla", None)


@compat.promoting
def _on_any_tpu(x, embedding, targets, scale):
  choice = dispatch.choose(fused.OP, "auto", x, embedding, on=dispatch.ANY_TPU)
  return _statistics(x, embedding, targets, scale, choice.implementation, None)


def _statistics(x, embedding, targets, scale, name, chip, platforms=()):
  """`xla.statistics` or its kernels, over the mesh that the arrays live on."""
  if name == "xla":
    local = xla.statistics
  else:
    local = functools.partial(
        fused.statistics, backend=dispatch.kernel_module(fused.OP, name), chip=chip,
        platforms=platforms)
    x = guards.reverse_only(x if platforms else guards.only_on(x, fused.OP, name), fused.OP)
    embedding = guards.reverse_only(embedding, fused.OP)
  vocabulary = embedding.shape[0]
  static_scale, scale = (scale, None) if isinstance(scale, float) else (None, scale)

  def flat(x, embedding, targets, scale, num_valid):
    results = local(x.reshape(-1, x.shape[-1]), embedding, targets.reshape(-1),
                    scale=static_scale if scale is None else scale, num_valid=num_valid)
    return jax.tree.map(lambda y: y.reshape(targets.shape), results)

  mesh = partition.current(x, embedding)
  free = partition.to_take_over(mesh)
  if not free:
    arrays = partition.varying_together(x, embedding, targets, scale)
    return flat(*arrays, vocabulary)

  sequences, positions, shards = fused.divided(x, mesh)
  tokens = P(sequences or None, positions or None)
  axis = partition.HEAD_AXIS if shards > 1 else None
  rows = -(-vocabulary // shards)
  specs = P(*tokens, None), P(axis, None), tokens, None if scale is None else P()
  embedding = jnp.pad(embedding, ((0, rows * shards - vocabulary), (0, 0)))

  def shard(*arrays):
    x, embedding, targets, scale = partition.varying_together(*arrays)
    if axis is None:
      return flat(x, embedding, targets, scale, vocabulary)
    first = jax.lax.axis_index(axis) * rows
    log_z, logit = flat(x, embedding, targets - first, scale,
                        jnp.clip(vocabulary - first, 0, rows))
    top = jax.lax.pmax(jax.lax.stop_gradient(log_z), axis)
    total, logit = jax.lax.psum((jnp.exp(log_z - top), logit), axis)
    return top + jnp.log(total), logit

  arrays = jax.tree.map(
      lambda array, spec: partition.reshard(array, spec, mesh), (x, embedding, targets, scale),
      specs)
  return jax.shard_map(shard, mesh=mesh, axis_names=free, in_specs=specs,
                       out_specs=(specs[2],) * 2)(*arrays)


def _check(x, embedding, targets, weights):
  if x.ndim < 1 or embedding.ndim != 2 or 0 in embedding.shape:
    raise ValueError(f"x must be [..., D] and embedding [V, D]; got {x.shape}, {embedding.shape}")
  if x.shape[-1] != embedding.shape[-1]:
    raise ValueError(f"x and embedding must agree in their last dimension; got {x.shape} and "
                     f"{embedding.shape}")
  for name, array in (("x", x), ("embedding", embedding)):
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating point; got {array.dtype}")
  if not jnp.issubdtype(targets.dtype, jnp.integer):
    raise ValueError(f"targets must be integers; got {targets.dtype}")
  for name, array in (("targets", targets), ("weights", weights)):
    if array is not None and np.shape(array) != x.shape[:-1]:
      raise ValueError(f"{name} must be {x.shape[:-1]}, as x is without its last axis; "
                       f"got {np.shape(array)}")
  if not math.prod(x.shape[:-1]):
    raise ValueError(f"there must be at least one token; got x {x.shape}")
  unweighted, targets, weights = weights is None, *map(integers.known, (targets, weights))
  if weights is not None and weights.min() < 0:
    raise ValueError(f"weights must not be negative; got {weights.min()}")
  if targets is not None and (unweighted or weights is not None):
    counted = targets if unweighted else targets[weights != 0]
    low, high = int(counted.min(initial=0)), int(counted.max(initial=0))
    if low < 0 or integers.exceeds(high + 1, embedding.shape[0]):
      raise ValueError(f"target {low if low < 0 else high} is outside the vocabulary of "
                       f"{embedding.shape[0]} tokens")
