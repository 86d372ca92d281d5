"""The Hopper cross-entropy kernels: in the interpreter with races found, and compiled for h200."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec as P

from palm_haiku.kernels import interpret, linear_cross_entropy
from palm_haiku.kernels.core import tile_order
from palm_haiku.kernels.cross_entropy import configs, mosaic_gpu
from palm_haiku.kernels.hopper import product, softmax
from tests.kernels import draws
from tests.kernels.cross_entropy import contract
from tests.kernels.cross_entropy.contract import Case
from tests.mutants import DROPPED, Mistake, planted


@dataclasses.dataclass(frozen=True)
class Plan:
  """The cut and the walk of the tiles; small ones make many of few numbers."""

  columns: int = 64
  stages: int = 2
  walk: int = 2
  together: int = 1


@functools.lru_cache(maxsize=4)
def compiled(case, plan, of):
  """A jitted function of the inputs of all cases that share this program."""
  config = configs.HopperConfig(plan.columns, plan.stages)

  def kernels(arrays):
    with mock.patch.multiple(tile_order, walk=lambda *_: plan.walk, TOGETHER=plan.together):
      return contract.run(mosaic_gpu, case, arrays, of=of, chip=None, config=config)

  return jax.jit(kernels)


def run(case, plan=Plan(), of=("log_z", "g")):
  """The kernels' results on a case."""
  with interpret(detect_races=True):
    return jax.block_until_ready(compiled(case.program, plan, of)(contract.inputs(case)))


def verify(case, *args, **keywords):
  contract.check(case, run(case, *args, **keywords))


def verify_variants(case, plan, data, number):
  """One program on several inputs: its compilation takes seconds, a run tenths of one."""
  for variant in contract.variants(case, data.draw, number):
    verify(variant, plan)


ODD = Case(num_tokens=131, vocabulary=301, dim=192, num_valid=290, first=7, targets="ends")
TABLE = Plan(256, 4, 2, 16)  # the tiles of the table

plans = st.builds(
    Plan, columns=st.sampled_from([64, 128]), stages=st.integers(2, 4), walk=st.integers(1, 3),
    together=st.integers(1, 2))


drawn = given(contract.cases(max_tokens=150, max_vocabulary=200), plans, st.data())


@settings(max_examples=2)
@drawn
def test_drawn_cases(case, plan, data):
  verify_variants(case, plan, data, 3)


@pytest.mark.full
@settings(max_examples=2)
@drawn
def test_more_drawn_cases(case, plan, data):
  verify_variants(case, plan, data, 6)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@settings(max_examples=50, derandomize=False,
          suppress_health_check=list(HealthCheck))
@given(contract.cases(max_tokens=300, max_vocabulary=700),
       plans | st.just(TABLE), st.data())
def test_fuzz(case, plan, data):
  """50 programs, 4 inputs for each: 200 cases."""
  verify_variants(case, plan, data, 4)
  jax.clear_caches()


@pytest.mark.full
@pytest.mark.parametrize("case, plan", [
    (Case(num_tokens=1, vocabulary=1), Plan()),
    (ODD, TABLE),
    (dataclasses.replace(ODD, num_valid=0, traced=True, dtype="float16"), Plan()),
    (Case(vocabulary=130, scale=0.0), Plan()),
], ids=str)
def test_edges(case, plan):
  verify(case, plan)


@pytest.mark.full
def test_same_bits_every_time():
  jax.tree.map(np.testing.assert_array_equal, *(
      run(MISTAKEN_CASE, MISTAKEN_PLAN) for _ in range(2)))


def total(x, embedding, targets, implementation):
  loss, log_z = linear_cross_entropy(
      x, embedding, targets, z_loss=1e-2, scale=0.1, implementation=implementation)
  return (loss * jnp.cos(jnp.arange(loss.size).reshape(loss.shape))).sum() + log_z.sum()


@pytest.mark.full
def test_through_the_op_under_vmap():
  x, embedding = (draws.normal(i, shape, jnp.bfloat16)
                  for i, shape in enumerate([(2, 9, 64), (70, 64)]))
  targets = draws.integers(2, (2, 9), 0, 70)
  gradients = lambda name: jax.jit(jax.vmap(
      jax.value_and_grad(functools.partial(total, implementation=name), (0, 1)), (0, None, 0)))(
          x, embedding, targets)
  with interpret(detect_races=True):
    got = jax.block_until_ready(gradients("mosaic_gpu"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients("xla")), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32),
                               rtol=0.03, atol=0.03)


@pytest.mark.parametrize("axes", [("data", "model"), ("data", "other")])
def test_gradients_are_typed_under_a_mesh(axes):
  """Tokens over one axis, vocabulary over another: shard_map takes what the kernels return."""
  mesh = jax.make_mesh((2, 2), axes)
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  x = place(jnp.ones((4, 10, 64), jnp.bfloat16), "data")
  embedding = place(jnp.ones((33, 64), jnp.bfloat16))
  targets = place(jnp.zeros((4, 10), jnp.int32), "data")
  with interpret(detect_races=True), jax.set_mesh(mesh):
    grads = jax.eval_shape(
        jax.grad(functools.partial(total, implementation="mosaic_gpu"), (0, 1)),
        x, embedding, targets)
  assert [grad.shape for grad in grads] == [x.shape, embedding.shape]


# Planted mistakes: each of these changes of the kernels must be noticed. ------------------------


MISTAKES = {  # the result that each spoils, and the mistake
    "one column too many in the sum": (
        "log_z", Mistake("valid columns", "- column0", "- column0 + 1")),
    "one column too few in the gradient": (
        "g", Mistake("valid columns", "- column0", "- column0 - 1")),
    "a slot is read before it is full": ("log_z", Mistake("full", *DROPPED)),
    "a whole block without its guard": (
        "log_z", Mistake("full blocks", r"bounds_ref\[0\]", "bounds_ref[0] + columns")),
    "the logit beside the target's": (
        "log_z", Mistake("target's logit", "- column0", "- column0 + 1")),
    "the column beside the target": ("g", Mistake("target", "- column0", "- column0 + 1")),
    "the sum stays relative to an old maximum": (
        "log_z", Mistake("running sum", r" \* across\(.*?\)", "")),
    "a result is copied before it is written": ("log_z", Mistake("written", *DROPPED)),
    "a result is overwritten before it is copied": ("g", Mistake("copied", *DROPPED)),
}
MISTAKEN_CASE, MISTAKEN_PLAN = Case(num_tokens=20, vocabulary=150, dim=128, num_valid=145), Plan(
    walk=3)


@functools.cache
def check_unmutated():
  verify(MISTAKEN_CASE, MISTAKEN_PLAN)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.full if i else ()) for i, name in enumerate(MISTAKES)])
def test_a_planted_mistake_is_noticed(name):
  result, mistake = MISTAKES[name]
  check_unmutated()
  module = {"running sum": softmax, "full": product}.get(mistake.place, mosaic_gpu)
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
    with planted(module, mistake):
      results = run(MISTAKEN_CASE, MISTAKEN_PLAN, of=(result,))
    contract.check(MISTAKEN_CASE, results)


@pytest.mark.full
def test_a_slot_that_is_refilled_in_use_is_noticed(monkeypatch):
  """The first wait that is traced is that of the copies for a slot to be free."""
  wait, calls = plgpu.barrier_wait, []
  monkeypatch.setattr(
      plgpu, "barrier_wait", lambda *args: calls.append(args) or len(calls) == 1 or wait(*args))
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
    verify(Case(vocabulary=150, dim=128), of=("log_z",))
  compiled.cache_clear()


# Refusals. --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim, dtype, chip, message", [
    (128, "bfloat16", "h100", None), (64, "float16", None, None),
    (80, "bfloat16", "h200", "a last dimension that is a multiple of 64; got 80"),
    (64, "float32", "h200", "bfloat16 or float16; got float32"),
    (64, "bfloat16", "b200", "a Hopper GPU (h100, h200); got b200"),
])
def test_requirements_are_named(dim, dtype, chip, message):
  x, embedding = (jax.ShapeDtypeStruct((n, dim), dtype) for n in (9, 70))
  assert mosaic_gpu.unsupported(x, embedding, chip=chip) == message


# Compiled for a chip that is not here. ----------------------------------------------------------


def program(num_tokens, vocabulary, dim, rows):
  """(both kernels, the types of their arguments)."""
  options = dict(scale=dim**-0.5, chip="h200")

  def both(x, embedding, targets, top, spread, peak, num_valid, first):
    block = embedding[:rows]
    return (mosaic_gpu.forward(x, embedding, targets, num_valid=num_valid, **options),
            mosaic_gpu.logit_gradient(x, block, targets, top, spread, peak, first=first,
                                      num_valid=num_valid, **options))

  array, number = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((), jnp.int32)
  matrix = lambda n: array((n, dim), jnp.bfloat16)
  token = lambda dtype: array((num_tokens,), dtype)
  return both, (matrix(num_tokens), matrix(vocabulary), token(jnp.int32),
                *[token(jnp.float32)] * 3, number, number)


# Instructions of the main loop of JAX's hopper_matmul_mgpu for the same tile (64 x 256 x 64, 4
# slots, ptxas 13.0), 4 of them HGMMA.
MATMUL = 60


def compiles_well(num_tokens, vocabulary, dim):
  aot = pytest.importorskip("palm_haiku.kernels.aot", reason="compiles ahead of time")
  rows = min(vocabulary, 8192)
  report = aot.report(program, target="h200", num_tokens=num_tokens, vocabulary=vocabulary, dim=dim,
                      rows=rows)
  kernels = [k for k in report.kernels if k.source == "mosaic_gpu"]
  assert len(kernels) == 2 and not report.problems, report.problems
  copies = rows * dim  # a block of the embedding
  copies += vocabulary * dim * (vocabulary % 8 > 0) + num_tokens * dim * (num_tokens % 8 > 0)
  copies += num_tokens * rows * (rows % 64 > 0)  # g, cut
  assert report.memory["temp"] < 2 * copies + 16 * 2**20
  return [kernel.code.main_loop for kernel in kernels]


@pytest.mark.full
def test_compiles_without_spills_or_serialized_products_in_little_memory():
  for loop in compiles_well(16_384, 256_000, 4096):
    assert loop.mix["HGMMA"] == 4 and loop.instructions <= MATMUL, loop


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens, vocabulary, dim", [
    (5, 300, 640), (129, 50_257, 768), (1001, 999, 8192)])
def test_compiles_at_odd_sizes(num_tokens, vocabulary, dim):
  compiles_well(num_tokens, vocabulary, dim)
