"""The TPU kernels in JAX's TPU interpreter, and compiled ahead of time.

The interpreter looks for races and reads out of bounds, and fills fresh memory with NaN.
"""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings, strategies as st

from palm_haiku.kernels import aot, interpret, linear_cross_entropy
from palm_haiku.kernels.core import chips
from palm_haiku.kernels.cross_entropy import configs, mosaic_tpu
from tests.kernels import draws
from tests.kernels.cross_entropy import contract
from tests.kernels.cross_entropy.contract import Case

# Small enough that little has several blocks, and a block several tiles.
BLOCKS = (
    configs.TpuConfig(tokens=256, rows=256, tile=128, chunk=128, together=3),
    configs.TpuConfig(tokens=128, rows=128, tile=128, chunk=128, together=1),
)


@functools.lru_cache(maxsize=4)
def program(case, blocks):
  """A jitted function of the inputs of all cases that share this program."""
  fixed = lambda name: functools.partial(getattr(mosaic_tpu, name), config=blocks, chip=None)
  backend = types.SimpleNamespace(forward=fixed("forward"), logit_gradient=fixed("logit_gradient"))
  # Every program is a compilation; optimizing it would cost more than it saves.
  return jax.jit(functools.partial(contract.run, backend, case),
                 compiler_options={"xla_backend_optimization_level": 0})


def results(case, blocks=BLOCKS[0], program=program):
  with interpret(detect_races=True):
    return jax.block_until_ready(program(case.program, blocks)(contract.inputs(case)))


def verify_variants(case, blocks, data, number):
  for variant in contract.variants(case, data.draw, number):
    contract.check(variant, results(variant, blocks))


drawn = given(
    case=contract.cases(dims=(64, 128, 192), dtypes=("bfloat16", "float32"), max_tokens=300,
                        max_vocabulary=600),
    blocks=st.sampled_from(BLOCKS), data=st.data())


@settings(max_examples=2)
@drawn
def test_right_on_drawn_cases(case, blocks, data):
  verify_variants(case, blocks, data, 2)


@pytest.mark.full
@settings(max_examples=6)
@drawn
def test_right_on_more_drawn_cases(case, blocks, data):
  verify_variants(case, blocks, data, 2)


def off_by_one(monkeypatch):
  """A mask that shows one row too many."""
  def shifted(f):
    return lambda *args, num_valid, **keywords: f(*args, num_valid=num_valid + 1, **keywords)
  for name in ("forward", "logit_gradient"):
    monkeypatch.setattr(mosaic_tpu, name, shifted(getattr(mosaic_tpu, name)))


def stale_accumulator(monkeypatch):
  monkeypatch.setattr(mosaic_tpu, "clear", lambda *refs: None)


def no_column_guard(monkeypatch):
  everything = lambda f: lambda *args, num_valid, **keywords: f(
      *args, num_valid=2**20, **keywords)
  for name in ("forward", "logit_gradient"):
    monkeypatch.setattr(mosaic_tpu, name, everything(getattr(mosaic_tpu, name)))


def skipped_tile(monkeypatch):
  each_tile = mosaic_tpu.each_tile
  monkeypatch.setattr(mosaic_tpu, "each_tile", lambda plan, *rest: each_tile(
      plan._replace(rows=plan.rows - plan.chunk), *rest))


full = functools.partial(pytest.param, marks=pytest.mark.full)


@pytest.mark.parametrize("mutant, finds", [
    (skipped_tile, {"log_z", "g"}), full(off_by_one, {"log_z", "g"}),
    full(stale_accumulator, {"log_z", "logit"}), full(no_column_guard, {"log_z", "g"})])
def test_a_planted_error_is_found(monkeypatch, mutant, finds):
  case = Case(num_tokens=140, vocabulary=300, num_valid=270, dtype="float32", targets="ends")
  mutant(monkeypatch)
  wrong = results(case, program=program.__wrapped__)
  assert contract.errors(case, wrong).keys() >= finds


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_through_the_op_over_a_mesh_that_the_vocabulary_does_not_divide(dtype):
  x = draws.normal(0, (4, 9, 40), dtype)
  embedding = draws.normal(1, (131, 40))
  targets = draws.integers(2, (4, 9), 0, 131)
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def gradients(implementation):
    def total(x, embedding):
      loss, log_z = linear_cross_entropy(x, embedding, targets, z_loss=1e-2, scale=0.2,
                                         implementation=implementation)
      return (loss * jnp.cos(jnp.arange(36.0)).reshape(4, 9)).sum() + log_z.sum()
    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(x, embedding)

  want = gradients("xla")
  with jax.set_mesh(mesh), interpret():
    got = jax.block_until_ready(gradients("mosaic_tpu"))
  tolerance = 1e-5 if dtype == "float32" else 2e-2
  chex.assert_trees_all_close(got, want, atol=tolerance, rtol=tolerance)


def test_what_it_cannot_take_is_named():
  array = lambda *shape, dtype="bfloat16": jax.ShapeDtypeStruct(shape, dtype)
  ask = lambda chip, dim, dtype="bfloat16": mosaic_tpu.unsupported(
      array(4096, dim, dtype=dtype), array(256_000, dim), chip=chip)
  assert "bfloat16 or float32" in ask(None, 512, "float16")
  assert "one of the chips v4" in ask("v9", 512)
  assert "within the 16 MiB of VMEM of a v4" in ask("v4", 18_432)
  for chip in chips.TPUS:
    assert ask(chip, 4096) is None
    assert chip == "v4" or ask(chip, 18_432) is None


@pytest.mark.full
def test_compiles_for_a_chip_with_no_logits_in_memory():
  pytest.importorskip("libtpu", reason="the compiler for TPUs is in libtpu")
  report = aot.report(
      "benchmarks.static.loss:program", target="v5e", tokens=1100, dim=320, vocabulary=20_011,
      embedding="float32", gradient=True, implementation="auto", square=(1100, 20_011))
  assert len(report.kernels_named("cross_entropy")) >= 3  # forward, gradient, each in two sizes
  assert not report.problems and not report.loops
  assert report.memory["temp"] < 1100 * 20_011 * 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("chip", chips.TPUS)
@pytest.mark.parametrize("dim, dtype", [
    (512, "bfloat16"), (4096, "bfloat16"), (8192, "bfloat16"), (1000, "float32")])
def test_compiles_within_the_vmem_that_is_counted(chip, dim, dtype):
  def both(x, embedding, targets):
    f = lambda x, embedding: linear_cross_entropy(
        x, embedding, targets, implementation="mosaic_tpu")[0].sum()
    return jax.grad(f, argnums=(0, 1))(x, embedding)

  array = jax.ShapeDtypeStruct
  aot.compile(both, array((2100, dim), dtype), array((9_001, dim), dtype),
              array((2100,), "int32"), target=chip)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@settings(max_examples=300)
@drawn
def test_right_on_many_drawn_cases(case, blocks, data):
  verify_variants(case, blocks, data, 1)
