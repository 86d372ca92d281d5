"""The Triton kernels: numbers in Triton's interpreter, compilation ahead of time."""

import contextlib
import dataclasses
import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType

from palm_haiku.kernels import alibi_slopes, flash_attention
from palm_haiku.kernels.attention import configs, triton
from palm_haiku.kernels.attention.residuals import Residuals
from palm_haiku.kernels.triton import call as triton_call
from tests import triton_interpreter
from tests.kernels import draws
from tests.kernels.attention import contract
from tests.kernels.attention.contract import Case
from tests.mutants import DROPPED, Mistake

if trouble := triton_call.problem():
  pytest.skip(f"needs {trouble}", allow_module_level=True)

attention = functools.partial(flash_attention, implementation="triton")
Blocks = configs.TritonConfig


def blocks_of(rows, keys, apart=False):
  """Every kernel with these tiles."""
  return lambda *_: Blocks(rows, keys, 4, 2, apart)


@contextlib.contextmanager
def running(blocks=None, mistake=None):
  """The kernels run in the interpreter, with these tiles; programs are compiled once in it."""
  with pytest.MonkeyPatch.context() as patch, triton_interpreter.interpreted(mistake):
    if blocks:
      patch.setattr(triton, "_blocks", blocks_of(*blocks))
    yield


@functools.partial(jax.jit, static_argnames=(
    "is_causal", "scale", "window", "known_offset", "chip", "dslopes"))
def kernels(query, key, value, dout, query_offset, known_offset, dslopes, **options):
  """Results of both passes, for a query_offset that is an array, or a Python int."""
  options["query_offset"] = query_offset if known_offset is None else known_offset
  out, lse = triton.forward(query, key, value, **options)
  grads = triton.backward(Residuals(query, key, value, out, lse), dout, slope_gradients=dslopes,
                          **options)
  return dict(out=out, lse=lse) | contract.named(grads)


def run(case, chip=None, **replaced):
  """A case's inputs and the kernels' results on them."""
  arrays = contract.inputs(case) | replaced
  options = dict(arrays["options"], chip=chip)
  offset = options.pop("query_offset")
  return arrays, kernels(*(arrays[name] for name in ("query", "key", "value", "dout")), offset,
                         offset if isinstance(offset, int) else None, case.dslopes, **options)


def results(case, blocks=None, mistake=None, **more):
  with running(blocks, mistake):
    return run(case, **more)


drawn = dict(
    case=contract.cases(dim_heads=(16, 64), dtypes=("bfloat16", "float16", "float32"),
                        max_queries=40, max_keys=70, groups=((1, 1), (1, 3), (1, 8), (2, 2))),
    blocks=st.sampled_from([(16, 16), (32, 32), (16, 64, True), (64, 32)]), data=st.data())


def check_variants(case, blocks, data):
  """One program on several inputs: what surrounds the kernels is compiled for each shape."""
  varies = case.segments or case.traced_offset
  with running(blocks):
    for _ in range(4 if varies else 2):
      contract.check(case, *run(case))
      case = data.draw(contract.variants(case))


@settings(max_examples=3)
@given(**drawn)
def test_results_are_as_near_to_float64_as_the_xla_path(case, blocks, data):
  check_variants(case, blocks, data)


@pytest.mark.full
@pytest.mark.timeout(1200)  # for a busy machine
@settings(max_examples=11)
@given(**drawn)
def test_results_of_more_drawn_cases(case, blocks, data):
  check_variants(case, blocks, data)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=700, derandomize=False)
@given(case=contract.cases(dim_heads=(16, 64, 128, 256),
                           dtypes=("bfloat16", "float16", "float32")),
       blocks=st.sampled_from([(16, 16), (32, 16), (16, 64), (64, 32, True), (128, 64), None]))
def test_fuzz(case, blocks):
  contract.check(case, *results(case, blocks))


@pytest.mark.full
@pytest.mark.parametrize("chip", ["rtx4090", "b200"])
@pytest.mark.parametrize("dim_head", [64, 128, 256])
def test_the_block_sizes_of_the_table(chip, dim_head):
  case = Case(num_queries=40, num_keys=150, heads=6, dim_head=dim_head, query_offset=110,
              window=(100, 0), shared_kv=dim_head == 256)
  contract.check(case, *results(case, chip=chip))


# Planted mistakes: each must fail the very check that the kernels pass.
# In float32, whose bound is the sharpest.
CAUSAL = Case(num_queries=50, num_keys=50, dtype="float32", dim_head=16)
WINDOW = dataclasses.replace(CAUSAL, num_keys=70, window=(30, 4), is_causal=False, query_offset=9)
SEGMENTS = dataclasses.replace(CAUSAL, segments="packed", is_causal=False)
SLOPES = dataclasses.replace(WINDOW, dslopes=True)
MISTAKES = {  # the case that notices it, the place in the kernels, and what changes there
    "sees the next key": (CAUSAL, "right edge", "$", " + 1"),
    "does not see itself": (CAUSAL, "right edge", "<=", "<"),
    "window one short": (WINDOW, "left edge", ">=", ">"),
    "window one long": (WINDOW, "left edge", "$", " - 1"),
    "other segments seen": (SEGMENTS, "segments", *DROPPED),
    "slopes of another head, forward and dq": (
        CAUSAL, "slopes", r"\+ (\w+)\)", r"+ (\1 + 1) % GROUP)"),
    "slopes of another head, dkv": (
        CAUSAL, "slopes of dkv", r"\+ (\w+)\)", r"+ (\1 + 1) % GROUP)"),
    "a key too far left is left out": (WINDOW, "first key", ", 0", " + BLOCK, 0"),
    "the last keys are left out": (WINDOW, "last key", r" \+ 1", ""),
    "the diagonal is taken for a whole block": (CAUSAL, "last whole block", r"\+ 1", "+ BLOCK"),
    "the window's edge is taken for a whole block": (
        WINDOW, "first whole block", r" \+ BLOCK - 1", ""),
    "the last block of a segment is left out": (SEGMENTS, "segment's end", r" \+ BLOCK", ""),
    "the first rows are left out of dkv": (CAUSAL, "first row", "$", " + BLOCK_Q"),
    "the diagonal is taken for a whole tile of dkv": (CAUSAL, "first whole tile", "n_last", "n"),
    "the last rows are left out of dkv": (WINDOW, "last row", r" \+ 1", ""),
    "the first tile of a split is another's": (
        CAUSAL, "split", "= .*", "= (split + tile + 1) // 2 % SPLITS"),
    "keys past the end weigh something": (
        dataclasses.replace(CAUSAL, is_causal=False), "end of the keys", " & .*", ""),
    "lse is left at the tile's first position": (CAUSAL, "lse", *DROPPED),
    "distances with the wrong sign": (
        SLOPES, "distance", r"(key.*) - (row.*)", r"\2 - \1"),
    "slopes' gradient of the last block alone": (SLOPES, "moment", r"\+=", "="),
}


@functools.cache
def check_unmutated(case, blocks):
  contract.check(case, *results(case, blocks))


@pytest.mark.parametrize("name", [
    name if name == "sees the next key" else pytest.param(name, marks=pytest.mark.full)
    for name in MISTAKES])
def test_a_planted_mistake_is_noticed(name):
  case, *mistake = MISTAKES[name]
  blocks = (16, 16)
  check_unmutated(case, blocks)
  assert contract.errors(case, *results(case, blocks, mistake=Mistake(*mistake)))


@pytest.mark.full
def test_rows_and_keys_past_the_end_weigh_nothing():
  """Even where exp(0 - lse), what a row of zeros would weigh, overflows."""
  case = dataclasses.replace(CAUSAL, is_causal=False, scale=1.0)
  shape = lambda heads: (case.batch, case.num_queries, heads, case.dim_head)
  far_below = dict(query=jnp.full(shape(case.heads), 4.0), key=jnp.full(shape(1), -4.0))
  contract.check(case, *results(case, (16, 16), **far_below))
  for end in ("end of the rows", "end of the keys"):
    mistake = Mistake(end, " & .*", "")
    assert contract.errors(case, *results(case, (16, 16), mistake=mistake, **far_below))


def qkv(num_queries=20, num_keys=None, heads=4, kv_heads=1, dim_head=16, lead=(2,),
        dtype=jnp.float32):
  num_keys = num_keys or num_queries
  return (draws.normal(0, (*lead, num_queries, heads, dim_head), dtype),
          draws.normal(1, (*lead, num_keys, kv_heads, dim_head), dtype),
          draws.normal(2, (*lead, num_keys, kv_heads, dim_head), dtype))


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(triton, "_blocks", blocks_of(16, 16))
  with triton_interpreter.interpreted():
    yield


def loss(attend):
  return lambda *x: (attend(*x) * jnp.cos(jnp.arange(x[0].size).reshape(x[0].shape))).sum()


@pytest.mark.full
@pytest.mark.parametrize("num_queries", [1, 37])
def test_no_gradient_flows_from_the_future(interpreted, num_queries):
  q, k, v = qkv(num_queries, lead=())
  row = num_queries // 2
  f = lambda k, v: attention(q, k, v, alibi_slopes=alibi_slopes(4))[row].sum()
  for gradient in jax.grad(f, argnums=(0, 1))(k, v):
    assert not np.any(gradient[row + 1:])
    assert num_queries == 1 or np.all(np.any(np.asarray(gradient[:row + 1]) != 0, axis=(1, 2)))


@pytest.mark.full
def test_a_constant_added_to_all_positions_changes_nothing(interpreted):
  q, k, v = qkv(40)
  shift = 23  # keys in front that another segment id hides; not a multiple of a block
  pad = lambda x, value: jnp.pad(x, ((0, 0), (shift, 0), (0, 0), (0, 0)), constant_values=value)
  ids = jnp.zeros((2, 40), jnp.int32), jnp.broadcast_to(
      -(jnp.arange(shift + 40) < shift).astype(jnp.int32), (2, 63))

  def near(q, k, v):
    return attention(q, k, v, alibi_slopes=alibi_slopes(4))

  def far(q, k, v):
    return attention(q, pad(k, 9.0), pad(v, 9.0), alibi_slopes=alibi_slopes(4),
                     query_offset=shift, segment_ids=ids)

  got, want = (jax.value_and_grad(loss(f), argnums=(0, 1, 2))(q, k, v) for f in (far, near))
  chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-5)
  assert np.abs(near(q, k, v) - attention(q, k, v)).max() > 1e-2


@pytest.mark.full
def test_bias_is_exact_far_from_the_origin(interpreted):
  """A window keeps keys at hand while positions pass 2^20."""
  q, k, v = qkv(24, 24, lead=())
  slopes = jnp.full(4, 2.0)
  far = 2**20
  ids = lambda x: jnp.zeros(x.shape[0], jnp.int32)
  got = attention(q, k, v, alibi_slopes=slopes, query_offset=far, is_causal=False,
                  segment_ids=(ids(q), ids(k)))
  want = attention(q, k, v, alibi_slopes=slopes, query_offset=24, is_causal=False)
  # The same distances but for a constant; float32 holds 2 * 2^20 to 1/8, so weights to 13%.
  np.testing.assert_allclose(got, want, atol=0.3)


@pytest.mark.full
def test_a_row_that_sees_nothing_is_zero_with_zero_gradient(interpreted):
  q, k, v = qkv(20)
  f = functools.partial(attention, query_offset=-3, alibi_slopes=alibi_slopes(4))
  out = f(q, k, v)
  assert not np.any(out[:, :3]) and np.all(np.any(out[:, 3:] != 0, axis=-1))
  gradients = jax.grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2))(q, k, v)
  assert not np.any(gradients[0][:, :3])
  chex.assert_tree_all_finite(gradients)
  _, lse = triton.forward(q, k, v, segment_ids=None, alibi_slopes=None, query_offset=-3,
                          is_causal=True, scale=1.0, window=None, chip=None)
  assert np.all(lse[:, :, :3] == -np.inf) and np.all(np.isfinite(lse[:, :, 3:]))


@pytest.mark.full
def test_nothing_is_visible_at_all(interpreted):
  q, k, v = qkv(20)
  f = lambda *x: attention(*x, query_offset=-100)
  out, gradients = jax.value_and_grad(lambda *x: f(*x).sum(), argnums=(0, 1, 2))(q, k, v)
  assert out == 0 and not any(np.any(x) for x in gradients)


@pytest.mark.full
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(scale):
  case = Case(dim_head=16, scale=scale, dtype="float32")
  contract.check(case, *results(case, (16, 16)))


@pytest.mark.full
def test_the_same_inputs_give_the_same_bits(interpreted):
  q, k, v = qkv(33, dtype=jnp.bfloat16)
  f = jax.value_and_grad(loss(attention), argnums=(0, 1, 2))
  chex.assert_trees_all_equal(f(q, k, v), f(q, k, v))
  from palm_haiku.kernels.attention import triton_kernels
  assert "atomic" not in inspect.getsource(triton_kernels)


SLOPES = alibi_slopes(4)


@pytest.mark.full
@pytest.mark.parametrize("wrap", [
    jax.jit, lambda f: jax.jit(jax.checkpoint(f)),
    lambda f: jax.jit(lambda *x: jax.lax.scan(
        lambda c, _: (c, f(*x)), 0, None, length=2)[1][0]),
    lambda f: jax.vmap(lambda *x: f(*(y[None] for y in x))[0]),
    lambda f: jax.jit(
        lambda *x: jax.vmap(jax.vmap(jax.checkpoint(f)))(*(y[:, None] for y in x))[:, 0]),
    lambda f: jax.jit(jax.vmap(lambda q, k, v: jax.lax.map(lambda q: f(q, k, v), q[None])[0])),
], ids=["jit", "remat", "scan", "vmap", "nested vmap of remat", "jit of vmap of map"])
def test_transformations_equal_the_xla_path(interpreted, wrap):
  got, want = (jax.value_and_grad(loss(wrap(functools.partial(f, alibi_slopes=SLOPES))),
                                  argnums=(0, 1, 2))(*qkv()) for f in (attention, flash_attention))
  chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.full
def test_vmap_of_anything(interpreted):
  """Keys that are not mapped, while slopes, offsets, segments and queries are."""
  q, k, v = qkv(20)
  slopes = jnp.stack([jnp.asarray(SLOPES), 2.0 * SLOPES, jnp.zeros(4)])
  offsets = jnp.array([0, 5, -2])
  ids = draws.integers(1, (2, 20, 3), 0, 2)
  queries = jnp.stack([q, 2 * q, -q], axis=2)

  def mapped(f):
    def one(q, slopes, offset, ids, k, v):
      return f(q, k, v, alibi_slopes=slopes, query_offset=offset, segment_ids=ids)
    batched = jax.vmap(one, in_axes=(2, 0, 0, 2, None, None), out_axes=2)
    return jax.value_and_grad(
        lambda q, k, v: loss(lambda q: batched(q, slopes, offsets, ids, k, v))(q),
        argnums=(0, 1, 2))(queries, k, v)

  chex.assert_trees_all_close(mapped(attention), mapped(flash_attention), atol=3e-5, rtol=1e-5)


@pytest.mark.full
def test_vmap_of_grad(interpreted):
  q, k, v = qkv(20, lead=(3, 1))
  per_example = lambda f: jax.vmap(jax.grad(loss(f), argnums=(0, 1, 2)))(q, k, v)
  chex.assert_trees_all_close(per_example(attention), per_example(flash_attention), atol=2e-5)


@pytest.mark.full
def test_over_a_mesh(interpreted):
  q, k, v = qkv(17)
  mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2,
                       devices=jax.devices()[:4])
  f = lambda *x: loss(functools.partial(attention, alibi_slopes=SLOPES))(*x)
  want = jax.value_and_grad(f, argnums=(0, 1, 2))(q, k, v)
  with jax.set_mesh(mesh):
    got = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(q, k, v)
  chex.assert_trees_all_close(got, want, atol=2e-5, rtol=1e-5)


# Refusals.


def struct(num_queries=128, heads=16, dim_head=64, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct((2, num_queries, heads, dim_head), dtype)


@pytest.mark.parametrize("change, chip, message", [
    (dict(dim_head=80), "a100", r"dim_head in {16, 32, 64, 128, 256}; got 80"),
    (dict(dtype=jnp.float64), "a100", "dtype in {bfloat16, float16, float32}; got float64"),
    (dict(), "v5e", "a GPU with .* of compute capability 8.0, .*; got v5e"),
    (dict(num_queries=2**27, heads=16), "h200", "2.31 rows"),
])
def test_requirements_are_named(change, chip, message):
  query = struct(**change)
  key = jax.ShapeDtypeStruct((2, 128, 1, query.shape[-1]), query.dtype)
  assert triton.unsupported(struct(), struct(heads=1), None, chip="a100") is None
  problem = triton.unsupported(query, key, key, chip=chip)
  assert problem and re.search(message, problem), problem


def test_the_op_refuses_before_anything_compiles(interpreted):
  q, k, v = qkv(dim_head=80)
  with pytest.raises(ValueError, match="triton needs dim_head in .*; got 80"):
    attention(q, k, v)
  with pytest.raises(ValueError, match=r"alibi_slopes must be \[4\]"):
    attention(*qkv(), alibi_slopes=alibi_slopes(5))
  with pytest.raises(ValueError, match=r"segment_ids must be \(2, 20\)"):
    attention(*qkv(), segment_ids=jnp.zeros((2, 7), int))
  with pytest.raises(ValueError, match="3 key/value heads do not divide 4"):
    attention(qkv()[0], *qkv(kv_heads=3)[1:])


def test_a_cpu_is_refused():
  with pytest.raises(ValueError, match="triton needs a device of cuda or rocm; got cpu"):
    attention(*qkv())
