"""The parallel block's Hopper kernels: in the interpreter with races found, compiled for h200."""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from jax.sharding import AxisType, PartitionSpec as P

from palm_haiku.kernels import interpret, parallel_attention_ffn
from palm_haiku.kernels.core import chips, tile_order
from palm_haiku.kernels.hopper import product
from palm_haiku.kernels.parallel_block import configs, mosaic_gpu, mosaic_gpu_backward
from tests.kernels.parallel_block import contract
from tests.kernels.parallel_block.contract import Case
from tests.mutants import DROPPED, Mistake, planted

FUNCTIONS = ("in_projection", "out_projection", "swiglu_gradient", "input_gradient")


@dataclasses.dataclass(frozen=True)
class Plan:
  """The cut and the walk of the tiles; small ones make many of few numbers."""

  columns: int = 128
  stages: int = 2
  together: bool = True
  processors: int = 4  # that the tiles are dealt to
  side_by_side: int = 2  # rows of tiles that are walked together


TABLE = Plan(256, 4, True, 132, tile_order.TOGETHER)


@contextlib.contextmanager
def planned(plan):
  config = configs.HopperConfig(plan.columns, plan.stages, plan.together)
  chip = dataclasses.replace(chips.GPUS["h200"], multiprocessors=plan.processors)
  with mock.patch.dict(chips.GPUS, h200=chip), mock.patch.object(
      configs, "mosaic_gpu", lambda *_: (config,)), mock.patch.object(
          tile_order, "TOGETHER", plan.side_by_side):
    yield


@functools.lru_cache(maxsize=4)
def jitted(case, plan, of):
  """A function of the inputs of all cases that share this program."""
  def kernels(arrays):
    with planned(plan):
      return contract.run(mosaic_gpu, case, arrays, of=of)

  return jax.jit(kernels)


def run(case, plan=Plan(), of=FUNCTIONS):
  """The kernels' results on a case."""
  with interpret(detect_races=True):
    return jax.block_until_ready(jitted(case.program, plan, of)(contract.inputs(case)))


def verify(case, *args, **keywords):
  contract.check(case, run(case, *args, **keywords))


SIZES = (64, 128, 192, 320)
plans = st.builds(
    Plan, columns=st.sampled_from([128, 256]), stages=st.integers(2, 4), together=st.booleans(),
    processors=st.sampled_from([2, 4, 132]), side_by_side=st.sampled_from([2, 16]))


def fitting(plan, case):
  """A tile holds a whole head."""
  return dataclasses.replace(plan, columns=max(plan.columns, case.dim_head))


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@settings(max_examples=150, derandomize=False,
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
    (ODD, Plan(stages=3)),
    pytest.param(Case(tokens=1, dim=64, heads=1, dim_head=64, hidden=64, value=False, with_x=False),
                 TABLE, marks=pytest.mark.full),
    # Keys that end within a block of columns.
    pytest.param(Case(tokens=130, dim=64, heads=6, kv_heads=3, dim_head=64, hidden=64),
                 Plan(256), marks=pytest.mark.full),
    # One block at a time.
    pytest.param(Case(tokens=124, dim=192, hidden=128, norm="rms", value=False, spread=10.0),
                 Plan(stages=3, together=False, processors=2, side_by_side=16),
                 marks=pytest.mark.full),
    pytest.param(Case(tokens=8, dim=64, heads=1, dim_head=256, hidden=64, norm="rms", value=False,
                      rotated=False, keep=False, mean=30.0, spread=10.0),
                 Plan(256, together=False, processors=2), marks=pytest.mark.full),
], ids=str)
def test_edges(case, plan):
  verify(case, plan)


@pytest.mark.full
def test_the_same_inputs_give_the_same_bits():
  jax.tree.map(np.testing.assert_array_equal, *(run(ODD, Plan(stages=3)) for _ in range(2)))


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

  with interpret(detect_races=True):
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

  with interpret(detect_races=True):
    got = jax.block_until_ready(gradients("mosaic_gpu"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(gradients("xla")), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32),
                               atol=0.03 * float(jnp.abs(b).max()))


# Planted mistakes: each of these changes of the kernels must be noticed. ------------------------


def one_accumulator(statement):
  """Of all tiles, where each has its own."""
  if "multiply" in statement[0]:
    return "sums = multiply(*accumulate.kept)"
  return ("pl.run_scoped(lambda *sums: setattr(accumulate, 'kept', sums) or each_tile(compute),"
          " plgpu.ACC((64, 128), jnp.float32))")


MISTAKES = {  # the module, a function that it spoils, the mistake
    "the residual is missing": (
        mosaic_gpu, "out_projection", Mistake("residual", r"\+=", "+= 0 *")),
    "the residual of the tile beside": (
        mosaic_gpu, "out_projection", Mistake("residual's place", r"column \*", "(1 - column) *")),
    "the residual of the other 64 rows": (
        mosaic_gpu, "out_projection", Mistake("residual's place", r"\+ half", "+ 64 - half")),
    "one product less": (mosaic_gpu, "out_projection", Mistake(
        "products", "$", " - 1\nparts[1] = (parts[1][0] - 1, parts[1][1])")),
    "statistics of the wrong rows": (mosaic_gpu, "in_projection", Mistake(
        "statistics", r"normalize\(x,", "normalize(jnp.roll(x, 1, 0),")),
    "gate and up exchanged": (mosaic_gpu, "in_projection", Mistake(
        "gate and up", r"\(gate_ref, up_ref\)", "(up_ref, gate_ref)")),
    "the value is rotated": (mosaic_gpu, "in_projection", Mistake(
        "rotated columns", "<|>=", lambda sign: {"<": "<=", ">=": ">"}[sign[0]])),
    "rotated the other way": (
        mosaic_gpu, "in_projection", Mistake("rotation", "-", "+")),
    "the rotation of other rows": (
        mosaic_gpu, "in_projection", Mistake("angles", r"\[rows,", "[pl.ds(0, 64),")),
    "gate's derivative is that of a sigmoid": (
        mosaic_gpu_backward, "swiglu_gradient", Mistake("gate's gradient", r"s \+ silu", "s")),
    "the value's gradient is left out": (mosaic_gpu_backward, "input_gradient", Mistake(
        "terms", r"\(dvalue, .*?\)\)", "(None, None)")),
    "a slot is read before it is full": (
        product, "out_projection", Mistake("full", *DROPPED)),
    "a slot is refilled while it is read": (
        product, "out_projection", Mistake("free", *DROPPED)),
    "what an epilogue reads is refilled": (
        product, "swiglu_gradient", Mistake("taken", *DROPPED)),
    "a result is copied before it is written": (
        product, "out_projection", Mistake("written", *DROPPED)),
    "a result is overwritten before it is copied": (
        product, "in_projection", Mistake("copied", *DROPPED)),
    "the last tile's products stay in the accumulator": (
        product, "input_gradient", Mistake("accumulator", "(?s).+", one_accumulator)),
    "both blocks of a pair take the same rows": (
        product, "input_gradient", Mistake("pair", r"lax.axis_index\('pair'\)", "0")),
}
MISTAKEN = Case(tokens=150, dim=256, heads=1, hidden=256), Plan(processors=2)


@functools.cache
def check_unmutated(of):
  verify(*MISTAKEN, of=of)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.full if i else ()) for i, name in enumerate(MISTAKES)])
def test_a_planted_mistake_is_noticed(name):
  module, function, mistake = MISTAKES[name]
  check_unmutated((function,))
  with (planted(module, mistake),
        pytest.raises((AssertionError, jax.errors.JaxRuntimeError))):
    verify(*MISTAKEN, of=(function,))


# Refusals, and the choice of tiles. ---------------------------------------------------------------


@pytest.mark.parametrize("changes, chip, message", [
    (dict(), "h100", None), (dict(dtype="float16", dim=64, hidden=1536, dim_head=256), None, None),
    (dict(dim=80), "h200", "dim a multiple of 64; got 80"),
    (dict(hidden=100, heads=6, kv_heads=3), "h200", None),
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
  fastest = functools.partial(product.fastest, configs.mosaic_gpu("h200"), rows, processors=132)
  assert fastest(lambda columns: -(-width // columns)).columns == columns
  assert fastest(lambda columns: columns // 256).columns == 256


# Compiled for a chip that is not here, and run on one that is. ----------------------------------


def aot_program(of=FUNCTIONS, **options):
  """(the functions, the types of their arguments)."""
  case = Case(**options)
  return functools.partial(contract.run, mosaic_gpu, case, chip="h200", of=of), (shapes(case),)


def shapes(case):
  """Those of `contract.inputs`."""
  m, d, h, dh, f = case.tokens, case.dim, case.heads, case.dim_head, case.hidden
  array = lambda *shape, dtype=case.dtype: jax.ShapeDtypeStruct(shape, dtype)
  kv = case.kv_heads * dh
  table, tokens, hidden, heads, head = (
      array(m, dh // 2, dtype="float32"), array(m, d), array(m, f), array(m, h, dh), array(m, kv))
  weights = dict(norm=array(d, dtype="float32"), query=array(d, h, dh), key=array(d, kv),
                 value=array(d, kv), gate=array(d, f), up=array(d, f))
  if not case.value:
    del weights["value"]
  return dict(
      x=tokens, weights=weights, rotation=(table, table) if case.rotated else None, attended=heads,
      act=hidden, attn_out=array(h, dh, d), ff_out=array(f, d), dy=tokens, gate=hidden, up=hidden,
      dquery=heads, dkey=head, dvalue=head if case.value else None, dgate=hidden, dup=hidden)


def matmuls(**tiles):
  """JAX's product of the same shape for Hopper: with each of the tiles of a warpgroup, in turn."""
  from jax.experimental.pallas.ops.gpu import hopper_matmul_mgpu as peer
  axes = peer.MatmulDimension

  def all_of_them(a, b):
    for tile_m, tile_n, wg in tiles.values():
      a = peer.matmul(a, b, c=None, config=peer.TuningConfig(
          tile_m, tile_n, 64, 4, grid_minor_dim=axes.M, grid_tile_width=8, wg_dimension=axes[wg],
          cluster_dimension=axes.M))
    return a

  array = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
  return all_of_them, (array, array)


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


@pytest.mark.full
def test_main_loops_are_as_short_as_those_of_a_plain_product():
  """Without spills, products that wait for each other, or memory but for norm(x)."""
  report, loops = compiles_well(**WIDE)
  assert report.memory["temp"] < 2 * WIDE["tokens"] * WIDE["dim"] + 2**20
  peers = compiled("matmuls", wide=(128, 128, "N"), tall=(64, 256, "M"))[0].kernels
  peers = {kernel.code.main_loop.mix["HGMMA"]: kernel.code.main_loop for kernel in peers}
  assert peers.keys() == {8, 4}
  for name, loop in loops.items():
    peer = peers[8 if name == "in_projection" else 4]
    assert loop.mix["HGMMA"] == peer.mix["HGMMA"], (name, loop, peer)
    assert loop.instructions <= 1.1 * peer.instructions, (name, loop, peer)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [
    dict(keep=False), dict(value=False, rotated=False, norm="rms"), dict(value=False, keep=False),
    dict(rotated=False, with_x=False), dict(tokens=1, heads=1), dict(heads=6, kv_heads=3)], ids=str)
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
  contract.check(case, results)
  jax.tree.map(np.testing.assert_array_equal, results, run(arrays))
