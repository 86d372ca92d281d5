"""The parallel block's Hopper kernels: in the interpreter with races found, compiled for h200."""

import contextlib
import dataclasses
import functools
import inspect
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import AxisType, PartitionSpec as P

from palm_haiku.kernels import parallel_attention_ffn, tuning
from palm_haiku.kernels.parallel_block import (
    mosaic_gpu, mosaic_gpu_backward, mosaic_gpu_product)
from tests.kernels import hopper
from tests.kernels.parallel_block import contract
from tests.kernels.parallel_block.contract import Case

FUNCTIONS = ("in_projection", "out_projection", "swiglu_gradient", "input_gradient")


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the tiles are cut and walked; small ones make many of few numbers."""

  columns: int = 128
  stages: int = 2
  together: bool = True
  processors: int = 4  # that the tiles are dealt to
  side_by_side: int = 2  # rows of tiles that are walked together


TABLE = Plan(256, 4, True, 132, tuning.TOGETHER)


@contextlib.contextmanager
def planned(plan):
  config = tuning.ParallelBlockMosaicGpu(plan.columns, plan.stages, plan.together)
  with mock.patch.multiple(
      tuning, parallel_block_mosaic_gpu=lambda *_: config, HOPPER_PROCESSORS=plan.processors,
      TOGETHER=plan.side_by_side):
    yield


def program(case, plan=Plan(), backend=mosaic_gpu, of=FUNCTIONS):
  """A jitted function of a case's inputs."""
  def run(arrays):
    with planned(plan):
      return contract.run(backend, case, arrays, of=of)
  return jax.jit(run)


def verify(case, *args, compiled=None, **keywords):
  compiled = compiled or program(case, *args, **keywords)
  arrays = contract.inputs(case)
  with hopper.interpret():
    results = jax.block_until_ready(compiled(arrays))
  contract.check(case, arrays, results)
  return results


SIZES = (64, 128, 192, 320)
plans = st.builds(
    Plan, columns=st.sampled_from([128, 256]), stages=st.integers(2, 4), together=st.booleans(),
    processors=st.sampled_from([2, 4, 132]), side_by_side=st.sampled_from([2, 16]))


def fitting(plan, case):
  """A tile holds a whole head."""
  return dataclasses.replace(plan, columns=max(plan.columns, case.dim_head))


@pytest.mark.timeout(900)
@settings(max_examples=3, phases=contract.PHASES)
@given(contract.cases(dims=SIZES[:3], hiddens=SIZES[:3], dim_heads=(64, 128, 256), max_heads=2),
       plans)
def test_drawn_cases(case, plan):
  verify(case, fitting(plan, case))


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@settings(max_examples=150, phases=contract.PHASES, derandomize=False,
          suppress_health_check=list(HealthCheck))
@given(contract.cases(dims=SIZES, hiddens=SIZES, dim_heads=(64, 128, 256), max_tokens=400,
                      max_heads=5),
       plans | st.just(TABLE))
def test_fuzz(case, plan):
  verify(case, fitting(plan, case))
  jax.clear_caches()


# Three rows of tiles, of which a pair has one too many; columns that no tile divides.
ODD = Case(tokens=259, dim=64, heads=1, dim_head=64, hidden=192, mean=30.0)


@pytest.mark.parametrize("case, plan", [
    (Case(tokens=1, dim=64, heads=1, hidden=64, value=False, with_x=False), TABLE),
    (ODD, Plan(stages=3)),
], ids=str)
def test_edges(case, plan):
  verify(case, plan)


def test_the_same_inputs_give_the_same_bits():
  case = Case(tokens=130, dim=64, heads=1, hidden=64)
  compiled = program(case)
  jax.tree.map(np.testing.assert_array_equal, *(verify(case, compiled=compiled) for _ in range(2)))


def test_results_vary_over_the_mesh_as_what_they_are_made_of():
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  case = Case(tokens=8, heads=2)
  arrays = contract.inputs(case)
  by_token, by_column, by_row = P("data"), P(None, "model"), P("model")
  weights = {name: by_column if name in ("query", "gate", "up") else P()
             for name in arrays["weights"]}
  both = P("data", "model")
  specs = dict(x=by_token, weights=weights, rotation=(by_token, by_token), attended=both, act=both,
               attn_out=by_row, ff_out=by_row, dy=by_token, gate=both, up=both, dquery=both,
               dkey=by_token, dvalue=by_token, dgate=both, dup=both)

  def f(arrays):
    results = contract.run(mosaic_gpu, case, arrays)
    assert all(jax.typeof(a).manual_axis_type.varying == {"data", "model"}
               for a in results.values())
    return {name: jax.lax.psum(a, "model") for name, a in results.items()}

  with hopper.interpret():
    out = jax.eval_shape(
        jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=by_token), arrays)
  assert out["dh"].shape == arrays["x"].shape


@pytest.mark.slow
def test_gradients_through_the_op():
  arrays = contract.inputs(Case(tokens=20, dim=64, hidden=128, dim_head=64))
  params = arrays["weights"] | {name: arrays[name] for name in ("attn_out", "ff_out")}

  def gradients(implementation):
    def loss(x, params):
      y = parallel_attention_ffn(x, params, implementation=implementation)
      return jnp.vdot(y.astype(jnp.float32), arrays["dy"].astype(jnp.float32))
    return jax.grad(loss, (0, 1))(arrays["x"], params)

  with hopper.interpret():
    got = jax.block_until_ready(gradients("mosaic_gpu"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients("xla")), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32),
                               atol=0.03 * float(jnp.abs(b).max()))


# Mutants: each of these changes of the kernels must be noticed. ---------------------------------

MUTANTS = {  # by what it is: the module, a function that it spoils, what is replaced by what
    "the residual is missing": (mosaic_gpu, "out_projection", "value += product.take",
                                "value += 0 * product.take"),
    "the residual of the tile beside": (
        mosaic_gpu, "out_projection",
        "pl.ds(column * columns + i * STORE, STORE)],\n          ring",
        "pl.ds((1 - column) * columns + i * STORE, STORE)],\n          ring"),
    "the residual of the other 64 rows": (mosaic_gpu, "out_projection", "row * ROWS + half,",
                                          "row * ROWS + 64 - half,"),
    "one product less": (mosaic_gpu, "out_projection",
                         "depth = sum(steps for steps, _ in parts)",
                         "depth = sum(steps for steps, _ in parts) - 1; parts[1] = ("
                         "parts[1][0] - 1, parts[1][1])"),
    "statistics of the wrong rows": (mosaic_gpu, "in_projection", "xla.normalize(x,",
                                     "xla.normalize(jnp.roll(x, 1, 0),"),
    "gate and up exchanged": (mosaic_gpu, "in_projection", "enumerate((gate_ref, up_ref))",
                              "enumerate((up_ref, gate_ref))"),
    "the value is rotated": (
        mosaic_gpu, "in_projection", "block < heads[-1][0])", "block <= heads[-1][0])",
        "block >= heads[-1][0])", "block > heads[-1][0])"),
    "rotated the other way": (mosaic_gpu, "in_projection", "first * cos - second * sin",
                              "first * cos + second * sin"),
    "the rotation of other rows": (mosaic_gpu, "in_projection", "table.at[rows, pl.ds(channel",
                                   "table.at[pl.ds(0, 64), pl.ds(channel"),
    "gate's derivative is that of a sigmoid": (
        mosaic_gpu_backward, "swiglu_gradient", "s + silu * (1 - s)", "s * (1 - s)"),
    "the value's gradient is left out": (mosaic_gpu_backward, "input_gradient",
                                         "(dvalue, params.get(\"value\"))",
                                         "(None, None)"),
    "a slot is read before it is full": (
        mosaic_gpu_product, "out_projection", "plgpu.barrier_wait(self.ready.at[slot])", "pass"),
    "a slot is refilled while it is read": (
        mosaic_gpu_product, "out_projection", "plgpu.barrier_wait(ring.free.at[slot])", "pass"),
    "what an epilogue reads is refilled": (
        mosaic_gpu_product, "swiglu_gradient",
        "plgpu.commit_smem()  # all has been read before the next copy writes there", "pass"),
    "a result is copied before it is written": (
        mosaic_gpu_product, "out_projection",
        "slot[...] = value.astype(slot.dtype)\n  plgpu.commit_smem()",
        "slot[...] = value.astype(slot.dtype)"),
    "a result is overwritten before it is copied": (
        mosaic_gpu_product, "in_projection",
        "plgpu.wait_smem_to_gmem(min(i, 1), wait_read_only=True)", "pass"),
    "the last tile's products stay in the accumulator": (
        mosaic_gpu_product, "input_gradient", "CHUNK = 64", "CHUNK, STALE = 64, []",
        "each_tile(compute)\n", "pl.run_scoped(lambda *sums: STALE.append(sums) or each_tile("
        "compute), plgpu.ACC((64, 128), jnp.float32))\n",
        "pl.run_scoped(multiply, *[\n      plgpu.ACC((WARPGROUP_ROWS, b.shape[1]), jnp.float32) "
        "for b in operands(0)])", "multiply(*STALE[-1])"),
    "both blocks of a pair take the same rows": (
        mosaic_gpu_product, "input_gradient", "lax.axis_index(\"pair\") if ring.together",
        "0 if ring.together"),
}
QUICK = ("the residual is missing", "statistics of the wrong rows", "gate and up exchanged",
         "the value is rotated", "a slot is read before it is full",
         "a slot is refilled while it is read", "what an epilogue reads is refilled",
         "the last tile's products stay in the accumulator")
SMALL = Case(tokens=150, dim=256, heads=1, hidden=256)


def mutant(module, *changes):
  """`mosaic_gpu` with some text of one of its modules replaced by other text, in turns."""
  def copy(source, **names):
    made = types.ModuleType("mutant")
    made.__package__ = mosaic_gpu.__package__
    text = inspect.getsource(source)
    for old, new in zip(changes[::2], changes[1::2]) if source is module else ():
      assert old in text, old
      text = text.replace(old, new)
    exec(compile(text, "mutant", "exec"), made.__dict__)
    made.__dict__.update(names)
    return made

  product = copy(mosaic_gpu_product)
  backward = copy(mosaic_gpu_backward, product=product)
  return copy(mosaic_gpu, product=product, swiglu_gradient=backward.swiglu_gradient,
              input_gradient=backward.input_gradient)


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS])
def test_a_planted_mistake_is_noticed(name):
  module, function, *changes = MUTANTS[name]
  wrong = mutant(module, *changes)
  with pytest.raises((AssertionError, jax.errors.JaxRuntimeError)):
    verify(SMALL, Plan(processors=2), wrong, of=(function,))


def test_without_a_mistake():
  verify(SMALL, Plan(processors=2), mutant(mosaic_gpu_product, "STORE", "STORE"))


# What is refused, and which tiles are taken. -----------------------------------------------------


@pytest.mark.parametrize("changes, chip, message", [
    (dict(), "h100", None), (dict(dtype="float16", dim=64, hidden=1536, dim_head=256), None, None),
    (dict(dim=80), "h200", "dim a multiple of 64; got 80"),
    (dict(hidden=100), "h200", "a hidden width that is a multiple of 64; got 100"),
    (dict(dim_head=80), "h200", "dim_head in {64, 128, 256}; got 80"),
    (dict(dtype="float32"), "h200", "bfloat16 or float16; got float32"),
    (dict(), "b200", "a Hopper GPU (h100, h200); got b200"),
])
def test_requirements_are_named(changes, chip, message):
  arrays = contract.inputs(Case(**changes))
  assert mosaic_gpu.unsupported(arrays["x"], arrays["weights"], chip=chip) == message


@pytest.mark.parametrize("rows, width, columns", [
    (128, 4096, 256), (128, 512, 256), (16, 512, 128), (16, 4096, 256), (1, 4096, 128)])
def test_narrow_tiles_where_wide_ones_leave_the_chip_empty(rows, width, columns):
  config = tuning.parallel_block_mosaic_gpu("h200", rows, lambda columns: -(-width // columns))
  assert config.columns == columns
  assert tuning.parallel_block_mosaic_gpu(
      None, rows, lambda columns: columns // 256).columns == 256


# Compiled for a chip that is not here, and run on one that is. ----------------------------------


def aot_program(of=FUNCTIONS, **options):
  """(the functions, the types of their arguments)."""
  case = Case(**options)
  arrays = jax.eval_shape(lambda: abstract(case))
  return functools.partial(contract.run, mosaic_gpu, case, chip="h200", of=of), (arrays,)


def abstract(case):
  """`contract.inputs` without the numbers."""
  with mock.patch.object(contract.np.random, "default_rng", lambda _: Zeros()):
    return contract.inputs(case)


class Zeros:
  """Draws zeros, which JAX does not allocate when it traces."""

  def normal(self, size):
    return jnp.zeros(size)

  def uniform(self, low, high, size):
    return jnp.zeros(size)

  integers = uniform


def matmul(tile_m, tile_n, wg):
  """JAX's product of the same shape for Hopper, with tiles of a warpgroup."""
  from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as peer
  axes = peer.MatmulDimension
  config = peer.TuningConfig(tile_m, tile_n, 64, 4, grid_minor_dim=axes.M, grid_tile_width=8,
                             wg_dimension=axes[wg], cluster_dimension=axes.M)
  array = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
  return functools.partial(peer.matmul, c=None, config=config), (array, array)


def compiled(function, **options):
  aot = pytest.importorskip("palm_haiku.kernels.aot", reason="compiles ahead of time")
  report = aot.report(
      f"tests.kernels.parallel_block.test_mosaic_gpu:{function}", target="h200", **options)
  return report, {kernel.name.rpartition("_")[0]: kernel for kernel in report.kernels
                  if kernel.source == "mosaic_gpu"}


def compiles_well(**options):
  report, kernels = compiled("aot_program", **options)
  assert set(kernels) == set(options.get("of", FUNCTIONS)) and not report.problems, report.problems
  return report, {name: kernel.code.main_loop for name, kernel in kernels.items()}


WIDE = dict(tokens=16_384, dim=4096, heads=16, dim_head=256, hidden=16_384)


def test_main_loops_are_as_short_as_those_of_a_plain_product():
  """Without spills, products that wait for each other, or memory but for norm(x)."""
  report, loops = compiles_well(**WIDE)
  assert report.memory["temp"] < 2 * WIDE["tokens"] * WIDE["dim"] + 2**20
  for names, tile in ((("in_projection",), dict(tile_m=128, tile_n=128, wg="N")),
                      (FUNCTIONS[1:], dict(tile_m=64, tile_n=256, wg="M"))):
    peer = compiled("matmul", **tile)[1]["anonymous"].code.main_loop
    for name in names:
      assert loops[name].mix["HGMMA"] == peer.mix["HGMMA"], (loops[name], peer)
      assert loops[name].instructions <= 1.1 * peer.instructions, (loops[name], peer)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [
    dict(keep=False), dict(value=False, rotated=False, norm="rms"), dict(value=False, keep=False),
    dict(rotated=False, with_x=False), dict(tokens=1, heads=1)], ids=str)
@pytest.mark.parametrize("sizes", [
    dict(tokens=2048, dim=512, heads=8, dim_head=64, hidden=2048),
    dict(tokens=131, dim=2048, heads=3, dim_head=128, hidden=1536),
    dict(tokens=1001, dim=8192, heads=1, dim_head=256, hidden=448)], ids=str)
def test_every_variant_compiles_soundly(sizes, options, dtype):
  compiles_well(**sizes | options | dict(dtype=dtype))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the kernels on a Hopper GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [
    dict(tokens=2049, dim=1024, heads=5, dim_head=64, hidden=4096),
    dict(tokens=777, dim=512, heads=2, dim_head=256, hidden=1536, value=False, mean=30.0),
    dict(tokens=1, dim=2048, heads=3, dim_head=128, hidden=192, keep=False)], ids=str)
def test_on_a_gpu(options, dtype):
  case = Case(**options | dict(dtype=dtype))
  arrays = contract.inputs(case)
  run = jax.jit(functools.partial(contract.run, mosaic_gpu, case))
  results = run(arrays)
  contract.check(case, arrays, results)
  jax.tree.map(np.testing.assert_array_equal, results, run(arrays))
