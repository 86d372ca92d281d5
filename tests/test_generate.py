import functools

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palm_haiku import PaLM, PaLMConfig
from palm_haiku.generate import generate, sample

CONFIG = PaLMConfig(11, 8, 2, 3, 4)
LITE = PaLMConfig(11, 8, 2, 3, 4, position="alibi", norm="rms", shared_kv=True)


@functools.cache
def make(config):
  model = hk.without_apply_rng(hk.transform(lambda tokens: PaLM.from_config(config)(tokens)))
  return model, jax.jit(model.init)(jax.random.key(3), jnp.zeros(4, int))


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["palm", "palm-lite"])
def test_greedy_takes_the_argmax_of_the_full_forward(config):
  model, params = make(config)
  # Sharper than at the start, so that no two logits tie.
  params = params | {"palm": params["palm"] | {"norm": 8 * params["palm"]["norm"]}}
  prompt = np.array([[1, 2, 3], [7, 7, 0]])
  tokens = generate(params, config, prompt, 12, temperature=0)
  assert tokens.shape == (2, 15)
  np.testing.assert_array_equal(tokens[:, :3], prompt)
  want = jnp.argmax(model.apply(params, tokens), -1)
  np.testing.assert_array_equal(tokens[:, 3:], want[:, 2:-1])


@pytest.mark.parametrize("config", [CONFIG, LITE], ids=["palm", "palm-lite"])
def test_prompts_of_different_lengths_are_continued_as_each_alone(config):
  _, params = make(config)
  params = params | {"palm": params["palm"] | {"norm": 8 * params["palm"]["norm"]}}
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


def test_first_token_follows_the_models_distribution():
  model, params = make(CONFIG)
  prompt = np.array([5, 1, 2])
  draws = generate(params, CONFIG, np.tile(prompt, (4000, 1)), 1, key=jax.random.key(0))[:, 3]
  want = np.asarray(jax.nn.softmax(model.apply(params, prompt)[-1]))
  got = np.bincount(draws, minlength=11) / 4000
  assert 4000 * ((got - want) ** 2 / want).sum() < 29.6  # 99.9th percentile, 10 degrees


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
    (dict(temperature=-1.0), "temperature must not be negative"),
    (dict(top_k=0), "top_k must be at least 1"),
    (dict(top_p=0.0), r"top_p must be in \(0, 1\]"),
    (dict(eod=11), "eod 11 is outside"),
    (dict(key=None), "sampling needs a key"),
])
def test_bad_input_is_named(change, message):
  _, params = make(CONFIG)
  arguments = dict(prompt=np.array([1, 2]), length=4, key=jax.random.key(0)) | change
  with pytest.raises(ValueError, match=message):
    generate(params, CONFIG, **arguments)
