"""The block's Triton kernels: numbers in Triton's interpreter, compilation ahead of time."""

import functools
import inspect
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from palm_haiku.kernels.core import chips, tile_order
from palm_haiku.kernels.parallel_block import configs, triton
from palm_haiku.kernels.triton import call as triton_call
from tests import triton_interpreter
from tests.kernels.parallel_block import contract
from tests.kernels.parallel_block.contract import Case
from tests.mutants import Mistake

if trouble := triton_call.problem():
  pytest.skip(f"needs {trouble}", allow_module_level=True)

ALL = ("in_projection", "out_projection", "swiglu_gradient", "input_gradient")


def run(case, blocks=(32, 64, 32), together=2, mistake=None, of=ALL):
  """The kernels' results on a case, in tiles of (tokens, columns, depth)."""
  tiles = configs.TritonConfig(*blocks, 4, 2)
  with (triton_interpreter.interpreted(mistake),
        mock.patch.object(configs, "triton", lambda *_: tiles),
        mock.patch.object(tile_order, "TOGETHER", together)):
    return jax.device_get(contract.run(triton, case, contract.inputs(case), of=of))


def verify(case, *args, **keywords):
  contract.check(case, run(case, *args, **keywords))


drawn = dict(
    case=contract.cases(dims=(64, 128, 192), hiddens=(64, 128, 320), dim_heads=(64, 128),
                        dtypes=("bfloat16", "float16", "float32"), max_tokens=70, max_heads=2),
    blocks=st.sampled_from([(16, 128, 64), (32, 64, 64), (64, 128, 32), (128, 256, 64)]),
    together=st.integers(1, 3))


@settings(max_examples=3)
@given(**drawn)
def test_results_are_as_near_to_float64_as_the_xla_path(case, blocks, together):
  verify(case, blocks, together)


@pytest.mark.full
@settings(max_examples=5)
@given(**drawn)
def test_more_drawn_cases(case, blocks, together):
  verify(case, blocks, together)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=200, derandomize=False)
@given(**drawn | dict(case=contract.cases(
    dims=(64, 128, 192, 576), hiddens=(64, 192, 384), dim_heads=(64, 128, 256),
    dtypes=("bfloat16", "float16", "float32"), max_tokens=300)))
def test_fuzz(case, blocks, together):
  verify(case, blocks, together)


@pytest.mark.full
@pytest.mark.parametrize("case", [
    Case(tokens=1, dim=64, heads=1, hidden=64, mean=30.0),
    Case(tokens=131, dim=320, heads=1, dim_head=256, hidden=448, norm="rms", value=False),
], ids=str)
@pytest.mark.parametrize("contraction", [1, 10**6])
def test_edges_in_the_tiles_of_the_table(case, contraction):
  verify(case, configs.triton(None, 2, contraction)[:3])


# Planted mistakes: each must fail the very check that the kernels pass. In float32, whose bound is
# the sharpest.
MISTAKES = {  # the function and the result that each spoils, and the mistake
    "gate and up exchanged": ("in_projection", "act", Mistake(
        "gate and up", r"up_ptr(.*)gate_ptr", r"gate_ptr\1up_ptr")),
    "the sizes of all rows of a program": ("in_projection", "act", Mistake(
        "size", r"tl.sum\(x \* x, 1\) / D \+ EPS\)\[:, None\]",
        "tl.sum(tl.sum(x * x, 1), 0) / (BLOCK_M * D) + EPS)")),
    "the mean stays": ("in_projection", "act", Mistake("mean", "CENTRED", "False")),
    "what is past the end of a row counts": ("in_projection", "act", Mistake(
        "row's end", r"tl.where\(.*?, (x - .*), 0.0\)", r"\1")),
    "the last tile's products stay in the accumulator": (
        "out_projection", "y", Mistake("accumulator", "$", " + token / 64")),
    "the value rotated": (
        "in_projection", "value", Mistake("rotated columns", "inside & .*", "inside")),
    "every pair is of the first key head": (
        "in_projection", "key", Mistake("head of a pair", r"\* HALF", "* 0")),
    "the values' channels are counted from the keys'": (
        "in_projection", "value", Mistake("keys and values", "pair - KEYS", "pair")),
    "values where the keys are": (
        "in_projection", "value", Mistake("value's place", "value_out", "out_ptr")),
    "rotated backwards": ("in_projection", "key", Mistake(
        "rotation", "[-+]", lambda sign: {"-": "+", "+": "-"}[sign[0]])),
    "the angles of another token": (
        "in_projection", "query", Mistake("angles", r"row \*", "(row ^ 1) *")),
    "the other half of the head before": (
        "in_projection", "query", Mistake("halves of a head", "right, HALF", "right, -HALF")),
    "no residual": ("out_projection", "y", Mistake("residual", "WITH_X", "False")),
    "the last step of the contraction is left out": (
        "out_projection", "y", Mistake("contraction", "// BLOCK_K", "// BLOCK_K - 1")),
    "a step past the end of a product": (
        "input_gradient", "dh", Mistake("end of a product", ">=", ">")),
    "the next product begins late": (
        "input_gradient", "dh", Mistake("next product", r"tl.where\(.*\)", "start")),
    "the value's gradient through the key": (
        "input_gradient", "dh", Mistake("weights", ", value_ptr", ", key_ptr")),
    "half the derivative of SwiGLU": (
        "swiglu_gradient", "dgate", Mistake("gate's gradient", r"\(s \+ .*?\)\)", "s")),
    "the gradients of gate and up exchanged": (
        "swiglu_gradient", "dup", Mistake("up's gradient", "silu", "up")),
    "a part of the tile twice": ("swiglu_gradient", "act of gradient", Mistake(
        "part", r"part \* \(BLOCK_N // 4\)", "part // 2 * (BLOCK_N // 2)")),
    "tokens past the end of a group": (
        "swiglu_gradient", "dup", Mistake("group", r"\* BLOCK_M,", "* BLOCK_M + 1,")),
}
MISTAKEN_CASE = Case(tokens=70, dim=192, hidden=192, heads=2, kv_heads=2, dtype="float32",
                     mean=1.0)


@functools.cache
def check_unmutated(of):
  verify(MISTAKEN_CASE, of=(of,))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.full if i else ()) for i, name in enumerate(MISTAKES)])
def test_a_planted_mistake_is_noticed(name):
  of, result, mistake = MISTAKES[name]
  check_unmutated(of)
  results = run(MISTAKEN_CASE, mistake=mistake, of=(of,))
  assert result in contract.errors(MISTAKEN_CASE, results)


@pytest.mark.full
def test_same_bits_every_time():
  case = Case(tokens=40, hidden=128)
  chex.assert_trees_all_equal(run(case), run(case))
  from palm_haiku.kernels.parallel_block import triton_kernels
  assert "atomic" not in inspect.getsource(triton_kernels)


@pytest.mark.parametrize("change, chip, message", [
    (dict(), "a100", None), (dict(heads=1, hidden=64, dtype="float32"), None, None),
    (dict(dim=96), "a100", "dim a multiple of 64; got 96"),
    (dict(dim_head=32), None, "dim_head a multiple of 64; got 32"),
    (dict(dim_head=192), None, "dim_head in {64, 128, 256}; got 192"),
    (dict(hidden=100), "b200", None),
    (dict(dim=65_536), "h200", "dim at most 32768; got 65536"),
    (dict(dtype="float64"), "a100", "dtype in {bfloat16, float16, float32}; got float64"),
    (dict(), "v5e", triton_call.unfit("v5e")),
])
def test_requirements_are_named(change, chip, message):
  case = Case(**change)
  array = lambda *shape: jax.ShapeDtypeStruct(shape, np.dtype(case.dtype))
  params = dict(query=array(case.dim, case.heads, case.dim_head),
                key=array(case.dim, case.dim_head), gate=array(case.dim, case.hidden))
  assert triton.unsupported(array(case.tokens, case.dim), params, chip=chip) == message


def test_tiles_fit_the_shared_memory_of_every_chip():
  for chip in configs.TRITON:
    for itemsize, contraction in ((2, 10**6), (2, 512), (4, 512)):
      blocks = configs.triton(chip, itemsize, contraction)
      buffers = blocks.stages if chip in ("h100", "h200", "b200") else blocks.stages - 1
      step = itemsize * blocks.depth * (blocks.tokens + blocks.columns)
      together = 2 if itemsize == 2 and contraction == 512 else 1  # on one multiprocessor
      assert together * buffers * step <= chips.GPUS[chip].shared_memory


# Compiled for chips that are not here. -----------------------------------------------------------

TENSOR_CORES = {"a100": "HMMA", "h100": "HGMMA", "b200": "UTCMMA"}


def program(tokens, dim, heads, kv_heads, dim_head, hidden, dtype, value, rotated, keep, chip):
  """(all four functions, the types of their arguments)."""
  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  table = array(tokens, dim_head // 2, dtype="float32")
  kv = kv_heads * dim_head
  x, keys, h, query = (array(tokens, dim), array(tokens, kv), array(tokens, hidden),
                     array(tokens, heads, dim_head))
  weights = dict(norm=array(dim, dtype="float32"), query=array(dim, heads, dim_head),
                 key=array(dim, kv), value=array(dim, kv), gate=array(dim, hidden),
                 up=array(dim, hidden))
  if not value:
    del weights["value"]

  def layer(x, weights, rotation, query, keys, h, attn_out, ff_out):
    dvalue = keys if value else None
    return (triton.in_projection(x, weights, rotation, norm="layer", eps=1e-5, keep=keep,
                                 chip=chip),
            triton.out_projection(x, query, h, attn_out, ff_out, chip=chip),
            triton.swiglu_gradient(x, h, h, ff_out, chip=chip),
            triton.input_gradient(query, keys, dvalue, h, h, weights, chip=chip))

  return layer, (x, weights, (table, table) if rotated else None, query, keys, h,
                 array(heads, dim_head, dim), array(hidden, dim))


def compiles_well(chip, tokens=16_384, dim=4096, heads=16, kv_heads=1, dim_head=256, hidden=16_384,
                  dtype="bfloat16", value=True, rotated=True, keep=True):
  aot = pytest.importorskip("palm_haiku.kernels.aot", reason="compiles ahead of time")
  report = aot.report(program, target=chip, tokens=tokens, dim=dim, heads=heads,
                      kv_heads=kv_heads, dim_head=dim_head, hidden=hidden, dtype=dtype,
                      value=value, rotated=rotated, keep=keep, chip=chip)
  kernels = {k.name.removesuffix("_kernel"): k for k in report.kernels}
  assert kernels.keys() == {*ALL, "normalize"}  # and nothing of XLA's: no copy, no transposition
  for name, kernel in kernels.items():
    assert not kernel.problems, kernel.problems
    assert kernel.shared_memory <= chips.GPUS[chip].shared_memory
    if name != "normalize":
      assert kernel.code.mix.get(TENSOR_CORES[chip]), kernel
  h = tokens * dim * jnp.dtype(dtype).itemsize
  assert report.memory["temp"] <= h + 2**20


@pytest.mark.full
def test_compiles_without_spills_for_the_tensor_cores_in_little_memory():
  compiles_well("h100")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("chip", TENSOR_CORES)
@pytest.mark.parametrize("change", [
    dict(), dict(dtype="float32"), dict(dim=8192, heads=32), dict(dim=2048, dim_head=128),
    dict(tokens=2048, dim=512, heads=8, dim_head=64, hidden=2048, value=False, rotated=False),
    dict(tokens=2048, dim=1024, heads=8, dim_head=128, hidden=4096, keep=False),
    dict(heads=32, kv_heads=8, dim_head=128, hidden=14_336),
    dict(tokens=1001, dim=384, heads=1, dim_head=128, hidden=640, dtype="float16")], ids=str)
def test_every_entry_of_the_table(chip, change):
  compiles_well(chip, **change)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the kernels on a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("change", [
    dict(dim=192, hidden=320, heads=1), dict(dim=2048, hidden=1536, dim_head=256, norm="rms"),
    dict(dim=1024, hidden=4096, heads=8, dim_head=128, value=False, mean=30.0)], ids=str)
def test_on_a_gpu(change, dtype):
  case = Case(tokens=701, dtype=dtype, **change)
  arrays = contract.inputs(case)
  results = contract.run(triton, case, arrays)
  contract.check(case, results)
  chex.assert_trees_all_equal(results, contract.run(triton, case, arrays))
