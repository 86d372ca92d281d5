"""The Triton decode kernels: numbers in Triton's interpreter, compilation ahead of time."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from palm_haiku.kernels import alibi_slopes, decode_attention
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.decode import configs, splits, triton
from palm_haiku.kernels.triton import call as triton_call
from tests import triton_interpreter
from tests.kernels import contract as bound
from tests.kernels.decode import contract
from tests.kernels.decode.contract import Case
from tests.mutants import DROPPED, Mistake

if trouble := triton_call.problem():
  pytest.skip(f"needs {trouble}", allow_module_level=True)


def result(case, keys=16, per_row=1, mistake=None, chip=None, arrays=None):
  """Results of the kernels for a case, in blocks of `keys` and slots of `per_row` a row."""
  arrays = arrays or contract.inputs(case)
  blocks = configs.triton

  def smaller(*args):
    return blocks(*args)._replace(**dict(keys=keys) if keys else {})

  with pytest.MonkeyPatch.context() as patch, triton_interpreter.interpreted(mistake):
    patch.setattr(configs, "triton", smaller)
    patch.setattr(splits, "POSITIONS_PER_ROW", per_row)
    return jax.jit(functools.partial(
        triton.forward, scale=case.scale, left=case.left, chip=chip))(**arrays)


def errors(case, *args, **kwargs):
  return contract.errors(case, contract.inputs(case), result(case, *args, **kwargs))


def check(case, *args, **kwargs):
  bound.check(errors(case, *args, **kwargs), case)


drawn = dict(case=contract.cases(dims=(16, 64, 128), dtypes=("bfloat16", "float16", "float32")),
             keys=st.sampled_from([16, 32, 64]), per_row=st.sampled_from([1, 4, 48]))


@settings(max_examples=4)
@given(**drawn)
def test_results_are_as_near_to_float64_as_the_xla_path(case, keys, per_row):
  check(case, keys, per_row)


@pytest.mark.full
@settings(max_examples=10)
@given(**drawn)
def test_results_of_more_drawn_cases(case, keys, per_row):
  check(case, keys, per_row)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=700, derandomize=False)
@given(**drawn)
def test_fuzz(case, keys, per_row):
  check(case, keys, per_row)


@pytest.mark.full
@pytest.mark.parametrize("chip", ["rtx4090", "h200"])
@pytest.mark.parametrize("case", [
    Case(lengths=(2000, 0, 77), max_len=2048, heads=16),
    Case(lengths=(1999, 3), max_len=2000, heads=3, num_queries=4, dim_head=256),
    Case(lengths=(1500,), max_len=1500, heads=8, kv_heads=2, dim_head=32, int8=True),
    Case(lengths=(900, 70), max_len=900, heads=48, num_queries=3),  # 144 rows: two tiles
    Case(lengths=(900, 70), max_len=900, heads=2, dtype="float32", shared=True, scale=0.0)],
    ids=str)
def test_the_block_sizes_of_the_table(case, chip):
  check(case, None, splits.POSITIONS_PER_ROW, chip=chip)


# Planted mistakes: each must fail the very check that the kernels pass.
# In float32, whose bound is the sharpest.
ONE = Case(lengths=(128, 19, 0, 2), max_len=140, dtype="float32", dim_head=16, num_queries=2)
SHORT = dataclasses.replace(ONE, lengths=(1, 20), num_queries=4)
INT8 = dataclasses.replace(ONE, int8=True)
GROUPS = dataclasses.replace(ONE, kv_heads=2)
# The last query's window begins in another block of 16 than that of the first.
WINDOW = dataclasses.replace(ONE, lengths=(128, 33, 0, 2), left=31)
MISTAKES = {  # the case that notices it, the place in the kernels, and what changes there
    "sees the next position": (ONE, "mask", "<= ", "- 1 <= "),
    "does not see itself": (ONE, "mask", "<= ", "< "),
    "positions past the end weigh something": (
        dataclasses.replace(ONE, num_queries=1, lengths=(130,), heads=1, alibi=False),
        "mask", *DROPPED),
    "a block of two queries has no mask": (ONE, "first masked position", r" - \w+ \+ 1", ""),
    "sees a position before its window": (WINDOW, "window", "LEFT,", "LEFT - 1,"),
    "does not see the first of its window": (WINDOW, "window", ">=", ">"),
    "the blocks at a window's edge have no mask": (
        WINDOW, "blocks at a window's edge", "=.*", "= lo"),
    "slopes of another head": (ONE, "slopes", r"(\w+) %", r"(\1 + 1) %"),
    "slopes of another group": (GROUPS, "slopes", r" \+ \w+ \* \w+", ""),
    "queries of another group": (GROUPS, "rows", r" \+ \w+ \* \w+", ""),
    "the accumulator is not faded": (ONE, "fade of the accumulator", *DROPPED),
    "the sum is not faded": (ONE, "sum", r" \* \w+", ""),
    "the first block of a slot is skipped": (ONE, "walk", r"range\((\w+)", r"range(\1 + BLOCK"),
    "the last block of a slot is skipped": (ONE, "masked part", "$", "; end = mid"),
    "parts are of the slot's own origin": (ONE, "origin", r"\w+ - 1", "end - 1"),
    "a part is skipped": (ONE, "first part", "$", " + 1"),
    "the last part is skipped": (ONE, "last part", "$", " - 1"),
    "parts of another sequence are merged": (ONE, "last part", "$", " + 1"),
    "parts weigh the same": (ONE, "weights of parts", "= .*", "= tl.where(slot < hi, 1.0, 0.0)"),
    "a row that sees nothing is divided by 0": (SHORT, "empty rows", r"tl\.where\(.*?\)", "total"),
    "no scales of the keys": (INT8, "key scales", *DROPPED),
    "no scales of the values": (INT8, "value scales", *DROPPED),
    "the sum has the values' scales": (INT8, "value scales", "$", "; total += tl.sum(weights, 1)"),
}


@functools.cache
def check_unmutated(case):
  check(case)


@pytest.mark.parametrize("name", [
    name if name == "sees the next position" else pytest.param(name, marks=pytest.mark.full)
    for name in MISTAKES])
def test_a_planted_mistake_is_noticed(name):
  case, *mistake = MISTAKES[name]
  check_unmutated(case)
  assert errors(case, mistake=Mistake(*mistake))


@pytest.mark.full
@pytest.mark.parametrize("name, change", {
    "a slot is lost": lambda table: table.at[2, 2].set(table[2, 1]),
    "a slot ends early": lambda table: table.at[1, 2].add(-16),
    "a slot is another sequence's": lambda table: table.at[0, 0].set(1),
}.items())
def test_a_wrong_table_is_noticed(name, change, monkeypatch):
  original = splits.split

  def wrong(*args):
    table, starts = original(*args)
    return splits.Splits(change(table), starts)

  monkeypatch.setattr(splits, "split", wrong)
  assert errors(ONE)


@pytest.mark.full
@pytest.mark.parametrize("int8", [False, True])
def test_nothing_past_the_length_is_loaded(int8):
  """Unfilled positions are NaN here, also in the block in which a sequence ends."""
  case = dataclasses.replace(ONE, int8=int8)
  arrays = contract.inputs(case)
  poisoned = contract.poisoned(case, arrays)
  contract.check(case, arrays, result(case, arrays=poisoned))
  one_more = Mistake("loads past the end", r"< (\w+)", r"< \1 + 1")
  assert contract.errors(case, arrays, result(case, arrays=poisoned, mistake=one_more))


@pytest.mark.full
@pytest.mark.parametrize("int8", [False, True])
def test_nothing_before_a_window_is_loaded(int8):
  case = dataclasses.replace(WINDOW, int8=int8)
  arrays = contract.inputs(case)
  poisoned = contract.poisoned(case, arrays)
  contract.check(case, arrays, result(case, arrays=poisoned))
  one_more = Mistake("loads before a window", ">= ", ">= -1 + ")
  assert contract.errors(case, arrays, result(case, arrays=poisoned, mistake=one_more))


@pytest.mark.full
def test_the_same_inputs_give_the_same_bits():
  case = Case(lengths=(140, 90), max_len=140)
  np.testing.assert_array_equal(*(np.asarray(result(case), np.float32) for _ in range(2)))


@pytest.mark.full
def test_through_the_op(monkeypatch):
  """Under jit and vmap, over a mesh, and a length that is none."""
  monkeypatch.setattr(splits, "POSITIONS_PER_ROW", 1)
  a = contract.inputs(Case(lengths=(70, 3, 0, 11), max_len=75, dim_head=16, dtype="float32"))
  f = lambda q, k, v, n, implementation: decode_attention(
      q, k, v, n, alibi_slopes=a["alibi_slopes"], implementation=implementation)
  args = [a[name] for name in ("query", "key", "value", "lengths")]
  run = lambda implementation, *args: jax.jit(functools.partial(
      f, implementation=implementation))(*args)
  close = functools.partial(np.testing.assert_allclose, atol=2e-6)
  with triton_interpreter.interpreted():
    close(run("triton", *args), run("xla", *args))
    pairs = [x.reshape(2, 2, *x.shape[1:]) for x in args]
    close(jax.vmap(functools.partial(run, "triton"))(*pairs), run("xla", *pairs))
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"),
                                    axis_types=(jax.sharding.AxisType.Auto,) * 2)):
      close(run("triton", *args), run("xla", *args))
    args[3] = jnp.array([76, 3, 0, 11])
    got = run("triton", *args)
    assert np.all(np.isnan(got[0])) and np.all(np.isfinite(got[1:]))


# Refusals.


def struct(length=128, heads=1, dim_head=64, dtype="bfloat16"):
  return jax.ShapeDtypeStruct((2, length, heads, dim_head), dtype)


@pytest.mark.parametrize("query, key, chip, message", [
    (struct(1, 16, 80), struct(dim_head=80), "a100", r"dim_head in {16, 32, .*, 256}; got 80"),
    (struct(1, dtype="float64"), struct(), "a100", "queries of dtype in {.*}; got float64"),
    (struct(1), struct(), "v5e", "a GPU with .* of compute capability 8.0, .*; got v5e"),
    (struct(1), struct(2**28, 8), "h200", r"fewer than 2\^31 positions x heads"),
])
def test_requirements_are_named(query, key, chip, message):
  assert triton.unsupported(struct(1, 16), struct(), None, chip="a100") is None
  problem = triton.unsupported(query, key, key, chip=chip)
  assert problem and re.search(message, problem) and "\n" not in problem, problem


def test_the_op_refuses_before_anything_compiles():
  a = contract.inputs(Case(dim_head=80))
  call = lambda a: decode_attention(a["query"], a["key"], a["value"], a["lengths"],
                                    implementation="triton")
  with pytest.raises(ValueError, match="triton needs dim_head in .*; got 80"):
    call(a)
  with pytest.raises(ValueError, match="triton needs a device of cuda or rocm; got cpu"):
    call(contract.inputs(Case()))


# Compiled for GPUs that are not here, and run on one that is.

TENSOR_CORES = {"HMMA", "HGMMA", "UTCMMA"}


def program(chip, heads, dim_head, num_queries=1, batch=1, max_len=262_144, dtype="bfloat16",
            int8=False, shared=False, kv_heads=1, left=None):
  """(the kernels, the types of their arguments)."""
  array = jax.ShapeDtypeStruct
  key = array((batch, max_len, kv_heads, dim_head), "int8" if int8 else dtype)
  scales = array(key.shape[:3], "float32") if int8 else None
  names = ("query", "key", "value", "lengths", "key_scales", "value_scales")
  value, value_scales = (None, None) if shared else (key, scales)
  types = dict(zip(names, (array((batch, num_queries, heads, dim_head), dtype), key, value,
                           array((batch,), "int32"), scales, value_scales)))
  given = [name for name in names if types[name] is not None]

  def run(*arrays):
    return triton.forward(**dict.fromkeys(names) | dict(zip(given, arrays)), scale=0.1, left=left,
                          chip=chip, alibi_slopes=jnp.asarray(alibi_slopes(heads), jnp.float32))

  return run, tuple(types[name] for name in given)


def compiled(chip, **options):
  aot = pytest.importorskip("palm_haiku.kernels.aot")
  try:
    aot.devices(chip)
    for name in ("ptxas", "nvdisasm", "cuobjdump"):
      aot.ptxas.tool(name)
  except aot.AotError as missing:
    pytest.skip(str(missing))
  report = aot.report("tests.kernels.decode.test_triton:program", target=chip, chip=chip, **options)
  kernels = {kernel.name: kernel for kernel in report.kernels if kernel.source == "triton"}
  assert set(kernels) == {"attend_kernel", "merge_kernel"}
  attend = kernels["attend_kernel"]
  for kernel in kernels.values():
    spills = max(kernel.resources.spill_stores, kernel.resources.spill_loads)
    assert spills == 0 and not kernel.resources.serialized, kernel
  assert set(attend.code.main_loop.mix) & TENSOR_CORES, attend
  assert attend.shared_memory <= chips.GPUS[chip].shared_memory
  return report


@pytest.mark.full
@pytest.mark.parametrize("options", [
    dict(heads=16, dim_head=128), pytest.param(
        dict(heads=16, dim_head=256, num_queries=4, int8=True), marks=pytest.mark.slow)], ids=str)
def test_compiles_for_hopper_without_spills(options):
  report = compiled("h200", **options)
  assert report.memory["temp"] < 2**22  # parts, not scores


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("chip", ["a100", "h200", "b200"])
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("dim_head", [64, 128, 256])
@pytest.mark.parametrize("int8", [False, True])
def test_every_entry_of_the_table(chip, heads, dim_head, int8):
  compiled(chip, heads=heads, dim_head=dim_head, int8=int8)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["a100", "h200", "b200"])
@pytest.mark.parametrize("options", [
    dict(heads=1, dim_head=16), dict(heads=6, dim_head=32, kv_heads=2, dtype="float32"),
    dict(heads=6, dim_head=64, kv_heads=2, dtype="float16", int8=True, shared=True)], ids=str)
def test_every_variant_compiles(chip, options):
  compiled(chip, **options)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the kernels on a GPU")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("num_queries, heads, dim_head", [(1, 16, 128), (4, 16, 256), (1, 3, 64)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_on_a_gpu(dtype, num_queries, heads, dim_head, int8):
  case = Case(lengths=(30_000, 0, 77, 1), max_len=30_001, num_queries=num_queries, heads=heads,
              dim_head=dim_head, dtype=dtype, int8=int8)
  arrays = contract.inputs(case)
  run = jax.jit(functools.partial(triton.forward, scale=case.scale, chip=None))
  got = run(**arrays)
  contract.check(case, arrays, got)
  np.testing.assert_array_equal(got, run(**arrays))
