"""Ring attention: the sequence divided over a mesh axis, by any backend's kernels.

Each device keeps its queries. Keys, values and their segment ids go round the ring, and where
they are, the backend computes a part: (out, lse) of these queries and these keys, at an offset
that says how far apart they stand. Parts are merged by their lse; in the backward pass, that of
all keys makes the parts of a gradient add up, and dkey and dvalue travel with their keys.

Under a causal mask the last device would have all keys to attend to, the first only its own. So
the sequence is cut into twice as many blocks as there are devices, and device i of n computes
the blocks 2 i and 2 n - 1 - 2 i: it swaps its second half with device n - 1 - i, before and
after. Then there are two visible pairs of blocks on every device in every step, and nothing
else is computed.

References:
  Ring Attention (arXiv:2310.01889), Striped Attention (arXiv:2311.09431).
"""

import dataclasses
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..core import partition
from .residuals import Residuals

# A tour of at most so many shards is unrolled, which leaves out the last transfer of the keys, one
# of n; a longer one is a loop, so that what is compiled does not grow with the ring. With gradients
# and zigzag that is 4 kernels for each device, 16 of 4, and 8 in all as a loop.
UNROLLED = 4


class Pair(NamedTuple):
  """A block of queries and one of keys; None for all, each with the other's of the same number."""

  rows: jax.Array | None
  columns: jax.Array | None
  offset: int | jax.Array  # from the block's first key to its first query
  is_causal: bool
  seen: bool | jax.Array = True  # whether any query sees any key


@dataclasses.dataclass(frozen=True)
class Ring:
  """A backend that attends to the keys of all devices of a mesh axis, inside `shard_map`."""

  backend: types.ModuleType
  axis: str
  size: int  # devices
  zigzag: bool  # whether a shard is two blocks, as the module says

  @property
  def blocks(self) -> int:
    return 2 if self.zigzag else 1

  def balanced(self, attend):
    """`attend`, called on the blocks that are this device's to compute."""
    if not self.zigzag:
      return attend

    def around(query, key, value, segment_ids, *others):
      moved = jax.tree.map(self._swap, (query, key, value, segment_ids))
      return self._swap(attend(*moved, *others))

    return around

  def _swap(self, x):
    kept, other = jnp.split(x, 2, axis=1)
    other = jax.lax.ppermute(other, self.axis, [(i, self.size - 1 - i) for i in range(self.size)])
    return jnp.concatenate([kept, other], axis=1)

  def forward(self, query: jax.Array, key: jax.Array, value: jax.Array | None, *,
              segment_ids: tuple[jax.Array, jax.Array] | None, **options):
    """(out, lse) as any backend's; the arrays are shards."""
    query_ids, key_ids = segment_ids or (None, None)
    rows, tour = (query, query_ids), _tour(self.size, query, key, options)

    def part(pair, columns):
      (q, q_ids), (k, v, k_ids) = self._take(rows, pair.rows), self._take(columns, pair.columns)

      def compute():
        out, lse = self.backend.forward(q, k, v, **self._keywords(pair, q_ids, k_ids, options))
        return out, lse.swapaxes(1, 2)

      return _where(pair.seen, compute, lambda: _nothing(q))

    def turn(step, carry):
      columns, total = carry
      pairs = self._pairs(step, query, key, options)
      following = self._send(columns, 1)
      following, parts = _meanwhile(following, [part(pair, columns) for pair in pairs])
      for pair, new in zip(pairs, parts):
        merged = _merge(self._take(total, pair.rows), new)
        total = self._put(total, pair.rows, merged)
      return following, total

    columns = self._send((key, value, key_ids), tour[0])
    carry = turn(tour[0], (columns, _nothing(query.astype(jnp.float32))))
    out, lse = jax.lax.fori_loop(
        tour[0] + 1, tour[-1] + 1, turn, carry, unroll=len(tour) <= UNROLLED)[1]
    return out.astype(query.dtype), lse.swapaxes(1, 2)

  def backward(self, residuals: Residuals, dout: jax.Array, *,
               segment_ids: tuple[jax.Array, jax.Array] | None, slope_gradients: bool = False,
               **options):
    """The gradients as any backend's, from the (out, lse) of all keys."""
    query, key, value, out, lse = residuals
    query_ids, key_ids = segment_ids or (None, None)
    rows = query, out, lse.swapaxes(1, 2), dout, query_ids
    tour = _tour(self.size, query, key, options)

    def part(pair, columns):
      q, o, rows_lse, do, q_ids = self._take(rows, pair.rows)
      k, v, k_ids = self._take(columns, pair.columns)

      def compute():
        gradients = self.backend.backward(
            Residuals(q, k, v, o, rows_lse.swapaxes(1, 2)), do, slope_gradients=slope_gradients,
            **self._keywords(pair, q_ids, k_ids, options))
        return jax.tree.map(lambda x: x.astype(jnp.float32), tuple(gradients))

      return _where(pair.seen, compute, lambda: _zeros(q, k, v, *no_slopes(q)))

    # A sequence is several where blocks are.
    no_slopes = lambda q: [q[:, 0, :, 0]] if slope_gradients else []

    def turn(step, columns, dquery, dcolumns, dslopes):
      pairs = self._pairs(step, query, key, options)
      following = self._send(columns, 1)
      (following, dcolumns), parts = _meanwhile(
          (following, dcolumns), [part(pair, columns) for pair in pairs])
      for pair, (dq, dk, dv, *ds) in zip(pairs, parts):
        dquery = self._add(dquery, pair.rows, dq)
        dcolumns = self._add(dcolumns, pair.columns, (dk, dv))
        dslopes = [x + y.reshape(len(x), -1, y.shape[1]).sum(1) for x, y in zip(dslopes, ds)]
      return following, dquery, dcolumns, dslopes

    def next_turn(step, carry):
      columns, dquery, dcolumns, dslopes = carry
      return turn(step, columns, dquery, self._send(dcolumns, 1), dslopes)

    columns = self._send((key, value, key_ids), tour[0])
    dquery, dkey, dvalue, *dslopes = _zeros(query, key, value, *no_slopes(query))
    carry = turn(tour[0], columns, dquery, (dkey, dvalue), dslopes)
    _, dquery, dcolumns, dslopes = jax.lax.fori_loop(
        tour[0] + 1, tour[-1] + 1, next_turn, carry, unroll=len(tour) <= UNROLLED)
    dkey, dvalue = self._home(dcolumns, tour[-1])
    cast = lambda x, like: None if like is None else x.astype(like.dtype)
    return cast(dquery, query), cast(dkey, key), cast(dvalue, value), *dslopes

  def _pairs(self, step, query, key, options) -> list[Pair]:
    """The mask when each device has the keys of the one `step` places before it."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    here = jax.lax.axis_index(self.axis)
    there = (here - step) % self.size
    if not self.zigzag:
      aligned = isinstance(step, int) and step == 0 and num_queries == num_keys
      offset = options["query_offset"] + (
          0 if aligned else here * num_queries - there * num_keys)
      seen = _sees(offset, num_queries, num_keys, options)
      return [] if seen is False else [Pair(None, None, offset, options["is_causal"], seen)]

    # Of the blocks 2 i and 2 n - 1 - 2 i of a device, the first comes first in its first half.
    number = lambda device, block: jnp.where(
        block == 0, 2 * device, 2 * self.size - 1 - 2 * device)
    low = lambda device: (2 * device >= self.size).astype(jnp.int32)
    high = lambda device: 1 - low(device)

    def full(rows, columns):
      blocks = number(here, rows) - number(there, columns)
      return Pair(rows, columns, blocks * (num_queries // 2), False)

    across = full(high(here), low(there))
    if isinstance(step, int) and step == 0:
      return [Pair(None, None, 0, True), across]
    later = number(here, low(here)) > number(there, low(there))
    return [across, full(jnp.where(later, low(here), high(here)),
                         jnp.where(later, low(there), high(there)))]

  def _keywords(self, pair, query_ids, key_ids, options):
    return dict(
        options, segment_ids=None if query_ids is None else (query_ids, key_ids),
        query_offset=pair.offset, is_causal=pair.is_causal,
        window=None if self.zigzag else options["window"])

  def _blocks(self, x):
    return x.reshape(x.shape[0], self.blocks, -1, *x.shape[2:])

  def _take(self, tree, block):
    def take(x):
      if block is None:
        return x.reshape(x.shape[0] * self.blocks, -1, *x.shape[2:])
      return jax.lax.dynamic_index_in_dim(self._blocks(x), block, 1, keepdims=False)
    return jax.tree.map(take, tree)

  def _put(self, tree, block, new):
    def put(x, part):
      if block is not None:
        part = jax.lax.dynamic_update_index_in_dim(self._blocks(x), part, block, 1)
      return part.reshape(x.shape)
    return jax.tree.map(put, tree, new)

  def _add(self, tree, block, part):
    return self._put(tree, block, jax.tree.map(jnp.add, self._take(tree, block), part))

  def _send(self, tree, places):
    if places % self.size == 0:
      return tree
    to = [(i, (i + places) % self.size) for i in range(self.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, to), tree)

  def _home(self, tree, places):
    """Sends back what has travelled so many places."""
    return self._send(tree, -places)


def over(mesh, query, key, backend, *, is_causal, window, query_offset) -> Ring | None:
  """The ring that these arrays' sequences are divided over; None where they are not.

  Args:
    mesh: whose axis `partition.SEQUENCE_AXIS` counts, if it divides both lengths.
    query, key, is_causal, window, query_offset: of the whole attention; the offset is None where
      it is traced.
    backend: whose kernels compute the parts.
  """
  axis = partition.SEQUENCE_AXIS
  length, num_keys = query.shape[1], key.shape[1]
  if axis not in partition.axes(query, 1, (axis,), mesh) or num_keys % mesh.shape[axis]:
    return None
  size = mesh.shape[axis]
  # A window leaves each device as much as the others, all but the first, without a swap.
  zigzag = (is_causal and length == num_keys and length % (2 * size) == 0 and query_offset == 0
            and (window is None or window[0] >= length - 1))
  return Ring(backend, axis, size, zigzag)


def _tour(size, query, key, options) -> range:
  """The steps in which some device sees some of the keys that it then has; never empty."""
  length, offset = query.shape[1], options["query_offset"]
  is_causal, window = options["is_causal"], options["window"]
  if not isinstance(offset, int) or length != key.shape[1]:
    return range(size)
  first, last = 1 - size, size - 1
  if is_causal or window is not None:
    right = 0 if is_causal else window[1]
    first = max(first, -((offset + length - 1 + right) // length))
  if window is not None:
    last = min(last, (window[0] + length - 1 - offset) // length)
  if last - first + 1 >= size:
    return range(size)
  return range(first, last + 1) if first <= last else range(1)


def _sees(offset, num_queries, num_keys, options):
  """Whether any of the queries, which stand at `offset`, sees any of the keys."""
  seen = True
  if options["is_causal"]:
    seen &= offset + num_queries > 0
  if options["window"] is not None:
    left, right = options["window"]
    seen &= (offset - left < num_keys) & (offset + num_queries + right > 0)
  return seen


def _where(seen, compute, nothing):
  return compute() if seen is True else jax.lax.cond(seen, compute, nothing)


def _meanwhile(transferred, computed):
  """Both, with nothing that uses what is transferred before all is computed.

  Left alone, XLA's scheduler for TPUs ends a transfer before it starts the kernels beside it.
  """
  return jax.lax.optimization_barrier((transferred, computed))


def _nothing(query):
  """(out, lse) of queries that see no key."""
  return partition.varying_together(
      jnp.zeros_like(query), jnp.full(query.shape[:3], -jnp.inf, jnp.float32), query)[:2]


def _zeros(*arrays):
  zeros = (None if x is None else jnp.zeros(x.shape, jnp.float32) for x in arrays)
  return partition.varying_together(*zeros, arrays[0])[:-1]


def _merge(total, part):
  """Attention to two sets of keys; (out, lse) of each, and of both."""
  (out, lse), (out_part, lse_part) = total, part
  both = jnp.logaddexp(lse, lse_part)
  finite = jnp.where(both == -jnp.inf, 0, both)  # of a row that has seen nothing so far
  weighted = lambda out, lse: out * jnp.exp(lse - finite)[..., None]
  return weighted(out, lse) + weighted(out_part, lse_part), both
