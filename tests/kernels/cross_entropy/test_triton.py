"""The Triton cross-entropy kernels: numbers in Triton's interpreter, compilation ahead of time."""

import functools
import inspect
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from palm_haiku.kernels import linear_cross_entropy
from palm_haiku.kernels.core import chips, tile_order
from palm_haiku.kernels.cross_entropy import configs, triton
from palm_haiku.kernels.triton import call as triton_call
from tests import triton_interpreter
from tests.kernels import draws
from tests.kernels.cross_entropy import contract
from tests.kernels.cross_entropy.contract import Case
from tests.mutants import Mistake

if trouble := triton_call.problem():
  pytest.skip(f"needs {trouble}", allow_module_level=True)


def run(case, blocks=(16, 16, 16), walk=2, together=2, mistake=None, of=("log_z", "g")):
  """The kernels' results on a case, in tiles of (tokens, columns, depth)."""
  tiles = configs.TritonConfig(*blocks, 4, 2)
  with (triton_interpreter.interpreted(mistake),
        mock.patch.object(configs, "triton", lambda *_: tiles),
        mock.patch.multiple(tile_order, walk=lambda *_: walk, TOGETHER=together)):
    return contract.run(triton, case, contract.inputs(case), of=of, chip=None)


def verify(case, *args, **keywords):
  contract.check(case, run(case, *args, **keywords))


drawn = dict(
    case=contract.cases(dims=(16, 48, 64), dtypes=("bfloat16", "float16", "float32"),
                        max_tokens=80, max_vocabulary=200),
    blocks=st.sampled_from([(16, 16, 16), (32, 64, 32), (64, 32, 64), (128, 128, 32)]),
    walk=st.integers(1, 4), together=st.integers(1, 3))


@settings(max_examples=2)
@given(**drawn, data=st.data())
def test_results_are_as_near_to_float64_as_the_xla_path(case, blocks, walk, together, data):
  for variant in contract.variants(case, data.draw, 3):
    verify(variant, blocks, walk, together)


@pytest.mark.full
@settings(max_examples=8)
@given(**drawn)
def test_more_drawn_cases(case, blocks, walk, together):
  verify(case, blocks, walk, together)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=200, derandomize=False)
@given(**drawn | dict(case=contract.cases(
    dims=(16, 48, 64, 192), dtypes=("bfloat16", "float16", "float32"), max_tokens=300,
    max_vocabulary=700)))
def test_fuzz(case, blocks, walk, together):
  verify(case, blocks, walk, together)


@pytest.mark.full
@pytest.mark.parametrize("case", [
    Case(num_tokens=1, vocabulary=1, dim=16),
    Case(num_tokens=131, vocabulary=301, dim=176, num_valid=290, first=7, targets="ends"),
    Case(num_tokens=40, vocabulary=70, num_valid=0, traced=True),
    Case(num_tokens=40, vocabulary=70, scale=0.0, dtype="float32"),
], ids=str)
def test_edges_in_the_tiles_of_the_table(case):
  blocks = configs.triton(None, jnp.dtype(case.dtype).itemsize)
  verify(case, blocks[:3])


# Planted mistakes: each must fail the very check that the kernels pass. In float32, whose bound is
# the sharpest.
MISTAKES = {  # the result that each spoils, and the mistake
    "one column too many in the sum": ("log_z", Mistake("counted columns", "< valid", "<= valid")),
    "one column too few in the sum": (
        "log_z", Mistake("counted columns", "< valid", "< valid - 1")),
    "one column too many in the gradient": (
        "g", Mistake("gradient's columns", "here <", "here <=")),
    "the logit beside the target's": ("logit", Mistake("target's logit", "==", "+ 1 ==")),
    "the column beside the target": ("g", Mistake("target", "==", "+ 1 ==")),
    "the last block's products stay in the accumulator": (
        "log_z", Mistake("accumulator", "$", " + column % 32 / 16")),
    "the last step of the contraction is left out": (
        "g", Mistake("contraction", r"\bD,", "D - 15,")),
    "the sum stays relative to an old maximum": (
        "log_z", Mistake("running sum", r" \* tl.exp2\(.*\) \+", " +")),
    "the last block of a walk is left out": (
        "log_z", Mistake("walk", r"WALK \* BLOCK_V", "(WALK - 1) * BLOCK_V")),
    "tokens past the end of a group": ("g", Mistake("group", "$", " + 1")),
}
MISTAKEN_CASE = Case(
    num_tokens=70, vocabulary=90, dim=72, dtype="float32", num_valid=75, first=3)


@functools.cache
def check_unmutated():
  verify(MISTAKEN_CASE)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.full if i else ()) for i, name in enumerate(MISTAKES)])
def test_a_planted_mistake_is_noticed(name):
  result, mistake = MISTAKES[name]
  check_unmutated()
  results = run(MISTAKEN_CASE, mistake=mistake, of=("g" if result == "g" else "log_z",))
  assert result in contract.errors(MISTAKEN_CASE, results)


@pytest.mark.full
def test_same_bits_every_time():
  case = Case(num_tokens=70, vocabulary=90)
  chex.assert_trees_all_equal(run(case), run(case))
  from palm_haiku.kernels.cross_entropy import triton_kernels
  assert "atomic" not in inspect.getsource(triton_kernels)


@pytest.fixture
def interpreted():
  with triton_interpreter.interpreted():
    yield


def problem(lead=(8, 6), vocabulary=50, dim=32):
  return (draws.normal(0, (*lead, dim)), draws.normal(1, (vocabulary, dim)),
          draws.integers(2, lead, 0, vocabulary))


def gradients(implementation, wrap=lambda f: f):
  f = functools.partial(linear_cross_entropy, z_loss=1e-2, scale=0.25,
                        implementation=implementation)

  def total(x, embedding, targets):
    loss, log_z = wrap(f)(x, embedding, targets)
    return (loss * jnp.cos(jnp.arange(loss.size).reshape(loss.shape))).sum() + log_z.sum()

  return jax.value_and_grad(total, argnums=(0, 1))


@pytest.mark.full
@pytest.mark.parametrize("wrap", [
    lambda f: jax.jit(jax.checkpoint(f)), lambda f: jax.vmap(f, (0, None, 0)),
    lambda f: jax.vmap(lambda x, e, t: f(x, e * (1 + x.mean()), t), (0, None, 0)),
], ids=["jit of remat", "vmap", "vmap of the embedding too"])
def test_transformations_equal_the_xla_path(interpreted, wrap):
  got, want = (jax.jit(gradients(name, wrap))(*problem()) for name in ("triton", "xla"))
  chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_over_a_mesh(interpreted, kind):
  """Tokens over one axis, a vocabulary that the other does not divide."""
  x, embedding, targets = problem(vocabulary=49)
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2,
                       devices=jax.devices()[:4])
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  got = jax.jit(gradients("triton"))(place(x, "data"), place(embedding), place(targets, "data"))
  want = jax.jit(gradients("xla"))(x, embedding, targets)
  chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dim, dtype, chip, message", [
    (48, "float32", "a100", None), (64, "bfloat16", None, None),
    (40, "bfloat16", "a100", "a last dimension that is a multiple of 16; got 40"),
    (64, "float64", "a100", "dtype in {bfloat16, float16, float32}; got float64"),
    (64, "bfloat16", "v5e", triton_call.unfit("v5e")),
])
def test_requirements_are_named(dim, dtype, chip, message):
  x, embedding = (jax.ShapeDtypeStruct((n, dim), np.dtype(dtype)) for n in (9, 70))
  assert triton.unsupported(x, embedding, chip=chip) == message


def test_tiles_fit_the_shared_memory_of_every_chip():
  for chip in configs.TRITON:
    for itemsize in (2, 4):
      blocks = configs.triton(chip, itemsize)
      step = itemsize * blocks.depth * (blocks.tokens + blocks.columns)
      assert blocks.stages * step <= chips.GPUS[chip].shared_memory


# Compiled for chips that are not here. -----------------------------------------------------------

TENSOR_CORES = {"a100": "HMMA", "h200": "HGMMA", "b200": "UTCMMA"}


def program(num_tokens, vocabulary, dim, rows, dtype, chip):
  """(both kernels, the types of their arguments)."""
  options = dict(scale=dim**-0.5, chip=chip)

  def both(x, embedding, targets, top, spread, peak, num_valid, first):
    return (triton.forward(x, embedding, targets, num_valid=num_valid, **options),
            triton.logit_gradient(x, embedding[:rows], targets, top, spread, peak, first=first,
                                  num_valid=num_valid, **options))

  array, number = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((), jnp.int32)
  token = lambda dtype: array((num_tokens,), dtype)
  return both, (array((num_tokens, dim), dtype), array((vocabulary, dim), dtype), token(jnp.int32),
                *[token(jnp.float32)] * 3, number, number)


def compiles_well(chip, num_tokens=16_384, vocabulary=256_000, dim=4096, dtype="bfloat16"):
  aot = pytest.importorskip("palm_haiku.kernels.aot", reason="compiles ahead of time")
  rows = min(8192, vocabulary)
  report = aot.report(program, target=chip, num_tokens=num_tokens, vocabulary=vocabulary, dim=dim,
                      rows=rows, dtype=dtype, chip=chip)
  kernels = [kernel for kernel in report.kernels if kernel.source == "triton"]
  assert {kernel.name for kernel in kernels} == {"forward_kernel", "gradient_kernel"}
  for kernel in kernels:
    assert kernel.resources.spill_loads <= (8 if chip == "a100" else 0), kernel.problems
    assert kernel.shared_memory <= chips.GPUS[chip].shared_memory
    assert kernel.code.main_loop.mix.get(TENSOR_CORES[chip]), kernel
  block_of_rows = rows * dim * jnp.dtype(dtype).itemsize
  assert report.memory["temp"] < block_of_rows + 32 * 2**20


@pytest.mark.full
def test_compiles_without_spills_for_the_tensor_cores_in_little_memory():
  compiles_well("h200")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("chip", ["a100", "h200", "b200"])
@pytest.mark.parametrize("change", [
    dict(), dict(dtype="float32"), dict(num_tokens=1001, vocabulary=50_257, dim=784)], ids=str)
def test_every_entry_of_the_table(chip, change):
  compiles_well(chip, **change)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the kernels on a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dim", [48, 1024])
def test_on_a_gpu(dim, dtype):
  case = Case(num_tokens=700, vocabulary=3001, dim=dim, dtype=dtype, num_valid=2900, first=100,
              scale=dim**-0.5)
  arrays = contract.inputs(case)
  results = contract.run(triton, case, arrays, chip=None)
  contract.check(case, results)
  chex.assert_trees_all_equal(results, contract.run(triton, case, arrays, chip=None))
