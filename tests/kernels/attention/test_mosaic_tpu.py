"""The TPU kernels in JAX's TPU interpreter, and compiled ahead of time.

The interpreter looks for races and reads out of bounds, and fills fresh memory with NaN.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from palm_haiku.kernels import alibi_slopes, flash_attention, interpret
from palm_haiku.kernels.attention import (
  configs,
  mosaic_tpu,
  mosaic_tpu_backward,
  mosaic_tpu_layout as layout,
  mosaic_tpu_mask as masking,
)
from palm_haiku.kernels.attention.residuals import Residuals
from palm_haiku.kernels.core import chips
from tests import mutants
from tests.kernels.attention import contract
from tests.kernels.attention.contract import Case
from tests.mutants import Mistake

# Small enough that short sequences have several blocks of rows and of keys, and steps of all
# kinds: diagonal, large, fine. The second deals the blocks of rows to two cores.
BLOCKS = (
    configs.TpuConfig(area=1024, rows=32, lanes=32, chunk=32, fine=16, major=64, ahead=1, cores=1),
    configs.TpuConfig(area=1024, rows=32, lanes=16, chunk=16, fine=8, major=32, ahead=2, cores=2),
)


@functools.lru_cache(maxsize=64)
def compiled(blocks, backward, dslopes, **static):
  # Every case is a compilation; optimizing it would cost more than it saves.
  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def run(query, key, value, dout, options):
    options = dict(options, **static, chip=None, config=blocks)
    out, lse = mosaic_tpu.forward(query, key, value, **options)
    results = dict(out=out, lse=lse)
    if backward:
      gradients = mosaic_tpu.backward(Residuals(query, key, value, out, lse), dout,
                                      slope_gradients=dslopes, **options)
      results |= contract.named(gradients)
    return results
  return run


def attention(arrays, blocks=BLOCKS[0], backward=True, compiled=compiled, dslopes=False):
  """Results by name of `contract.inputs`."""
  options = dict(arrays["options"])
  static = {name: options.pop(name) for name in ("is_causal", "scale", "window")}
  if isinstance(options["query_offset"], int):
    static["query_offset"] = options.pop("query_offset")
  run = compiled(blocks, backward, dslopes, **static)
  with interpret(detect_races=True):
    return jax.block_until_ready(
        run(*(arrays[n] for n in ("query", "key", "value", "dout")), options))


def check(case, blocks=BLOCKS[0], backward=True):
  arrays = contract.inputs(case)
  contract.check(case, arrays, attention(arrays, blocks, backward, dslopes=case.dslopes))


# A program is compiled once for each of these, and run on several inputs. The fuzz below draws
# everything.
STRUCTURES = [(Case(**case), BLOCKS[blocks]) for blocks, case in (
    (0, dict(num_queries=64, num_keys=64)),
    (0, dict(num_queries=70, num_keys=70, window=(32, 0), segments="packed", dim_head=128,
             dslopes=True)),
    (0, dict(num_queries=33, num_keys=150, query_offset=96, dtype="float32", dslopes=True)),
    (0, dict(num_queries=37, num_keys=61, heads=6, kv_heads=2, traced_offset=True, dslopes=True)),
    (0, dict(num_queries=50, num_keys=90, is_causal=False, window=(21, 9), shared_kv=True)),
    (0, dict(num_queries=1, num_keys=77, query_offset=76, scale=0.3, heads=8)),
    (0, dict(num_queries=90, num_keys=41, alibi=False, heads=3, kv_heads=3, dim_head=128)),
    (1, dict(num_queries=64, num_keys=64, shared_kv=True, batch=2)),
    (1, dict(num_queries=45, num_keys=45, segments="packed", heads=3, traced_offset=True,
             dslopes=True)),
    (1, dict(num_queries=40, num_keys=40, is_causal=False, segments="packed", scale=0.3)),
    (1, dict(num_queries=65, num_keys=65, window=(11, 5), dim_head=256, dslopes=True)),
)]


@pytest.mark.parametrize("structure", [
    n if n in (0, 8) else pytest.param(n, marks=pytest.mark.full) for n in range(len(STRUCTURES))])
def test_right_on_every_structure(structure):
  case, blocks = STRUCTURES[structure]
  for variation in contract.variations(case, 3):
    check(variation, blocks)


@pytest.mark.full
@pytest.mark.parametrize("blocks", BLOCKS)
def test_rows_beyond_all_that_see_a_key_leave_gradients_alone(blocks):
  for queries in (90, 120):
    check(Case(num_queries=queries, num_keys=48, window=(11, 0)), blocks)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@settings(max_examples=100)
@given(case=contract.cases(dtypes=("bfloat16", "float32"), max_queries=48, max_keys=80),
       blocks=st.sampled_from(BLOCKS), data=st.data())
def test_right_on_many_drawn_cases(case, blocks, data):
  """100 programs of any shape and mask, 7 inputs for each: 700 cases."""
  compiled.cache_clear()
  for _ in range(7):
    check(data.draw(contract.variants(case)), blocks)


def off_by_one(hide):
  return lambda x, tile, distance, *rest, **options: hide(
      x, tile, distance - 1, *rest, **options)


def of_another_head(row_slopes):
  return lambda slopes, *rest: row_slopes(jnp.roll(slopes, 1), *rest)


def shortened(visible_chunks):
  def mutant(*args, **options):
    chunks = visible_chunks(*args, **options)
    return chunks.at[:, 0].set(jnp.minimum(chunks[:, 0] + 1, chunks[:, 3]))
  return mutant


def without_a_mask_there(visible_chunks):
  def mutant(*args, **options):
    chunks = visible_chunks(*args, **options)
    return chunks.at[:, 2].set(chunks[:, 3])
  return mutant


def nothing(clear):
  return lambda ref: None


MUTANTS = {
    "mask": (layout, "hide", off_by_one),
    "slopes": (layout, "row_slopes", of_another_head),
    "skipped block": (masking, "visible_chunks", shortened),
    "block without its mask": (masking, "visible_chunks", without_a_mask_there),
    "stale accumulator": (mosaic_tpu, "clear", nothing)}


@pytest.mark.parametrize("mutant", [
    name if name == "slopes" else pytest.param(name, marks=pytest.mark.full) for name in MUTANTS])
def test_a_planted_error_is_found(monkeypatch, mutant):
  # Small, but with two blocks of rows and of keys; no diagonal steps, which start afresh.
  case = Case(num_queries=20, num_keys=40, query_offset=19, dtype="float32")
  if mutant == "mask":  # on the diagonal, too
    check_fails(monkeypatch, mutant, dataclasses.replace(case, num_keys=32, num_queries=32,
                                                         query_offset=0))
  check_fails(monkeypatch, mutant, case)


def check_fails(monkeypatch, mutant, case):
  module, name, mutate = MUTANTS[mutant]
  with monkeypatch.context() as patch:
    patch.setattr(module, name, mutate(getattr(module, name)))
    results = attention(contract.inputs(case), compiled=compiled.__wrapped__)
  found = contract.errors(case, contract.inputs(case), results).keys()
  # Each kernel is found out by itself: the forward by out, the backward by what it adds up.
  assert "out" in found and found & {"dquery", "dkey", "dvalue"}, found


@pytest.mark.full
@pytest.mark.parametrize("place, change", [
    ("moment", (r"\+=", "=")), ("share", (r"dscores \*", "-dscores *")),
    ("blocks of keys", (r"x\.sum\(0\)", "x[0]")),
], ids=["the last tile alone", "sign", "the first block of keys alone"])
def test_a_mistake_in_the_gradient_of_slopes_is_found(place, change):
  case = Case(num_queries=20, num_keys=80, query_offset=60, dtype="float32", dslopes=True)
  arrays = contract.inputs(case)
  with mutants.planted(mosaic_tpu_backward, Mistake(place, *change)):
    results = attention(arrays, compiled=compiled.__wrapped__, dslopes=True)
  assert contract.errors(case, arrays, results).keys() == {"dslopes"}


@pytest.mark.full
def test_no_gradient_flows_from_the_future():
  case, blocks = STRUCTURES[0]
  for row in (0, 17, 39, 63):
    arrays = contract.inputs(case)
    arrays["dout"] = jnp.zeros_like(arrays["dout"]).at[:, row].set(1.0)
    results = attention(arrays, blocks)
    for name in ("dkey", "dvalue"):
      gradient = np.asarray(results[name], np.float32)[0, :, 0]
      assert not np.any(gradient[row + 1 :]), (name, row)
      if row or name == "dvalue":
        assert np.all(np.any(gradient[: row + 1] != 0, axis=-1)), (name, row)
    assert not np.any(np.delete(np.asarray(results["dquery"], np.float32), row, axis=1))


@pytest.mark.full
def test_the_same_bits_on_every_run():
  case, blocks = STRUCTURES[7]
  arrays = contract.inputs(case)
  first, second = attention(arrays, blocks), attention(arrays, blocks)
  for name in first.keys() - {"dvalue"}:  # the keys are the values
    np.testing.assert_array_equal(first[name], second[name])


@pytest.mark.full
def test_a_row_that_sees_nothing_is_zero_with_zero_gradient():
  case, blocks = STRUCTURES[1]
  arrays = contract.inputs(case)
  query_ids, key_ids = arrays["options"]["segment_ids"]
  arrays["options"]["segment_ids"] = query_ids.at[:, 7].set(9), key_ids
  results = attention(arrays, blocks, dslopes=case.dslopes)
  assert not np.any(results["out"][:, 7]) and np.all(np.isneginf(results["lse"][:, :, 7]))
  assert not np.any(results["dquery"][:, 7])
  for name in ("dquery", "dkey", "dvalue"):
    assert np.all(np.isfinite(np.asarray(results[name], np.float32)))


@pytest.mark.full
def test_through_the_op_with_vmap_and_a_head_dim_that_is_padded():
  arrays = contract.inputs(Case(batch=2, num_queries=20, num_keys=20, dim_head=72, dtype="float32",
                                segments="packed"))
  def loss(query, key, value, ids, implementation):
    f = lambda q, k, v, i: flash_attention(
        q, k, v, segment_ids=i, alibi_slopes=alibi_slopes(4), implementation=implementation)
    return (jax.vmap(f)(query, key, value, ids) * arrays["dout"]).sum()
  ids = arrays["options"]["segment_ids"][0]
  gradient = jax.grad(loss, argnums=(0, 1, 2))
  given = tuple(arrays[name] for name in ("query", "key", "value"))
  want = gradient(*given, ids, "xla")
  with interpret():
    got = jax.block_until_ready(jax.jit(gradient, static_argnums=4)(*given, ids, "mosaic_tpu"))
  for g, w in zip(got, want, strict=True):
    np.testing.assert_allclose(g, w, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("change, chip, message", [
    (dict(dtype="float16"), "v5e", "bfloat16 or float32"),
    (dict(dim_head=512), None, "dim_head of at most 256; got 512"),
    (dict(), "v9", "one of the chips v4, v5e, v5p, v6e, tpu7x; got v9"),
    (dict(dim_head=256), "v4", "blocks within the 8 MiB of VMEM of a v4; forward takes 1"),
])
def test_what_a_chip_cannot_do_is_said(monkeypatch, change, chip, message):
  monkeypatch.setitem(chips.TPUS, "v4", dataclasses.replace(chips.TPUS["v4"], vmem=8))
  case = Case(**{"heads": 16, "num_queries": 8192, "num_keys": 8192, **change})
  array = lambda length, heads: jax.ShapeDtypeStruct(
      (1, length, heads, case.dim_head), jnp.dtype(case.dtype))
  query, key = array(case.num_queries, case.heads), array(case.num_keys, 1)
  assert message in mosaic_tpu.unsupported(query, key, key, chip=chip)


@pytest.mark.parametrize("chip", chips.TPUS)
@pytest.mark.parametrize("dim_head", [64, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(16, 1), (16, 16), (12, 4), (71, 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_table_fits_the_chip(chip, dim_head, heads, kv_heads, dtype):
  for length in (1, 700, 2048, 65536):
    query, key = (jax.ShapeDtypeStruct((1, length, n, dim_head), jnp.dtype(dtype))
                  for n in (heads, kv_heads))
    assert mosaic_tpu.unsupported(query, key, key, chip=chip) is None


COMPILE = """
import sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from palm_haiku.kernels.attention import mosaic_tpu
from palm_haiku.kernels.attention.residuals import Residuals

chip, topology, length, heads, kv_heads, dim, dtype, dslopes = sys.argv[1:]
length, heads, kv_heads, dim = map(int, (length, heads, kv_heads, dim))
device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
mesh = jax.sharding.Mesh([device], ("x",))

def both(query, key, value, dout, slopes):
  options = dict(segment_ids=None, alibi_slopes=slopes, query_offset=0, is_causal=True,
                 scale=dim**-0.5, window=None, chip=chip)
  out, lse = mosaic_tpu.forward(query, key, value, **options)
  return mosaic_tpu.backward(
      Residuals(query, key, value, out, lse), dout, slope_gradients=dslopes == "True", **options)

everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
array = lambda shape, dtype=dtype: jax.ShapeDtypeStruct(
    shape, jnp.dtype(dtype), sharding=everywhere)
query, key = array((1, length, heads, dim)), array((1, length, kv_heads, dim))
with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
  compiled = jax.jit(both).trace(query, key, key, query, array((heads,), "float32")).lower(
      lowering_platforms=("tpu",)).compile()
print("temporaries", compiled.memory_analysis().temp_size_in_bytes)
"""

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2",
              "tpu7x": "tpu7x:2x2x1"}


def temporaries(chip, length, heads=16, kv_heads=1, dim=128, dtype="bfloat16", dslopes=False):
  """Bytes of temporaries of forward and backward, compiled for a chip that is not here."""
  pytest.importorskip("libtpu", reason="the compiler for TPUs is in libtpu")
  done = subprocess.run(
      [sys.executable, "-c", COMPILE, chip, TOPOLOGIES[chip],
       *map(str, (length, heads, kv_heads, dim, dtype, dslopes))],
      env=os.environ | dict(
          JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4",
          TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"),
      capture_output=True, text=True, timeout=1200)
  assert done.returncode == 0, done.stderr[-2000:]
  return int(done.stdout.split()[-1])


@pytest.mark.full
def test_compiles_for_65536_positions_with_temporaries_of_their_number():
  assert temporaries("v5e", 65536, dslopes=True) < 16 * 65536 * 16 * (128 + 8)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("heads, kv_heads, dim, dtype", [
    (16, 1, 64, "bfloat16"), (16, 1, 128, "bfloat16"), (16, 1, 256, "bfloat16"),
    (4, 4, 128, "bfloat16"), (12, 4, 128, "bfloat16"), (16, 1, 128, "float32")])
def test_compiles_within_the_vmem_that_is_counted(chip, heads, kv_heads, dim, dtype):
  assert temporaries(chip, 8192, heads, kv_heads, dim, dtype) < 16 * 8192 * heads * (dim + 8)
