"""The TPU kernel in JAX's TPU interpreter, and compiled ahead of time.

The interpreter looks for races and reads out of bounds, and fills fresh memory with NaN.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.experimental.pallas import tpu as pltpu

from benchmarks.static import decode as decode_static
from palm_haiku.kernels import alibi_slopes, aot, decode_attention, interpret
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.decode import configs, mosaic_tpu
from tests.kernels.decode import contract
from tests.kernels.decode.contract import Case

# Small enough that short sequences have several blocks, and blocks several parts and products.
BLOCKS = (configs.TpuConfig(size=128, slots=3, chunk=128, cores=1),
          configs.TpuConfig(size=256, slots=4, chunk=128, cores=2),
          configs.TpuConfig(size=128, slots=4, chunk=128, cores=2))


def attention(case, arrays, blocks=BLOCKS[0]):
  # Every case is a compilation; optimizing it would cost more than it saves.
  run = jax.jit(functools.partial(mosaic_tpu.forward, scale=case.scale, left=case.left, chip=None,
                                  config=blocks),
                compiler_options={"xla_backend_optimization_level": 0})
  with interpret(detect_races=True):
    return jax.block_until_ready(run(**arrays))


def check(case, blocks=BLOCKS[0]):
  arrays = contract.inputs(case)
  contract.check(case, arrays, attention(case, arrays, blocks))


drawn = given(case=contract.cases(max_len=600), blocks=st.sampled_from(BLOCKS))


@settings(max_examples=2)
@drawn
def test_right_on_few_drawn_cases(case, blocks):
  check(case, blocks)


@pytest.mark.full
@settings(max_examples=7)
@drawn
def test_right_on_drawn_cases(case, blocks):
  check(case, blocks)


@pytest.mark.full
@pytest.mark.parametrize("case, blocks", [
    # Each core has part of the only sequence; both end within it, or one has nothing.
    (Case(lengths=(700,), max_len=704, alibi=False), 2),
    (Case(lengths=(3,), max_len=704, dtype="float32"), 2),
    # Longer and shorter parts in turn; a part of what was computed before must not be seen.
    (Case(lengths=(100, 256, 30, 512, 1), max_len=512, heads=20, int8=True, num_queries=2), 1),
    (Case(lengths=(0, 0, 129, 0), max_len=130, dim_head=256), 0),
])
def test_right_where_blocks_and_cores_meet(case, blocks):
  check(case, BLOCKS[blocks])


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@settings(max_examples=300)
@given(case=contract.cases(dims=(8, 64, 80, 128, 256), dtypes=("bfloat16", "float32"), max_len=900,
                           heads=((1, 1), (8, 1), (3, 1), (71, 1), (16, 1), (4, 2), (3, 3))),
       blocks=st.sampled_from(BLOCKS))
def test_right_on_many_drawn_cases(case, blocks):
  check(case, blocks)


def off_by_one(hide):
  return lambda scores, distance: hide(scores, distance - 1)


def before_the_window(hide_before):
  return lambda scores, distance, left: hide_before(scores, distance, left + 1)


def of_another_head(row_slopes):
  return lambda plan, slopes: row_slopes(plan, jnp.roll(slopes, 1))


def without_waiting(copy_block):
  return lambda *args: copy_block(*args) if args[-1] == "start" else None


def stale(carried):
  return lambda fresh, state, first: jnp.nan_to_num(state)


def skipped(following):
  return lambda i, n, left, size: following(i, jnp.where(left > 2 * size, n + 1, n), left, size)


def nothing(clear):
  return lambda *args: None


def one_core(merge):
  return lambda out, pieces, sequence, is_shared: merge(out, pieces, sequence, False)


MUTANTS = {
    "window": ("hide_before", before_the_window),
    "stale window": ("clear_before", nothing),
    "mask": ("hide", off_by_one), "slopes": ("row_slopes", of_another_head),
    "missing wait": ("copy_block", without_waiting), "stale accumulator": ("carried", stale),
    "skipped block": ("following", skipped), "stale cache": ("clear_behind", nothing),
    "one core's part": ("merge", one_core)}


@pytest.mark.parametrize("mutant", [
    name if name in (None, "mask", "missing wait") else pytest.param(name, marks=pytest.mark.full)
    for name in (None, *MUTANTS)])
def test_a_planted_error_is_found(monkeypatch, mutant):
  case = Case(lengths=(50, 256, 40, 300, 600), max_len=640, dtype="float32")
  if mutant in ("window", "stale window"):
    case = dataclasses.replace(case, lengths=(300, 640, 30), left=260)
    return check_window(monkeypatch, case, *MUTANTS[mutant])
  if mutant is None:
    return check(case, BLOCKS[1])
  name, mutate = MUTANTS[mutant]
  monkeypatch.setattr(mosaic_tpu, name, mutate(getattr(mosaic_tpu, name)))
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
    check(case, BLOCKS[1])


def check_window(monkeypatch, case, name, mutate):
  """That nothing outside of a window has influence, and would not go unnoticed if it had."""
  arrays = contract.inputs(case)
  run = lambda: contract.check(
      case, arrays, attention(case, contract.poisoned(case, arrays), BLOCKS[1]))
  run()
  monkeypatch.setattr(mosaic_tpu, name, mutate(getattr(mosaic_tpu, name)))
  with pytest.raises(AssertionError):
    run()


def copied(monkeypatch, case, blocks):
  """Bytes that the kernel copies from the arrays in memory, as the interpreter performs them."""
  sizes = []
  make = pltpu.make_async_copy

  def counting(source, target, semaphore):
    copy, shape, dtype = make(source, target, semaphore), source.shape, source.dtype

    def start():
      jax.debug.callback(lambda *n: sizes.append(np.prod(n) * dtype.itemsize), *shape)
      copy.start()
    return types.SimpleNamespace(start=start, wait=copy.wait)

  monkeypatch.setattr(pltpu, "make_async_copy", counting)
  check(case, blocks)
  jax.effects_barrier()
  return sum(sizes)


@pytest.mark.full
@pytest.mark.parametrize("case", [
    Case(lengths=(640, 1, 801, 0, 2000), max_len=2048, heads=4),
    Case(lengths=(1000, 700), max_len=1024, heads=4, int8=True),
    Case(lengths=(900, 1100), max_len=1100, heads=4, shared=True),
    Case(lengths=(2000, 1700), max_len=2048, heads=4, left=1023)])
def test_no_more_is_copied_than_the_cache_that_is_used(monkeypatch, case):
  arrays = contract.inputs(case)
  caches = [x for name, x in arrays.items() if x is not None and name.startswith(("key", "value"))]
  seen = case.lengths if case.left is None else [  # from a multiple of 128 on
      n - (n - 1 - case.left) // 128 * 128 for n in case.lengths]
  used = sum(seen) * sum(x.nbytes // np.prod(x.shape[:2]) for x in caches)
  # With large blocks, as on a chip: the query comes with each.
  total = copied(monkeypatch, case, configs.TpuConfig(size=1024, slots=4, chunk=512, cores=1))
  assert used <= total <= 1.05 * used, total / used


@pytest.mark.full
def test_through_the_op():
  arrays = contract.inputs(Case(lengths=(5, 40, 64, 0), max_len=64, num_queries=2, dtype="float32"))
  query, key, value = (arrays[name] for name in ("query", "key", "value"))
  lengths = jnp.array([5, 40, 64, 65])
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def op(implementation):
    f = jax.jit(lambda *a: decode_attention(
        *a, alibi_slopes=alibi_slopes(8), implementation=implementation))
    pairs = [x.reshape(2, 2, *x.shape[1:]) for x in (query, key, value, lengths)]
    return f(query, key, value, lengths), jax.vmap(f)(*pairs)

  want = op("xla")
  with jax.set_mesh(mesh), interpret():
    got = jax.block_until_ready(op("mosaic_tpu"))
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, atol=1e-5)
  np.testing.assert_array_equal(np.isnan(got[0]).all((1, 2, 3)), [False, False, False, True])


@pytest.mark.parametrize("chip, change, message", [
    (None, dict(dtype="float16", cache="float16"), "bfloat16 or float32"),
    ("v9", {}, "one of the chips v4, v5e, v5p, v6e, tpu7x; got v9"),
    (None, dict(length=2047), "a multiple of 8 positions, which copies end with; got 2047"),
    ("v4", dict(cache="int8"), "caches in the dtype of query on a v4"),
    ("v4", dict(num_queries=512, heads=64), "within the 16 MiB of VMEM of a v4; with 32768 rows"),
])
def test_what_it_cannot_take_is_named(chip, change, message):
  shape = dict(batch=2, length=2048, heads=16, dim=128, cache="bfloat16") | change
  query, key, value, *_ = decode_static.arguments(**shape)
  problem = mosaic_tpu.unsupported(query, key, value, chip=chip)
  assert message in problem and "\n" not in problem


@pytest.mark.parametrize("chip", chips.TPUS)
@pytest.mark.parametrize("cache", ["bfloat16", "int8", "float32"])
def test_the_table_fits_the_chip(chip, cache):
  for dim in (64, 128, 256, 512):
    for heads, kv_heads in ((16, 1), (48, 1), (71, 1), (32, 8)):
      for length in (8, 696, 32768):
        for num_queries in (1, 4):
          query, key, value, *_ = decode_static.arguments(
              batch=3, length=length, heads=heads, dim=dim, cache=cache, kv_heads=kv_heads,
              num_queries=num_queries, dtype="float32" if cache == "float32" else "bfloat16")
          if (chip, cache) != ("v4", "int8"):
            assert mosaic_tpu.unsupported(query, key, value, chip=chip) is None


def check_that_copies_bind(chip, **shape):
  """A turn on a whole block, with its part of what the end of 65,536 positions takes."""
  pytest.importorskip("libtpu", reason="the compiler for TPUs is in libtpu")
  found = decode_static.figures(chip, **shape)
  size = found.plan.size
  cycles, copies = found.steps[size] + found.finish * size / 65536, found.copies(size)
  assert cycles <= copies, (cycles, copies)
  return found


@pytest.mark.full
def test_its_copies_take_longer_than_its_arithmetic():
  found = check_that_copies_bind("v5e", heads=16, dim=128, cache="bfloat16")
  assert found.share([8192] * 4 + [3000] * 4) < 1


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("heads", [8, 16, 48])
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("cache", ["bfloat16", "int8"])
def test_its_copies_take_longer_everywhere(chip, heads, dim, cache):
  check_that_copies_bind(chip, heads=heads, dim=dim, cache=cache)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("chip", chips.TPUS)
@pytest.mark.parametrize("shape", [
    dict(heads=3, dim=80, cache="bfloat16", length=1000),
    dict(heads=8, dim=64, cache="bfloat16", length=8),
    dict(heads=71, dim=64, cache="int8", length=2040),
    dict(heads=32, dim=128, cache="bfloat16", kv_heads=8, num_queries=5),
    dict(heads=16, dim=128, cache="float32", dtype="float32", num_queries=4),
    dict(heads=16, dim=128, cache="int8", dtype="float32", batch=300),
    dict(heads=48, dim=256, cache="bfloat16", num_queries=8)])
def test_compiles_within_the_vmem_that_is_counted(chip, shape):
  if (chip, shape["cache"]) == ("v4", "int8"):
    pytest.skip("a v4 takes no int8 cache")
  shape = dict(batch=2, length=8192) | shape
  function, arguments = decode_static.program(**shape)
  aot.compile(function, *arguments, target=chip)
