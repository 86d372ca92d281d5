"""Derivatives, residuals and meshes of the kernels, with a kernel written in plain JAX."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from palm_haiku.kernels import alibi_slopes, attention, flash_attention
from palm_haiku.kernels.attention.residuals import Residuals
from palm_haiku.kernels.triton import call as triton_call
from tests.kernels.attention import contract


def _distance(query, key, query_offset):
  return jnp.arange(key.shape[1]) - query_offset - jnp.arange(query.shape[1])[:, None]


def _scores(query, key, *, segment_ids, alibi_slopes, query_offset, is_causal, scale, window):
  heads, kv_heads = query.shape[2], key.shape[2]
  key = jnp.repeat(key, heads // kv_heads, 2)
  scores = scale * jnp.einsum("bthd,bshd->bhts", query, key)
  distance = _distance(query, key, query_offset)
  if alibi_slopes is not None:
    scores += alibi_slopes[:, None, None] * distance
  visible = jnp.ones_like(distance, bool)
  if is_causal:
    visible &= distance <= 0
  if window is not None:
    visible &= (distance >= -window[0]) & (distance <= window[1])
  visible = jnp.broadcast_to(visible, scores.shape[:1] + visible.shape)
  if segment_ids is not None:
    visible &= segment_ids[0][:, :, None] == segment_ids[1][:, None, :]
  return jnp.where(visible[:, None], scores, -jnp.inf)


class PlainBackend(types.ModuleType):
  """The functions of a backend, in plain JAX."""

  def __init__(self):
    super().__init__("plain")

  def unsupported(self, query, key, value, *, chip):
    return None if query.shape[-1] % 2 == 0 else f"an even dim_head; got {query.shape[-1]}"

  def forward(self, query, key, value, *, chip, **options):
    value = key if value is None else value
    scores = _scores(query.astype(jnp.float32), key.astype(jnp.float32), **options)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    value = jnp.repeat(value, query.shape[2] // value.shape[2], 2).astype(jnp.float32)
    return jnp.einsum("bhts,bshd->bthd", weights, value).astype(query.dtype), lse

  def backward(self, residuals, dout, *, chip, slope_gradients=False, **options):
    query, key, value, out, lse = residuals
    q, k, v, out_, dout_ = (x.astype(jnp.float32) for x in (
        query, key, key if value is None else value, out, dout))
    heads, kv_heads = q.shape[2], k.shape[2]
    weights = jnp.exp(_scores(q, k, **options) - jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    k, v = (jnp.repeat(x, heads // kv_heads, 2) for x in (k, v))
    dweights = jnp.einsum("bthd,bshd->bhts", dout_, v)
    delta = jnp.einsum("bthd,bthd->bht", out_, dout_)[..., None]
    dscores = weights * (dweights - delta)
    dslopes = []
    if slope_gradients:
      dslopes.append((dscores * _distance(q, k, options["query_offset"])).sum((2, 3)))
    dscores *= options["scale"]
    fold = lambda x: x.reshape(*x.shape[:2], kv_heads, -1, x.shape[-1]).sum(3)
    dquery = jnp.einsum("bhts,bshd->bthd", dscores, k).astype(query.dtype)
    dkey = fold(jnp.einsum("bhts,bthd->bshd", dscores, q))
    dvalue = fold(jnp.einsum("bhts,bthd->bshd", weights, dout_))
    if value is None:
      return dquery, (dkey + dvalue).astype(key.dtype), None, *dslopes
    return dquery, dkey.astype(key.dtype), dvalue.astype(key.dtype), *dslopes


@pytest.fixture
def plain(monkeypatch):
  module = PlainBackend()
  monkeypatch.setitem(attention.OP.backends, "mosaic_gpu", lambda: module)
  monkeypatch.setattr("palm_haiku.kernels.core.guards._PLATFORMS", {"mosaic_gpu": ("cpu",)})
  return module


fused = functools.partial(flash_attention, implementation="mosaic_gpu")
SLOPES = alibi_slopes(4)


def qkv(batch=8, num_queries=12, heads=4, kv_heads=1, dim_head=4):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(batch, num_queries, n, dim_head)), jnp.float32)
               for n in (heads, kv_heads, kv_heads))


def loss(attend):
  return lambda *x: (attend(*x) * np.cos(np.arange(x[0].size, dtype=np.float32)
                                         .reshape(x[0].shape))).sum()


@pytest.mark.full
@settings(max_examples=10)
@given(contract.cases(dim_heads=(4, 6), dtypes=("bfloat16", "float32"), max_queries=20,
                      max_keys=30))
def test_the_contract_holds_for_plain_jax(case):
  arrays = contract.inputs(case)
  q, k, v, dout = (arrays[name] for name in ("query", "key", "value", "dout"))
  module, options = PlainBackend(), dict(arrays["options"], chip=None)

  @jax.jit
  def both(q, k, v, dout):
    out, lse = module.forward(q, k, v, **options)
    return out, lse, module.backward(Residuals(q, k, v, out, lse), dout,
                                     slope_gradients=case.dslopes, **options)

  out, lse, gradients = both(q, k, v, dout)
  contract.check(case, arrays, dict(out=out, lse=lse) | contract.named(gradients))


@pytest.mark.parametrize("wrap", [
    jax.jit, pytest.param(lambda f: f, marks=pytest.mark.full),
    pytest.param(jax.checkpoint, marks=pytest.mark.full), pytest.param(
        lambda f: lambda *x: jax.lax.scan(lambda c, _: (c, f(*x)), 0, None, length=2)[1][0],
        marks=pytest.mark.full),
    lambda f: jax.jit(jax.vmap(lambda *x: f(*(y[None] for y in x))[0])),
], ids=["jit", "eager", "remat", "scan", "vmap"])
def test_value_and_gradients_equal_the_xla_path(plain, wrap):
  x = qkv()
  got, want = (jax.value_and_grad(loss(wrap(functools.partial(f, alibi_slopes=SLOPES))),
                                  argnums=(0, 1, 2))(*x) for f in (fused, flash_attention))
  chex.assert_trees_all_close(got, want, atol=1e-5, rtol=1e-5)


def test_shared_keys_and_values_arrive_as_one_array(plain, monkeypatch):
  q, k, _ = qkv()
  got, want = (jax.grad(loss(lambda q, k: f(q, k, k)), argnums=(0, 1))(q, k)
               for f in (fused, flash_attention))
  chex.assert_trees_all_close(got, want, atol=1e-5)
  monkeypatch.setattr(plain, "forward", lambda q, k, v, **_: (
      q if v is None else None, jnp.zeros(())))
  assert fused(q, k, k).shape == q.shape


@pytest.mark.full
def test_a_policy_that_keeps_the_residuals_does_not_rerun_the_kernel(plain, monkeypatch):
  runs = []
  forward = plain.forward

  def counted(*arrays, **options):
    results = forward(*arrays, **options)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), results)
    # Unlike an effect, a pure callback is left out where its results are not needed.
    return jax.pure_callback(lambda *x: runs.append(1) or x, shapes, *results)

  def number_of_runs(*names):
    runs.clear()
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    jax.block_until_ready(
        jax.jit(jax.value_and_grad(loss(jax.checkpoint(fused, policy=policy))))(*qkv()))
    return len(runs)

  monkeypatch.setattr(plain, "forward", counted)
  assert number_of_runs("attention_out", "attention_lse") == 1
  assert number_of_runs("attention_out") == 2
  assert number_of_runs() == 2


def test_an_eager_gradient_is_traced_once(plain, monkeypatch):
  traced = []
  for name in ("forward", "backward"):
    function = getattr(plain, name)
    monkeypatch.setattr(plain, name, lambda *arrays, function=function, name=name, **options: (
        traced.append(name) or function(*arrays, **options)))
  jax.grad(loss(fused))(*qkv())
  assert {"forward", "backward"} == set(traced)
  traced.clear()
  jax.grad(loss(fused))(*qkv())
  assert not traced


@pytest.mark.parametrize("jit", [False, True])
def test_other_derivatives_name_the_xla_path(plain, jit):
  q, k, v = qkv()
  f = lambda q: loss(fused)(q, k, v)
  f = jax.jit(f) if jit else f
  with pytest.raises(ValueError, match="no forward-mode derivative.*implementation='xla'"):
    jax.jit(lambda q: jax.jvp(f, (q,), (q,)))(q) if jit else jax.jvp(f, (q,), (q,))
  with pytest.raises(ValueError, match="no second derivative.*implementation='xla'"):
    jax.grad(lambda q: jax.grad(f)(q).sum())(q)


@pytest.mark.parametrize("wrap", [
    jax.jit, pytest.param(jax.checkpoint, marks=pytest.mark.full),
    pytest.param(lambda f: lambda *x: jax.lax.scan(
        lambda c, _: (c, f(*x)), 0, None, length=2)[1].sum(), marks=pytest.mark.full),
    # Slopes of each example, or the same for all.
    lambda f: jax.jit(lambda q, k, v, slopes: jax.vmap(f, (0, 0, 0, None))(
        *(y[:, None] for y in (q, k, v)), slopes).sum() + jax.vmap(f, (None, None, None, 0))(
            q, k, v, jnp.stack([slopes, 2 * slopes])).sum()),
], ids=["jit", "remat", "scan", "vmap"])
def test_gradients_of_slopes_equal_the_xla_path(plain, wrap):
  def total(attend):
    f = lambda q, k, v, slopes: loss(functools.partial(
        attend, alibi_slopes=slopes, query_offset=3, local_window_size=(7, 2)))(q, k, v)
    return wrap(f)

  x = *qkv(batch=2), jnp.asarray(SLOPES)
  for by in ((0, 1, 2, 3), (3,)):
    got, want = (jax.grad(total(f), argnums=by)(*x) for f in (fused, flash_attention))
    chex.assert_trees_all_close(got, want, atol=1e-4, rtol=1e-5)


def test_gradients_of_slopes_are_computed_where_they_are_asked_for(plain, monkeypatch):
  asked, backward = [], plain.backward
  monkeypatch.setattr(plain, "backward", lambda *arrays, slope_gradients, **options: (
      asked.append(slope_gradients)
      or backward(*arrays, slope_gradients=slope_gradients, **options)))
  f = lambda q, slopes: jnp.square(fused(q, *qkv()[1:], alibi_slopes=slopes)).sum()
  slopes = jnp.asarray(SLOPES, jnp.bfloat16)
  jax.eval_shape(jax.grad(f), qkv()[0], slopes)
  assert set(asked) == {False}
  asked.clear()
  assert jax.eval_shape(jax.grad(f, 1), qkv()[0], slopes).dtype == jnp.bfloat16
  assert set(asked) == {True}


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "mosaic_tpu", "triton"])
def test_derivatives_that_a_kernel_lacks_name_the_xla_path(implementation):
  # Nothing is compiled: what is differentiated is the call of the kernel itself.
  if implementation == "triton" and (trouble := triton_call.problem()):
    pytest.skip(f"needs {trouble}")
  shape = lambda heads: jax.ShapeDtypeStruct((1, 128, heads, 64), jnp.bfloat16)
  f = loss(functools.partial(flash_attention, implementation=implementation))

  def trace(transformed):
    return jax.eval_shape(transformed, shape(2), shape(1), shape(1))

  total = lambda g: lambda *x: g(*x).astype(jnp.float32).sum()
  trace(jax.grad(jax.checkpoint(f)))
  for again in (jax.grad(total(jax.grad(f))), jax.grad(total(jax.jit(jax.grad(f)))),
                jax.grad(total(jax.grad(jax.checkpoint(f)))), jax.jacrev(jax.grad(f))):
    with pytest.raises(ValueError, match="no second derivative.*implementation='xla'"):
      trace(again)
  with pytest.raises(ValueError, match="no forward-mode derivative.*implementation='xla'"):
    trace(jax.jacfwd(f))
  with pytest.raises(ValueError, match="no (second|forward-mode) derivative"):
    trace(jax.hessian(f))


OFFSETS = (2**24 + 7, -(2**40), 2**17 + 5, 2**30, 2**40, -(2**24))


@pytest.mark.parametrize("window", [None, (9, 4)])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "xla"])
def test_rows_far_from_all_keys(plain, is_causal, window, implementation):
  def gradients(offset, *x):
    return jax.value_and_grad(loss(functools.partial(
        flash_attention, implementation=implementation, query_offset=offset, is_causal=is_causal,
        local_window_size=window, alibi_slopes=SLOPES)), argnums=(0, 1, 2))(*x)

  traced = jax.jit(gradients)
  near = {sign: traced(sign * 30, *qkv()) for sign in (1, -1)}
  for offset in OFFSETS:
    # Near enough for exact sums, and where the mask is the same.
    want = near[1 if offset > 0 else -1]
    if abs(offset) < 2**31:
      chex.assert_trees_all_close(traced(offset, *qkv()), want, atol=1e-4, rtol=1e-4)


# Numbers that are known when a program is compiled: each is another program.
@pytest.mark.parametrize("implementation, offset, is_causal, window", [
    pytest.param(implementation, offset, is_causal, (9, 4) if windowed else None,
                 marks=() if offset in OFFSETS[:2] else pytest.mark.full)
    for m, implementation in enumerate(("mosaic_gpu", "xla"))
    for n, offset in enumerate(OFFSETS)
    for is_causal, windowed in ((True, (n + m) % 2), (False, (n + m + 1) % 2))])
def test_rows_known_to_be_far_from_all_keys(plain, implementation, offset, is_causal, window):
  f = lambda offset: jax.jit(jax.value_and_grad(loss(functools.partial(
      flash_attention, implementation=implementation, query_offset=offset, is_causal=is_causal,
      local_window_size=window, alibi_slopes=SLOPES)), argnums=(0, 1, 2)))(*qkv())
  chex.assert_trees_all_close(f(offset), f(30 if offset > 0 else -30), atol=1e-4, rtol=1e-4)


def test_a_scale_is_a_number(plain):
  with pytest.raises(ValueError, match="scale that is known.*implementation='xla'"):
    jax.jit(lambda scale: fused(*qkv(), scale=scale))(0.5)


# Each number of heads with each kind of axis, and inside and outside of the mesh's context.
@pytest.mark.parametrize("kind, kv_heads, context", [
    (AxisType.Auto, 2, True), (AxisType.Explicit, 2, False),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        (AxisType.Auto, 1, False), (AxisType.Explicit, 1, True), (AxisType.Auto, 4, True),
        (AxisType.Explicit, 4, False)))])
def test_a_mesh_divides_batch_and_heads(plain, kind, kv_heads, context):
  devices = np.array(jax.devices()[:8]).reshape(2, 2, 2)
  mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "model"), axis_types=(kind,) * 3)
  x = qkv(kv_heads=kv_heads)
  ids = jnp.tile(jnp.repeat(jnp.arange(2), 6), (8, 1))
  slopes = jnp.asarray(SLOPES)
  run = lambda f: jax.jit(jax.value_and_grad(lambda *x: loss(functools.partial(
      f, alibi_slopes=x[3], segment_ids=ids))(*x[:3]), argnums=(0, 1, 2, 3)))
  want = run(flash_attention)(*x, slopes)
  heads = "model" if kv_heads > 1 else None
  place = lambda x, heads: jax.device_put(
      x, NamedSharding(mesh, P(("data", "fsdp"), None, heads)))
  sharded = (place(x[0], "model"), place(x[1], heads), place(x[2], heads),
             jax.device_put(slopes, NamedSharding(mesh, P("model"))))
  if context:
    with jax.set_mesh(mesh):
      text = run(fused).lower(*sharded).as_text()
      got = run(fused)(*sharded)
  else:
    text = run(fused).lower(*sharded).as_text()
    got = run(fused)(*sharded)
  chex.assert_trees_all_close(got, want, atol=1e-4, rtol=1e-4)
  assert "tensor<2x12x2x4xf32>" in text  # the part of one device: batch 8/4, heads 4/2


@pytest.mark.full
def test_what_a_mesh_does_not_divide_is_repeated(plain):
  mesh = jax.make_mesh((2, 4), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)
  x = qkv(batch=3, heads=6)
  f = lambda *x: fused(*x, alibi_slopes=alibi_slopes(6))
  with jax.set_mesh(mesh):
    got = jax.jit(f)(*x)
  np.testing.assert_allclose(got, flash_attention(*x, alibi_slopes=alibi_slopes(6)), atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("heads, kv_heads, model, implementation", [
    (6, 3, 2, "mosaic_gpu"), (8, 2, 4, "mosaic_gpu"), (6, 3, 2, "xla")])
def test_key_heads_that_a_mesh_does_not_divide_are_repeated(
    plain, heads, kv_heads, model, implementation):
  mesh = jax.make_mesh((2, model), ("fsdp", "model"), axis_types=(AxisType.Auto,) * 2)
  x = qkv(heads=heads, kv_heads=kv_heads)
  x = *x, jnp.asarray(alibi_slopes(heads))
  run = lambda name: jax.jit(jax.value_and_grad(lambda *x: loss(functools.partial(
      flash_attention, implementation=name, alibi_slopes=x[3]))(*x[:3]), argnums=(0, 1, 2, 3)))
  want = run("xla")(*x)
  with jax.set_mesh(mesh):
    text = run(implementation).lower(*x).as_text()
    got = run(implementation)(*x)
  chex.assert_trees_all_close(got, want, atol=1e-4, rtol=1e-4)
  assert f"tensor<4x12x{heads // model}x4xf32>" in text


@pytest.mark.full
def test_inside_a_shard_map_of_the_caller(plain):
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  x = qkv()
  f = jax.shard_map(
      lambda q, k, v, slopes: fused(q, k, v, alibi_slopes=slopes),
      mesh=mesh, in_specs=(P("data", None, "model"), P("data"), P("data"), P("model")),
      out_specs=P("data", None, "model"))
  total = lambda attend: lambda q, k, v, slopes: loss(
      lambda *x: attend(*x, slopes))(q, k, v)
  plainly = lambda *x: flash_attention(*x[:3], alibi_slopes=x[3])
  got, want = (jax.value_and_grad(total(f), argnums=(0, 1, 2, 3))(*x, jnp.asarray(SLOPES))
               for f in (f, plainly))
  chex.assert_trees_all_close(got, want, atol=1e-4, rtol=1e-4)


def test_a_named_backend_says_what_it_lacks_before_anything_compiles(plain):
  q, k, v = qkv(dim_head=5)
  with pytest.raises(ValueError, match="mosaic_gpu needs an even dim_head; got 5"):
    fused(q, k, v)


def test_a_named_backend_says_on_what_it_runs(plain, monkeypatch):
  monkeypatch.setattr("palm_haiku.kernels.core.guards._PLATFORMS", {"mosaic_gpu": ("cuda",)})
  x = qkv()
  with pytest.raises(ValueError, match="mosaic_gpu needs a device of cuda; got cpu"):
    fused(*x)
  with pytest.raises(ValueError, match="mosaic_gpu needs a device of cuda; got cpu"):
    jax.jit(fused).lower(*x)
