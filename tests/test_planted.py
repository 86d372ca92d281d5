"""Mistakes planted outside of the kernels, each with the test that must notice it.

Small ones: an index one too far, a factor of 3%, an axis or a mask that is another.
"""

import inspect

import pytest

from palm_haiku import (
  checkpoint,
  data,
  generate,
  interop,
  loss,
  optim,
  recipe,
  sampling,
  sharding,
  speculative,
  train,
  train_step,
)
from tests import (
  test_checkpoint,
  test_data,
  test_generate,
  test_interop,
  test_loss,
  test_optim,
  test_recipe,
  test_run,
  test_sharding,
)
from tests.mutants import Mistake, planted


def adamw():
  test_optim.test_adamw_is_its_formula(dict(steps=30))


def palm():
  test_optim.test_palm_is_the_papers_formula(dict(constant_steps=2, learning_rate=0.03, clip=0.3))


def step():
  test_run.test_a_step_is_its_formula(2)


def left_out():
  test_run.test_batches_up_to_the_spike_are_left_out(504, 504)


def start(tmp_path):
  test_run.test_another_run_is_not_resumed(tmp_path)


def samples(monkeypatch):
  for options in (dict(temperature=0.5), dict(top_p=0.649), dict(top_p=0.651)):
    test_generate.test_samples_follow_the_distribution(options, monkeypatch)


def texts():
  test_generate.check_the_distribution_of_texts(draft=False)


def texts_with_a_draft():
  test_generate.check_the_distribution_of_texts(draft=True)


def divided(tmp_path):
  test_data.test_text_is_divided_without_loss_or_overlap(tmp_path, 0.25)


def evaluated():
  test_data.test_evaluation_has_every_target_once(97, 8)


def peer_in_jax():
  test_interop.check_logits("palm-jax", {})


def parameters():
  test_sharding.test_where_each_parameter_lies("adamw")


def activations():
  test_sharding.test_where_activations_lie(sharding.Rules(), None)


# Effect, place, change (old text, new text), and the test that must notice it.
PLANTED = [
    ("gradients are not clipped", optim, ("adamw", r"optax.clip_by_global_norm\(clip\), ", ""),
     adamw),
    ("beta1 of AdamW is 0.91", optim, ("adamw", r"b1=0\.9", "b1=0.91"), adamw),
    ("beta2 of AdamW is beta2^2", optim, ("adamw", "b2=b2", "b2=b2 ** 2"), adamw),
    ("gains of norms decay", optim, ("adamw", r"mask=\w+", "mask=None"), adamw),
    ("the cosine ends a step late", optim, ("schedule", r"max\((\w+), 1\)", r"\1 + 1"),
     test_optim.test_the_schedule_is_its_formula),
    ("warm-up takes a step more", optim, ("schedule", r"warmup_steps=", "warmup_steps=1 + "),
     test_optim.test_the_schedule_is_its_formula),
    ("PaLM's rate falls a step late", optim, ("palm's rate", r"count \+ 1", "count"), palm),
    ("beta2 of PaLM is 1 - k^-0.79", optim, ("palm", r"decay_rate=0\.8", "decay_rate=0.79"), palm),
    ("a step is scaled by all layers' size", optim, ("root mean square", r"int\(.*?\)\)", "0"),
     palm),
    ("PaLM's decay is linear in the rate", optim, ("palm's decay", r" \*\* 2", ""), palm),
    ("the first skipped batch is read", recipe, ("skipped batch", ">=", ">"),
     test_recipe.test_skipped_batches),
    ("a ramp reads a sequence twice", recipe, ("batch ramp", r"$", " - (batch > start)"),
     test_recipe.test_every_sequence_is_read_once_through_a_ramp),
    ("the z-loss is dropped", train_step, ("z-loss", r"z_loss=[\w.]+", "z_loss=0.0"), step),
    ("gradients of parts are summed", train_step, ("part of a batch", "1 / num_parts", "1"), step),
    ("segments are those of the targets", train_step, ("segments", ":-1", "1:"), step),
    ("the optimizer forgets", train_step, ("new state", "opt_state", "state.opt_state"), step),
    ("the mean is over padding as well", loss, ("weighted tokens", r"weights\.sum\(\)", "nll.size"),
     test_loss.test_matches_numpy),
    ("temperature is 3% higher", sampling, ("temperature", r"maximum\(", "maximum(1.03 * "),
     samples),
    ("top-p keeps one token too many", sampling, ("nucleus", r"- (\w+)$", r"- 2 * \1"), samples),
    ("top-p keeps one token too few", sampling, ("nucleus", r" - \w+$", ""), samples),
    ("each token is drawn with one key", generate, ("key", r"\(key, i\)", "(key, 1)"), texts),
    ("a draft is accepted 15% too often", speculative, ("acceptance", "< ", "< 1.15 * "),
     texts_with_a_draft),
    ("a draft is accepted 3% too often", speculative, ("acceptance", "< ", "< 1.03 * "),
     texts_with_a_draft),
    ("a draft is accepted 3% too rarely", speculative, ("acceptance", "< ", "< 0.97 * "),
     texts_with_a_draft),
    ("a refused token may come again", speculative,
     ("residual", r"maximum\(p - q, 0\)", "abs(p - q)"), texts_with_a_draft),
    ("the caches are a position ahead", speculative, ("filled", " - 1", ""), texts_with_a_draft),
    ("held-out text overlaps the training data", data,
     ("held out", r"\[(\w+):\]", r"[max(0, \1 - 1):]"), divided),
    ("the shift never is the largest", data, ("shift", r"slack \+ 1", "max(1, slack)"),
     test_data.test_the_seed_decides_where_windows_begin_and_their_order),
    ("the seed does not decide the order", data, ("order", "seed=seed", "seed=0"),
     test_data.test_the_seed_decides_where_windows_begin_and_their_order),
    ("the last held-out token does not count", data, ("held-out batch", "<=", "<"), evaluated),
    ("the checkpoint gone back to is deleted", checkpoint, ("forget", "later > ", "later >= "),
     test_checkpoint.test_later_checkpoints_are_forgotten),
    ("a step reads the next batch", train, ("batch of a step", r"\(step\)", "(step + 1)"),
     test_run.test_steps_read_the_batches_that_are_their_turn),
    ("only the first held-out batches count", train, ("evaluation", r"(sums)", r"\1[:-1]"),
     test_run.test_evaluation_is_the_mean_over_held_out_tokens),
    ("a spike is above the mean", train, ("spike", "median", "mean"),
     test_run.test_a_spike_is_above_the_median_of_recent_losses),
    ("a run goes back one checkpoint too far", train, ("back", "<=", "<"),
     test_run.test_a_run_goes_back_far_enough),
    ("the batch of the spike is read again", train, ("left out", r"\(step\)", "(step - 1)"),
     left_out),
    ("a run goes on with other data", train, ("other data", "if .*:", "if False:"), start),
    ("rows of heads and their channels are exchanged", interop,
     ("a peer's layer", r"(reshape\()-1, dim_head, (dim\))", r"\1dim_head, -1, \2.swapaxes(0, 1)"),
     peer_in_jax),
    ("rotary pairs are permuted the wrong way", interop, ("rotary pairs", r"np\.argsort", ""),
     peer_in_jax),
    ("gate and up are exchanged", interop, ("a peer's layer", r"'up'(.*)'gate'", r"'gate'\1'up'"),
     peer_in_jax),
    ("the axis of the layers is last", sharding,
     ("parameter", r"\*stack, (.*)\)$", r"\1, *stack)"), parameters),
    ("leading axes are taken for the batch", sharding, ("activation", r"(\(None.*\)) \+ (\w+)$",
                                                        r"\2 + \1"), activations),
]


@pytest.mark.full
@pytest.mark.parametrize("module, mistake, notices", [
    pytest.param(module, Mistake(*how), notices, id=name)
    for name, module, how, notices in PLANTED])
def test_a_planted_mistake_is_noticed(module, mistake, notices, tmp_path, monkeypatch):
  fixtures = dict(tmp_path=tmp_path, monkeypatch=monkeypatch)
  arguments = {name: fixtures[name] for name in inspect.signature(notices).parameters}
  traced = notices not in (texts, texts_with_a_draft)  # which disable jit
  train_step._program.cache_clear()  # Shardings are decided in Python, outside of JAX's traces.
  with planted(module, mistake, traced=traced), pytest.raises(AssertionError):
    notices(**arguments)
  train_step._program.cache_clear()


@pytest.mark.full
@pytest.mark.parametrize("name, axes", [
    ("query", ("heads", "embed", None)), ("attn_out", ("heads", "embed", None)),
    ("ff_out", ("embed", "ff")), ("key", (None, None)), ("embedding", ("embed", "vocab"))])
def test_a_wrong_axis_is_noticed(name, axes, monkeypatch):
  monkeypatch.setitem(sharding._PARAMETERS, name, axes)
  sharding_of = test_sharding.train_step._program
  sharding_of.cache_clear()
  with pytest.raises(AssertionError):
    parameters()
  sharding_of.cache_clear()
