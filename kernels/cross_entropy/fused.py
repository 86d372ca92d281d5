"""The loss around the kernels of all backends: their functions, derivative, blocks, `vmap`.

  unsupported(x, embedding, *, chip) -> the first requirement that is not met, or None
  forward(x, embedding, targets, *, scale, num_valid, chip) -> (top, total, logit)
  logit_gradient(x, rows, targets, top, spread, peak, *, first, scale, num_valid, chip) -> g

with x [N, D]; embedding [V, D] in the dtype of x (only `unsupported` is shown the caller's, which
may be another); targets int32[N], one outside [0, num_valid) has no logit here; scale > 0;
num_valid an int or int32[], rows of the embedding from there on are padding; all else float32[N]:

  top   = max(x @ embedding.T), over the valid rows; any number <= -1e30 where there is none
  total = sum(exp(scale * (x @ embedding.T - top))), 0 where there is none
  logit = scale * x @ embedding[target], 0 where there is no target

`logit_gradient` makes one block of columns of the gradient of x @ embedding.T, those of
rows = embedding[first : first + R], in the dtype of x:

  g [N, R] = exp(scale * (x @ rows.T - top)) * spread + onehot(targets - first) * peak

and 0 in columns from num_valid - first on; first is an int or int32[], R and N are any numbers.
Both must subtract before they scale: log_z = scale * top + log(total) is rounded to 2^-24 of a
large logit, and exp would make that a relative error of every g.

The backward pass here walks over such blocks of the vocabulary. A block of the embedding's
gradient, g.T @ x, is complete when it is made; g @ rows is added to the gradient of x in float32.
So there are four matrix products where a loss that keeps its logits has three, two of them XLA's,
and nothing of the size [N, V] exists: g has at most `BLOCK_BYTES`. How its rounding is kept out of
the gradients: docs/loss.md.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from ..core import op, partition
from ..core.compat import promoting
from ..core.constants import LOWEST
from ..core.derivatives import Rules, differentiable
from ..core.vmap import folding_vmap
from . import configs, xla

BLOCK_BYTES = 2**28  # of g
# Rows of the embedding in a block. How much of its peak XLA's product for dx and the one for the
# embedding's gradient reach, in % (static, 16,384 tokens, dim 4096): on a v6e 91.9 and 93.6 with
# 7168 rows, 86.0 and 91.3 with 5120, 87.7 and 88.9 with 8192; on a v5p 93.2 and 93.2, 97.0 and
# 94.2, 93.4 and 93.2. 2048 has 95.9 and 94.7 on a v6e, but then dx, which each block reads and
# writes, is too much for its memory.
MOST_ROWS = 7168
LEAST_ROWS = 2048  # where there would be fewer, the tokens are divided as well
WHOLE_TILES = 1024
# Below this what was rounded off g is multiplied, too: among fewer tokens one number is the largest
# error. A training step has as many, or more.
MANY_TOKENS = 2048


def _mosaic_gpu():
  from . import mosaic_gpu
  return mosaic_gpu


def _mosaic_tpu():
  from . import mosaic_tpu
  return mosaic_tpu


def _triton():
  from . import triton
  return triton


def divided(x, mesh) -> tuple[tuple[str, ...], tuple[str, ...], int]:
  """The mesh axes that the first two dimensions of x are divided over, and parts of the vocabulary.

  Args:
    x: [sequences, T, D], or its type.
  """
  free = partition.to_take_over(mesh)
  if not free:
    return (), (), 1
  sequences = partition.axes(x, 0, partition.BATCH_AXES, mesh)
  positions = partition.axes(x, 1, (partition.SEQUENCE_AXIS,), mesh)
  whole = partition.HEAD_AXIS not in free or partition.HEAD_AXIS in sequences + positions
  return sequences, positions, 1 if whole else mesh.shape[partition.HEAD_AXIS]


def on_one_device(x, embedding):
  """The types of what a device's kernel is given: [tokens, D], [rows of the vocabulary, D].

  Args:
    x, embedding: whole arrays or their types, [..., D] and [V, D].
  """
  mesh = partition.current(x, embedding)
  if x.ndim < 3:
    x = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), 1, x.shape[-1]), x.dtype)
  x = partition.with_one_batch(x, 2)
  sequences, positions, shards = divided(x, mesh)
  tokens = x.shape[0] * x.shape[1] // partition.devices(mesh, sequences + positions)
  rows, dim = -(-embedding.shape[0] // shards), embedding.shape[1]
  return (jax.ShapeDtypeStruct((tokens, dim), x.dtype),
          jax.ShapeDtypeStruct((rows, dim), embedding.dtype))


class Loss(NamedTuple):
  """Static arguments of a loss; None where one is an array."""

  scale: float | None
  z_loss: float | None


def _loss(route, options, x, embedding, targets, weights, scale, z_loss):
  """(loss, log Z) of each token, by kernels or plain JAX."""
  vocabulary = embedding.shape[0]
  if weights is not None:
    weights = weights.astype(jnp.promote_types(x.dtype, jnp.float32))
    outside = (targets < 0) | (targets >= vocabulary)
    targets = jnp.where((weights == 0) & outside, 0, targets)
    # 0 * NaN is NaN, in the loss and in the gradient of all that the token meets.
    square = jnp.square(jax.lax.stop_gradient(x).astype(weights.dtype)).sum(-1)
    x = jnp.where(((weights == 0) & ~jnp.isfinite(square))[..., None], 0, x)
  # [sequences, T, D]: either may be divided over mesh axes of its own, so they stay apart.
  rows = x.shape[-2] if x.ndim > 2 else 1
  log_z, logit = _over_mesh(route, options.scale, x.reshape(-1, rows, x.shape[-1]), embedding,
                            targets.reshape(-1, rows), scale)
  log_z, logit = log_z.reshape(targets.shape), logit.reshape(targets.shape)
  logit = jnp.where((targets >= 0) & (targets < vocabulary), logit, jnp.nan)
  z_loss = options.z_loss if z_loss is None else z_loss
  loss = log_z - logit + z_loss * jnp.square(log_z)
  return (loss if weights is None else weights * loss), log_z


OP = op.Op(
    "linear_cross_entropy",
    dict(mosaic_gpu=_mosaic_gpu, mosaic_tpu=_mosaic_tpu, triton=_triton), configs,
    ranks=(1, 2), on_one_device=on_one_device, plain=_loss,
    fused=lambda *static: functools.partial(_loss, *static))


def _over_mesh(route, static_scale, x, embedding, targets, scale):
  """`xla.statistics` or its kernels: tokens over the data axes, the vocabulary over the model's."""
  local = xla.statistics if route.implementation == "xla" else functools.partial(statistics, route)
  vocabulary, mesh = embedding.shape[0], partition.current(x, embedding)
  sequences, positions, shards = divided(x, mesh)
  tokens = P(sequences or None, positions or None)
  axis = partition.HEAD_AXIS if shards > 1 else None
  rows = -(-vocabulary // shards)
  if shards > 1:
    embedding = jnp.pad(embedding, ((0, rows * shards - vocabulary), (0, 0)))

  def flat(x, embedding, targets, scale, num_valid):
    results = local(x.reshape(-1, x.shape[-1]), embedding, targets.reshape(-1),
                    scale=static_scale if scale is None else scale, num_valid=num_valid)
    return jax.tree.map(lambda y: y.reshape(targets.shape), results)

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

  return op.over_mesh(mesh, shard, (P(*tokens, None), P(axis, None), tokens, P()), (tokens, tokens),
                      x, embedding, targets, scale)


class Options(NamedTuple):
  """Static arguments of the logits."""

  scale: float
  num_valid: int | None  # None where it is an array

  def valid(self, num_valid):
    return num_valid if self.num_valid is None else self.num_valid

  def keywords(self, route, num_valid):
    """The keyword arguments of a backend's functions."""
    return dict(scale=self.scale, chip=route.chip, num_valid=self.valid(num_valid))


def statistics(route, x, embedding, targets, *, scale, num_valid):
  """`xla.logits_statistics` by one backend's kernels; arguments and results as there.

  It has a gradient for x and the embedding, and no other derivative. Its results are named
  "loss_log_z" and "loss_logit" for `jax.checkpoint_policies`.
  """
  if scale <= 0:  # the kernels take the largest product, so the sign goes to x
    x, scale = np.sign(scale).astype(x.dtype) * x, abs(scale) or 1.0
  static = isinstance(num_valid, int)
  options = Options(float(scale), num_valid if static else None)
  return _statistics(route, options, *partition.varying_together(
      x, embedding, targets, None if static else num_valid))


def _statistics(route, options, *arrays):
  return differentiable(Rules(
      op=OP.name, kernel=lambda *arrays: _forward(route, options, *arrays)[0],
      forward=functools.partial(_forward, route, options),
      backward=functools.partial(_backward, route, options),
      plain=functools.partial(_formula, options) if route.auto else None, by=2))(*arrays)


def _formula(options, x, embedding, targets, num_valid):
  return xla.statistics(
      x, embedding, targets, scale=options.scale, num_valid=options.valid(num_valid))


def _forward(route, options, x, embedding, targets, num_valid):
  top, total, logit = _parts(route, options, x, embedding, targets, num_valid)
  # Named here, where they are residuals: a policy that keeps them does not rerun the kernel.
  top, total = checkpoint_name(top, "loss_log_z"), checkpoint_name(total, "loss_log_z")
  logit = checkpoint_name(logit, "loss_logit")
  log_z = jnp.where(total == 0, -jnp.inf, options.scale * top + jnp.log(total))
  return (log_z, logit), (top, total, logit)


def _plain_parts(options, *arrays):
  log_z, logit = _formula(options, *arrays)
  some = jnp.isfinite(log_z)
  return jnp.where(some, log_z / options.scale, 0), some.astype(jnp.float32), logit


@promoting()
def _parts(route, options, x, embedding, targets, num_valid):
  """The backend's (top, total, logit) of all rows of the embedding."""
  if route.undecided:
    return route.by_platform(_plain_parts, _parts, options, x, embedding, targets, num_valid)
  kernel = folding_vmap(lambda tokens, others: route.backend.forward(
      tokens[0], others[0], tokens[1], **options.keywords(route, others[1])))
  if embedding.dtype == x.dtype:
    return kernel((x, targets), (embedding, num_valid))
  # Cast block by block, for a copy of the whole embedding may be the largest array of all.
  valid = options.valid(num_valid)

  def one_block(first, size, carry):
    in_block = options._replace(num_valid=None)
    rows = _slice(embedding, first, size, x.dtype)
    kernel = folding_vmap(lambda tokens, others: route.backend.forward(
        tokens[0], others[0], tokens[1] - others[2], **in_block.keywords(route, others[1])))
    top, total, logit = kernel((x, targets), (rows, jnp.clip(valid - first, 0, size), first))
    tops, totals = (jnp.stack(both) for both in zip(carry[:2], (top, total)))
    return *merged(tops, totals, options.scale), carry[2] + logit

  nothing = jnp.zeros(x.shape[:1], jnp.float32)
  start = partition.varying_together(nothing + LOWEST, nothing, nothing, x)[:3]
  return _over_blocks(embedding.shape[0], _rows(x), one_block, start)


def _backward(route, options, arrays, residuals, cotangents):
  return (*_gradients(route, options, *arrays, *residuals, *cotangents), None, None)


def _plain_gradients(options, x, embedding, targets, num_valid, top, total, logit, *cotangents):
  statistics = lambda x, embedding: _formula(options, x, embedding, targets, num_valid)
  return jax.vjp(statistics, x, embedding)[1](cotangents)


@promoting()
def _gradients(route, options, *arrays):
  """The cotangents of x and the embedding, by the backend's kernel and XLA's products."""
  if route.undecided:
    return route.by_platform(_plain_gradients, _gradients, options, *arrays)
  x, embedding, targets, num_valid, top, total, logit, dlog_z, dlogit = arrays
  spread = jnp.where(total == 0, 0, options.scale * dlog_z)
  has_target = (targets >= 0) & (targets < options.valid(num_valid))
  peak = jnp.where(has_target, options.scale * dlogit, 0)
  unit = _unit(jnp.abs(spread) + jnp.abs(peak), x.dtype)
  spread, peak = spread * unit, peak * unit

  num_tokens = x.shape[0]
  share = spread / jnp.where(total == 0, 1, total)
  # g at the target, as it is before it is stored; what rounding takes of it is added again below.
  own = jnp.exp(logit - options.scale * top) * share + peak
  is_known = has_target & (jnp.abs(logit) < _known_below(x.dtype))
  tokens = jax.tree.map(jnp.asarray, (x, targets, top, share, peak, own, is_known))
  kernel = folding_vmap(lambda tokens, others: route.backend.logit_gradient(
      tokens[0], others[0], *tokens[1:5], first=others[2], **options.keywords(route, others[1])))
  dot = functools.partial(
      jax.lax.dot_general, preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
  few = num_tokens < MANY_TOKENS and x.dtype != jnp.float32
  rows_of_block = _rows(x)
  tokens_of_block = max(1, BLOCK_BYTES // (rows_of_block * x.dtype.itemsize))

  def one_block(first, size, carry):
    rows = _slice(embedding, first, size, x.dtype)

    def of_tokens(start, count, carry):
      dx, sums, rests, drows = carry
      part = lambda a: jax.lax.dynamic_slice_in_dim(a, start, count)
      add = lambda a, change: jax.lax.dynamic_update_slice_in_dim(a, part(a) + change, start, 0)
      here = tuple(map(part, tokens))
      g = kernel(here, (rows, num_valid, jnp.asarray(first, jnp.int32)))
      column = here[1] - first
      at_target = column[:, None] == jnp.arange(size)
      drows += dot(g, here[0], (((0,), (0,)), ((), ())))
      dx = add(dx, dot(g, rows, (((1,), (0,)), ((), ()))))
      if few:
        is_valid = jnp.arange(size) < options.valid(num_valid) - first
        lost = _rounded_off(g, dot(here[0], rows, (((1,), (1,)), ((), ()))), at_target & is_valid,
                            is_valid, *here[2:5], options.scale)
        remainder = lost.astype(g.dtype)
        drows += dot(remainder, here[0], (((0,), (0,)), ((), ())))
        dx = add(dx, dot(remainder, rows, (((1,), (0,)), ((), ()))))
        return dx, add(sums, (g + lost).sum(1)), rests, drows
      sum_of_g, stored = _sums(g.astype(jnp.float32), at_target)
      rest = jnp.where(here[6] & (column >= 0) & (column < size), here[5] - stored, 0)
      return dx, add(sums, sum_of_g + rest), add(rests, rest), drows

    *of_x, dembedding = carry
    *of_x, drows = _over_blocks(num_tokens, tokens_of_block, of_tokens,
                                (*of_x, zeros((size, x.shape[1]), jnp.float32)))
    return *of_x, jax.lax.dynamic_update_slice_in_dim(
        dembedding, (drows / unit).astype(embedding.dtype), first, 0)

  zeros = lambda shape, dtype: partition.varying_together(jnp.zeros(shape, dtype), x)[0]
  of_token = zeros(x.shape[:1], jnp.float32)
  dx, sums, rests, dembedding = _over_blocks(
      embedding.shape[0], rows_of_block, one_block,
      (zeros(x.shape, jnp.float32), of_token, of_token, zeros(embedding.shape, embedding.dtype)))
  target_rows = embedding.at[jnp.where(has_target, targets, 0)].get(mode="clip").astype(x.dtype)
  target_rows = target_rows.astype(jnp.float32)
  dx += rests[:, None] * target_rows
  return (_with_known_sum(dx, sums, spread, peak, target_rows) / unit).astype(x.dtype), dembedding


def _known_below(dtype) -> float:
  """Below which logits a target's g is known better than it is stored: they are rounded, too."""
  return 0 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps) * 2**19


def _rounded_off(g, products, at_target, is_valid, top, share, peak, scale):
  """The part of each entry of g that storing took, float32[N, R], for logits known well enough.

  Args:
    g: [N, R], as it was stored.
    products: float32[N, R], x @ rows.T.
    at_target, is_valid: bool[N, R], bool[R].
    top, share, peak: float32[N]
  """
  unrounded = (jnp.exp(scale * (products - top[:, None])) * share[:, None]
               + jnp.where(at_target, peak[:, None], 0))
  lost = unrounded - g.astype(jnp.float32)
  is_known = is_valid & (jnp.abs(scale * products) < _known_below(g.dtype))
  # No more than rounding takes: a kernel that is wrong stays wrong, and is seen.
  is_rounding = jnp.abs(lost) <= float(jnp.finfo(g.dtype).eps) * jnp.abs(unrounded)
  return jnp.where(is_known & is_rounding, lost, 0)


def _sums(g, at_target):
  """The sum of each row of g, and of its target's column alone; one pass over g."""
  both = (g, jnp.where(at_target, g, 0))
  return jax.lax.reduce(both, (jnp.float32(0),) * 2, lambda a, b: tuple(map(jnp.add, a, b)), (1,))


def _unit(size, dtype):
  """The factor of g in memory: a power of two that lifts float16 over its underflow.

  Args:
    size: float32[N], the most that a token's g may be.
  """
  if dtype != jnp.float16:
    return 1.0
  _, exponent = jnp.frexp(jnp.where(jnp.isfinite(size), size, 0).max())
  return jnp.ldexp(jnp.float32(1), jnp.clip(15 - exponent, -100, 100))


def _with_known_sum(dx, sums, spread, peak, target_rows):
  """g @ embedding without the part of g's rounding that all rows of the embedding share.

  A token's g adds up to spread + peak, and as it was stored to `sums`, the target's entry exact.
  What is missing goes to the others: to the softmax's mean, (dx - peak * target's row) / spread.
  """
  # Beside a peak so much larger no rounding of the softmax shows, and a quotient could be anything.
  size = jnp.sign(spread) * jnp.maximum(jnp.abs(spread), jnp.abs(peak) / 256)
  missing = (spread + peak - sums) / jnp.where(size == 0, 1, size)
  return dx + missing[:, None] * (dx - peak[:, None] * target_rows)


def merged(top, total, scale):
  """(top, total) of parts of the vocabulary, float32[parts, N], made those of all of it."""
  largest = top.max(0)
  return largest, (total * jnp.exp(scale * (top - largest))).sum(0)


def _slice(embedding, first, size, dtype):
  rows = jax.lax.dynamic_slice_in_dim(embedding, first, size)
  if dtype != embedding.dtype:
    # XLA would cast the whole embedding once, before the loop, and keep that.
    kind = jnp.finfo(dtype)
    rows = jax.lax.reduce_precision(rows, kind.nexp, kind.nmant).astype(dtype)
  return rows


def _rows(x) -> int:
  """Rows of the embedding in a block."""
  most = BLOCK_BYTES // (x.shape[0] * x.dtype.itemsize)
  return min(MOST_ROWS, max(LEAST_ROWS, most - most % WHOLE_TILES))


def _over_blocks(length, size, body, carry):
  """The carry after `body(first, size, carry)` for each block; the last may be shorter."""
  whole, rest = divmod(length, size)
  if whole == 1:
    carry = body(0, size, carry)
  elif whole:
    carry = jax.lax.fori_loop(0, whole, lambda i, carry: body(i * size, size, carry), carry)
  return body(whole * size, rest, carry) if rest else carry
