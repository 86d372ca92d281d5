import dataclasses
import functools
import itertools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku import PaLM, PaLMConfig, decoder, sharding
from palm_haiku.cache import Cache, Int8Rows, empty_cache, extend
from palm_haiku.generate import generate
from palm_haiku.sampling import log_probabilities, sample

CONFIG = PaLMConfig(11, 8, 2, 3, 4)
LITE = PaLMConfig(11, 8, 2, 3, 4, position="alibi", norm="rms", shared_kv=True)

ALL = PaLMConfig(11, 8, 2, 2, 4, qk_norm=True, xpos_scale_base=32, shared_kv=True)
DRAFT = PaLMConfig(11, 4, 1, 1, 4)
# For what goes on around the model: a loop's program has each layer once.
ONE = dataclasses.replace(CONFIG, depth=1)


# PaLM-lite alone in a quick run.
LITE_FIRST = pytest.mark.parametrize("config", [
    pytest.param(CONFIG, id="palm", marks=pytest.mark.full), pytest.param(LITE, id="palm-lite")])


def sharper(params, factor=8):
  """Logits further apart than at the start, so that greedy choice has no ties."""
  return params | {"palm": params["palm"] | {"norm": factor * params["palm"]["norm"]}}


@functools.cache
def make(config):
  model = hk.without_apply_rng(hk.transform(lambda tokens: PaLM.from_config(config)(tokens)))
  model = model._replace(apply=jax.jit(model.apply))
  return model, jax.jit(model.init)(jax.random.key(3), jnp.zeros(4, int))


@LITE_FIRST
def test_greedy_takes_the_argmax_of_the_full_forward(config):
  model, params = make(config)
  params = sharper(params)
  prompt = np.array([[1, 2, 3], [7, 7, 0]])
  tokens = generate(params, config, prompt, 12, temperature=0)
  assert tokens.shape == (2, 15)
  np.testing.assert_array_equal(tokens[:, :3], prompt)
  want = jnp.argmax(model.apply(params, tokens), -1)
  np.testing.assert_array_equal(tokens[:, 3:], want[:, 2:-1])


@LITE_FIRST
def test_prompts_of_different_lengths_are_continued_as_each_alone(config):
  _, params = make(config)
  params = sharper(params)
  prompt = np.random.default_rng(0).integers(0, 11, (2, 2, 6))
  lengths = np.array([[1, 6], [6, 1]])
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


@pytest.mark.full
def test_padding_behind_prompts_may_be_anything():
  _, params = make(ONE)
  draw = lambda padding, **more: np.asarray(generate(
      params, ONE, np.array([[1, 2, 3], [7, padding, padding]]), 4, temperature=0,
      prompt_lengths=np.array([3, 1]), **more))
  for padding in (-1, 11):
    np.testing.assert_array_equal(draw(padding), draw(0))


@pytest.mark.full
def test_equal_prompt_lengths_draw_what_none_draw():
  _, params = make(ONE)
  prompt = np.array([[1, 2, 3], [7, 7, 0]])
  draw = lambda **more: np.asarray(generate(
      params, ONE, prompt, 12, key=jax.random.key(0), **more))
  np.testing.assert_array_equal(draw(prompt_lengths=np.array([3, 3])), draw())


LOGITS = jnp.log(jnp.array([0.05, 0.4, 0.1, 0.25, 0.2]))

OPTIONS = [
    dict(), dict(temperature=0.5), dict(top_k=1), dict(top_k=3), dict(top_k=99), dict(top_p=0.39),
    dict(top_p=0.41), dict(top_p=0.649), dict(top_p=0.651), dict(top_p=1.0),
    dict(top_k=4, top_p=0.6),  # 0.6 of what the four make up together
    dict(top_k=2, temperature=2.0), dict(temperature=0.7, top_p=0.75)]


def distribution(logits, temperature=1.0, top_k=None, top_p=None):
  """The probabilities that the options of `sample` leave, in float64."""
  logits = np.asarray(logits, np.float64) / temperature
  order = np.argsort(-logits, -1, kind="stable")
  best = np.take_along_axis(logits, order, -1)[..., :top_k]
  p = np.exp(best - best.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  if top_p is not None:
    p *= np.cumsum(p, -1) - p < top_p
    p /= p.sum(-1, keepdims=True)
  result = np.zeros_like(logits)
  np.put_along_axis(result, order[..., :top_k], p, -1)
  return result


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_follow_the_distribution(options, monkeypatch):
  """Exactly: `categorical` is made to return each choice in turn, with the probability it has."""
  want = distribution(LOGITS, **options)
  np.testing.assert_allclose(jnp.exp(log_probabilities(LOGITS, **options)), want, atol=1e-6)
  got, offered = np.zeros(5), []
  for choice in range(5):
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits: (
        offered.append(logits), jnp.int32(min(choice, len(logits) - 1)))[1])
    token = sample(LOGITS, jax.random.key(0), **options)
    if choice < len(offered[-1]):
      got[token] += jax.nn.softmax(offered[-1])[choice]
  np.testing.assert_allclose(got, want, atol=1e-6)


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


class Script:
  """A stand-in for `jax.random`: every way in which draws can fall, one in each row of a batch.

  A draw returns the choice that its row's script makes, and the row's weight is multiplied by the
  probability of that choice. So the weights of all rows that end with the same tokens add up to
  the probability of these tokens, exactly. Whether a guess is kept is decided by a uniform number
  that lies 0.1% below or above the odds of theorem 1 of arXiv:2211.17192: guesses that are kept
  more or less often than that, by as little, change tokens and so the sums.

  Args:
    rows: for each row a list of turns, (guesses, how many of them are kept, token behind those).
    odds: (number of tokens before, last token, guess) -> p / q.
  """

  def __init__(self, rows, odds, texts):
    self.rows, self.odds, self.keys = [list(row) for row in rows], odds, []
    self.texts, self.weights = [list(texts)] * len(rows), np.ones(len(rows))
    self.number = 0  # of the draw within a turn
    self._split = jax.random.split

  def turns(self):
    """The rows that have not ended, and their turns."""
    return [(i, row[0]) for i, row in enumerate(self.rows) if row]

  def categorical(self, key, logits):
    self.keys.append(key)
    p, tokens = distribution(logits), np.zeros(len(self.rows), np.int32)
    draws = len(self.turns()[0][1][0])
    last = not draws or self.number > draws  # One guess more than is used is drawn.
    for i, (guesses, kept, token) in self.turns():
      if last or self.number <= min(kept, draws - 1):  # Tokens behind a refusal do not count.
        choice = token if last else guesses[self.number]
        tokens[i] = min(choice, p.shape[-1] - 1)
        self.weights[i] *= p[i, choice] if choice < p.shape[-1] else 0
      if last:
        self.texts[i] = [*self.texts[i], *guesses[:kept], token]
        self.rows[i].pop(0)
    self.number = 0 if last else self.number + 1
    return jnp.asarray(tokens)

  def uniform(self, key, shape):
    self.keys.append(key)
    numbers = np.full(shape, 0.5)
    for i, (guesses, kept, _) in self.turns():
      text = list(self.texts[i])
      for number, guess in enumerate(guesses[: kept + 1]):
        odds = min(self.odds(len(text), text[-1], guess), 1)
        self.weights[i] *= odds if number < kept else 1 - odds
        numbers[i, number] = odds * (0.999 if number < kept else 1.001)
        text.append(guess)
    return jnp.asarray(numbers, jnp.float32)

  def split(self, key, num=2):
    self.keys.append(key)
    return self._split(key, num)

  def assert_that_no_key_is_used_twice(self):
    keys = [jax.random.key_data(key).tobytes() for key in self.keys]
    assert len(keys) == len(set(keys))


TABLES = np.random.default_rng(0).normal(size=(2, 8, 3, 3))  # logits by model, position and token


def generate_from_tables(prompt, length, **options):
  """`generate` with models whose logits are `TABLES`, by the position of a token and the token."""
  def run(table, config, tokens, cache, prompt_lengths=None, **_):
    positions = cache.length[..., None] + jnp.arange(tokens.shape[-1])
    positions = jnp.broadcast_to(positions, tokens.shape)
    return (jnp.stack([positions, tokens], -1),
            cache._replace(length=cache.length + tokens.shape[-1]
                           if prompt_lengths is None else prompt_lengths))

  with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
    patch.setattr(decoder, "prepare", lambda table, *_: jnp.asarray(table, jnp.float32))
    patch.setitem(generate.__globals__, "empty_cache", lambda *_: Cache((), jnp.int32(0)))
    patch.setitem(generate.__globals__, "palm_params", lambda *_: None)
    patch.setattr(decoder, "run", run)
    patch.setattr(decoder, "logits", lambda table, config, x: table[x[..., 0], x[..., 1]])
    return np.asarray(generate(TABLES[0], PaLMConfig(3, 8, 1, 1), prompt, length,
                               key=jax.random.key(0), **options))


def check_the_distribution_of_texts(draft, eod=None, **options):
  prompt, length = [2, 0], 3
  p, q = distribution(TABLES, **options)

  def ends(text):
    return len(text) >= length or eod in text

  def rows(text=()):
    if ends(text):
      return [()]
    guesses = 2 if draft and text else 0  # The first token is drawn without.
    return [((guess + (0,) * (guesses - len(guess)), kept, token), *rest)
            for kept in range(guesses + 1)
            for guess in itertools.product(range(3), repeat=min(kept + 1, guesses))
            for token in range(3) for rest in rows((*text, *guess[:kept], token))]

  want = np.zeros([3] * length)

  def expect(text=(), probability=1.0):
    if ends(text):
      want[text + (eod,) * (length - len(text))] = probability
    else:
      for token, x in enumerate(p[len(text) + 1, (*prompt, *text)[-1]]):
        expect((*text, token), probability * x)

  expect()
  script = Script(rows(), lambda n, last, guess: (
      p[n - 1, last, guess] / max(q[n - 1, last, guess], 1e-30)), prompt)
  if draft:
    options |= dict(draft=(TABLES[1], PaLMConfig(3, 8, 1, 1)), draft_length=2)
  with pytest.MonkeyPatch.context() as patch:
    for name in ("categorical", "uniform", "split"):
      patch.setattr(jax.random, name, getattr(script, name))
    drawn = generate_from_tables(np.tile(prompt, (len(script.rows), 1)), length, eod=eod, **options)
  got = np.zeros_like(want)
  np.add.at(got, tuple(drawn[:, len(prompt):].T), script.weights)
  np.testing.assert_allclose(got, want, atol=1e-6)
  script.assert_that_no_key_is_used_twice()


@pytest.mark.parametrize("draft", [False, True], ids=["alone", "with a draft"])
@pytest.mark.parametrize("options", [
    dict(temperature=0.4, top_k=2), *(pytest.param(options, marks=pytest.mark.full) for options in (
        dict(), dict(temperature=1.3, top_p=0.6, eod=1)))], ids=str)
def test_texts_have_the_probability_that_the_model_gives_them(options, draft):
  """Exactly: no number is drawn, and acceptance that is wrong by 0.1% fails; see `Script`."""
  check_the_distribution_of_texts(draft, **options)


def test_greedy_with_a_draft_is_greedy():
  params = sharper(make(LITE)[1])
  prompt = np.random.default_rng(1).integers(0, 11, (2, 3, 6))
  lengths = np.array([[1, 6, 2], [3, 5, 4]])
  options = dict(prompt_lengths=lengths, temperature=0)
  want = np.asarray(generate(params, LITE, prompt, 17, **options))
  eod = int(want[0, 0, 5])
  ended = want.copy()
  for text, n in zip(ended.reshape(-1, 23), lengths.ravel()):
    end = n + list(text[n: n + 17]).index(eod) if eod in text[n: n + 17] else n + 17
    text[end:] = eod
  # Mostly wrong; always right.
  for draft, draft_length, end_token, result in ((DRAFT, 1, None, want), (LITE, 4, eod, ended)):
    got = generate(params, LITE, prompt, 17, eod=end_token, draft_length=draft_length,
                   draft=(sharper(make(draft)[1]), draft), **options)
    np.testing.assert_array_equal(got, result)


@pytest.mark.full
def test_tokens_with_a_draft_are_streamed_in_order():
  params, seen = sharper(make(ONE)[1]), []
  tokens = generate(params, ONE, np.array([1, 2]), 9, key=jax.random.key(0), draft=(
      make(DRAFT)[1], DRAFT), on_token=lambda token: seen.append(int(token)))
  jax.effects_barrier()
  np.testing.assert_array_equal(seen, tokens[2:])


@pytest.mark.full
def test_64_bit_mode_and_a_draft_change_no_token():
  draw = lambda **options: np.asarray(generate(
      sharper(make(ONE)[1]), ONE, np.array([1, 2, 3]), 9, temperature=0, eod=0, **options))
  want = draw()
  with jax.enable_x64(True):
    np.testing.assert_array_equal(draw(draft=(make(DRAFT)[1], DRAFT)), want)


@pytest.mark.parametrize("config, dtype, cache_dtype, weights, tolerance", [
    (ALL, "bfloat16", "int8", "int8", 0.05),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        (CONFIG, "float32", "float32", None, 1e-5),
        (LITE, "float32", "float32", None, 1e-5), (ALL, "float32", "float32", None, 1e-5),
        (dataclasses.replace(LITE, qk_norm=True), "float32", "float32", None, 1e-5),
        (CONFIG, "bfloat16", "bfloat16", None, 0.03), (LITE, "bfloat16", "bfloat16", None, 0.03),
        (LITE, "float32", "int8", None, 0.03), (CONFIG, "float32", "float32", "int8", 0.03)))])
def test_decoding_is_the_full_forward_at_every_position(config, dtype, cache_dtype, weights,
                                                        tolerance):
  model, params = make(config)
  tokens = np.random.default_rng(2).integers(0, 11, (3, 14))
  want = np.asarray(model.apply(params, tokens))
  prepared = decoder.prepare(params, config, dtype, weights)
  run = jax.jit(functools.partial(decoder.run, prepared, config, dtype=dtype),
                static_argnames="fresh")
  starts = np.array([1, 5, 3])
  cache = empty_cache(config, (3,), 16, cache_dtype)
  x, cache = run(tokens[:, :5], cache, fresh=True)
  cache = cache._replace(length=jnp.asarray(starts))
  got = [[np.asarray(x)[i, :n]] for i, n in enumerate(starts)]
  for many in (1, 3, 1, 3):
    part = np.stack([row[n : n + many] for row, n in zip(tokens, starts)])
    x, cache = run(part, cache)
    starts += many
    for i in range(3):
      got[i].append(np.asarray(x)[i])
  logits = decoder.logits(prepared, config, np.concatenate([part for row in got for part in row]))
  np.testing.assert_allclose(logits, np.concatenate([want[i, : starts[i]] for i in range(3)]),
                             atol=tolerance * np.abs(want).max(), rtol=0)


def test_rows_of_an_int8_cache_are_rounded_to_127_steps():
  rows = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
  rows[0, 1] = 0
  empty = Int8Rows(jnp.zeros((2, 8, 4), jnp.int8), jnp.zeros((2, 8)))
  (stored,), _ = extend((empty,), (jnp.asarray(rows),), jnp.int32(2), axis=1, window=None,
                        by_position=False)
  largest = np.abs(rows).max(-1)
  np.testing.assert_allclose(stored.scales[:, 2:5], largest / 127, rtol=1e-6)
  want = np.round(127 * rows / np.where(largest, largest, 1)[..., None])
  np.testing.assert_array_equal(stored.values[:, 2:5], want)
  assert not np.any(stored.values[:, :2]) and not np.any(stored.values[:, 5:])


@pytest.mark.full
def test_int8_weights_generate_much_the_same():
  model, params = make(CONFIG)
  prompt = np.array([[1, 2, 3], [7, 7, 0]])
  tokens = generate(params, CONFIG, prompt, 8, temperature=0, weights="int8", cache_dtype="int8")
  logits = np.asarray(model.apply(params, tokens))[:, 2:-1]
  taken = np.take_along_axis(logits, np.asarray(tokens)[:, 3:, None], -1)[..., 0]
  assert np.all(logits.max(-1) - taken < 0.1 * np.ptp(logits, -1))


@pytest.mark.full
@pytest.mark.parametrize("weights, more", [
    (None, {}), ("int8", {}), (None, dict(kv_heads=2, window=3, global_every=2))], ids=str)
def test_many_devices_generate_what_one_does(weights, more):
  config = PaLMConfig(12, 8, more.get("global_every", 1), 4, 4, **more)
  params = sharper(make(config)[1])
  prompt = np.random.default_rng(0).integers(0, 12, (4, 5))
  options = dict(prompt_lengths=np.array([5, 2, 3, 1]), temperature=0, weights=weights)
  want = generate(params, config, prompt, 6, **options)
  mesh = sharding.make_mesh("fsdp=2,model=4")
  params = jax.device_put(params, sharding.params_shardings(params, mesh))
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(generate(params, config, prompt, 6, **options), want)
    heads = jax.tree.leaves(empty_cache(config, (4,), 8, np.float32).layers)[0].shape[2:-1]
  assert heads == ((4,) if config.kv_heads == 2 else ())  # one for each device of the model axis


@pytest.mark.full
def test_prepared_weights_are_as_good_as_parameters():
  _, params = make(ONE)
  draw = lambda params: generate(params, ONE, np.array([1, 2]), 9, key=jax.random.key(1))
  np.testing.assert_array_equal(draw(decoder.prepare(params, ONE)), draw(params))


def test_a_seed_fixes_the_sample():
  _, params = make(ONE)
  draw = lambda seed: np.asarray(generate(
      params, ONE, np.array([[1, 2], [3, 4], [5, 6]]), 30, key=jax.random.key(seed)))
  np.testing.assert_array_equal(draw(0), draw(0))
  assert np.any(draw(0) != draw(1))


@pytest.mark.full
def test_tokens_are_streamed_in_order():
  _, params = make(ONE)
  seen = []
  tokens = generate(params, ONE, np.array([[1, 2], [3, 4]]), 6, key=jax.random.key(0),
                    on_token=lambda token: seen.append(np.asarray(token)))
  jax.effects_barrier()
  np.testing.assert_array_equal(np.stack(seen, -1), tokens[:, 2:])


def test_generation_ends_with_the_document():
  _, params = make(ONE)
  prompt = np.array([[1, 2], [3, 4], [5, 6]])
  free = np.asarray(generate(params, ONE, prompt, 30, key=jax.random.key(0)))[:, 2:]
  eod = int(free[0, 3])
  seen = []
  tokens = np.asarray(generate(params, ONE, prompt, 30, key=jax.random.key(0), eod=eod,
                               on_token=lambda token: seen.append(token)))[:, 2:]
  jax.effects_barrier()
  for row, want in zip(tokens, free):
    end = int(np.argmax(want == eod)) if eod in want else len(want)
    np.testing.assert_array_equal(row[:end], want[:end])
    assert np.all(row[end:] == eod)
  # The loop itself stops when the last sequence has ended.
  longest = max(int(np.argmax(want == eod)) + 1 if eod in want else 30 for want in free)
  assert len(seen) == longest


@pytest.mark.full
def test_bfloat16():
  _, params = make(ONE)
  assert generate(params, ONE, np.array([1]), 3, temperature=0, dtype="bfloat16").shape == (4,)


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


@pytest.mark.full
def test_under_strict_promotion():
  """JAX's strict settings are for the caller's code to find its mistakes by."""
  config = dataclasses.replace(DRAFT, shared_kv=True)
  _, params = make(config)
  options = dict(prompt_lengths=[1, 2], weights="int8", cache_dtype="int8", temperature=0)
  want = generate(params, config, [[1, 2], [3, 4]], 2, **options)
  with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
    got = generate(params, config, [[1, 2], [3, 4]], 2, **options)
  np.testing.assert_array_equal(got, want)
