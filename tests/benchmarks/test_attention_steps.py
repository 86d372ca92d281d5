"""Static figures of attention, against every row and key of small problems."""

import numpy as np
import pytest

from benchmarks.shapes import Attention
from benchmarks.static import attention as static, attention_steps
from benchmarks.static.attention_steps import Mask, documents
from palm_haiku.kernels.attention import (
  configs,
  mosaic_tpu_layout as layout,
  mosaic_tpu_mask as masking,
)

# 32 positions of 4 heads to a block of rows, two steps of 16; a major block of 128 keys.
BLOCKS = configs.TpuConfig(
    area=2**12, rows=64, lanes=32, chunk=32, fine=8, major=128, ahead=1, cores=1)
MASKS = {
    "none": (256, Mask(is_causal=False)),
    "none, offset": (256, Mask(is_causal=False, query_offset=-64)),
    "causal": (256, Mask()),
    "odd": (250, Mask()),
    "offset": (256, Mask(query_offset=-64)),
    "window": (256, Mask(window=(64, 0))),
    "window between blocks": (256, Mask(window=(41, 0))),
    "documents": (256, Mask(segment_ids=documents(256, 32))),
    "long documents": (256, Mask(segment_ids=documents(256, 64))),
    "documents between blocks": (256, Mask(segment_ids=documents(256, 40)))}


def dense(length, mask):
  query, key = np.arange(length)[:, None] + mask.query_offset, np.arange(length)
  seen = np.ones((length, length), bool)
  if mask.is_causal:
    seen &= key <= query
  if mask.window:
    seen &= (key >= query - mask.window[0]) & (key <= query + mask.window[1])
  if mask.segment_ids is not None:
    ids, = mask.segment_ids
    seen &= ids[:, None] == ids
  return seen


def brute(plan, length, mask, blocks):
  """Counts over the grid, for the blocks of rows of a core."""
  seen, ids = dense(length, mask), mask.segment_ids
  edges = masking.find_edges(plan, length=length, num_keys=length, **mask.known)
  size, tall = plan.block_rows // plan.group, plan.rows // plan.group
  counts = dict.fromkeys(("seen", "one id", "ids", "alone", "edge", "large", "plain", "masked",
                          "diagonal ends", "alone ends"), 0)
  for block in blocks:
    rows = slice(block * size, block * size + size)
    start = block * size + mask.query_offset
    on_diagonal = np.zeros_like(seen[rows])
    on_edge = np.zeros_like(on_diagonal)
    if edges:
      on_diagonal[:, start : start + size] = True
    if len(edges) > 1 and start >= mask.window[0]:
      on_edge[:, start - mask.window[0] : start - mask.window[0] + size] = True
    one = ids is None or len(set(ids[0, rows])) == 1
    alone = bool(edges) and one and not (seen[rows] & ~on_diagonal).any()
    for first in range(0, plan.padded_keys, plan.major):
      keys = slice(first, min(first + plan.major, length))
      if not seen[rows, keys].any():
        continue
      counts["seen"] += 1
      if on_diagonal[:, keys].any():
        counts["alone" if alone else "one id" if one else "ids"] += 1
      counts["edge"] += bool(on_edge[:, keys].any())
      for top in range(0, size, tall):
        part, chunks = seen[rows, keys][top : top + tall], []
        if not len(part):
          continue
        for at in range(0, part.shape[1], plan.fine):
          chunk = slice(at, at + plan.fine)
          if (on_diagonal | on_edge)[:, keys][:, chunk].any() or not part[:, chunk].any():
            continue
          whole = part[:, chunk].all() and first + at + plan.fine <= length
          counts["masked"] += not whole
          chunks += [at // plan.fine] if whole else []
        ratio = plan.chunk // plan.fine
        assert not chunks or len(chunks) == chunks[-1] - chunks[0] + 1
        counts["large"] += len(chunks) // ratio
        counts["plain"] += len(chunks) % ratio
    counts["diagonal ends"] += not edges or not on_diagonal.any()
    counts["alone ends"] += alone
  return counts


def idle(plan, length, mask, blocks):
  """Blocks of rows in turn on a core, of one that sees the keys to one that does, but don't."""
  size, found = plan.block_rows // plan.group, 0
  for first in range(0, plan.padded_keys, plan.major):
    keys = slice(first, first + plan.major)
    meet = [dense(length, mask)[n * size : n * size + size, keys].any()
            for n in range(plan.num_blocks)]
    on = [n // plan.cores for n in range(plan.num_blocks) if meet[n]]
    found += sum(not meet[block] and on[0] <= turn <= on[-1] for turn, block in enumerate(blocks))
  return found


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("change", [
    pytest.param({}, marks=pytest.mark.full), {"cores": 2},
    pytest.param({"area": 2**6, "lanes": 16, "rows": 16}, marks=pytest.mark.full)])
def test_steps_are_those_of_the_dense_mask(name, backward, change):
  length, mask = MASKS[name]
  shape = Attention(1, length, 4, 1, 128)
  plan = layout.fit(BLOCKS._replace(**change), length=length, group=4, num_keys=length, itemsize=2)
  edges = masking.find_edges(plan, length=length, num_keys=length, **mask.known)
  assert bool(edges) == ("area" not in change and name not in ("none", "none, offset", "offset"))
  turns = plan.padded_keys // plan.major
  assert turns == 2
  for core in range(plan.cores):
    blocks = plan.dealt(core, np.arange(plan.num_blocks // plan.cores))
    want = brute(plan, length, mask, blocks)
    steps = attention_steps.steps(plan, shape, "v5p", backward, mask, core=core)
    calls = turns if backward else 1
    assert steps.grid * calls == len(blocks) * turns
    seen = steps.grid * calls * steps.visited[0]
    assert seen == pytest.approx(want["seen"])

    ids = mask.segment_ids is not None
    if backward and not ids:  # the diagonal's step is one
      want["one id"], want["alone"] = want["one id"] + want["alone"], 0
    kinds = ["one id"] + ["ids"] * ids + ["alone"] * (ids or not backward)
    expected = [want[kind] for kind in kinds if edges] + [want["edge"]] * (len(edges) > 1)
    *active, _, _, _ = steps.active
    assert [seen * x for x in active] == pytest.approx(expected)
    loops = [seen * steps.visited[-1] ** bool(edges) * plan.steps * x for x in steps.inner]
    assert loops == pytest.approx([want[kind] for kind in ("large", "plain", "masked")])

    ends = [steps.grid * calls * x for x in steps.edge]
    if not backward:
      assert ends == pytest.approx(
          [len(blocks) * (not edges), 1, len(blocks) - want["alone ends"]])
      continue
    diagonals = sum(want[kind] for kind in ("one id", "ids", "alone"))
    assert ends[0] == pytest.approx(turns)
    if edges:
      assert ends[1] == pytest.approx(want["seen"] - diagonals)
    if edges and ids:
      assert ends[2] == pytest.approx(want["seen"] - want["alone"])
    assert len(ends) == 2 + bool(edges) * (1 + ids)
    assert ends[-1] == pytest.approx(idle(plan, length, mask, blocks))


@pytest.mark.parametrize("name", MASKS)
def test_the_share_of_the_pairs(name):
  length, mask = MASKS[name]
  assert mask.share(length) == pytest.approx(dense(length, mask).mean())


def test_a_program_meets_another_mask():
  """Visits of a sparse program as if nothing were hidden: its edges never run."""
  length, mask = MASKS["window"]
  shape = Attention(1, length, 4, 1, 128)
  plan = layout.fit(BLOCKS, length=length, group=4, num_keys=length, itemsize=2)
  full = attention_steps.steps(plan, shape, "v5e", False, Mask(is_causal=False), mask)
  assert full.active == [0, 0, 0, 1, 1, 1] and full.visited == (1, 1)
  assert full.inner == [plan.major / plan.chunk, 0, 0]
  assert full.edge == [0.5, 1 / full.grid, 0.5]
  causal = attention_steps.steps(plan, shape, "v5e", False, Mask(), mask)
  alone = attention_steps.steps(plan, shape, "v5e", False, Mask())
  assert causal.active == [*alone.active[:2], 0, *alone.active[2:]]
  assert causal.inner == alone.inner and causal.edge == alone.edge


@pytest.mark.full
def test_the_masks_of_the_table():
  length, window = static.MASKS["window"]
  np.testing.assert_allclose(window.share(length) * length**2, sum(
      min(row, 1024) + 1 for row in range(length)))
  length, packed = static.MASKS["documents"]
  assert packed.segment_ids.max() == 15
  np.testing.assert_allclose(packed.share(length) * length**2, 16 * 512 * 513 / 2)
  length, ragged = static.MASKS["ragged"]
  sizes = np.bincount(ragged.segment_ids[0])
  assert len(sizes) == 16 and sizes.min() > 0 and (np.diff(ragged.segment_ids[0]) >= 0).all()
  np.testing.assert_allclose(ragged.share(length) * length**2, (sizes * (sizes + 1) / 2).sum())
