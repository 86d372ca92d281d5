"""The Hopper decode kernel: in the interpreter with race detection, and compiled for h200."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from palm_haiku.kernels import alibi_slopes, decode_attention, interpret, interpreters
from palm_haiku.kernels.decode import mosaic_gpu, mosaic_gpu_merge, splits
from palm_haiku.kernels.hopper import softmax
from tests import mutants
from tests.kernels import contract as bound
from tests.kernels.decode import contract
from tests.kernels.decode.contract import Case
from tests.mutants import DROPPED, Mistake

SETTINGS = interpreters.Mode(detect_races=True, check_products=True)


def result(case, per_row=32, arrays=None, merge=None):
  """Results of the kernels for a case, in slots of `per_row` positions a row.

  Args:
    merge: a function instead of the kernel that merges parts.
  """
  forward = jax.jit(functools.partial(
      mosaic_gpu.forward, scale=case.scale, left=case.left, chip=None))
  with pytest.MonkeyPatch.context() as patch, interpreters.running(SETTINGS):
    patch.setattr(splits, "POSITIONS_PER_ROW", per_row)
    if merge:
      patch.setattr(mosaic_gpu_merge, "merge", merge)
    return jax.block_until_ready(forward(**arrays or contract.inputs(case)))


def check(case, **options):
  contract.check(case, contract.inputs(case), result(case, **options))


def whole(case):
  """The case with a cache of a length that copies divide."""
  return dataclasses.replace(case, max_len=-(-case.max_len // 8) * 8)


drawn = given(case=contract.cases(dims=(64, 128), dtypes=("bfloat16", "float16")).map(whole),
              per_row=st.sampled_from([4, 16, 64]))


@settings(max_examples=2)
@drawn
def test_few_results(case, per_row):
  check(case, per_row=per_row)


@pytest.mark.full
@pytest.mark.timeout(900)
@settings(max_examples=6)
@drawn
def test_results_are_as_near_to_float64_as_the_xla_path(case, per_row):
  check(case, per_row=per_row)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@settings(max_examples=500, derandomize=False, suppress_health_check=list(HealthCheck))
@drawn
def test_fuzz(case, per_row):
  check(case, per_row=per_row)
  jax.clear_caches()


@pytest.mark.full
@pytest.mark.parametrize("case", [
    Case(lengths=(700, 0, 77), max_len=704, heads=16, dim_head=256),  # slots of the ring again
    Case(lengths=(200, 3), max_len=208, heads=30, num_queries=3),  # 90 rows: two tiles
    Case(lengths=(450,), max_len=456, heads=8, kv_heads=2, int8=True),
    Case(lengths=(200, 128), max_len=200, heads=4, scale=0.0, shared=True, int8=True)], ids=str)
def test_edges(case):
  check(case)


@pytest.mark.full
@pytest.mark.parametrize("int8", [False, True])
def test_nothing_outside_of_a_window_has_influence(int8):
  case = dataclasses.replace(WINDOW, int8=int8)
  arrays = contract.inputs(case)
  contract.check(case, arrays, result(case, arrays=contract.poisoned(case, arrays)))


def plain_merge(parts, lse2, starts, *_):
  """`mosaic_gpu_merge.merge` in plain JAX, which takes less time to compile."""
  _, num_rows, slots, _ = parts.shape
  slot = jnp.arange(slots)
  of_sequence = (slot >= starts[:-1, None]) & (slot < starts[1:, None])  # [B, slots]
  lse2 = jnp.where(of_sequence[:, None, None], lse2[:, :num_rows, :slots], -jnp.inf)
  top = lse2.max(-1, keepdims=True)
  weights = jnp.exp2(lse2 - jnp.where(jnp.isfinite(top), top, 0))
  weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
  wide = jnp.where((weights > 0).any(0)[..., None], parts.astype(jnp.float32), 0)
  return jnp.einsum("bkrs,krsd->brkd", weights, wide).astype(parts.dtype)


# Planted mistakes: each must fail the very check that the kernel passes. The commit of a tile that
# was int8 is not among them: the interpreter does not know what wgmma may not see yet.
ONE = Case(lengths=(512, 0, 3), max_len=512, num_queries=2, heads=4, dtype="float16")
INT8 = dataclasses.replace(ONE, int8=True, lengths=(512, 3))
GROUPS = dataclasses.replace(ONE, kv_heads=2)
# The first query's window begins in the last copy of a tile, the last query's in the next tile.
WINDOW = dataclasses.replace(ONE, lengths=(449, 3), num_queries=3, left=63)
OF_SPLITS = ("skipped blocks",)
MISTAKES = {  # the case that notices it, the place in the kernel, and what changes there
    "sees the next position": (ONE, "mask", r"\+ 1", "+ 2"),
    "does not see itself": (ONE, "mask", r" \+ 1", ""),
    "a tile of two queries has no mask": (ONE, "plain end", r" - \w+ \+ 1", ""),
    "sees a position before its window": (WINDOW, "window", "- left", "- left - 1"),
    "does not see the first of its window": (WINDOW, "window", "- left", "- left + 1"),
    "a tile at the edge of a window has no mask": (WINDOW, "window's edge", "pl", "0 * pl"),
    "a copy at the edge of a window is left out": (
        WINDOW, "pieces before a window", r" \+ PIECE", ""),
    "a block at the edge of a window is left out": (
        WINDOW, "skipped blocks", "// block", "// block + 1"),
    "slopes of another head": (ONE, "slopes", r"(lax\.rem\(.*?\))", r"\1 + 1"),
    "slopes of another group": (GROUPS, "slopes", r"\[(\w+),", r"[0 * \1,"),
    "queries of another group": (GROUPS, "rows", "b, kv", "b, 0 * kv"),
    "the accumulator is not faded": (ONE, "fade of the accumulator", *DROPPED),
    "the accumulator is lost": (ONE, "product", r"\((\w+)", r"(0 * \1"),
    "the sum is not faded": (ONE, "sum", r" \* across\(.*?\)", ""),
    "the maximum keeps its frame": (ONE, "frame of a tile", *DROPPED),
    "parts are of their own frame": (ONE, "frame of a row", r"\blo \+ ", ""),
    "the first tile is skipped": (ONE, "plain tiles", r"\(seen,", "(seen + 1,"),
    "a refill is of the wrong tile": (ONE, "refill", r"copy\((.*?)\)", r"copy(\1 - 1)"),
    "no wait for a tile": (ONE, "wait for a tile", *DROPPED),
    "no wait for the queries": (ONE, "wait for the queries", *DROPPED),
    "no commit of the result": (ONE, "commit of the result", *DROPPED),
    "no commit before a refill": (
        dataclasses.replace(INT8, shared=True), "commit before a refill", *DROPPED),
    "no scales of the keys": (INT8, "key scales", *DROPPED),
    "no scales of the values": (INT8, "value scales", *DROPPED),
    "the values have the keys' scales": (INT8, "values' scales", "if .*:", "if False:"),
}
OF_SOFTMAX = ("frame of a tile", "sum")  # places in what all kernels share
USUAL = ("sees the next position", "no wait for a tile")


def by_name(mistakes):
  return [pytest.param(name, marks=() if name in USUAL else pytest.mark.full) for name in mistakes]


def check_parts(case):
  check(case, merge=plain_merge)


@functools.cache
def check_unmutated(case):
  check_parts(case)


@pytest.mark.parametrize("name", by_name(MISTAKES))
def test_a_planted_mistake_is_noticed(name):
  if name == "no wait for the queries" and jax.__version_info__ < (0, 12):
    pytest.skip("the interpreter of jax 0.11 takes the wait for the keys as one for the queries")
  case, place, *change = MISTAKES[name]
  check_unmutated(case)
  module = softmax if place in OF_SOFTMAX else splits if place in OF_SPLITS else mosaic_gpu
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
    with mutants.planted(module, Mistake(place, *change)):
      got = result(case, merge=plain_merge)
    contract.check(case, contract.inputs(case), got)


def wrong_table(change):
  original = splits.split

  def split(*args):
    table, starts = original(*args)
    return splits.Splits(change(table), starts)

  return split


def wrong_parts(change):
  return lambda parts, lse2, starts, *rest: plain_merge(parts, *change(lse2, starts), *rest)


@pytest.mark.full
@pytest.mark.parametrize("split, merge", [
    (wrong_table(lambda table: table.at[0, 2].set(table[0, 1])), plain_merge),  # a slot is lost
    (wrong_table(lambda table: table.at[1, 2].add(-16)), plain_merge),
    (wrong_table(lambda table: table.at[0, 0].set(1)), plain_merge),
    # A part is skipped.
    (splits.split, wrong_parts(lambda lse2, starts: (lse2, starts.at[0].add(1)))),
    (splits.split, wrong_parts(lambda lse2, starts: (lse2, starts.at[1].add(-1)))),
    # Parts weigh the same.
    (splits.split, wrong_parts(lambda lse2, starts: (0 * jnp.maximum(lse2, -9), starts))),
])
def test_wrong_slots_are_noticed(split, merge, monkeypatch):
  check_unmutated(ONE)
  monkeypatch.setattr(splits, "split", split)
  with pytest.raises(AssertionError):
    check(ONE, merge=merge)


MERGE_MISTAKES = {
    "the accumulator is not faded": ("fade of the accumulator", *DROPPED),
    "the sum is not faded": ("sum", r" \* across\(.*?\)", ""),
    "parts behind the last weigh something": ("last part", r"None, (\w+)\)", r"None, \1 + 1)"),
    "the last tile is skipped": ("tiles", "0, steps", "0, 1"),
    "no wait for a part": ("wait for a part", *DROPPED),
    "no commit of the result": ("commit of the result", *DROPPED),
}


def check_merge():
  """Of 70 parts, in two tiles, and of a few."""
  rng, starts, dim = np.random.default_rng(0), np.array([0, 70, 74, 75], np.int32), 64
  slots = starts[-1] + splits.SPARE
  parts = rng.normal(size=(1, 2, slots, dim)).astype(np.float16)
  lse2 = rng.normal(size=(1, 2, slots + mosaic_gpu_merge.PARTS), scale=2).astype(np.float32)
  lse2[..., 64:70] += 4  # the second tile's maximum is another
  merge = functools.partial(
      mosaic_gpu_merge.merge, most=70, transforms=mosaic_gpu._transforms(parts.dtype))
  with interpreters.running(SETTINGS):
    got = jax.block_until_ready(jax.jit(merge)(parts, lse2, starts))
  for b, slot in enumerate(map(slice, starts[:-1], starts[1:])):
    weights = np.exp2(lse2[0, :, slot].astype(float))
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("rs,rsd->rd", weights, parts[0, :, slot].astype(float))
    floor = np.abs(want).max() * (4 * bound.eps("float16") + 8 * bound.eps("float32"))
    assert not bound.excess(got[b, :, 0], want, lambda: want, floor=floor)


@functools.cache
def check_merge_unmutated():
  check_merge()


@pytest.mark.full
@pytest.mark.parametrize("name", MERGE_MISTAKES)
def test_a_planted_mistake_in_the_merge_is_noticed(name):
  check_merge_unmutated()
  mistake = Mistake(*MERGE_MISTAKES[name])
  module = softmax if mistake.place in OF_SOFTMAX else mosaic_gpu_merge
  with mutants.planted(module, mistake):
    with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
      check_merge()


@pytest.mark.full
def test_what_lies_behind_a_sequence_is_not_loaded(monkeypatch):
  """It is NaN here, but for what completes the last piece of 16 positions, and not cleared."""
  monkeypatch.setattr(mosaic_gpu.tiles, "clear_rows", lambda *_: None)
  case = Case(lengths=(70, 16, 0, 130), max_len=136, heads=2)
  arrays = contract.inputs(case)
  edge = -(-np.reshape(case.lengths, (-1, 1, 1, 1)) // mosaic_gpu.PIECE) * mosaic_gpu.PIECE
  behind = np.arange(case.max_len)[:, None, None] >= edge
  poisoned = arrays | {name: jnp.where(behind, jnp.nan, arrays[name]) for name in ("key", "value")}
  contract.check(case, arrays, result(case, arrays=poisoned))
  with mutants.planted(mosaic_gpu, Mistake("pieces", r"< (\w+)", r"< \1 + PIECE")):
    assert contract.errors(case, arrays, result(case, arrays=poisoned))


@pytest.mark.full
def test_through_the_op(monkeypatch):
  """Under jit and vmap, over a mesh, and a length that is none."""
  monkeypatch.setattr(splits, "POSITIONS_PER_ROW", 8)
  a = contract.inputs(Case(lengths=(72, 3, 0, 11), max_len=72, heads=4, dim_head=64))
  args = [a[name] for name in ("query", "key", "value", "lengths")]
  run = lambda implementation, *args: jax.jit(functools.partial(
      decode_attention, alibi_slopes=a["alibi_slopes"], implementation=implementation))(*args)
  close = lambda got, want: np.testing.assert_allclose(
      np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.03)
  with interpret(detect_races=True):
    close(run("mosaic_gpu", *args), run("xla", *args))
    pairs = [x.reshape(2, 2, *x.shape[1:]) for x in args]
    close(jax.vmap(functools.partial(run, "mosaic_gpu"))(*pairs), run("xla", *pairs))
    args[3] = jnp.array([73, 3, 0, 11])
    got = run("mosaic_gpu", *args)
    assert np.all(np.isnan(got[0])) and np.all(np.isfinite(got[1:]))
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"),
                                    axis_types=(jax.sharding.AxisType.Auto,) * 2)):
      assert jax.eval_shape(functools.partial(run, "mosaic_gpu"), *args).shape == args[0].shape


@pytest.mark.full
def test_the_same_inputs_give_the_same_bits():
  case = Case(lengths=(140, 90), max_len=144)
  np.testing.assert_array_equal(*(np.asarray(result(case), np.float32) for _ in range(2)))


# Refusals. --------------------------------------------------------------------------------------


def struct(length=128, heads=1, dim_head=64, dtype="bfloat16"):
  return jax.ShapeDtypeStruct((2, length, heads, dim_head), dtype)


@pytest.mark.parametrize("query, key, chip, message", [
    (struct(1, 16, 80), struct(dim_head=80), "h200", r"dim_head in {64, 128, 256}; got 80"),
    (struct(1, dtype="float32"), struct(), None, "queries of bfloat16 or float16; got float32"),
    (struct(1), struct(), "a100", "a Hopper GPU .*; got a100"),
    (struct(1, dim_head=256), struct(dim_head=256, dtype="int8"), None,
     "a dim_head of 64 or 128 for an int8 cache; got 256"),
    (struct(1), struct(100), "h100", "a length that is a multiple of 8; got 100"),
])
def test_requirements_are_named(query, key, chip, message):
  assert mosaic_gpu.unsupported(struct(1, 16), struct(), None, chip="h200") is None
  problem = mosaic_gpu.unsupported(query, key, key, chip=chip)
  assert problem and re.search(message, problem) and "\n" not in problem, problem


def test_the_op_refuses_before_anything_compiles():
  a = contract.inputs(Case(max_len=44))
  with pytest.raises(ValueError, match="mosaic_gpu needs caches of a length that .*; got 44"):
    decode_attention(a["query"], a["key"], a["value"], a["lengths"], implementation="mosaic_gpu")


# Compiled for a chip that is not here, and run on one that is. ----------------------------------


def program(heads, dim_head, num_queries=1, batch=1, max_len=262_144, dtype="bfloat16",
            int8=False, shared=False, kv_heads=1, alibi=True, left=None):
  """(the kernel, the types of its arguments)."""
  array = jax.ShapeDtypeStruct
  key = array((batch, max_len, kv_heads, dim_head), "int8" if int8 else dtype)
  scales = array(key.shape[:3], "float32") if int8 else None
  names = ("query", "key", "value", "lengths", "key_scales", "value_scales")
  value, value_scales = (None, None) if shared else (key, scales)
  types = dict(zip(names, (array((batch, num_queries, heads, dim_head), dtype), key, value,
                           array((batch,), "int32"), scales, value_scales)))
  given = [name for name in names if types[name] is not None]

  def run(*arrays):
    slopes = jnp.asarray(alibi_slopes(heads), jnp.float32) if alibi else None
    return mosaic_gpu.forward(**dict.fromkeys(names) | dict(zip(given, arrays)), scale=0.1,
                              left=left, chip="h200", alibi_slopes=slopes)

  return run, tuple(types[name] for name in given)


# The shared memory of two programs on one multiprocessor, of 228 KiB less one for each.
TWO = (228 // 2 - 1) * 1024


def compiled(**options):
  aot = pytest.importorskip("palm_haiku.kernels.aot", reason="compiles ahead of time")
  report = aot.report("tests.kernels.decode.test_mosaic_gpu:program", target="h200", **options)
  kernels = [k for k in report.kernels if k.source == "mosaic_gpu"]
  (kernel,) = (k for k in kernels if "merge" not in k.name)
  assert not report.problems, report.problems
  assert len(kernels) == 1 + (options.get("max_len") is None)
  assert kernel.code.main_loop.mix.get("HGMMA"), kernel
  if options["dim_head"] < 256:
    assert kernel.shared_memory <= TWO and 2 * 128 * kernel.resources.registers <= 65_536
  return report


@pytest.mark.full
@pytest.mark.parametrize("options", [
    dict(heads=16, dim_head=128),
    pytest.param(dict(heads=16, dim_head=64, int8=True), marks=pytest.mark.slow)], ids=str)
def test_compiles_without_spills_or_serialized_products(options):
  report = compiled(**options)
  assert report.memory["temp"] < 2**22  # parts, not scores


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("options", [
    dict(heads=16), dict(heads=48, alibi=False), dict(heads=1, num_queries=3),
    dict(heads=6, kv_heads=2, dtype="float16", shared=True), dict(heads=16, max_len=512, batch=3),
    dict(heads=32, num_queries=4, batch=3), dict(heads=32, kv_heads=8, batch=8)], ids=str)
@pytest.mark.parametrize("dim_head, int8", [
    (64, False), (64, True), (128, False), (128, True), (256, False)])
def test_every_variant_compiles_soundly(dim_head, int8, options):
  compiled(dim_head=dim_head, int8=int8, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dim_head, int8", [
    (64, False), (64, True), (128, False), (128, True), (256, False)])
def test_windows_compile_soundly(dim_head, int8):
  compiled(dim_head=dim_head, int8=int8, heads=32, kv_heads=8, left=4095, batch=8)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the kernel on a Hopper GPU")
@pytest.mark.parametrize("num_queries, heads, dim_head, int8", [
    (1, 16, 128, False), (1, 16, 128, True), (4, 16, 256, False), (1, 3, 64, True)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_on_a_gpu(dtype, num_queries, heads, dim_head, int8):
  case = Case(lengths=(30_000, 0, 77, 1), max_len=30_008, num_queries=num_queries, heads=heads,
              dim_head=dim_head, dtype=dtype, int8=int8)
  arrays = contract.inputs(case)
  run = jax.jit(functools.partial(mosaic_gpu.forward, scale=case.scale, chip=None))
  got = run(**arrays)
  contract.check(case, arrays, got)
  np.testing.assert_array_equal(got, run(**arrays))
