"""Derivatives, blocks, residuals and meshes of the kernels, with a kernel written in plain JAX."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from palm_haiku.kernels import linear_cross_entropy
from palm_haiku.kernels.cross_entropy import fused
from tests.kernels import draws
from tests.kernels.cross_entropy import contract


class PlainBackend(types.ModuleType):
  """The functions of a backend, in plain JAX."""

  def __init__(self):
    super().__init__("plain")

  def unsupported(self, x, embedding, *, chip):
    return None if x.shape[-1] % 2 == 0 else f"an even dimension; got {x.shape[-1]}"

  def forward(self, x, embedding, targets, *, scale, num_valid, chip):
    assert x.dtype == embedding.dtype
    products = jnp.einsum("nd,vd->nv", x, embedding, preferred_element_type=jnp.float32)
    products = jnp.where(jnp.arange(embedding.shape[0]) < num_valid, products, -jnp.inf)
    top = products.max(1, initial=fused.LOWEST)
    hit = (targets[:, None] == jnp.arange(embedding.shape[0])) & jnp.isfinite(products)
    return (top, jnp.exp(scale * (products - top[:, None])).sum(1),
            scale * jnp.where(hit, products, 0).sum(1))

  def logit_gradient(self, x, rows, targets, top, spread, peak, *, first, scale, num_valid, chip):
    assert x.dtype == rows.dtype
    products = jnp.einsum("nd,vd->nv", x, rows, preferred_element_type=jnp.float32)
    column = first + jnp.arange(rows.shape[0])
    g = (jnp.exp(scale * (products - top[:, None])) * spread[:, None]
         + (targets[:, None] == column) * peak[:, None])
    return jnp.where(column < num_valid, g, 0).astype(x.dtype)


@pytest.fixture
def plain(monkeypatch):
  module = PlainBackend()
  monkeypatch.setitem(fused.OP.backends, "mosaic_gpu", lambda: module)
  monkeypatch.setattr("palm_haiku.kernels.core.guards._PLATFORMS", {"mosaic_gpu": ("cpu",)})
  return module


@pytest.fixture
def small_blocks(monkeypatch):
  """So that little has several blocks of the vocabulary, and of tokens, none of which divides."""
  blocks(monkeypatch)


def blocks(monkeypatch, block_bytes=1000, most=16, least=8, tiles=4):
  for name, value in dict(BLOCK_BYTES=block_bytes, MOST_ROWS=most, LEAST_ROWS=least,
                          WHOLE_TILES=tiles).items():
    monkeypatch.setattr(fused, name, value)


def problem(lead=(8, 6), vocabulary=50, dim=16, dtype=jnp.float32):
  return (draws.normal(0, (*lead, dim), dtype),
          draws.normal(1, (vocabulary, dim)),
          draws.integers(2, lead, 0, vocabulary))


def total(x, embedding, targets, implementation="mosaic_gpu", wrap=lambda f: f, **options):
  f = wrap(functools.partial(linear_cross_entropy, z_loss=1e-2, scale=0.25,
                             implementation=implementation, **options))
  loss, log_z = f(x, embedding, targets)
  return (loss * jnp.cos(jnp.arange(loss.size).reshape(loss.shape))).sum() + log_z.sum()


def gradients(**options):
  return jax.value_and_grad(functools.partial(total, **options), argnums=(0, 1))


@settings(max_examples=6)
@given(case=contract.cases(dims=(4, 6), dtypes=("bfloat16", "float32"), max_tokens=30,
                           max_vocabulary=50),
       block_bytes=st.sampled_from([200, 1000, 2**28]))
def test_the_contract_holds_for_plain_jax(case, block_bytes):
  @jax.jit
  def both(arrays):
    return (contract.run(PlainBackend(), case, arrays, chip=None),
            contract.run_differentiated(PlainBackend(), case, arrays))

  arrays = contract.inputs(case)
  with pytest.MonkeyPatch.context() as patch:
    blocks(patch, block_bytes)
    for results in both(arrays):
      contract.check(case, results)


full = functools.partial(pytest.param, marks=pytest.mark.full)


@functools.cache
def of_the_xla_path(vocabulary=50, dtype="float32"):
  return jax.jit(gradients(implementation="xla"))(*problem(vocabulary=vocabulary, dtype=dtype))


def unchanged(f):
  return f


@pytest.mark.parametrize("wrap", [
    unchanged, jax.jit, jax.checkpoint, jax.vmap,
    full(lambda f: jax.vmap(f, in_axes=(0, None, 0))),
    full(lambda f: lambda *x: jax.tree.map(lambda y: y[0], jax.lax.scan(
        lambda c, _: (c, f(*x)), 0, None, length=2)[1])),
], ids=["eager", "jit", "remat", "vmap of all", "vmap", "scan"])
@pytest.mark.parametrize("dtype", ["float32", full("bfloat16")])
def test_value_and_gradients_equal_the_xla_path(plain, small_blocks, wrap, dtype):
  x, embedding, targets = problem(dtype=dtype)
  if wrap is jax.vmap:
    embedding = embedding + jnp.arange(8.0)[:, None, None]
  outside = unchanged if wrap in (unchanged, jax.jit) else jax.jit
  got = outside(gradients(wrap=wrap))(x, embedding, targets)
  want = of_the_xla_path(dtype=dtype)
  if wrap is jax.vmap:
    want = jax.jit(gradients(wrap=wrap, implementation="xla"))(x, embedding, targets)
  assert got[1][0].dtype == dtype and got[1][1].dtype == jnp.float32
  tolerance = 1e-5 if dtype == "float32" else 2e-2
  chex.assert_trees_all_close(got, want, atol=tolerance, rtol=tolerance)


def calls(plain, monkeypatch, name):
  """A list that grows with each call of a backend's function that is run."""
  runs, function = [], getattr(plain, name)

  def counted(*arrays, **options):
    results = function(*arrays, **options)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results)
    # Unlike an effect, a pure callback is left out where its results are not needed.
    leaves, tree = jax.tree.flatten(results)
    return jax.pure_callback(
        lambda *x: runs.append(x[0].shape) or tree.unflatten(x), shapes, *leaves)

  monkeypatch.setattr(plain, name, counted)
  return runs


def test_blocks_cover_tokens_and_vocabulary_once(plain, monkeypatch):
  x, embedding, targets = problem()
  run = lambda: jax.block_until_ready(jax.jit(gradients())(x, embedding, targets))
  blocks(monkeypatch, 1000)  # 8 rows of the embedding and 31 tokens in float32
  runs = calls(plain, monkeypatch, "logit_gradient")
  run()
  assert sorted(runs) == sorted([(31, 8), (17, 8)] * 6 + [(31, 2), (17, 2)])
  runs.clear()
  blocks(monkeypatch, 10**6, most=48)
  run()
  assert sorted(runs) == [(48, 2), (48, 48)]


def test_an_embedding_of_another_dtype_is_never_copied_whole(plain):
  shapes = (jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),
            jax.ShapeDtypeStruct((100_000, 64), jnp.float32),
            jax.ShapeDtypeStruct((64,), jnp.int32))
  compiled = jax.jit(gradients()).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 100_000 * 64 * 2


def test_logits_do_not_exist(plain, monkeypatch):
  blocks(monkeypatch, 2**18, most=512, least=128, tiles=128)
  shapes = (jax.ShapeDtypeStruct((4096, 16), jnp.bfloat16),
            jax.ShapeDtypeStruct((8000, 16), jnp.bfloat16),
            jax.ShapeDtypeStruct((4096,), jnp.int32))
  monkeypatch.setattr(plain, "forward", lambda x, embedding, *_, **__: (
      *x[:, :3].astype(jnp.float32).T,))
  compiled = jax.jit(gradients()).lower(*shapes).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 8000 / 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("targets, tokens", [
    ("drawn", 20), ("with a competitor", 20), pytest.param("drawn", 160, marks=pytest.mark.full),
    pytest.param("with a competitor", 160, marks=pytest.mark.full)])
def test_each_draw_is_as_exact_as_xlas(plain, dtype, targets, tokens):
  """Errors of one draw, not of the worst: what storing took of g is added again."""
  def f(implementation):
    return jax.jit(jax.grad(lambda x, embedding, targets: linear_cross_entropy(
        x, embedding, targets, implementation=implementation)[0].sum() / tokens, (0, 1)))

  fused_loss, xla = f("mosaic_gpu"), f("xla")
  for seed in range(8):
    rng = np.random.default_rng(seed)
    x, embedding = 0.3 * rng.normal(size=(tokens, 64)), 0.3 * rng.normal(size=(900, 64))
    target = rng.integers(0, 900, tokens)
    if targets == "with a competitor":  # the row behind the target is nearly the same
      target, embedding = 2 * rng.permutation(450)[:tokens], embedding / 0.3
      embedding[1::2] = embedding[::2] + 0.02 * rng.normal(size=(450, 64))
      rows = embedding[target]
      x = 11 * rows / np.square(rows).sum(1, keepdims=True) + 0.02 * rng.normal(size=x.shape)
    x, embedding = jnp.asarray(x, dtype), jnp.asarray(embedding, dtype)
    wide = np.asarray(x, np.float64), np.asarray(embedding, np.float64)
    logits = wide[0] @ wide[1].T
    g = np.exp(logits - logits.max(1, keepdims=True))
    g /= tokens * g.sum(1, keepdims=True)
    g[np.arange(tokens), target] -= 1 / tokens
    error = lambda results, g=g, wide=wide: np.array([
        abs(np.asarray(got, np.float64) - want).max()
        for got, want in zip(results, (g @ wide[1], g.T @ wide[0]))])
    target = jnp.asarray(target)
    assert (error(fused_loss(x, embedding, target))
            <= 1.25 * error(xla(x, embedding, target))).all(), seed


def test_a_peak_without_a_softmax_has_an_exact_gradient(plain):
  """Of the logit alone, whose g has no other entries: no quotient by what is nearly nothing."""
  x, embedding, targets = problem(dtype=jnp.bfloat16)
  embedding = embedding.astype(x.dtype)
  for little in (0.0, 1e-30, 1e-4):
    dx = jax.grad(lambda x, little=little: (
        lambda loss, log_z: ((1 - little) * log_z - loss).sum())(*linear_cross_entropy(
            x, embedding, targets, implementation="mosaic_gpu")))(x)
    want = embedding[targets].astype(jnp.float32)
    assert jnp.abs(dx - want).max() <= 0.02 * jnp.abs(want).max()


def test_a_policy_that_keeps_the_residuals_does_not_rerun_the_kernel(plain, monkeypatch):
  runs = calls(plain, monkeypatch, "forward")
  x, embedding, targets = problem()
  embedding = embedding.astype(x.dtype)

  def number_of_runs(*names):
    runs.clear()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    wrap = lambda f: jax.checkpoint(f, policy=policy)
    jax.block_until_ready(jax.jit(gradients(wrap=wrap))(x, embedding, targets))
    return len(runs)

  assert number_of_runs("loss_log_z", "loss_logit") == 1
  assert number_of_runs("loss_logit") == 2
  assert number_of_runs() == 2


@pytest.mark.parametrize("jit", [full(False), True])
def test_other_derivatives_name_the_xla_path(plain, jit):
  x, embedding, targets = problem()
  f = lambda x, embedding: total(x, embedding, targets)
  f = jax.jit(f) if jit else f
  push = lambda x, e: jax.jvp(f, (x, e), (x, e))
  with pytest.raises(ValueError, match="no forward-mode derivative.*implementation='xla'"):
    (jax.jit(push) if jit else push)(x, embedding)
  with pytest.raises(ValueError, match="no second derivative.*implementation='xla'"):
    jax.grad(lambda x: jax.grad(f)(x, embedding).sum())(x)
  with pytest.raises(ValueError, match="no second derivative.*implementation='xla'"):
    jax.grad(lambda e: jax.grad(f)(x, e).sum())(embedding)
  twice = jax.jit(jax.grad(lambda e: jax.grad(
      lambda x: total(x, e, targets, implementation="xla"))(x).sum()))(embedding)
  assert np.all(np.isfinite(twice))


# Each vocabulary with each dtype, and with each kind of axis.
@pytest.mark.parametrize("vocabulary, dtype, kind", [
    (50, "float32", AxisType.Auto), (50, "bfloat16", AxisType.Explicit),
    full(48, "float32", AxisType.Explicit), full(48, "bfloat16", AxisType.Auto),
    full(3, "float32", AxisType.Auto), full(3, "bfloat16", AxisType.Explicit)])
def test_a_mesh_divides_tokens_and_vocabulary(plain, small_blocks, kind, vocabulary, dtype):
  x, embedding, targets = problem(vocabulary=vocabulary, dtype=dtype)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
  place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
  sharded = place(x, "data"), place(embedding), place(targets, "data")
  want = of_the_xla_path(vocabulary, dtype)
  tolerance = 1e-5 if dtype == "float32" else 2e-2
  chex.assert_trees_all_close(
      jax.jit(gradients())(*sharded), want, rtol=tolerance, atol=tolerance)


def test_inside_a_shard_map_of_the_caller(plain, small_blocks):
  x, embedding, targets = problem()
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

  def losses(x, embedding, targets, **options):
    return linear_cross_entropy(x, embedding, targets, scale=0.25, **options)[0]

  f = jax.shard_map(functools.partial(losses, implementation="mosaic_gpu"), mesh=mesh,
                    in_specs=(P("data"), P(), P("data")), out_specs=P("data"))
  both = lambda f: jax.jit(jax.value_and_grad(lambda *a: f(*a).sum(), argnums=(0, 1)))(
      x, embedding, targets)
  chex.assert_trees_all_close(both(f), both(losses), atol=1e-5, rtol=1e-5)


def test_the_same_bits_on_every_run(plain, small_blocks):
  arrays = problem(dtype=jnp.bfloat16)
  run = jax.jit(gradients())
  first, second = run(*arrays), run(*arrays)
  chex.assert_trees_all_equal(first, second)


def test_a_named_backend_says_what_it_lacks_before_anything_compiles(plain, monkeypatch):
  x, embedding, targets = problem(dim=5)
  with pytest.raises(ValueError, match="mosaic_gpu needs an even dimension; got 5"):
    total(x, embedding, targets)
  monkeypatch.setattr("palm_haiku.kernels.core.guards._PLATFORMS", {"mosaic_gpu": ("cuda",)})
  with pytest.raises(ValueError, match="mosaic_gpu needs a device of cuda; got cpu"):
    total(*problem())
