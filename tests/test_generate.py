import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from palm_haiku import PaLM, PaLMConfig, decoder, sharding
from palm_haiku.generate import generate
from palm_haiku.sampling import log_probabilities, sample

CONFIG = PaLMConfig(11, 8, 2, 3, 4)
LITE = PaLMConfig(11, 8, 2, 3, 4, position="alibi", norm="rms", shared_kv=True)

ALL = PaLMConfig(11, 8, 2, 2, 4, qk_norm=True, xpos_scale_base=32, shared_kv=True)
DRAFT = PaLMConfig(11, 4, 1, 1, 4)


def sharper(params, factor=8):
  """Logits further apart than at the start, so that greedy choice has no ties."""
  return params | {"palm": params["palm"] | {"norm": factor * params["palm"]["norm"]}}


@functools.cache
def make(config):
  model = hk.without_apply_rng(hk.transform(lambda tokens: PaLM.from_config(config)(tokens)))
  return model, jax.jit(model.init)(jax.random.key(3), jnp.zeros(4, int))


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["palm", "palm-lite"])
def test_greedy_takes_the_argmax_of_the_full_forward(config):
  model, params = make(config)
  params = sharper(params)
  prompt = np.array([[1, 2, 3], [7, 7, 0]])
  tokens = generate(params, config, prompt, 12, temperature=0)
  assert tokens.shape == (2, 15)
  np.testing.assert_array_equal(tokens[:, :3], prompt)
  want = jnp.argmax(model.apply(params, tokens), -1)
  np.testing.assert_array_equal(tokens[:, 3:], want[:, 2:-1])


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["palm", "palm-lite"])
def test_prompts_of_different_lengths_are_continued_as_each_alone(config):
  _, params = make(config)
  params = sharper(params)
  prompt = np.random.default_rng(0).integers(0, 11, (2, 2, 6))
  lengths = np.array([[1, 6], [3, 5]])
  seen = []
  tokens = generate(params, config, prompt, 9, prompt_lengths=lengths, temperature=0,
                    on_token=lambda token: seen.append(np.asarray(token)))
  jax.effects_barrier()
  assert tokens.shape == (2, 2, 15)
  for index in np.ndindex(2, 2):
    n = lengths[index]
    alone = generate(params, config, prompt[index][:n], 9, temperature=0)
    np.testing.assert_array_equal(tokens[index][: n + 9], alone)
    np.testing.assert_array_equal(np.stack(seen, -1)[index], alone[n:])
    assert not np.any(tokens[index][n + 9 :])


def test_padding_behind_prompts_may_be_anything():
  _, params = make(CONFIG)
  draw = lambda padding, **more: np.asarray(generate(
      params, CONFIG, np.array([[1, 2, 3], [7, padding, padding]]), 4, temperature=0,
      prompt_lengths=np.array([3, 1]), **more))
  for padding in (-1, 11):
    np.testing.assert_array_equal(draw(padding), draw(0))


def test_equal_prompt_lengths_draw_what_none_draw():
  _, params = make(CONFIG)
  prompt = np.array([[1, 2, 3], [7, 7, 0]])
  draw = lambda **more: np.asarray(generate(
      params, CONFIG, prompt, 12, key=jax.random.key(0), **more))
  np.testing.assert_array_equal(draw(prompt_lengths=np.array([3, 3])), draw())


def frequencies(logits, count=20_000, **options):
  keys = jax.random.split(jax.random.key(0), count)
  draw = jax.jit(jax.vmap(lambda key: sample(logits, key, **options)))
  return np.bincount(draw(keys), minlength=len(logits)) / count


LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.25, 0.2]))


@pytest.mark.parametrize("options, kept, temperature", [
    (dict(), [0, 1, 2, 3, 4], 1.0),
    (dict(temperature=0.5), [0, 1, 2, 3, 4], 0.5),
    (dict(top_k=1), [1], 1.0),
    (dict(top_k=3), [1, 3, 4], 1.0),
    (dict(top_k=99), [0, 1, 2, 3, 4], 1.0),
    (dict(top_p=0.39), [1], 1.0),
    (dict(top_p=0.7), [1, 3, 4], 1.0),
    (dict(top_p=1.0), [0, 1, 2, 3, 4], 1.0),
    (dict(top_k=4, top_p=0.6), [1, 3], 1.0),  # 0.6 of what the four make up together
    (dict(top_k=2, temperature=2.0), [1, 3], 2.0),
])
def test_samples_follow_the_distribution(options, kept, temperature):
  got = frequencies(LOGITS, **options)
  want = np.zeros(5)
  want[kept] = np.exp(np.asarray(LOGITS)[kept] / temperature)
  want /= want.sum()
  assert not np.any(got[want == 0])
  # Pearson's chi-square; the 99.9th percentile for 4 degrees of freedom is 18.5.
  chi_square = 20_000 * ((got - want)[want > 0] ** 2 / want[want > 0]).sum()
  assert chi_square < 18.5


@pytest.mark.parametrize("options", [
    dict(temperature=1e-30), dict(temperature=1e-38), dict(temperature=1e-50),
    dict(temperature=1e-38, top_k=3), dict(top_p=1e-50), dict(temperature=1e-50, top_p=1e-50)],
    ids=str)
def test_nearly_nothing_leaves_the_likeliest_token(options):
  best = jnp.array([0.0, 0.0, 0.0, 1.0, 0.0])
  for logits in (LOGITS, LOGITS - 1e4, 200 * best - 100):
    want = int(jnp.argmax(logits))
    assert int(sample(logits, jax.random.key(0), **options)) == want
    np.testing.assert_array_equal(
        jnp.exp(log_probabilities(logits, **options)), np.eye(5)[want])


@pytest.mark.parametrize("draft", [False, True], ids=["alone", "with a draft"])
@pytest.mark.parametrize("options", [
    dict(), dict(temperature=0.4), dict(temperature=2.0, top_k=4), dict(top_p=0.6),
    dict(temperature=0.7, top_k=5, top_p=0.9)], ids=str)
def test_two_tokens_follow_the_models_distribution(options, draft):
  model, params = make(CONFIG)
  params = sharper(params, 2)
  count, prompt = 8000, np.array([5, 1, 2])
  if draft:
    options = options | dict(draft=(sharper(make(DRAFT)[1], 2), DRAFT), draft_length=2)
  draws = generate(params, CONFIG, np.tile(prompt, (count, 1)), 2, key=jax.random.key(0), **options)
  got = np.zeros((11, 11))
  np.add.at(got, tuple(np.asarray(draws[:, 3:]).T), 1)
  options = {name: x for name, x in options.items() if "draft" not in name}
  log_p = lambda tokens: log_probabilities(model.apply(params, tokens)[:, -1], **options)
  both = np.concatenate([np.tile(prompt, (11, 1)), np.arange(11)[:, None]], 1)
  want = count * np.exp(np.asarray(log_p(prompt[None]).T + log_p(both), np.float64))
  assert not np.any(got[want == 0])
  # Pearson's chi-square; cells where less than five are expected are one cell.
  few = want < 5
  got, want = (np.append(x[~few], x[few].sum()) for x in (got, want))
  chi_square = ((got - want)[want > 0] ** 2 / want[want > 0]).sum()
  assert chi_square < scipy.stats.chi2.ppf(0.999, (want > 0).sum() - 1)


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["palm", "palm-lite"])
def test_greedy_with_a_draft_is_greedy(config):
  params = sharper(make(config)[1])
  prompt = np.random.default_rng(1).integers(0, 11, (2, 3, 6))
  lengths = np.array([[1, 6, 2], [3, 5, 4]])
  options = dict(prompt_lengths=lengths, temperature=0)
  want = generate(params, config, prompt, 17, **options)
  for draft, draft_length in ((DRAFT, 1), (config, 4)):  # mostly wrong; always right
    more = dict(draft=(sharper(make(draft)[1]), draft), draft_length=draft_length)
    np.testing.assert_array_equal(generate(params, config, prompt, 17, **options, **more), want)
  eod = int(want[0, 0, 5])
  np.testing.assert_array_equal(
      generate(params, config, prompt, 17, eod=eod, **options, **more),
      generate(params, config, prompt, 17, eod=eod, **options))


def test_tokens_with_a_draft_are_streamed_in_order():
  params, seen = sharper(make(CONFIG)[1]), []
  tokens = generate(params, CONFIG, np.array([1, 2]), 9, key=jax.random.key(0), draft=(
      make(DRAFT)[1], DRAFT), on_token=lambda token: seen.append(int(token)))
  jax.effects_barrier()
  np.testing.assert_array_equal(seen, tokens[2:])


def test_64_bit_mode_changes_no_token():
  draw = lambda: np.asarray(generate(
      sharper(make(CONFIG)[1]), CONFIG, np.array([1, 2, 3]), 9, temperature=0, eod=0,
      draft=(make(DRAFT)[1], DRAFT)))
  want = draw()
  with jax.enable_x64(True):
    np.testing.assert_array_equal(draw(), want)


@pytest.mark.parametrize("config, dtype, cache_dtype, weights, tolerance", [
    (CONFIG, "float32", "float32", None, 1e-5), (LITE, "float32", "float32", None, 1e-5),
    (ALL, "float32", "float32", None, 1e-5), (CONFIG, "bfloat16", "bfloat16", None, 0.03),
    (LITE, "bfloat16", "bfloat16", None, 0.03), (LITE, "float32", "int8", None, 0.03),
    (CONFIG, "float32", "float32", "int8", 0.03), (ALL, "bfloat16", "int8", "int8", 0.05)])
def test_decoding_is_the_full_forward_at_every_position(config, dtype, cache_dtype, weights,
                                                        tolerance):
  model, params = make(config)
  tokens = np.random.default_rng(2).integers(0, 11, (3, 14))
  want = np.asarray(model.apply(params, tokens))
  prepared = decoder.prepare(params, config, dtype, weights)
  run = jax.jit(functools.partial(decoder.run, prepared, config, dtype=dtype),
                static_argnames="fresh")
  starts = np.array([1, 5, 3])
  cache = decoder.empty_cache(config, (3,), 16, cache_dtype)
  x, cache = run(tokens[:, :5], cache, fresh=True)
  cache, got = cache._replace(length=jnp.asarray(starts)), [[x[i, :n]] for i, n in enumerate(starts)]
  for many in (1, 3, 1, 3):
    part = np.stack([row[n : n + many] for row, n in zip(tokens, starts)])
    x, cache = run(part, cache)
    starts += many
    for i in range(3):
      got[i].append(x[i])
  for i in range(3):
    logits = decoder.logits(prepared, config, jnp.concatenate(got[i]))
    np.testing.assert_allclose(logits, want[i, : starts[i]],
                               atol=tolerance * np.abs(want).max(), rtol=0)


def test_int8_weights_generate_much_the_same():
  model, params = make(CONFIG)
  prompt = np.array([[1, 2, 3], [7, 7, 0]])
  tokens = generate(params, CONFIG, prompt, 8, temperature=0, weights="int8", cache_dtype="int8")
  logits = np.asarray(model.apply(params, tokens))[:, 2:-1]
  taken = np.take_along_axis(logits, np.asarray(tokens)[:, 3:, None], -1)[..., 0]
  assert np.all(logits.max(-1) - taken < 0.1 * np.ptp(logits, -1))


@pytest.mark.parametrize("weights", [None, "int8"])
def test_many_devices_generate_what_one_does(weights):
  config = PaLMConfig(12, 8, 2, 4, 4)
  params = sharper(make(config)[1])
  prompt = np.random.default_rng(0).integers(0, 12, (4, 5))
  options = dict(prompt_lengths=np.array([5, 2, 3, 1]), temperature=0, weights=weights)
  want = generate(params, config, prompt, 6, **options)
  mesh = sharding.make_mesh("fsdp=2,model=4")
  params = jax.device_put(params, sharding.params_shardings(params, mesh))
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(generate(params, config, prompt, 6, **options), want)


def test_prepared_weights_are_as_good_as_parameters():
  _, params = make(CONFIG)
  draw = lambda params: generate(params, CONFIG, np.array([1, 2]), 9, key=jax.random.key(1))
  np.testing.assert_array_equal(draw(decoder.prepare(params, CONFIG)), draw(params))


def test_a_seed_fixes_the_sample():
  _, params = make(CONFIG)
  draw = lambda seed: np.asarray(generate(
      params, CONFIG, np.array([1]), 20, key=jax.random.key(seed)))
  np.testing.assert_array_equal(draw(0), draw(0))
  assert np.any(draw(0) != draw(1))


def test_tokens_are_streamed_in_order():
  _, params = make(CONFIG)
  seen = []
  tokens = generate(params, CONFIG, np.array([[1, 2], [3, 4]]), 6, key=jax.random.key(0),
                    on_token=lambda token: seen.append(np.asarray(token)))
  jax.effects_barrier()
  np.testing.assert_array_equal(np.stack(seen, -1), tokens[:, 2:])


def test_generation_ends_with_the_document():
  _, params = make(CONFIG)
  prompt = np.array([[1, 2], [3, 4], [5, 6]])
  free = np.asarray(generate(params, CONFIG, prompt, 30, key=jax.random.key(0)))[:, 2:]
  eod = int(free[0, 3])
  seen = []
  tokens = np.asarray(generate(params, CONFIG, prompt, 30, key=jax.random.key(0), eod=eod,
                               on_token=lambda token: seen.append(token)))[:, 2:]
  jax.effects_barrier()
  for row, want in zip(tokens, free):
    end = int(np.argmax(want == eod)) if eod in want else len(want)
    np.testing.assert_array_equal(row[:end], want[:end])
    assert np.all(row[end:] == eod)
  # The loop itself stops when the last sequence has ended.
  longest = max(int(np.argmax(want == eod)) + 1 if eod in want else 30 for want in free)
  assert len(seen) == longest


def test_bfloat16():
  _, params = make(CONFIG)
  assert generate(params, CONFIG, np.array([1]), 3, temperature=0, dtype="bfloat16").shape == (4,)


@pytest.mark.parametrize("change, message", [
    (dict(prompt=np.zeros((2, 0), int)), "prompt must be"),
    (dict(prompt=np.array([0.5])), "prompt must be"),
    (dict(prompt=np.array([11])), "prompt token 11 is outside the vocabulary of 11"),
    (dict(prompt_lengths=np.array([1])), r"prompt_lengths must be int\[\], one per prompt"),
    (dict(prompt_lengths=np.array(1.0)), "prompt_lengths must be int"),
    (dict(prompt_lengths=np.array(0)), "prompt length 0 is outside 1 to 2"),
    (dict(prompt_lengths=np.array(3)), "prompt length 3 is outside 1 to 2"),
    (dict(length=0), "length must be at least 1"),
    (dict(length=2.0), "length must be an integer; got 2.0"),
    (dict(top_k=2.0), "top_k must be an integer; got 2.0"),
    (dict(cache_dtype="int16"), "cache_dtype must be floating point or int8; got int16"),
    (dict(temperature=-1.0), "temperature must not be negative"),
    (dict(top_k=0), "top_k must be at least 1"),
    (dict(top_p=0.0), r"top_p must be in \(0, 1\]"),
    (dict(eod=11), "eod 11 is outside"),
    (dict(key=None), "sampling needs a key"),
    (dict(weights="int4"), "weights must be None or 'int8'; got 'int4'"),
    (dict(draft=({}, PaLMConfig(12, 8, 1, 1))), "vocabulary of the model, 11 tokens; it has 12"),
    (dict(draft=({}, CONFIG), draft_length=0), "draft_length must be at least 1"),
    (dict(draft=({}, CONFIG), draft_length=1.5), "draft_length must be an integer; got 1.5"),
    (dict(prompt=np.array([1, 11]), prompt_lengths=np.array(2)), "prompt token 11 is outside"),
    (dict(draft=({}, CONFIG), prompt=np.ones((2, 2), int), on_token=print), "a single sequence"),
])
def test_bad_input_is_named(change, message):
  _, params = make(CONFIG)
  arguments = dict(prompt=np.array([1, 2]), length=4, key=jax.random.key(0)) | change
  with pytest.raises(ValueError, match=message):
    generate(params, CONFIG, **arguments)
