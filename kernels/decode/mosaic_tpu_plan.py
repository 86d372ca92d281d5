"""Division of a problem by the TPU kernel: blocks that fit, each core's share, and its merging."""

from typing import NamedTuple

import jax.numpy as jnp

from ..core.constants import LOG2E
from ..tpu import vmem
from ..tpu.layout import LANES, round_up
from . import configs


class Plan(NamedTuple):
  """The division of one problem."""

  size: int  # positions in a block
  slots: int  # blocks in VMEM, two of them being computed on
  chunk: int  # positions in one product
  cores: int
  sequences: int  # times key/value heads
  kv_heads: int
  num_queries: int
  group: int  # heads of a key/value head
  dim: int
  max_len: int
  query_size: int  # bytes of a number, and of one of the cache
  cache_size: int
  caches: int  # one where the values are the keys
  span: int | None = None  # last positions of a sequence that its queries see; None for all

  rows = property(lambda self: self.num_queries * self.group)

  @property
  def parts(self) -> list[int]:
    """Positions that a step may compute on: a block, or what holds the end of a sequence."""
    parts = [self.size]
    while parts[0] >= 2 * self.chunk and parts[0] % (2 * LANES) == 0:
      parts.insert(0, parts[0] // 2)
    return parts

  def begin(self, length):
    """Where the blocks of a sequence begin, and how many positions there no query sees."""
    if self.span is None:
      return 0, 0
    first = jnp.maximum(length - self.span, 0)
    unseen = first % LANES  # mutant: before a window
    return first - unseen, unseen

  @property
  def vmem_bytes(self) -> int:
    """Of scratch, and of what the compiler keeps of a step: scores twice, a few columns."""
    lanes, rows = round_up(self.dim, LANES), round_up(self.rows, 16)
    position = self.caches * (lanes * self.cache_size + (4 if self.cache_size == 1 else 0))
    row = 8 * self.size + 32 * (lanes + LANES) + self.slots * lanes * self.query_size
    widened = self.chunk * lanes * self.query_size * self.caches
    return self.slots * self.size * position + rows * row + widened + 2**20


def fit(query, key, value, chip, config=None, left=None) -> Plan:
  """The plan for a chip, that for a v4 where it is None; `config` and `left` as for `forward`."""
  batch, num_queries, heads, dim = query.shape
  max_len, kv_heads = key.shape[1:3]
  span = None if left is None else num_queries + left
  most = max_len if span is None else min(max_len, span + LANES - 1)
  size, slots, chunk, cores = config or configs.mosaic_tpu(chip, key.dtype.itemsize, dim)
  sequences = batch * kv_heads
  if not config:
    # Nothing is computed before the first block is there, so it should be a small part of all.
    while size > configs.TPU_LEAST and size * 8 * cores > sequences * most:
      size //= 2
  plan = Plan(
      min(size, round_up(most, LANES)), slots, chunk, cores, sequences, kv_heads, num_queries,
      heads // kv_heads, dim, max_len, query.dtype.itemsize, key.dtype.itemsize,
      1 if value is None else 2, span)
  while plan.size > LANES and plan.vmem_bytes > vmem.limit(chip):
    plan = plan._replace(size=round_up(plan.size // 2, LANES))
  return plan


def deal(plan, lengths):
  """The walk of each core: half of the blocks.

  Returns:
    int32[cores, 4], (sequence, block) of the first block and of the one after the last; and of
    two cores the sequence that the second begins with, and whether the first has some of it.
  """
  if plan.cores == 1:
    return jnp.array([[0, 0, plan.sequences, 0]], jnp.int32), None
  positions = lengths - plan.begin(lengths)[0]
  blocks = jnp.repeat(jnp.maximum(-(-positions // plan.size), 1), plan.kv_heads)
  ends = jnp.cumsum(blocks, dtype=jnp.int32)
  half = ends[-1] // 2
  sequence = (ends <= half).sum(dtype=jnp.int32)
  block = half - jnp.where(ends <= half, blocks, 0).sum(dtype=jnp.int32)
  ranges = jnp.stack([jnp.int32(0), jnp.int32(0), sequence, block,
                      sequence, block, jnp.int32(plan.sequences), jnp.int32(0)])
  return ranges.reshape(2, 4), (sequence, block > 0)


def merge(out, pieces, sequence, is_shared):
  """`out` with the sequence that the second core begins with, of which the first may have some."""
  (first, second), (lse, other) = pieces[..., : out.shape[-1]], pieces[..., -1:]
  exp, *_ = powers(out.dtype)
  weight = 1 / (1 + exp(other - lse))
  weight = jnp.where(is_shared & (lse > -jnp.inf), weight, 0)
  # Where it has nothing, the first core has written nothing.
  merged = jnp.where(weight > 0, weight * first + (1 - weight) * second, second)
  return out.at[sequence].set(merged.astype(out.dtype))


def powers(dtype):
  """exp, log, and what scores are multiplied by: of 2, but of e where that would be a rounding."""
  return (jnp.exp, jnp.log, 1) if dtype == jnp.float32 else (jnp.exp2, jnp.log2, LOG2E)
