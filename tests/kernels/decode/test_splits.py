"""Splits of the cache: all of it, once, evenly, and in few enough bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from palm_haiku.kernels.decode import mosaic_gpu, splits


def split(lengths, max_len, *, rows=16, dim=128, kv_heads=1, block=64, programs=264,
          int8=False, span=None):
  """(limits, table, starts) for queries of `rows` heads on each key/value head."""
  batch = len(lengths)
  query = jax.ShapeDtypeStruct((batch, 1, rows * kv_heads, dim), "bfloat16")
  key = jax.ShapeDtypeStruct((batch, max_len, kv_heads, dim), "int8" if int8 else "bfloat16")
  limits = splits.limits(query, key, block, programs, span)
  result = jax.jit(functools.partial(splits.split, limits=limits))(jnp.asarray(lengths, jnp.int32))
  return limits, np.asarray(result.table), np.asarray(result.starts)


def check(lengths, limits, table, starts):
  """Every position of every sequence has one slot; the sequence's slots are `starts`'s.

  With a span, every position from the block on in which that begins.
  """
  assert table.shape == (limits.slots, 3) and starts[0] == 0 and starts[-1] <= limits.slots
  spare, idle = np.split(table[starts[-1]:], [splits.SPARE])
  assert np.all(spare == [len(lengths) - 1, 0, 0]) and np.all(idle == [-1, 0, 0])
  assert not limits.parts or len(spare) == splits.SPARE
  for b, length in enumerate(lengths):
    mine = table[starts[b]:starts[b + 1]]
    assert len(mine) and np.all(mine[:, 0] == b)
    unseen = 0 if limits.span is None else max(length - limits.span, 0)
    assert mine[0, 1] == unseen // limits.block * limits.block and mine[-1, 2] == length
    np.testing.assert_array_equal(mine[1:, 1], mine[:-1, 2])
    assert np.all(mine[:, 1] % limits.block == 0)
    if len(mine) > 1:
      sizes = mine[:, 2] - mine[:, 1]
      assert sizes.max() - sizes.min() < 2 * limits.block
      assert sizes.mean() >= limits.least


@settings(max_examples=10)
@given(data=st.data())
def test_every_position_has_one_slot(data):
  max_len = data.draw(st.sampled_from([1, 63, 64, 700, 5000, 100_000]))
  length = st.one_of(st.integers(0, max_len), st.sampled_from([0, 1, max_len]))
  lengths = data.draw(st.sampled_from([1, 2, 7, 40, 300]).flatmap(
      lambda n: st.lists(length, min_size=n, max_size=n)))
  options = dict(
      rows=data.draw(st.sampled_from([1, 8, 64])), kv_heads=data.draw(st.sampled_from([1, 3])),
      block=data.draw(st.sampled_from([16, 64])), int8=data.draw(st.booleans()),
      programs=data.draw(st.sampled_from([1, 5, 264])),
      span=data.draw(st.sampled_from([None, 1, 64, 1000, 4096, 200_000])))
  check(lengths, *split(lengths, max_len, **options))


def test_one_long_sequence_fills_the_chip():
  _, table, starts = split([262_144], 262_144)
  assert starts[1] == 262_144 // (68 * 16)  # 240, of the 264 programs
  assert np.all(table[:starts[1], 2] - table[:starts[1], 1] <= 1152)


def test_a_long_sequence_among_short_ones_has_most_of_the_slots():
  lengths = [100_000] + [1000] * 31
  limits, table, starts = split(lengths, 131_072)
  assert starts[1] == 100_000 // limits.least  # where an even division would give it 8
  assert (table[:, 2] - table[:, 1]).max() < 1200


def test_equal_sequences_have_no_slots_in_a_second_wave():
  for batch in (1, 3, 70, 128, 200, 264):
    _, _, starts = split([8192] * batch, 8192)
    assert starts[-1] <= 264


def test_short_caches_need_no_merge():
  limits, table, _ = split([100, 700], 1024)
  assert not limits.parts and limits.slots == len(table) == 2


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("rows, dim", [(1, 64), (16, 128), (48, 256), (64, 128)])
@pytest.mark.parametrize("batch, max_len", [(1, 262_144), (64, 16_384), (30, 131_072)])
def test_bytes_are_little_more_than_the_cache(batch, max_len, rows, dim, int8):
  position = 2 * dim * (1 if int8 else 2) + (8 if int8 else 0)
  fewest = splits.POSITIONS_PER_ROW * rows * (2 if int8 else 1)
  lengths = np.random.default_rng(0).integers(fewest, max_len, batch, endpoint=True)
  limits, table, starts = split(lengths, max_len, rows=rows, dim=dim, int8=int8)
  used, row, slots = int(lengths.sum()) * position, rows * dim * 2, int(starts[-1])
  for piece, parts in ((1, 1), (mosaic_gpu.PIECE, splits.SPARE)):  # Triton, Mosaic GPU
    loaded = -(-(table[:, 2] - table[:, 1]) // piece) * piece
    moved = int(loaded.sum()) * position
    moved += (slots + batch) * row + table.nbytes + starts.nbytes  # queries, results
    if limits.parts:
      moved += (slots + splits.SPARE) * (row + rows * 4)  # parts are written, and read
      read = sum(n if n == 1 else -(-n // parts) * parts for n in np.diff(starts).tolist())
      moved += read * row + slots * rows * 4
    assert moved <= 1.05 * used, (moved / used, lengths)
