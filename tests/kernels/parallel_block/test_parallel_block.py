import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku import PaLMConfig, ParallelBlock, kernels
from palm_haiku.kernels import alibi_slopes, parallel_attention_ffn
from palm_haiku.kernels.parallel_block import xla
from tests import numpy_palm
from tests.kernels import draws

LITE = dict(norm="rms", position="alibi", shared_kv=True)


def options_of(config):
  return dict(norm=config.norm, norm_eps=config.norm_eps, rotary=config.position == "rotary",
              alibi_slopes=alibi_slopes(config.heads) if config.position == "alibi" else None)


def random_params(config, seed=0):
  d, h, k, f = config.dim, config.heads, config.dim_head, config.dim_ff
  key = (d, config.kv_heads, k) if config.kv_heads > 1 else (d, k)
  shapes = dict(norm=(d,), query=(d, h, k), key=key, value=key, gate=(d, f), up=(d, f),
                attn_out=(h, k, d), ff_out=(f, d))
  if config.shared_kv:
    del shapes["value"]
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape) / np.sqrt(shape[0]) + (name == "norm")
          for name, shape in shapes.items()}


@pytest.mark.parametrize("architecture", [{}, LITE, dict(position="alibi"), dict(shared_kv=True)],
                         ids=["palm", "palm-lite", "alibi", "shared-kv"])
@pytest.mark.parametrize("heads, length", [
    pytest.param(1, 1, marks=pytest.mark.full), (3, 7),
    pytest.param(4, 130, marks=pytest.mark.full)])
def test_matches_numpy_in_float64(architecture, heads, length):
  config = PaLMConfig(10, 12, 1, heads, 4, **architecture)
  params = random_params(config)
  x = np.random.default_rng(1).normal(size=(2, length, config.dim))
  want = np.stack([numpy_palm.block(row, params, config, layer=0) for row in x])
  with jax.enable_x64(True):
    got = jax.jit(functools.partial(parallel_attention_ffn, **options_of(config)))(x, params)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("architecture", [{}, LITE], ids=["palm", "palm-lite"])
def test_gradients_of_every_weight(architecture):
  config = PaLMConfig(10, 6, 1, 3, 4, **architecture)
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, random_params(config))
    x = draws.normal(0, (5, 6), jnp.float64)
    f = jax.jit(functools.partial(parallel_attention_ffn, **options_of(config)))
    jax.test_util.check_grads(f, (x, params), order=1, modes=("rev",))


def test_bfloat16_stays_close():
  config = PaLMConfig(10, 64, 1, 4, 16)
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), random_params(config))
  x = draws.normal(0, (2, 9, 64))
  layer = jax.jit(parallel_attention_ffn)
  got = layer(x.astype(jnp.bfloat16), params)
  assert got.dtype == jnp.bfloat16
  want = layer(x, params)
  assert np.abs(got.astype(jnp.float32) - want).max() < 0.03 * np.abs(want).max()


@pytest.mark.parametrize("architecture", [{}, LITE], ids=["palm", "palm-lite"])
def test_only_distances_count_without_a_cache(architecture):
  config = PaLMConfig(10, 12, 1, 3, 4, **architecture)
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), random_params(config))
  x = draws.normal(0, (2, 9, 12))
  run = jax.jit(lambda offset: parallel_attention_ffn(
      x, params, query_offset=offset, local_window_size=(4, 0), **options_of(config)))
  chex.assert_trees_all_close(run(7), run(0), atol=1e-5)


@pytest.mark.parametrize("qk_scales", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("architecture", [{}, LITE, dict(shared_kv=True)],
                         ids=["palm", "palm-lite", "shared-kv"])
def test_cache_gives_what_the_whole_sequence_gives(architecture, qk_scales):
  config = PaLMConfig(10, 12, 1, 3, 4, **architecture)
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), random_params(config))
  if qk_scales:
    params |= dict(query_scale=jnp.full(4, 2.0), key_scale=jnp.arange(1.0, 5.0))
  x = draws.normal(0, (2, 9, 12))
  layer = jax.jit(functools.partial(parallel_attention_ffn, **options_of(config)))
  want = layer(x, params)
  one_array = config.shared_kv and config.position == "alibi" and not qk_scales
  cache = (jnp.zeros((2, 11, 4)),) * (1 if one_array else 2)
  got = []
  for lo, hi in ((0, 4), (4, 8), (8, 9)):
    y, cache = layer(x[:, lo:hi], params, query_offset=jnp.asarray(lo), kv_cache=cache)
    got.append(y)
  chex.assert_trees_all_close(jnp.concatenate(got, 1), want, atol=1e-5)


@pytest.mark.parametrize("architecture", [{}, LITE, dict(xpos_scale_base=16)],
                         ids=["palm", "palm-lite", "xpos"])
def test_sequences_may_have_come_to_different_positions(architecture):
  config = PaLMConfig(10, 12, 1, 3, 4, **architecture)
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), random_params(config))
  run = jax.jit(lambda x, **more: parallel_attention_ffn(
      x, params, xpos_scale_base=config.xpos_scale_base, **options_of(config), **more))
  x = draws.normal(0, (2, 2, 9, 12))
  want = run(x)
  empty = (jnp.zeros((2, 2, 11, 4)),) * (1 if config.shared_kv else 2)
  _, cache = run(x[..., :7, :], query_offset=0, kv_cache=empty)
  offsets = jnp.array([[0, 3], [6, 7]])
  rows = offsets[..., None] + jnp.arange(2)
  part = jnp.take_along_axis(x, rows[..., None], -2)
  # Rows behind the offset must have no influence.
  filled = jnp.arange(11)[:, None] < offsets[..., None, None]
  cache = tuple(jnp.where(filled, a, 9.0) for a in cache)
  y, cache = run(part, query_offset=offsets, kv_cache=cache)
  chex.assert_trees_all_close(y, jnp.take_along_axis(want, rows[..., None], -2), atol=1e-5)
  y, _ = run(x[..., 8:, :] * 0 + part[..., 1:, :], query_offset=offsets + 1, kv_cache=cache)
  chex.assert_trees_all_close(y, jnp.take_along_axis(want, rows[..., 1:, None], -2), atol=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(query_offset=jnp.zeros(3, int)), r"one integer or \(2,\), one per sequence; got \(3,\)"),
    (dict(kv_cache=None), "needs a kv_cache"),
    (dict(segment_ids=np.zeros((2, 3), np.int32)), "without segment_ids"),
    (dict(is_causal=False), "causal"),
])
def test_positions_of_sequences_that_do_not_fit_are_named(change, message):
  config = PaLMConfig(10, 12, 1, 3, 4)
  arguments = dict(query_offset=jnp.zeros(2, int), kv_cache=(jnp.zeros((2, 5, 4)),) * 2) | change
  with pytest.raises(ValueError, match=message):
    parallel_attention_ffn(jnp.zeros((2, 1, 12)), random_params(config), **arguments)


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries():
  config = PaLMConfig(10, 12, 1, 3, 4)
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), random_params(config))
  params |= dict(query_scale=jnp.ones(4), key_scale=jnp.ones(4))
  x = draws.normal(0, (9, 12))
  louder = params | dict(query=params["query"] * 7, key=params["key"] * 3)
  layer = jax.jit(parallel_attention_ffn)
  chex.assert_trees_all_close(layer(x, louder), layer(x, params), atol=1e-5)


def test_xpos_decays_with_distance_alone():
  config = PaLMConfig(10, 12, 1, 3, 4)
  params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), random_params(config))
  x = draws.normal(0, (9, 12))
  f = jax.jit(lambda base, offset: parallel_attention_ffn(
      jnp.tile(x, (3, 1))[: 9 + offset], params, xpos_scale_base=base,
      segment_ids=(jnp.arange(9 + offset) >= offset).astype(int))[offset:], static_argnums=(0, 1))
  decayed = f(16, 0)
  assert np.abs(decayed - f(None, 0)).max() > 1e-3
  moved = f(16, 9)  # the same rows, nine positions later
  chex.assert_trees_all_close(moved, decayed, atol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(ff_out=None), "params lack ff_out"),
    (dict(bias=(12,)), "unknown entries: bias"),
    (dict(query_scale=(4,)), "come together"),
    (dict(key=(12, 5)), r"params\['key'\] must be \(12, 4\)"),
    (dict(attn_out=(3, 4, 11)), r"params\['attn_out'\] must be \(3, 4, 12\)"),
    (dict(gate=(12,)), r"\['gate'\] must be"),
    (dict(gate=(12, 0), up=(12, 0), ff_out=(0, 12)), "none of them 0"),
    (dict(query=(12, 3, 5), key=(12, 5), value=(12, 5), attn_out=(3, 5, 12)),
     "must be even; got 5"),
])
def test_weights_that_do_not_fit_are_named(change, message):
  params = random_params(PaLMConfig(10, 12, 1, 3, 4))
  params |= {name: shape and np.zeros(shape) for name, shape in change.items()}
  params = {name: w for name, w in params.items() if w is not None}
  with pytest.raises(ValueError, match=message):
    parallel_attention_ffn(jnp.zeros((5, 12)), params)


@pytest.mark.parametrize("x, options, message", [
    (jnp.zeros((0, 12)), {}, "at least one row"),
    (jnp.zeros(12), {}, r"x must be \[..., T, D\]"),
    (jnp.zeros((5, 12), int), {}, "x must be floating point"),
    (jnp.zeros((5, 12)), dict(norm="batch"), "norm must be layer or rms"),
    (jnp.zeros((5, 12)), dict(xpos_scale_base=0), "xpos_scale_base must be positive"),
    (jnp.zeros((5, 12)), dict(alibi_slopes=jnp.zeros(2)), r"alibi_slopes must be \[3\]"),
    (jnp.zeros((5, 12)), dict(segment_ids=jnp.zeros(4, int)), r"segment_ids must be \(5,\)"),
    (jnp.zeros((5, 12)), dict(local_window_size=-1), "must not be negative"),
    (jnp.zeros((5, 12)), dict(query_offset=0.5), "query_offset must be one integer"),
    (jnp.zeros((5, 12)), dict(kv_cache=(jnp.zeros((5, 4)),)), r"must be \(keys, values\)"),
    (jnp.zeros((5, 12)), dict(kv_cache=(jnp.zeros((4, 4)),) * 2), "S of at least 5"),
    (jnp.zeros((5, 12)), dict(kv_cache=(jnp.zeros((9, 3)),) * 2), r"\['S', 4\]"),
    (jnp.zeros((5, 12)), dict(kv_cache=(jnp.zeros((9, 4), jnp.int8),) * 2),
     "floating point; got int8"),
    (jnp.zeros((5, 12)), dict(kv_cache=(jnp.zeros((9, 4)),) * 2, query_offset=5),
     "rows 5 to 9 are not all in the cache of 9"),
    (jnp.zeros((5, 12)), dict(kv_cache=(jnp.zeros((9, 4)),) * 2, query_offset=jnp.asarray(-1)),
     "rows -1 to 3"),
    (jnp.zeros((5, 12)), dict(implementation="triton"),
     "triton needs dim a multiple of 64; got 12"),
])
def test_other_bad_input_is_named(monkeypatch, x, options, message):
  # Nothing is computed before.
  monkeypatch.setattr(xla, "parallel_attention_ffn", None)
  with pytest.raises(ValueError, match=message):
    parallel_attention_ffn(x, random_params(PaLMConfig(10, 12, 1, 3, 4)), **options)


def test_weights_of_integers_are_refused():
  params = random_params(PaLMConfig(10, 12, 1, 3, 4))
  with pytest.raises(ValueError, match=r"params\['up'\] must be floating point; got int32"):
    up = np.zeros_like(params["up"], "int32")
    parallel_attention_ffn(jnp.zeros((5, 12)), params | dict(up=up))


def test_the_op_is_what_the_module_calls():
  config = PaLMConfig(10, 12, 1, 3, 4)
  x = draws.normal(0, (5, 12))
  f = hk.without_apply_rng(hk.transform(lambda x: ParallelBlock(config)(x)))
  params = jax.jit(f.init)(jax.random.key(1), x)
  chex.assert_trees_all_equal(
      jax.jit(f.apply)(params, x), jax.jit(parallel_attention_ffn)(x, params["parallel_block"]))


@pytest.mark.parametrize("chip, backend", [("v6e", "mosaic_tpu"), ("h100", "mosaic_gpu"),
                                           ("a100", "triton")])
@pytest.mark.parametrize("changes, reason", [
    (dict(kv_heads=8, activation="gelu"), "SwiGLU"),
    (dict(norm_bias=True), "a norm without a bias")])
def test_parts_of_a_layer_that_no_kernel_has_take_xla(chip, backend, changes, reason):
  config = PaLMConfig(100, 4096, 1, 32, 128, **changes)
  layer = hk.transform(lambda: ParallelBlock(config).params())
  params, = jax.eval_shape(layer.init, jax.random.key(0)).values()
  array = lambda *shape: jax.ShapeDtypeStruct((1, 2048, *shape), jnp.bfloat16)
  block = functools.partial(
      kernels.explain, "parallel_attention_ffn", array(4096), params, chip=chip)
  assert block().implementation == "xla"
  with pytest.raises(ValueError, match=f"{backend} needs {reason}"):
    block(implementation=backend)
  key = array(config.kv_heads, 128)
  attention = kernels.explain("flash_attention", array(32, 128), key, key, chip=chip)
  assert attention.implementation == backend


@pytest.mark.parametrize("chip, backend", [("v6e", "mosaic_tpu"), ("h100", "mosaic_gpu"),
                                           ("a100", "triton")])
@pytest.mark.parametrize("changes", [
    dict(kv_heads=8), dict(kv_heads=32, dim_ff=11_001), dict(kv_heads=8, qk_norm="layer")], ids=str)
def test_kernels_make_the_products_of_public_models(chip, backend, changes):
  config = PaLMConfig(100, 4096, 1, 32, 128, **changes)
  params, = jax.eval_shape(
      hk.transform(lambda: ParallelBlock(config).params()).init, jax.random.key(0)).values()
  x = jax.ShapeDtypeStruct((1, 2048, 4096), jnp.bfloat16)
  choice = kernels.explain("parallel_attention_ffn", x, params, chip=chip, implementation=backend)
  assert choice.implementation == backend
  if chip == "v6e":
    assert kernels.explain("parallel_attention_ffn", x, params, chip=chip).implementation == backend
