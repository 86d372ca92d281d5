"""Derivatives, residuals, meshes and choice of the kernels, with a backend written in plain JAX."""

import collections
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from palm_haiku import PaLMConfig
from palm_haiku.kernels import norms, parallel_attention_ffn, rotary
from palm_haiku.kernels.parallel_block import fused, steps
from tests.kernels import draws
from tests.kernels.parallel_block import contract
from tests.kernels.parallel_block.test_parallel_block import LITE, options_of, random_params

ARCHITECTURES = {"palm": {}, "palm-lite": LITE, "shared-kv": dict(shared_kv=True),
                 "alibi": dict(position="alibi"), "xpos": dict(xpos_scale_base=16),
                 "qk-norm": dict(qk_norm=True), "grouped": dict(kv_heads=2, dim_ff=13),
                 "grouped-lite": LITE | dict(kv_heads=4), "layer-norm of heads": dict(
                     kv_heads=2, qk_norm="layer")}


class PlainBackend(types.ModuleType):
  """The functions of a backend, in plain JAX."""

  HIDDEN = 2

  def __init__(self):
    super().__init__("plain")

  def unsupported(self, x, params, *, chip):
    return None if x.shape[-1] % 2 == 0 else f"an even dimension; got {x.shape[-1]}"

  def in_projection(self, x, params, rotation, *, norm, eps, keep, chip):
    h = norms.normalize(x, params["norm"], kind=norm, eps=eps)
    made = {name: steps.project(h, params[name]) for name in params if name != "norm"}
    if rotation is not None:
      made["query"] = rotary.rotate_by(made["query"], rotation)
      heads = made["key"].reshape(len(x), -1, made["query"].shape[-1])
      made["key"] = rotary.rotate_by(heads, rotation).reshape(len(x), -1)
    assert not params["gate"].shape[1] % self.HIDDEN
    act = jax.nn.silu(made["gate"]) * made["up"]
    return (made["query"], made["key"], made.get("value"), act,
            *((made["gate"], made["up"]) if keep else (None, None)))

  def out_projection(self, x, attended, act, attn_out, ff_out, *, chip):
    wide = lambda a, w, axes: jnp.tensordot(a, w, axes, preferred_element_type=jnp.float32)
    y = wide(attended, attn_out, 2) + wide(act, ff_out, 1)
    return (y if x is None else x + y).astype(act.dtype)

  def swiglu_gradient(self, dy, gate, up, ff_out, *, chip):
    act, pull = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up,
                        *(a.astype(jnp.float32) for a in (gate, up)))
    out = *pull((dy @ ff_out.T).astype(jnp.float32)), act
    return tuple(a.astype(dy.dtype) for a in out)

  def input_gradient(self, dquery, dkey, dvalue, dgate, dup, params, *, chip):
    given = dict(query=dquery.reshape(len(dquery), -1), key=dkey, value=dvalue, gate=dgate, up=dup)
    return sum(
        jnp.dot(d, params[name].reshape(-1, d.shape[1]).T, preferred_element_type=jnp.float32)
        for name, d in given.items() if d is not None).astype(dkey.dtype)


@pytest.fixture
def plain(monkeypatch):
  module = PlainBackend()
  monkeypatch.setitem(fused.OP.backends, "mosaic_gpu", lambda: module)
  monkeypatch.setattr("palm_haiku.kernels.core.guards._PLATFORMS", {"mosaic_gpu": ("cpu",)})
  # A kernel for the products alone.
  attention = steps.attention
  monkeypatch.setattr(steps, "attention", lambda *arrays, **options: attention(
      *arrays, **options | dict(implementation="xla")))
  return module


def problem(architecture, lead=(4, 6), dtype=jnp.float32, heads=4):
  config = PaLMConfig(10, 16, 1, heads, 8, **architecture)
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), random_params(config))
  if config.qk_norm == "l2":
    params |= dict(query_scale=jnp.full(8, 2.0), key_scale=jnp.arange(1.0, 9.0))
  elif config.qk_norm:
    scale = lambda heads: jnp.linspace(1.0, 2.0, heads * 8).reshape(heads, 8)
    params |= dict(query_scale=scale(heads), key_scale=scale(config.kv_heads))
  x = draws.normal(0, (*lead, config.dim), dtype)
  return x, params, options_of(config) | dict(xpos_scale_base=config.xpos_scale_base)


def gradients(options, implementation="mosaic_gpu", wrap=lambda f: f, **more):
  f = wrap(functools.partial(
      parallel_attention_ffn, implementation=implementation, **options, **more))

  def total(x, params):
    y = f(x, params).astype(jnp.float32)
    return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y

  return jax.grad(total, argnums=(0, 1), has_aux=True)


def assert_close(got, want, dtype="float32"):
  """Close beside the largest number of each array."""
  tolerance = 1e-5 if dtype == "float32" else 3e-2

  def close(a, b):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float),
                               atol=tolerance * max(1, np.abs(np.asarray(b, float)).max()))

  jax.tree.map(close, got, want)


full = functools.partial(pytest.param, marks=pytest.mark.full)


@functools.cache
def of_the_xla_path(dtype="float32", heads=4, **architecture):
  x, params, options = problem(architecture, dtype=dtype, heads=heads)
  return jax.jit(gradients(options, "xla"))(x, params)


@settings(max_examples=8)
@given(case=contract.cases(dims=(4, 6), hiddens=(2, 10), dim_heads=(2, 4), max_tokens=30,
                           dtypes=("bfloat16", "float32")))
def test_the_contract_holds_for_plain_jax(case):
  arrays = contract.inputs(case)
  run = jax.jit(functools.partial(contract.run, PlainBackend(), case))
  contract.check(case, run(arrays))


@pytest.mark.parametrize("name, dtype", [
    pytest.param(name, "float32",
                 marks=() if name in ("palm", "palm-lite", "grouped") else pytest.mark.full)
    for name in ARCHITECTURES] + [
    # These have every feature between them.
    full(name, "bfloat16") for name in ("xpos", "qk-norm", "grouped-lite", "layer-norm of heads")])
def test_value_and_gradients_equal_the_xla_path(plain, name, dtype):
  architecture = ARCHITECTURES[name]
  x, params, options = problem(architecture, dtype=dtype)
  got = jax.jit(gradients(options))(x, params)
  assert_close(got, of_the_xla_path(dtype, **architecture), dtype)


TRAINED = [
    *([name] for name in ("norm", "query", "key", "value", "gate", "up", "attn_out", "ff_out")),
    ["attn_out", "ff_out"], ["query_scale"], []]  # [] for x


@pytest.mark.parametrize("jit", [full(False), True])
def test_part_of_the_weights_may_be_trained(plain, jit):
  x, params, options = problem(dict(qk_norm=True, kv_heads=2, dim_ff=13))
  # Without jit each is a program: of the single weights one.
  trained = TRAINED if jit else [names for names in TRAINED if len(names) != 1 or "norm" in names]

  def total(x, part, implementation="mosaic_gpu"):
    return jnp.sin(parallel_attention_ffn(
        x, params | part, implementation=implementation, **options)).sum()

  def gradients_of_parts():
    return [jax.grad(total, argnums=1 if names else 0)(x, {name: params[name] for name in names})
            for names in trained]

  of_x, of_params = jax.jit(
      jax.grad(functools.partial(total, implementation="xla"), argnums=(0, 1)))(x, params)
  want = [{name: of_params[name] for name in names} if names else of_x for names in trained]
  assert_close((jax.jit(gradients_of_parts) if jit else gradients_of_parts)(), want)


@pytest.mark.parametrize("wrap", [
    full(jax.jit), jax.checkpoint, jax.vmap, full(lambda f: jax.vmap(f, in_axes=(0, None))),
    full(lambda f: lambda *x: jax.lax.scan(lambda c, _: (c, f(*x)), 0, None, length=2)[1][0]),
], ids=["jit", "remat", "vmap of all", "vmap", "scan"])
def test_within_other_transformations(plain, wrap):
  x, params, options = problem({})
  if wrap is jax.vmap:
    params = jax.tree.map(lambda w: w * jnp.linspace(1, 2, 4).reshape(4, *[1] * w.ndim), params)
  outside = jax.jit if wrap is not jax.jit else lambda f: f
  want = of_the_xla_path()
  if wrap is jax.vmap:
    want = jax.jit(gradients(options, "xla", wrap=wrap))(x, params)
  assert_close(outside(gradients(options, wrap=wrap))(x, params), want)


@pytest.mark.parametrize("architecture", [{}, LITE], ids=["palm", "palm-lite"])
def test_a_cache_of_the_prompt(plain, architecture):
  x, params, options = problem(architecture)
  run = functools.partial(parallel_attention_ffn, x, params, query_offset=3, kv_cache=tuple(
      jnp.zeros((4, 10, 8)) for _ in range(1 if architecture else 2)), **options)
  got, want = (jax.jit(functools.partial(run, implementation=name))()
               for name in ("mosaic_gpu", "xla"))
  assert_close(got, want)


# Each mesh with each architecture, and with each kind of axis.
@pytest.mark.parametrize("axes, heads, architecture, kind", [
    (dict(data=2, model=4), 4, LITE, AxisType.Auto),
    full(dict(data=2, model=4), 4, {}, AxisType.Explicit),
    (dict(fsdp=2, seq=2, model=2), 4, LITE, AxisType.Explicit),
    full(dict(fsdp=2, seq=2, model=2), 4, {}, AxisType.Auto),
    full(dict(data=2, model=4), 3, LITE, AxisType.Auto),
    full(dict(data=2, model=4), 3, {}, AxisType.Explicit)])
def test_a_mesh_divides_tokens_and_columns(plain, kind, architecture, axes, heads):
  x, params, options = problem(architecture, heads=heads)
  mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))
  spec = fused.Division(columns=("model",) if heads == 4 else ())
  place = lambda a, s: jax.device_put(a, NamedSharding(mesh, s))
  # With Explicit axes only the ring divides positions, and what is added must match.
  tokens = P(axes.get("fsdp") and "fsdp" or "data", kind == AxisType.Auto and "seq" in axes
             and "seq" or None)
  sharded = place(x, tokens), {n: place(w, spec.weight(n)) for n, w in params.items()}
  with jax.set_mesh(mesh):
    got = jax.jit(gradients(options))(*sharded)
  assert_close(got, of_the_xla_path(heads=heads, **architecture))


@pytest.mark.parametrize("kind, heads, kv_heads, model", [
    (AxisType.Auto, 6, 3, 2), full(AxisType.Explicit, 8, 2, 4), full(AxisType.Auto, 8, 4, 2)])
def test_a_device_makes_the_keys_of_its_queries(plain, kind, heads, kv_heads, model):
  # An odd hidden width of a device.
  architecture = dict(kv_heads=kv_heads, dim_ff=3 * model, position="alibi")
  x, params, options = problem(architecture, heads=heads)
  mesh = jax.make_mesh((2, model), ("data", "model"), axis_types=(kind,) * 2)
  with jax.set_mesh(mesh):
    got = jax.jit(gradients(options))(x, params)
  assert_close(got, of_the_xla_path(heads=heads, **architecture))


@pytest.mark.full
@pytest.mark.parametrize("heads, offset, on_mesh, name", [
    ((2,), 3, True, "mosaic_gpu"), ((2,), (0, 2, 3, 1), True, "mosaic_gpu"),
    ((4,), 3, False, "mosaic_gpu"), ((), 3, True, "mosaic_gpu"), ((2,), 3, True, "xla"),
    ((), (0, 2, 3, 1), False, "xla")])
def test_a_cache_over_explicit_axes(plain, heads, offset, on_mesh, name):
  x, params, options = problem(dict(kv_heads=heads[0] if heads else 1), heads=8)
  cache = tuple(draws.normal(n, (4, 16, *heads, 8), jnp.float32) for n in (5, 6))
  run = lambda implementation: jax.jit(functools.partial(
      parallel_attention_ffn, implementation=implementation,
      query_offset=np.array(offset) if isinstance(offset, tuple) else offset, **options))
  want = run("xla")(x, params, kv_cache=cache)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
  place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
  by_columns = fused.Division(columns=("model",))
  params = {name: place(w, by_columns.weight(name)) for name, w in params.items()}
  if on_mesh:
    x, *cache = (place(a, P("data")) for a in (x, *cache))
  with jax.set_mesh(mesh):
    got = run(name)(x, params, kv_cache=tuple(cache))
  assert_close(got, want)


@pytest.mark.full
@pytest.mark.parametrize("tokens, name", [
    (P("data", "model"), "mosaic_gpu"), (P("model"), "mosaic_gpu"), (P("data", "model"), "xla")])
def test_tokens_may_be_divided_over_the_model_axis(plain, tokens, name):
  x, params, options = problem(LITE, lead=(4, 8))
  want = jax.jit(gradients(options, "xla"))(x, params)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
  place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
  by_columns = fused.Division(columns=("model",))
  params = {name: place(w, by_columns.weight(name)) for name, w in params.items()}
  with jax.set_mesh(mesh):
    assert_close(jax.jit(gradients(options, name))(place(x, tokens), params), want)


def test_a_device_sums_its_share_once(plain):
  x, params, options = problem(LITE)
  mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    layer = functools.partial(parallel_attention_ffn, implementation="mosaic_gpu", **options)
    text = jax.jit(layer).lower(x, params).compile().as_text()
  assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1


@pytest.mark.parametrize("heads, kv_heads, key", [
    (4, 1, (16, 8)), (8, 2, (16, 1, 8)), (8, 8, (16, 2, 8)), (12, 6, (16, 3, 8))])
def test_what_a_device_has(heads, kv_heads, key):
  mesh = jax.sharding.AbstractMesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  x = jax.ShapeDtypeStruct((6, 10, 16), "bfloat16")
  config = PaLMConfig(10, 16, 1, heads, 8, kv_heads=kv_heads)
  params = {n: jax.ShapeDtypeStruct(w.shape, "float32") for n, w in random_params(config).items()}
  with jax.sharding.use_abstract_mesh(mesh):
    x, params = fused.on_one_device(x, params)
  assert x.shape == (30, 16) and {n: w.shape for n, w in params.items()} == dict(
      norm=(16,), query=(16, heads // 4, 8), key=key, value=key, gate=(16, 16), up=(16, 16),
      attn_out=(heads // 4, 8, 16), ff_out=(16, 16))


def runs_of(plain, monkeypatch, name):
  """A list that grows with each call of a backend's function that is run."""
  runs, function = [], getattr(plain, name)

  def counted(*arrays, **options):
    results = function(*arrays, **options)
    leaves, tree = jax.tree.flatten(results)
    # Unlike an effect, a pure callback is left out where its results are not needed.
    shapes = tree.unflatten([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves])
    return jax.pure_callback(
        lambda *x: runs.append(options.get("keep")) or tree.unflatten(x), shapes, *leaves)

  monkeypatch.setattr(plain, name, counted)
  return runs


def test_a_policy_chooses_what_runs_again(plain, monkeypatch):
  runs = runs_of(plain, monkeypatch, "in_projection")
  x, params, options = problem(LITE)

  def keeps(*names):
    runs.clear()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    wrap = lambda f: jax.checkpoint(f, policy=policy)
    jax.block_until_ready(jax.jit(gradients(options, wrap=wrap))(x, params))
    return len(runs) == 1

  kept = [f"block_{name}" for name in ("query", "key", "gate", "up")]
  assert keeps(*kept, "attention_out", "attention_lse")
  assert not keeps(*kept[:3], "attention_out", "attention_lse")


def test_policies_name_the_same_in_the_xla_path(capsys):
  x, params, options = problem({})
  shapes = dict(query="[4,6,4,8]", key="[4,6,1,8]", value="[4,6,1,8]", gate="[4,6,64]",
                up="[4,6,64]")

  def kept(*names):
    policy = jax.checkpoint_policies.save_only_these_names(*(f"block_{name}" for name in names))
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(functools.partial(
        parallel_attention_ffn, implementation="xla", **options), policy=policy), x, params)
    out = capsys.readouterr().out
    return {shape: out.count(f"f32{shape} ") for shape in shapes.values() if shape in out}

  for names in ([], ["gate"], ["query", "up"], list(shapes)):
    assert kept(*names) == collections.Counter(shapes[name] for name in names)


def test_gate_and_up_are_written_for_a_backward_pass_only(plain, monkeypatch):
  runs = runs_of(plain, monkeypatch, "in_projection")
  x, params, options = problem(LITE)
  jax.block_until_ready(jax.jit(functools.partial(
      parallel_attention_ffn, implementation="mosaic_gpu", **options))(x, params))
  assert runs == [False]
  runs.clear()
  jax.block_until_ready(jax.jit(gradients(options))(x, params))
  assert runs == [True]


def test_the_gradient_of_act_is_never_an_array(plain):
  x, params, options = problem(LITE, lead=(4, 64))
  wide = dict(gate=(16, 512), up=(16, 512), ff_out=(512, 16))
  params |= {name: jnp.zeros(shape) for name, shape in wide.items()}
  text = str(jax.make_jaxpr(gradients(options))(x, params))
  assert "custom_vmap_call" in text
  # gate, up, act of the forward pass; dgate, dup, act of the backward one: no seventh.
  compiled = jax.jit(gradients(options)).lower(x, params).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 7 * 256 * 512 * 4


@pytest.mark.parametrize("jit", [False, True])
def test_other_derivatives_name_the_xla_path(plain, jit):
  x, params, options = problem({})
  f = lambda x, params: parallel_attention_ffn(
      x, params, implementation="mosaic_gpu", **options).sum()
  f = jax.jit(f) if jit else f
  with pytest.raises(ValueError, match="no forward-mode derivative.*implementation='xla'"):
    jax.jvp(lambda x: f(x, params), (x,), (x,))
  with pytest.raises(ValueError, match="no second derivative.*implementation='xla'"):
    jax.grad(lambda x: jax.grad(f)(x, params).sum())(x)
  with pytest.raises(ValueError, match="no second derivative.*implementation='xla'"):
    jax.grad(lambda w: jax.grad(f)(x, params | dict(gate=w)).sum())(params["gate"])


def test_inside_a_shard_map_of_the_caller(plain):
  x, params, options = problem({})
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  layer = functools.partial(parallel_attention_ffn, **options)
  f = jax.shard_map(functools.partial(layer, implementation="mosaic_gpu"), mesh=mesh,
                    in_specs=(P("data"), P()), out_specs=P("data"))
  both = lambda f: jax.jit(jax.grad(lambda *a: jnp.sin(f(*a)).sum(), argnums=(0, 1)))(x, params)
  assert_close(both(f), both(layer))


@pytest.mark.full
def test_operation_by_operation(plain):
  x, params, options = problem({})
  with jax.disable_jit():
    got = gradients(options)(x, params)
  assert_close(got, of_the_xla_path())


@pytest.mark.full
def test_the_same_bits_on_every_run(plain):
  x, params, options = problem({}, dtype=jnp.bfloat16)
  run = jax.jit(gradients(options))
  chex.assert_trees_all_equal(run(x, params), run(x, params))


def test_a_named_backend_says_what_it_lacks_before_anything_compiles(plain, monkeypatch):
  config = PaLMConfig(10, 5, 1, 1, 4)
  with pytest.raises(ValueError, match="mosaic_gpu needs an even dimension; got 5"):
    parallel_attention_ffn(jnp.zeros((3, 5)), random_params(config), implementation="mosaic_gpu")
  monkeypatch.setattr("palm_haiku.kernels.core.guards._PLATFORMS", {"mosaic_gpu": ("cuda",)})
  x, params, options = problem({})
  with pytest.raises(ValueError, match="mosaic_gpu needs a device of cuda; got cpu"):
    parallel_attention_ffn(x, params, implementation="mosaic_gpu", **options)
