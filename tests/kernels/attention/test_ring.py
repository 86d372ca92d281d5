"""Ring attention over several devices: the same numbers as one device's, and no more work."""

import functools
import os
import re
import subprocess
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from palm_haiku.kernels import alibi_slopes, flash_attention, interpret
from palm_haiku.kernels.aot import targets
from palm_haiku.kernels.attention import ring, xla
from palm_haiku.kernels.attention.fused import OP
from palm_haiku.kernels.attention.residuals import Residuals
from palm_haiku.kernels.core import guards, partition
from tests.kernels.attention import contract
from tests.kernels.attention.contract import Case
from tests.kernels.attention.test_fused import PlainBackend, fused, loss, qkv

SLOPES = alibi_slopes(4)
# Every case is a compilation; optimizing it would cost more than it saves.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module", autouse=True)
def plain():
  """A backend in plain JAX, under the name of one of the kernels'."""
  module = PlainBackend()
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(OP.backends, "mosaic_gpu", lambda: module)
    patch.setitem(guards._PLATFORMS, "mosaic_gpu", ("cpu",))
    patch.setattr(ring, "UNROLLED", 2)  # a loop compiles sooner
    yield module


def mesh_of(kind=AxisType.Auto, **axes):
  sizes = tuple(axes.values())
  devices = jax.devices()[: int(np.prod(sizes))]
  return jax.make_mesh(sizes, tuple(axes), axis_types=(kind,) * len(axes), devices=devices)


@functools.cache
def compiled(implementation, mesh, shared, static):
  """Attention and its gradients over a mesh, of `contract.inputs`."""
  @jit
  def run(query, key, value, dout, segment_ids, slopes, traced):
    def attend(query, key, value, slopes):
      return flash_attention(
          query, key, key if shared else value, segment_ids=segment_ids, alibi_slopes=slopes,
          implementation=implementation, **dict(static), **traced)

    out, pull = jax.vjp(attend, query, key, value, slopes)
    return dict(zip(("out", *contract.GRADIENTS), (out, *pull(dout))))
  return run


def attention(case, arrays, mesh, implementation="mosaic_gpu"):
  options = arrays["options"]
  static = dict(is_causal=case.is_causal, scale=case.scale, local_window_size=case.window)
  traced = {}
  (traced if case.traced_offset else static)["query_offset"] = options["query_offset"]
  run = compiled(implementation, mesh, case.shared_kv, tuple(static.items()))
  with jax.set_mesh(mesh):
    return run(*(arrays[name] for name in ("query", "key", "value", "dout")),
               options["segment_ids"], options["alibi_slopes"], traced)


def differing(case, arrays, results):
  """Names of the results that are not those of one device."""
  want = contract.exact(case, arrays)
  size = dict(dslopes=want["dslopes_size"].max())  # the sum of many
  close = lambda got, want, size: got is None or want is None or np.allclose(
      got, want, rtol=2e-5, atol=2e-5 * size)
  return {name for name in results if not close(results[name], want[name], size.get(name, 1))}


def case_of(length=24, keys=None, **changes):
  return Case(**dict(dict(num_queries=length, num_keys=keys or length, dim_head=4, batch=2,
                          dtype="float32"), **changes))


# A program is compiled once for each of these; what lies in its arrays is drawn.
STRUCTURES = [(mesh, case_of(**case)) for mesh, case in (
    (dict(seq=4), dict(segments="packed", shared_kv=True)),
    (dict(seq=8), dict(length=32, segments="packed", kv_heads=2, alibi=False)),
    (dict(seq=3), dict(heads=3, kv_heads=3)),
    (dict(seq=4), dict(length=20, scale=0.3)),  # no 8 equal blocks, so no zigzag
    (dict(seq=8), dict(window=(5, 0), segments="packed")),
    (dict(seq=8), dict(window=(4, 2), is_causal=False)),
    (dict(seq=4, model=2), dict(heads=6, kv_heads=3, is_causal=False, segments="packed")),
    (dict(seq=4), dict(length=16, keys=32, query_offset=9)),
    (dict(seq=2), dict(length=24, keys=16, traced_offset=True, window=(9, 2))),
    (dict(data=2, seq=2, model=2), dict(segments="packed")),
)]


@pytest.mark.parametrize("structure", [
    n if n in (0, 9) else pytest.param(n, marks=pytest.mark.full) for n in range(len(STRUCTURES))])
@settings(max_examples=3)  # 30 in all
@given(data=st.data())
def test_right_on_drawn_cases(structure, data):
  mesh, case = STRUCTURES[structure]
  case = data.draw(contract.variants(case))
  arrays = contract.inputs(case)
  assert not differing(case, arrays, attention(case, arrays, mesh_of(**mesh)))


def test_a_row_that_sees_nothing_and_the_same_bits_on_every_run():
  mesh, case = STRUCTURES[0]
  arrays = contract.inputs(case)
  query_ids, key_ids = arrays["options"]["segment_ids"]
  arrays["options"]["segment_ids"] = query_ids.at[:, 7].set(9), key_ids
  results = attention(case, arrays, mesh_of(**mesh))
  assert not differing(case, arrays, results)
  assert not np.any(results["out"][:, 7]) and not np.any(results["dquery"][:, 7])
  chex.assert_trees_all_equal(results, attention(case, arrays, mesh_of(**mesh)))


def wrong_offset(pairs):
  def mutant(*args):
    off = jax.lax.axis_index("seq") == 1
    return [pair._replace(offset=pair.offset + off) for pair in pairs(*args)]
  return mutant


def of_the_last_part(merge):
  return lambda total, part: (merge(total, part)[0], part[1])


def added_as_they_are(merge):
  return lambda total, part: (total[0] + part[0], merge(total, part)[1])


def left_where_they_are(home):
  return lambda self, tree, places: tree


MUTANTS = {
    "offset": (ring.Ring, "_pairs", wrong_offset, {"out", *contract.GRADIENTS}),
    "lse": (ring, "_merge", of_the_last_part, {"out", *contract.GRADIENTS}),
    "weights": (ring, "_merge", added_as_they_are, {"out", "dquery", "dkey", "dslopes"}),
    "last transfer": (ring.Ring, "_home", left_where_they_are, {"dkey", "dvalue"})}


@pytest.mark.parametrize("mutant", [
    name if name == "weights" else pytest.param(name, marks=pytest.mark.full) for name in MUTANTS])
def test_a_planted_error_is_found(monkeypatch, mutant):
  where, name, mutate, wrong = MUTANTS[mutant]
  case = case_of(12)
  monkeypatch.setattr(where, name, mutate(getattr(where, name)))
  compiled.cache_clear()
  results = attention(case, contract.inputs(case), mesh_of(seq=2))
  compiled.cache_clear()
  assert differing(case, contract.inputs(case), results) == wrong


class Counting(types.ModuleType):
  """A backend whose lse is the log of the number of keys that it is called with."""

  def forward(self, query, key, value, **_):
    out = jnp.zeros_like(query)
    return out, jnp.log(key.shape[1] + out[..., 0].swapaxes(1, 2))

  def backward(self, residuals, *_, **__):
    query, key, *_ = residuals
    return key.shape[1] + 0 * query, 0 * key, None


def keys_of_each_query(size, zigzag, **options):
  """float[size, queries]: how many keys each of a device's queries is brought together with."""
  backend = ring.Ring(Counting("counting"), "seq", size, zigzag)
  options = dict(dict(is_causal=True, query_offset=0, window=None, segment_ids=None), **options)

  def count(query, key):
    out, lse = backend.forward(query, key, None, **options)
    dquery = backend.backward(Residuals(query, key, None, out, lse), out, **options)[0]
    return jnp.exp(lse).reshape(1, -1), dquery.reshape(1, -1)

  length = 4 * size
  arrays = jnp.zeros((1, length, 1, 1)), jnp.zeros((1, length, 1, 1))
  forward, backward = jit(jax.shard_map(
      count, mesh=mesh_of(seq=size), in_specs=P(None, "seq"), out_specs=P("seq")))(*arrays)
  np.testing.assert_allclose(forward, backward, rtol=1e-5)
  return np.round(np.asarray(forward))


@pytest.mark.parametrize("size", [3, 8])
def test_every_device_computes_as_many_pairs(size):
  block = 2
  pairs = keys_of_each_query(size, True).sum(axis=1) / block**2
  # Each device has 2 n blocks of keys for its 2 of queries, half of them visible, and a diagonal.
  np.testing.assert_array_equal(pairs, [2 * size + 1] * size)


def test_without_zigzag_what_no_query_sees_is_not_computed():
  keys = keys_of_each_query(4, False)
  np.testing.assert_array_equal(keys, [[4] * 4, [8] * 4, [12] * 4, [16] * 4])
  keys = keys_of_each_query(4, False, window=(3, 0))
  np.testing.assert_array_equal(keys, [[4] * 4, [8] * 4, [8] * 4, [8] * 4])


@settings(max_examples=300)
@given(size=st.integers(2, 6), length=st.integers(1, 5), offset=st.integers(-40, 40),
       is_causal=st.booleans(), window=st.none() | st.tuples(*[st.integers(0, 40)] * 2))
def test_a_tour_meets_all_that_is_visible_and_little_else(size, length, offset, is_causal, window):
  array = jax.ShapeDtypeStruct((1, length, 1, 1), jnp.float32)
  tour = ring._tour(size, array, array, dict(
      query_offset=offset, is_causal=is_causal, window=window))
  position = np.arange(size * length)
  distance = position - position[:, None] - offset
  visible = np.ones_like(distance, bool)
  if is_causal:
    visible &= distance <= 0
  if window is not None:
    visible &= (distance >= -window[0]) & (distance <= window[1])
  visible = visible.reshape(size, length, size, length).any(axis=(1, 3))
  seen = [visible[np.arange(size), (np.arange(size) - step) % size].any() for step in tour]
  assert len(tour) == len({step % size for step in tour}) <= size
  met = np.zeros_like(visible)
  for step in tour:
    met[np.arange(size), (np.arange(size) - step) % size] = True
  assert np.all(met[visible])
  assert len(tour) == size or all(seen) or not visible.any()


@pytest.mark.full
def test_a_policy_that_keeps_the_residuals_does_not_rerun_the_ring(plain, monkeypatch):
  runs = []
  forward = plain.forward

  def counted(*arrays, **options):
    results = forward(*arrays, **options)
    shapes = [partition.out_shape(x.shape, x.dtype, x) for x in results]
    # Unlike an effect, a pure callback is left out where its results are not needed.
    return jax.pure_callback(lambda *x: runs.append(1) or x, shapes, *results)

  def number_of_runs(*names):
    runs.clear()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    with jax.set_mesh(mesh_of(seq=2)):
      jax.block_until_ready(
          jit(jax.value_and_grad(loss(jax.checkpoint(fused, policy=policy))))(*qkv(1)))
    return len(runs)

  monkeypatch.setattr(plain, "forward", counted)
  once = 2 * (2 + 2)  # devices, steps of two calls
  assert number_of_runs("attention_out", "attention_lse") == once
  assert number_of_runs("attention_out") == 2 * once


@pytest.mark.full
@pytest.mark.parametrize("kind, implementation", [
    (AxisType.Auto, "xla"), (AxisType.Explicit, "xla"), (AxisType.Explicit, "mosaic_gpu")])
def test_arrays_that_are_divided_already(kind, implementation):
  mesh = mesh_of(kind, data=2, seq=2, model=2)
  length = 12 if implementation != "xla" else xla.BLOCK_Q + 6
  x = qkv(batch=2, num_queries=length)
  ids = jnp.tile(jnp.repeat(jnp.arange(2), length // 2), (2, 1))

  def run(*arrays, **how):
    *x, ids, slopes, offset = arrays
    attend = lambda *x: flash_attention(
        *x, segment_ids=ids, alibi_slopes=slopes, query_offset=offset, **how)
    return attend(*x), jax.grad(loss(attend), argnums=(0, 1, 2))(*x)

  rows, columns = P("data", "seq", "model"), P("data", "seq")
  arrays = *x, ids, jnp.asarray(SLOPES), jnp.asarray(1)
  sharded = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(
      arrays, (rows, columns, columns, columns, P("model"), P()))]
  got = jit(functools.partial(run, implementation=implementation))(*sharded)
  chex.assert_trees_all_close(got, jit(run)(*arrays), atol=1e-4, rtol=1e-4)
  if kind == AxisType.Explicit:
    with jax.set_mesh(mesh):
      # Arrays of no mesh, in that of a context.
      jit(functools.partial(flash_attention, implementation=implementation))(*x)
    assert jax.typeof(got[0]).sharding.spec == P("data", "seq", "model", None)


@pytest.mark.full
def test_under_vmap():
  x = qkv(batch=4)
  f = lambda attend: jax.grad(loss(jax.vmap(
      lambda *x: attend(*(y[None] for y in x), alibi_slopes=SLOPES)[0])), argnums=(0, 1, 2))
  with jax.set_mesh(mesh_of(seq=2)):
    got = jit(f(fused))(*x)
  chex.assert_trees_all_close(got, jit(f(flash_attention))(*x), atol=1e-5, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("lengths", [(10, 10), (1, 12), (12, 10)])
def test_what_the_axis_does_not_divide_is_repeated(lengths):
  query, key, value = qkv(batch=1)
  x = query[:, : lengths[0]], key[:, : lengths[1]], value[:, : lengths[1]]
  f = functools.partial(fused, query_offset=lengths[1] - lengths[0])
  with jax.set_mesh(mesh_of(seq=4)):
    lowered = jit(f).lower(*x)
    got = lowered.compile()(*x)
  assert "collective_permute" not in lowered.as_text()
  want = flash_attention(*x, query_offset=lengths[1] - lengths[0])
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.full
def test_the_kernel_for_tpus():
  # The interpreter's kernels wait for all devices, so that one under a condition, as without
  # zigzag, would wait for ever.
  mesh, case = mesh_of(seq=2), case_of(16, dim_head=64, heads=2, batch=1)
  arrays = contract.inputs(case)
  with interpret():
    results = jax.block_until_ready(attention(case, arrays, mesh, "mosaic_tpu"))
  assert not differing(case, arrays, results)


COMPILE = """
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from palm_haiku.kernels import alibi_slopes, flash_attention

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = jax.sharding.Mesh(np.array(devices), ("seq",), axis_types=(AxisType.Auto,))

def loss(query, key):
  out = flash_attention(query, key, key, is_causal=False, alibi_slopes=alibi_slopes(8),
                        implementation="mosaic_tpu")
  return jnp.square(out.astype(jnp.float32)).sum()

array = lambda heads: jax.ShapeDtypeStruct(
    (1, 1024, heads, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "seq")))
with jax.set_mesh(mesh):
  text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(array(8), array(1)).compile().as_text()
assert "is_scheduled=true" in text and "all-gather" not in text
kind = {"custom-call": "K", "collective-permute-start": "S", "collective-permute-done": "D"}
print("".join(kind[name] for name, call in re.findall(
    " (custom-call|collective-permute-start|collective-permute-done)[(](.*)", text)
    if name != "custom-call" or "tpu_custom_call" in call))
"""


@pytest.mark.full
def test_transfers_pass_under_kernels_as_compiled_for_tpus():
  pytest.importorskip("libtpu", reason="the compiler for TPUs is in libtpu")
  done = subprocess.run(
      [sys.executable, "-c", COMPILE], env=os.environ | targets.environment("v5p"),
      capture_output=True, text=True, timeout=280)
  assert done.returncode == 0, done.stderr[-2000:]
  # S starts a transfer, D ends it, K is a kernel. The last of all brings dkey home.
  assert re.fullmatch("(K*S+K+D+)+SD", done.stdout.strip()), done.stdout
