"""The block's TPU kernels in JAX's TPU interpreter, and compiled ahead of time.

The interpreter looks for races and reads out of bounds, and fills fresh memory with NaN.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.experimental import pallas as pl

from palm_haiku.kernels import aot, interpret
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.parallel_block import (
  configs,
  mosaic_tpu,
  mosaic_tpu_backward,
  mosaic_tpu_plan,
)
from tests.kernels.parallel_block import contract
from tests.kernels.parallel_block.contract import Case
from tests.mutants import Mistake, planted

# Small enough that little has several blocks, a block several tiles, and a tile several parts.
BLOCKS = (
    configs.ProductConfig(rows=64, columns=128, work=2**22, code=2**21, part=16),
    configs.ProductConfig(rows=96, columns=256, work=2**23, code=2**30, part=32),
)


def cases(**limits):
  return contract.cases(**dict(
      dims=(128, 256, 384), hiddens=(128, 256, 384, 512), dim_heads=(64, 128, 256),
      dtypes=("bfloat16", "bfloat16", "float32")) | limits)


@functools.lru_cache(maxsize=2)
def jitted(case, of):
  """A function of the inputs of all cases that share this program."""
  return jax.jit(functools.partial(contract.run, mosaic_tpu, case, of=of))


FUNCTIONS = ("in_projection", "out_projection", "swiglu_gradient", "input_gradient")


def results(case, blocks=BLOCKS[0], of=FUNCTIONS, jitted=jitted.__wrapped__):
  config = configs.TpuConfig(*[blocks] * 4)
  with (mock.patch.object(configs, "mosaic_tpu", lambda chip: config),
        interpret(detect_races=True)):
    return jax.block_until_ready(jitted(case.program, of)(contract.inputs(case)))


def check(case, *args, **keywords):
  contract.check(case, results(case, *args, **keywords))


def one_step(size):
  """The least depth of a step, in place of all that there are."""
  return [size if size % 128 else 128]


@pytest.mark.full
@settings(max_examples=3)
@given(case=cases(), blocks=st.sampled_from(BLOCKS))
def test_right_on_drawn_cases(case, blocks):
  check(case, blocks)


full = functools.partial(pytest.param, marks=pytest.mark.full)


@pytest.mark.parametrize("case", [
    Case(tokens=131, mean=30.0, dim_head=256, kv_heads=2, dtype="float32"),
    full(Case(tokens=70, heads=6, kv_heads=3)),
    full(Case(tokens=131, mean=30.0, dim=256, hidden=384, with_x=False)),
    full(Case(tokens=1, rotated=False, value=False, norm="rms", keep=False))], ids=str)
def test_right_where_it_is_easily_wrong(case):
  check(case, jitted=jitted)


@pytest.mark.full
def test_the_same_bits_twice():
  case = Case(tokens=1, rotated=False, value=False, norm="rms", keep=False, seed=1)
  jax.tree.map(np.testing.assert_array_equal, *(results(case, jitted=jitted) for _ in range(2)))


@pytest.mark.full
def test_right_with_a_contraction_in_steps(monkeypatch):
  monkeypatch.setattr(mosaic_tpu_plan, "depths_of", one_step)
  check(Case(tokens=70, dim=384, dim_head=128, hidden=384))


def test_steps_of_a_contraction_divide_it():
  blocks = BLOCKS[0]._replace(work=1)
  for size, least in ((64, 64), (192, 192), (384, 128), (4544, 4544), (5504, 128)):
    plan = mosaic_tpu_plan.fit_sum(blocks, None, 64, 128, [(size, 1)], 2)
    assert plan.depths == (least,)


def skipped_statistics(monkeypatch):
  """Later blocks of rows meet what the first one left."""
  normalize = mosaic_tpu.normalize
  def first_only(*args):
    jax.lax.cond(pl.program_id(0) == 0, lambda: normalize(*args), lambda: None)
  monkeypatch.setattr(mosaic_tpu, "normalize", first_only)


def no_residual(monkeypatch):
  add = mosaic_tpu.sum_of_products
  monkeypatch.setattr(
      mosaic_tpu, "sum_of_products", lambda x, *args, **keywords: add(None, *args, **keywords))


def stale_accumulator(monkeypatch):
  monkeypatch.setattr(mosaic_tpu_plan, "clear", lambda total: jax.lax.cond(
      sum(pl.program_id(i) for i in range(3)) == 0,
      lambda: total.__setitem__(..., jnp.zeros_like(total)), lambda: None))


def gate_and_up_exchanged(monkeypatch):
  in_projection = mosaic_tpu.in_projection
  monkeypatch.setattr(mosaic_tpu, "in_projection", lambda x, p, *args, **keywords: in_projection(
      x, p | dict(gate=p["up"], up=p["gate"]), *args, **keywords))


def rotated_value(monkeypatch):
  monkeypatch.setattr(mosaic_tpu, "ROTATED", ("query", "key", "value"))


def skipped_rows(monkeypatch):
  each = mosaic_tpu_plan.each_part
  monkeypatch.setattr(mosaic_tpu_plan, "each_part", lambda plan, *rest: each(
      plan._replace(num_tokens=plan.num_tokens - plan.tile), *rest))


def gradient_of_relu(monkeypatch):
  monkeypatch.setattr(mosaic_tpu_backward.jax.nn, "sigmoid", lambda x: (x > 0).astype(x.dtype))


IN, OUT, SWIGLU, INPUT = ((name,) for name in FUNCTIONS)


@pytest.mark.parametrize("mutant, of, finds", [
    (no_residual, OUT, {"y"}),
    full(skipped_statistics, IN, {"query", "key", "value", "act", "gate", "up"}),
    full(stale_accumulator, OUT + INPUT, {"dh"}),
    full(gate_and_up_exchanged, IN, {"act", "gate", "up"}), full(rotated_value, IN, {"value"}),
    full(skipped_rows, IN + INPUT, {"query", "key", "value", "act", "gate", "up", "dh"}),
    full(gradient_of_relu, IN + SWIGLU, {"act", "dgate", "dup", "act of gradient"})])
def test_a_planted_error_is_found(monkeypatch, mutant, of, finds):
  case = Case(tokens=150, dim=256, heads=1, dim_head=128)
  mutant(monkeypatch)
  wrong = results(case, of=of)
  assert contract.errors(case, wrong).keys() == finds


@pytest.mark.full
def test_key_heads_are_more_than_a_step():
  case = Case(heads=3, kv_heads=3, dim_head=128)
  with planted(mosaic_tpu, Mistake("steps of keys", "key_steps", "1")):
    assert {"key", "value"} <= contract.errors(case, results(case, of=IN)).keys()


def test_steps_of_keys_are_equal():
  for size, most, unit, want in (
      (128, 1024, 128, 128), (1024, 1024, 128, 1024), (64, 256, 128, 128), (1280, 1024, 256, 768),
      (1024, 640, 128, 512), (512, 128, 256, 256)):
    assert mosaic_tpu_plan.in_equal_steps(size, most, unit) == want


def test_twice_the_rows_where_they_fit_with_as_many_columns():
  def plan(chip, tokens=8192, dim=4096):
    sizes = mosaic_tpu_plan.Sizes(tokens, dim, 16, 1, 256, 16_384, 2)
    return sizes.plans(chip)["in_projection"]

  once, twice = plan("v5p"), plan("v5e")
  assert (once.rows, twice.rows) == (1024, 2048) and once.tile == twice.tile
  assert once.columns == twice.columns and once.query_columns == twice.query_columns
  assert plan("v5e", dim=8192).rows == 1024 and plan("v5e", dim=8192).depth == 8192
  assert plan("v5e", tokens=1000).rows == 1024


def test_what_varies_over_a_mesh_is_typed_so():
  arrays = contract.inputs(Case())
  mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
  split, whole = jax.P(None, "model"), jax.P()

  def share(x, attended, act, attn_out, ff_out):
    y = mosaic_tpu.out_projection(None, attended, act, attn_out, ff_out, chip=None)
    return jax.lax.psum(y, "model") + x  # the sum needs a type that varies

  y = jax.eval_shape(
      jax.shard_map(share, mesh=mesh, out_specs=whole,
                    in_specs=(whole, split, split, jax.P("model"), jax.P("model"))),
      *(arrays[name] for name in ("x", "attended", "act", "attn_out", "ff_out")))
  assert y.shape == arrays["x"].shape


def ask(chip, dim=4096, hidden=16384, heads=16, kv_heads=(), dim_head=256, dtype="bfloat16"):
  array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  params = dict(query=array(dim, heads, dim_head), key=array(dim, *kv_heads, dim_head),
                gate=array(dim, hidden))
  return mosaic_tpu.unsupported(array(8192, dim), params, chip=chip)


def test_what_it_cannot_take_is_named():
  assert "bfloat16 or float32" in ask(None, dtype="float16")
  assert ask(None, dim=80) == "dim a multiple of 128; got 80"
  assert ask(None, dim_head=512) == "dim_head in {64, 128, 256}; got 512"
  assert "one of the chips v4" in ask("v9")
  assert "within the 16 MiB of VMEM of a v4" in ask("v4", dim=65_536)
  for chip in chips.TPUS:
    assert ask(chip) is None
    assert ask(chip, dim=512, hidden=1536, heads=1, dim_head=64) is None
    assert chip == "v4" or ask(chip, dim=18_432, hidden=73_728 // 12, heads=4) is None
    assert ask(chip, hidden=14_330, heads=32, kv_heads=(8,), dim_head=128) is None
    assert ask(chip, dim=8192, hidden=22_528, heads=64, kv_heads=(64,), dim_head=128) is None


def program(*, chip, tokens, dim, heads, dim_head, hidden, dtype, kv_heads=1):
  """(function, arguments): all four kernels."""
  array = lambda *sizes, dtype=dtype: jax.ShapeDtypeStruct(sizes, dtype)
  params = dict(norm=array(dim, dtype="float32"), query=array(dim, heads, dim_head),
                **dict.fromkeys(("key", "value"), array(dim, kv_heads * dim_head)),
                **dict.fromkeys(("gate", "up"), array(dim, hidden)),
                attn_out=array(heads, dim_head, dim), ff_out=array(hidden, dim))
  table = array(tokens, dim_head // 2, dtype="float32")

  def function(x, params, rotation):
    query, key, value, act, gate, up = mosaic_tpu.in_projection(
        x, params, rotation, norm="layer", eps=1e-5, keep=True, chip=chip)
    y = mosaic_tpu.out_projection(x, query, act, params["attn_out"], params["ff_out"], chip=chip)
    dgate, dup, act = mosaic_tpu.swiglu_gradient(y, gate, up, params["ff_out"], chip=chip)
    return act, mosaic_tpu.input_gradient(query, key, value, dgate, dup, params, chip=chip)

  return function, (array(tokens, dim), params, (table, table))


@pytest.mark.full
def test_compiles_for_a_chip():
  pytest.importorskip("libtpu", reason="the compiler for TPUs is in libtpu")
  report = aot.report(
      "tests.kernels.parallel_block.test_mosaic_tpu:program", target="v5e", chip="v5e",
      tokens=1000, dim=384, heads=3, kv_heads=3, dim_head=64, hidden=640, dtype="bfloat16")
  assert len(report.kernels_named("block_")) == 4 and not report.problems


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chip", chips.TPUS)
@pytest.mark.parametrize("sizes", [
    (8192, 4096, 16, 1, 256, 16_384, "bfloat16"), (2047, 2048, 16, 1, 128, 8192, "bfloat16"),
    (8192, 1024, 16, 1, 64, 4096, "bfloat16"), (33, 512, 8, 1, 64, 2048, "bfloat16"),
    (4096, 8192, 8, 1, 256, 8192, "bfloat16"), (3000, 1024, 4, 1, 256, 5504, "float32"),
    (8192, 4096, 32, 8, 128, 14_336, "bfloat16"), (1000, 8192, 64, 64, 128, 22_528, "bfloat16")])
def test_compiles_within_the_vmem_that_is_counted(chip, sizes):
  names = ("tokens", "dim", "heads", "kv_heads", "dim_head", "hidden", "dtype")
  aot.report("tests.kernels.parallel_block.test_mosaic_tpu:program", target=chip, chip=chip,
             **dict(zip(names, sizes, strict=True)))


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@settings(max_examples=300)
@given(case=cases(max_tokens=300), blocks=st.sampled_from(BLOCKS), stepped=st.booleans())
def test_right_on_many_drawn_cases(case, blocks, stepped):
  with pytest.MonkeyPatch.context() as patch:
    if stepped:
      patch.setattr(mosaic_tpu_plan, "depths_of", one_step)
    check(case, blocks)
