import dataclasses
import json

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from palm_haiku import KVCache, PaLM, PaLMConfig, configs
from palm_haiku.model import REMAT_POLICIES
from tests import numpy_palm

LITE = dict(position="alibi", norm="rms", shared_kv=True)
ARCHITECTURES = pytest.mark.parametrize("architecture", [{}, LITE], ids=["palm", "palm-lite"])
# PaLM-lite alone in a quick run.
LITE_FIRST = pytest.mark.parametrize("architecture", [
    pytest.param({}, id="palm", marks=pytest.mark.full), pytest.param(LITE, id="palm-lite")])


def transform(config, **options):
  return hk.without_apply_rng(hk.transform(
      lambda tokens, **inputs: PaLM.from_config(config, **options)(tokens, **inputs)))


def make(config, length=9, lead=(), **options):
  """A model, random parameters (without the compilation that `init` costs), random tokens."""
  model = transform(config, **options)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, config.num_tokens, (*lead, length))
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)

  def fill(path, x):
    stacked = path[0].key.endswith("block")
    if x.ndim - stacked == 1:
      return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)
    fan_in = 1 if path[-1].key == "embedding" else x.size / x.shape[-1] / config.depth
    return jnp.asarray(rng.normal(size=x.shape) / fan_in**0.5, x.dtype)

  return model, jax.tree_util.tree_map_with_path(fill, shapes), tokens


@ARCHITECTURES
def test_matches_numpy_in_float64(architecture):
  check_against_numpy(architecture, heads=3, depth=2, length=17, half=3, ff_mult=2)


@pytest.mark.full
@ARCHITECTURES
@settings(max_examples=7)
@given(heads=st.integers(1, 6), depth=st.integers(1, 3), length=st.integers(1, 40),
       half=st.integers(1, 4), ff_mult=st.integers(1, 4))
def test_any_shape_matches_numpy_in_float64(architecture, heads, depth, length, half, ff_mult):
  check_against_numpy(architecture, heads, depth, length, half, ff_mult)


def check_against_numpy(architecture, heads, depth, length, half, ff_mult):
  config = PaLMConfig(11, 12, depth, heads, 2 * half, ff_mult, **architecture)
  with jax.enable_x64(True):
    model, params, tokens = make(config, length, dtype=jnp.float64)
    got = jax.jit(model.apply)(params, tokens)
    assert got.shape == (length, 11)
    np.testing.assert_allclose(got, numpy_palm.palm(params, np.asarray(tokens), config),
                               atol=2e-6)


# Each option of the architecture, alone or with those that it meets.
OPTIONS = pytest.mark.parametrize("options", [
    dict(window=5, global_every=2, kv_heads=2, qk_norm="layer", rope_theta=100.0, dim_ff=13),
    dict(window=4, **LITE), dict(norm_bias=True, activation="gelu", kv_heads=4),
    dict(window=6, global_every=2, position="alibi", qk_norm="l2", norm="rms")], ids=str)


@pytest.mark.full
@OPTIONS
def test_options_match_numpy_and_finite_differences_in_float64(options):
  config = PaLMConfig(11, 12, 3, 4, 6, **options)
  with jax.enable_x64(True):
    model, params, tokens = make(config, 17, dtype=jnp.float64)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(params, tokens),
                               numpy_palm.palm(params, np.asarray(tokens), config), atol=2e-6)
    loss = lambda params: np.square(apply(params, tokens)).sum()
    grads = jax.jit(jax.grad(lambda params: jnp.square(model.apply(params, tokens)).sum()))(params)
    rng = np.random.default_rng(1)
    for path, grad in jax.tree_util.tree_leaves_with_path(jax.device_get(grads)):
      step = 1e-5 * rng.normal(size=grad.shape)
      moved = [jax.tree_util.tree_map_with_path(
          lambda at, x, sign=sign: x + sign * step if at == path else x, params)
          for sign in (1, -1)]
      slope = (loss(moved[0]) - loss(moved[1])) / 2
      np.testing.assert_allclose((grad * step).sum(), slope, rtol=1e-4,
                                 atol=1e-9 * abs(slope) + 1e-8, err_msg=str(path))


@pytest.mark.parametrize("changes, message", [
    (dict(kv_heads=3), "kv_heads must divide heads; got 3 and 4"),
    (dict(kv_heads=0), "kv_heads must be a positive integer"),
    (dict(dim_ff=1.5), "dim_ff must be a positive integer"),
    (dict(global_every=2), "global_every is for models with a window"),
    (dict(norm_bias=True, norm="rms"), "norm_bias needs norm='layer'"),
    (dict(qk_norm="rms"), "qk_norm must be one of None, l2, layer; got 'rms'"),
    (dict(activation="relu"), "activation must be one of swiglu, gelu"),
    (dict(rope_theta=0.0), "rope_theta must be positive"), (dict(window=0), "window must be")])
def test_options_that_do_not_fit_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    PaLMConfig(11, 12, 2, 4, 6, **changes)


def test_the_hidden_width_follows_dim_unless_it_is_free():
  config = PaLMConfig(11, 12, 2, 4, 6)
  assert config.dim_ff == 48 and dataclasses.replace(config, dim=10, ff_mult=2).dim_ff == 20
  free = PaLMConfig(11, 12, 2, 4, 6, dim_ff=13)
  assert dataclasses.replace(free, dim=10).dim_ff == 13
  for one in (config, free):
    assert PaLMConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(one)))) == one
  old = dict(num_tokens=11, dim=12, depth=2, heads=4, qk_norm=False)  # as version 0.1 stored it
  assert PaLMConfig.from_dict(old).qk_norm is None
  assert PaLMConfig.from_dict(old | {"qk_norm": True}).qk_norm == "l2"


@pytest.mark.parametrize("name, count", [
    ("falcon-7b", 6_921_720_704), ("tiny-aya", 3_349_227_520), ("command-r7b", 8_028_033_024),
    ("palm-540b", 540_356_474_880), ("palm-62b", 62_495_662_080), ("palm-8b", 8_632_012_800),
    ("palm-lite", 29_757_952), ("palm-tiny", None), ("palm-small", None), ("palm-lite-tiny", None)])
def test_parameter_counts(name, count):
  config = configs[name]
  shapes = jax.eval_shape(
      transform(config).init, jax.random.key(0), jax.ShapeDtypeStruct((4,), jnp.int32))
  total = sum(x.size for x in jax.tree.leaves(shapes))
  assert total == config.num_params
  assert count is None or total == count


@pytest.mark.parametrize("config", [
    PaLMConfig(7, 8, 2, 3, 4, qk_norm=True), PaLMConfig(7, 8, 2, 3, 4, shared_kv=True)])
def test_parameter_counts_of_other_architectures(config):
  _, params, _ = make(config)
  assert sum(x.size for x in jax.tree.leaves(params)) == config.num_params


@pytest.mark.full
def test_any_leading_dimensions():
  config = PaLMConfig(11, 8, 2, 2, 4)
  model, params, tokens = make(config, length=5, lead=(2, 3))
  apply = jax.jit(model.apply)
  logits = apply(params, tokens)
  assert logits.shape == (2, 3, 5, 11) and logits.dtype == jnp.float32
  np.testing.assert_allclose(apply(params, tokens[1, 2]), logits[1, 2], atol=1e-5)
  np.testing.assert_allclose(apply(params, tokens[1]), logits[1], atol=1e-5)


@LITE_FIRST
def test_no_gradient_flows_from_the_future(architecture):
  config = PaLMConfig(11, 8, 2, 3, 4, **architecture)
  model, params, tokens = make(config, length=7)

  def logits_of_a_row(nudge, row):
    # The rows of the embedding stand for the positions: each position has a token of its own.
    table = params["palm"]["embedding"][:7] + nudge
    palm = params["palm"] | {"embedding": table}
    small = PaLMConfig(7, 8, 2, 3, 4, **architecture)
    out = transform(small).apply(params | {"palm": palm}, jnp.arange(7))
    return out[row]

  jacobian = jax.jit(jax.jacobian(logits_of_a_row))
  for row in range(7):
    # The output embedding is the same table, so take the part that comes through the input: the
    # Jacobian at one logit whose own table row is last.
    gradient = jacobian(jnp.zeros((7, 8)), row)[0]
    assert not np.any(gradient[row + 1:]) and np.any(gradient[row])


def test_layers_start_apart_and_well_scaled():
  model = transform(PaLMConfig(1000, 64, 3, 4, 32))
  params = jax.jit(model.init)(jax.random.key(1), jnp.zeros(4, int))
  layers = params["palm/layers/parallel_block"]
  for name, fan_in in (("query", 64), ("key", 64), ("value", 64), ("gate", 64), ("up", 64),
                       ("attn_out", 128), ("ff_out", 256)):
    weights = np.asarray(layers[name])
    assert weights.std() * fan_in**0.5 == pytest.approx(1, abs=0.05), name
    assert np.abs(weights[0] - weights[1]).max() > 0.01
  assert np.std(params["palm"]["embedding"]) == pytest.approx(1, abs=0.05)


@LITE_FIRST
def test_cache_gives_what_the_whole_sequence_gives(architecture):
  config = PaLMConfig(11, 8, 2, 3, 4, **architecture)
  model, params, tokens = make(config, length=9, lead=(2,))
  apply = jax.jit(model.apply)
  want = apply(params, tokens)
  cache = KVCache.empty(config, (2,), max_len=12)
  assert len(cache.arrays) == (1 if architecture else 2)
  got = []
  for lo, hi in ((0, 4), (4, 5), (5, 9)):
    logits, cache = apply(params, tokens[:, lo:hi], cache=cache)
    got.append(logits)
  np.testing.assert_allclose(jnp.concatenate(got, 1), want, atol=1e-5)
  assert cache.length == 9
  with pytest.raises(ValueError, match="room for 3 more positions; got 9 tokens"):
    model.apply(params, tokens, cache=cache)
  # Closed over by a jit, and with a length per sequence.
  cache = cache._replace(length=jnp.array([5, 5]))
  for function in (apply, jax.jit(lambda *x, **_: model.apply(*x, cache=cache))):
    logits, _ = function(params, tokens[:, 5:], cache=cache)
    np.testing.assert_allclose(logits, want[:, 5:], atol=1e-5)


@pytest.mark.full
def test_packed_documents_equal_separate_ones():
  config = PaLMConfig(11, 8, 2, 3, 4)
  model, params, tokens = make(config, length=9)
  apply = jax.jit(model.apply)
  packed = apply(params, tokens, segment_ids=(jnp.arange(9) >= 4).astype(jnp.int32))
  np.testing.assert_allclose(packed[:4], apply(params, tokens[:4]), atol=1e-5)
  np.testing.assert_allclose(packed[4:], apply(params, tokens[4:]), atol=1e-5)


@pytest.mark.full
def test_rematerialisation_changes_memory_not_results():
  config = PaLMConfig(11, 32, 24, 2, 16)  # so deep that what layers keep is most of it

  def grad(remat):
    model = transform(config, remat=remat)
    return jax.jit(jax.grad(
        lambda params, tokens: jnp.square(model.apply(params, tokens)).mean()))

  _, params, tokens = make(config, 256)
  compiled = {remat: grad(remat).lower(params, tokens).compile() for remat in REMAT_POLICIES}
  want = compiled["none"](params, tokens)
  for other in ("attention", "full"):
    chex.assert_trees_all_close(compiled[other](params, tokens), want, atol=1e-6)
  memory = {remat: c.memory_analysis().temp_size_in_bytes for remat, c in compiled.items()}
  # Floats that the layers keep: x, query, key, value, gate and up; x and attention; x.
  kept = {"none": 32 + 32 + 16 + 16 + 128 + 128 + 32, "attention": 32 + 32, "full": 32}
  for less, more in (("attention", "none"), ("full", "attention")):
    want = (kept[more] - kept[less]) * 4 * 256 * config.depth
    assert 0.7 * want < memory[more] - memory[less] < 1.3 * want, (memory, want)


@pytest.mark.full
def test_bfloat16_keeps_float32_parameters_and_logits():
  config = PaLMConfig(11, 32, 2, 2, 16)
  model, params, tokens = make(config, dtype=jnp.bfloat16)
  logits = jax.jit(model.apply)(params, tokens)
  assert logits.dtype == jnp.float32
  chex.assert_trees_all_equal_dtypes(params, jax.tree.map(jnp.float32, params))
  full = jax.jit(transform(config).apply)(params, tokens)
  assert 0 < np.abs(logits - full).max() < 0.1


@pytest.mark.full
def test_the_program_does_not_grow_with_depth():
  def size(depth):
    model, params, tokens = make(PaLMConfig(11, 8, depth, 2, 4))
    return len(jax.jit(model.apply).lower(params, tokens).as_text())
  assert size(12) < 1.02 * size(2)


def test_an_unknown_token_makes_its_sequence_nan_inside_jit():
  config = PaLMConfig(11, 8, 1, 2, 4)
  model, params, _ = make(config)
  logits = jax.jit(model.apply)(params, jnp.array([[3, 11, 4], [3, 10, 4]]))
  assert np.all(np.isnan(logits[0, 1:])) and np.all(np.isfinite(logits[1]))


@pytest.mark.parametrize("tokens, message", [
    (np.array([1, 11]), "token 11 is outside the vocabulary of 11 tokens"),
    (np.array([-1, 3]), "token -1 is outside the vocabulary"),
    (np.zeros((2, 0), int), "at least one token"),
    (np.array(3), "at least one token"),
    (np.array([0.5]), "tokens must be integers"),
])
def test_bad_tokens_are_named(tokens, message):
  model, params, _ = make(PaLMConfig(11, 8, 1, 2, 4))
  with pytest.raises(ValueError, match=message):
    model.apply(params, tokens)


@pytest.mark.parametrize("options, message", [
    (dict(remat="all"), "remat must be one of none, attention, full"),
    (dict(implementation="mosaic_gpu"), "mosaic_gpu needs bfloat16"),
])
def test_bad_options_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    make(PaLMConfig(11, 8, 1, 2, 4), **options)


def test_tokens_may_be_constants_of_a_compiled_function():
  model, params, tokens = make(PaLMConfig(11, 8, 1, 2, 4))
  tokens = jnp.asarray(tokens)
  np.testing.assert_allclose(jax.jit(lambda params: model.apply(params, tokens))(params),
                             model.apply(params, tokens), atol=1e-5)


def test_the_seeds_example():
  model = hk.without_apply_rng(hk.transform(lambda tokens: PaLM(
      num_tokens=200, dim=32, depth=2, heads=8, dim_head=8)(tokens)))
  tokens = jnp.zeros((1, 16), jnp.int32)
  params = jax.jit(model.init)(jax.random.key(0), tokens)
  assert jax.jit(model.apply)(params, tokens).shape == (1, 16, 200)


@LITE_FIRST
def test_the_loss_is_that_of_the_logits(architecture):
  config = PaLMConfig(11, 8, 2, 3, 4, **architecture)
  model, params, tokens = make(config, 30, (2,))
  targets, weights = np.roll(tokens, -1, -1), np.linspace(0, 2, 60).reshape(2, 30)
  segment_ids = np.arange(30) // 7 + np.zeros((2, 1), int)
  loss_of = hk.without_apply_rng(hk.transform(lambda: PaLM.from_config(config).loss(
      tokens, targets, z_loss=1e-2, weights=jnp.asarray(weights), segment_ids=segment_ids))).apply
  nll, log_z = jax.jit(loss_of)(params)
  logits = jax.jit(model.apply)(params, tokens, segment_ids=segment_ids)
  np.testing.assert_allclose(log_z, jax.nn.logsumexp(logits, -1), rtol=1e-5)
  want = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(nll, weights * (want + 1e-2 * jnp.square(log_z)), rtol=1e-4)


def test_a_norms_epsilon_and_the_scale_of_logits_are_the_configs():
  config = PaLMConfig(11, 12, 1, 2, 6, norm_eps=0.5, logits_scale=0.7)
  model, params, tokens = make(config)
  want = numpy_palm.palm(params, tokens, config) * 12**0.5 * 0.7
  np.testing.assert_allclose(jax.jit(model.apply)(params, tokens), want, atol=1e-4)


@pytest.mark.full
def test_lists_are_arrays():
  model = hk.without_apply_rng(hk.transform(lambda t, y: PaLM(13, 8, 1, 2, 4).loss(t, y)[0]))
  tokens = [[1, 2, 3], [4, 5, 6]]
  params = jax.jit(model.init)(jax.random.key(0), tokens, tokens)
  want = model.apply(params, np.array(tokens), np.array(tokens))
  np.testing.assert_array_equal(model.apply(params, tokens, tokens), want)
  np.testing.assert_allclose(jax.jit(model.apply)(params, tokens, tokens), want, rtol=1e-5)
  for bad, message in (
      ([[1, 2], [3]], "rectangular"), ([13], "token 13 is outside"), ([], "integers")):
    with pytest.raises(ValueError, match=message):
      model.apply(params, bad, bad)
