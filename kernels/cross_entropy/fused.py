"""What the cross-entropy kernels of all backends have in common: derivative, blocks, `vmap`.

A backend module has three functions:

  unsupported(x, embedding, *, chip) -> the first requirement that is not met, or None
  forward(x, embedding, targets, *, scale, num_valid, chip) -> (log_z, logit)
  logit_gradient(x, rows, targets, log_z, dlog_z, dlogit, *, first, scale, num_valid, chip) -> g

with x [N, D]; embedding [V, D] in the dtype of x (only `unsupported` is shown the caller's, which
may be another); targets int32[N], one outside [0, num_valid) has no logit here; num_valid an int
or int32[], rows of the embedding from there on are padding; log_z, logit, dlog_z, dlogit
float32[N], log_z -inf where there is no valid row, logit 0 where there is no target.

`logit_gradient` makes one block of columns of the gradient of x @ embedding.T, those of
rows = embedding[first : first + R], in the dtype of x:

  g [N, R] = scale * (exp(scale * x @ rows.T - log_z) * dlog_z + onehot(targets - first) * dlogit)

and 0 in columns from num_valid - first on; first is an int or int32[], R and N are any numbers.

The backward pass here walks over such blocks of the vocabulary. A block of the embedding's
gradient, g.T @ x, is complete when it is made; g @ rows is added to the gradient of x in float32.
So there are four matrix products where a loss that keeps its logits has three, two of them XLA's,
and nothing of the size [N, V] exists: g has at most `BLOCK_BYTES`.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .. import mesh as meshes
from ..batching import folding_vmap
from ..guards import not_differentiable

OP = "linear_cross_entropy"
BLOCK_BYTES = 2**28  # of g
# Rows of the embedding in a block. How much of its peak XLA's product for dx and the one for the
# embedding's gradient reach, in % (static, 16,384 tokens, dim 4096): on a v6e 91.9 and 93.6 with
# 7168 rows, 86.0 and 91.3 with 5120, 87.7 and 88.9 with 8192; on a v5p 93.2 and 93.2, 97.0 and
# 94.2, 93.4 and 93.2. 2048 has 95.9 and 94.7 on a v6e, but then dx, which each block reads and
# writes, is too much for its memory.
MOST_ROWS = 7168
LEAST_ROWS = 2048  # where there would be fewer, the tokens are divided as well
WHOLE_TILES = 1024


def divided(x, mesh) -> tuple[tuple[str, ...], tuple[str, ...], int]:
  """The mesh axes that the first two dimensions of x are divided over, and parts of the vocabulary.

  Args:
    x: [sequences, T, D], or its type.
  """
  free = meshes.to_take_over(mesh)
  if not free:
    return (), (), 1
  sequences = meshes.partition(x, 0, meshes.BATCH_AXES, mesh)
  positions = meshes.partition(x, 1, (meshes.SEQUENCE_AXIS,), mesh)
  whole = meshes.HEAD_AXIS not in free or meshes.HEAD_AXIS in sequences + positions
  return sequences, positions, 1 if whole else mesh.shape[meshes.HEAD_AXIS]


def on_one_device(x, embedding):
  """The types of what a device's kernel is given: [tokens, D], [rows of the vocabulary, D].

  Args:
    x, embedding: whole arrays or their types, [..., D] and [V, D].
  """
  mesh = meshes.current(x, embedding)
  if x.ndim < 3:
    x = jax.ShapeDtypeStruct((math.prod(x.shape[:-1]), 1, x.shape[-1]), x.dtype)
  x = meshes.with_one_batch(x, 2)
  sequences, positions, shards = divided(x, mesh)
  tokens = x.shape[0] * x.shape[1] // meshes.devices(mesh, sequences + positions)
  rows, dim = -(-embedding.shape[0] // shards), embedding.shape[1]
  return (jax.ShapeDtypeStruct((tokens, dim), x.dtype),
          jax.ShapeDtypeStruct((rows, dim), embedding.dtype))


@dataclasses.dataclass(frozen=True)
class Options:
  """What is known when a program is compiled."""

  backend: types.ModuleType
  chip: str | None
  scale: float
  num_valid: int | None  # None where it is an array

  def keywords(self, num_valid):
    """The keyword arguments of a backend's functions."""
    return dict(scale=self.scale, chip=self.chip,
                num_valid=num_valid if self.num_valid is None else self.num_valid)


def statistics(x, embedding, targets, *, scale, num_valid, backend, chip):
  """`xla.logits_statistics` by one backend's kernels; arguments and results as there.

  It has a gradient for x and the embedding, and no other derivative. Its results are named
  "loss_log_z" and "loss_logit" for `jax.checkpoint_policies`.
  """
  static = isinstance(num_valid, int)
  options = Options(backend, chip, float(scale), num_valid if static else None)
  x, embedding, targets, num_valid = meshes.varying_together(
      x, embedding, targets, None if static else num_valid)
  return _statistics(options, x, embedding, targets, num_valid)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(options, x, embedding, targets, num_valid):
  return _forward(options, x, embedding, targets, num_valid)[0]


def _forward(options, x, embedding, targets, num_valid):
  # Only a second derivative differentiates this.
  x, embedding = not_differentiable(x, OP), not_differentiable(embedding, OP)
  kernel = folding_vmap(lambda tokens, others: options.backend.forward(
      tokens[0], others[0], tokens[1], **options.keywords(others[1])))
  if embedding.dtype == x.dtype:
    log_z, logit = kernel((x, targets), (embedding, num_valid))
  else:
    # Cast block by block, for a copy of the whole embedding may be the largest array of all.
    valid = num_valid if options.num_valid is None else options.num_valid

    def one_block(first, size, carry):
      in_block = dataclasses.replace(options, num_valid=None)
      rows = _slice(embedding, first, size, x.dtype)
      kernel = folding_vmap(lambda tokens, others: options.backend.forward(
          tokens[0], others[0], tokens[1] - others[2], **in_block.keywords(others[1])))
      log_z, logit = kernel((x, targets), (rows, jnp.clip(valid - first, 0, size), first))
      return jnp.logaddexp(carry[0], log_z), carry[1] + logit

    start = meshes.varying_together(
        jnp.full(x.shape[:1], -jnp.inf, jnp.float32), jnp.zeros(x.shape[:1], jnp.float32), x)[:2]
    log_z, logit = _over_blocks(embedding.shape[0], _rows(x), one_block, start)
  # Named here, where they are residuals: a policy that keeps them does not rerun the kernel.
  log_z = checkpoint_name(log_z, "loss_log_z")
  logit = checkpoint_name(logit, "loss_logit")
  return (log_z, logit), (x, embedding, targets, num_valid, log_z)


def _backward(options, residuals, cotangents):
  x, embedding, targets, num_valid, log_z = residuals
  dlog_z, dlogit = (not_differentiable(a, OP) for a in cotangents)
  num_tokens = x.shape[0]
  tokens = jax.tree.map(jnp.asarray, (x, targets, log_z, dlog_z, dlogit))
  kernel = folding_vmap(lambda tokens, others: options.backend.logit_gradient(
      tokens[0], others[0], *tokens[1:], first=others[2], **options.keywords(others[1])))
  dot = functools.partial(
      jax.lax.dot_general, preferred_element_type=jnp.float32,
      precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
  rows_of_block = _rows(x)
  tokens_of_block = max(1, BLOCK_BYTES // (rows_of_block * x.dtype.itemsize))

  def one_block(first, size, carry):
    rows = _slice(embedding, first, size, x.dtype)

    def of_tokens(start, count, carry):
      dx, drows = carry
      part = lambda a: jax.lax.dynamic_slice_in_dim(a, start, count)
      here = tuple(map(part, tokens))
      g = kernel(here, (rows, num_valid, jnp.asarray(first, jnp.int32)))
      drows += dot(g, here[0], (((0,), (0,)), ((), ())))
      new = part(dx) + dot(g, rows, (((1,), (0,)), ((), ())))
      return jax.lax.dynamic_update_slice_in_dim(dx, new, start, 0), drows

    dx, dembedding = carry
    dx, drows = _over_blocks(
        num_tokens, tokens_of_block, of_tokens, (dx, zeros((size, x.shape[1]), jnp.float32)))
    return dx, jax.lax.dynamic_update_slice_in_dim(
        dembedding, drows.astype(embedding.dtype), first, 0)

  zeros = lambda shape, dtype: meshes.varying_together(jnp.zeros(shape, dtype), x)[0]
  dx, dembedding = _over_blocks(
      embedding.shape[0], rows_of_block, one_block,
      (zeros(x.shape, jnp.float32), zeros(embedding.shape, embedding.dtype)))
  return dx.astype(x.dtype), dembedding, None, None


_statistics.defvjp(_forward, _backward)


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
