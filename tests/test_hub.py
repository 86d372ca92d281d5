"""Models of the hub: loaded against float64, generated with a cache, saved, and refused."""

import json
import math
import shutil

import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import AxisType

from palm_haiku import PaLM, PaLMConfig, hub, sharding
from palm_haiku.generate import generate
from tests import numpy_hub, numpy_peers
from tests.numpy_hub import COHERE, COHERE2, FALCON

TOKENS = np.random.default_rng(3).integers(0, 37, 23)

MODELS = {
    "grouped": COHERE,
    "multi-query": COHERE | dict(num_key_value_heads=1, hidden_size=16, num_hidden_layers=1),
    "multi-head": COHERE | dict(num_key_value_heads=4, num_hidden_layers=1),
    "qk-norm": COHERE | dict(use_qk_norm=True, num_hidden_layers=2),
    "windows": COHERE2,
    "windows alone": COHERE2 | dict(num_hidden_layers=2, layer_types=["sliding_attention"] * 2),
    "no positions": COHERE2 | dict(num_hidden_layers=2, layer_types=["full_attention"] * 2),
    "falcon": FALCON,
}


def forward(config, params, tokens=TOKENS):
  apply = hk.without_apply_rng(hk.transform(lambda t: PaLM.from_config(config)(t))).apply
  return np.asarray(jax.jit(apply)(params, tokens))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """name -> (directory, fields, tensors), each written once."""
  written = {}

  def get(name):
    if name not in written:
      fields = MODELS[name]
      arrays = numpy_hub.tensors(fields)
      path = tmp_path_factory.mktemp("hub") / "model"
      numpy_hub.write(path, fields, arrays, shards=3 if name == "windows" else 1)
      written[name] = path, fields, arrays
    return written[name]

  return get


@pytest.mark.parametrize("name", [
    name if name in ("windows", "falcon") else pytest.param(name, marks=pytest.mark.full)
    for name in MODELS])
def test_logits_and_greedy_continuation_are_the_formulas(name, model):
  path, fields, arrays = model(name)
  config, params = hub.load(path)
  assert sum(x.size for x in jax.tree.leaves(params)) == config.num_params
  want = numpy_hub.logits(fields, arrays, TOKENS)
  np.testing.assert_allclose(forward(config, params), want, rtol=0,
                             atol=2e-5 * max(1, np.abs(want).max()))
  # The prompt is longer than the window of those that have one.
  out = generate(params, config, TOKENS[:12], 6, temperature=0)
  for i in range(12, 18):
    assert out[i] == numpy_hub.logits(fields, arrays, out[:i])[-1].argmax()


@pytest.mark.full
@pytest.mark.parametrize("name", ["windows", "windows alone", "qk-norm", "falcon"])
def test_ragged_prompts_drafts_and_int8(name, model):
  """A batch of prompts of any lengths, and a draft that is always right, change nothing."""
  path, fields, arrays = model(name)
  config, params = hub.load(path)
  lengths = np.array([1, 12, 5])
  prompts = np.stack([TOKENS[:12]] * 3)
  options = dict(prompt_lengths=lengths, temperature=0)
  together = generate(params, config, prompts, 9, **options)
  for row, n in zip(np.asarray(together), lengths):
    np.testing.assert_array_equal(row[:n], TOKENS[:n])
    best = numpy_hub.logits(fields, arrays, row[:n + 8]).argmax(-1)
    np.testing.assert_array_equal(row[n:n + 9], best[n - 1:])
  drafted = generate(params, config, prompts, 9, draft=(params, config), draft_length=3, **options)
  np.testing.assert_array_equal(drafted, together)
  other = jax.tree.map(lambda x: x + 0.3 * np.sin(np.arange(x.size, dtype=np.float32)).reshape(
      x.shape), params)
  drafted = generate(params, config, prompts, 9, draft=(other, config), draft_length=3, **options)
  np.testing.assert_array_equal(drafted, together)
  if name in ("windows", "falcon"):
    small = generate(params, config, prompts, 9, weights="int8", cache_dtype="int8", **options)
    assert (small == together).mean() > 0.8


@pytest.mark.full
@pytest.mark.parametrize("changes", [dict(prefix="module."), dict(prefix="_orig_mod.module."),
                                     dict(dtype=ml_dtypes.bfloat16), dict(dtype=np.float16)],
                         ids=str)
def test_prefixes_and_dtypes(changes, model, tmp_path):
  _, fields, arrays = model("grouped")
  arrays = {name: x.astype(changes.get("dtype", np.float32)) for name, x in arrays.items()}
  numpy_hub.write(tmp_path / "m", fields, arrays, shards=2, prefix=changes.get("prefix", ""))
  config, params = hub.load(tmp_path / "m")
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
  want = numpy_hub.logits(fields, arrays, TOKENS)
  np.testing.assert_allclose(forward(config, params), want, atol=1e-4, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("name", ["grouped", "windows", "falcon"])
def test_each_device_of_a_mesh_reads_its_part(name, model):
  path, *_ = model(name)
  mesh = jax.make_mesh((1, 2, 1, 2), sharding.AXES, axis_types=(AxisType.Auto,) * 4)
  config, whole = hub.load(path)
  _, params = hub.load(path, mesh=mesh)
  expected = sharding.params_shardings(whole, mesh)
  for (where, x), y, s in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(whole),
                              jax.tree.leaves(expected)):
    assert x.sharding == s, where
    np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("changes", [
    dict(), dict(kv_heads=2, qk_norm="layer", logits_scale=0.5),
    dict(window=4, global_every=3, kv_heads=4), dict(shared_kv=True)], ids=str)
def test_saved_and_loaded_again_is_bit_equal(changes, tmp_path):
  config = PaLMConfig(37, 16, 2, 4, 6, dim_ff=20, norm_eps=1e-6, rope_theta=300.0, **changes)
  model = hk.without_apply_rng(hk.transform(lambda t: PaLM.from_config(config)(t)))
  params = jax.tree.map(lambda x: x + 0.01, jax.jit(model.init)(jax.random.key(0), TOKENS))
  hub.save(tmp_path / "out", config, params)
  loaded, again = hub.load(tmp_path / "out")
  if config.shared_kv:  # as values of their own, which are the keys before rotary
    np.testing.assert_allclose(forward(loaded, again), forward(config, params), atol=1e-5)
    return
  assert loaded.logits_factor == config.logits_factor
  jax.tree.map(np.testing.assert_array_equal, dict(again), dict(params))
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  arrays = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
  np.testing.assert_allclose(numpy_hub.logits(fields, arrays, TOKENS), forward(config, params),
                             atol=2e-5)


@pytest.mark.full
def test_a_saved_model_in_transformers(tmp_path):
  reason = "transformers and torch are not installed: pip install 'palm-haiku[transformers]'"
  transformers = pytest.importorskip("transformers", reason=reason)
  torch = pytest.importorskip("torch", reason=reason)
  config = PaLMConfig(61, 32, 3, 4, 16)
  model = hk.without_apply_rng(hk.transform(lambda t: PaLM.from_config(config)(t)))
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)
  hub.save(tmp_path / "out", config, params)
  other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  with torch.no_grad():
    got = other(torch.tensor(TOKENS)[None]).logits[0].numpy()
  want = forward(config, params)
  np.testing.assert_allclose(got, want, atol=2e-5 * max(1, np.abs(want).max()), rtol=0)


def test_large_models_are_saved_in_shards(tmp_path, monkeypatch):
  monkeypatch.setitem(hub.save.__globals__, "SHARD", 4000)
  config = PaLMConfig(37, 16, 2, 4, 6)
  model = hk.transform(lambda t: PaLM.from_config(config)(t))
  params = jax.jit(model.init)(jax.random.key(0), TOKENS)
  hub.save(tmp_path / "out", config, params)
  assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
  jax.tree.map(np.testing.assert_array_equal, dict(hub.load(tmp_path / "out")[1]), dict(params))


def break_(path, fields=None, tensors=None, drop=None):
  """A copy of a model with a fault."""
  if fields:
    described = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(described | fields))
  if tensors:
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    arrays = {name: x for name, x in (arrays | tensors).items() if x is not None}
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
  if drop:
    (path / drop).unlink()


@pytest.mark.parametrize("name, fault, message", [
    ("grouped", dict(fields=dict(model_type="llama")), "model_type 'llama' is not supported"),
    ("grouped", dict(fields=dict(attention_bias=True)), "attention_bias = True is not supported"),
    ("grouped", dict(fields=dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4))),
     "rope scaling of type 'yarn'"),
    ("grouped", dict(fields=dict(rope_scaling=dict(type="linear"), rope_parameters=None)),
     "rope scaling of type 'linear'"),
    ("grouped", dict(fields=dict(rope_scaling=dict(type="linear"), rope_parameters=dict(
        rope_theta=1e4))), "rope scaling of type 'linear'"),
    ("grouped", dict(fields=dict(rope_parameters=dict(full_attention=dict(rope_type="default")))),
     "by the kind of layer"),
    ("grouped", dict(fields=dict(logit_scale=None)), "logit_scale must be a finite number; got N"),
    ("grouped", dict(fields=dict(logit_scale=math.nan)), "logit_scale must be a finite number"),
    ("grouped", dict(fields=dict(num_key_value_heads=3)), "not possible: kv_heads must divide"),
    ("windows", dict(fields=dict(sliding_window=0)), "not possible: window must be a positive"),
    ("grouped", dict(fields=dict(rope_parameters=7)), "cohere model is damaged"),
    ("grouped", dict(fields=dict(head_dim=None, num_attention_heads=0)), "cohere model is damaged"),
    ("grouped", dict(fields=dict(model_type=["cohere"])), "is not supported"),
    ("windows", dict(fields=dict(layer_types=["full_attention"] + ["sliding_attention"] * 4)),
     "layer 1 is sliding_attention"),
    ("windows", dict(drop="model-00002-of-00003.safetensors"),
     "lacks model-00002-of-00003.safetensors, a shard of 3"),
    ("grouped", dict(drop="model.safetensors"), "has no model.safetensors"),
    ("grouped", dict(drop="config.json"), "which describes the model"),
    ("grouped", dict(tensors={"model.norm.weight": None}), "lacks the tensor model.norm.weight"),
    ("grouped", dict(tensors={"model.norm.bias": np.zeros(24, np.float32)}),
     "model.norm.bias, which its architecture does not know"),
    ("grouped", dict(tensors={"model.norm.weight": np.zeros(25, np.float32)}),
     r"model.norm.weight must be \[24\], as config.json has it; got \[25\]"),
    ("grouped", dict(tensors={"lm_head.weight": np.zeros((37, 24), np.float32)}),
     "untied embeddings are not supported"),
    ("grouped", dict(tensors={"model.norm.weight": np.zeros(24, np.int8)}), "not quantised"),
    ("grouped", dict(tensors={"model.norm.weight": np.zeros(24, ml_dtypes.float8_e4m3fn)}),
     "F8_E4M3, which is not supported"),
    ("falcon", dict(fields=dict(new_decoder_architecture=True)), "new_decoder_architecture"),
    ("falcon", dict(fields=dict(alibi=True)), "alibi = True"),
])
def test_models_that_are_refused(name, fault, message, model, tmp_path):
  path, *_ = model(name)
  shutil.copytree(path, tmp_path / "broken")
  break_(tmp_path / "broken", **fault)
  with pytest.raises(hub.HubError, match=message):
    hub.load(tmp_path / "broken")


def test_weights_that_are_not_finite_are_named_once(model, tmp_path):
  path, _, arrays = model("grouped")
  names = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
  for bad, dtype in ((np.nan, np.float32), (np.inf, np.float16), (-np.inf, ml_dtypes.bfloat16)):
    shutil.copytree(path, tmp_path / str(bad))
    broken = {name: arrays[name].astype(dtype) for name in names}
    for array in broken.values():
      array[..., -1] = bad
    break_(tmp_path / str(bad), tensors=broken)
    with pytest.warns(UserWarning, match="NaN or infinite, .*'model.*weight' and 1 more$") as said:
      hub.load(tmp_path / str(bad))
    assert len(said) == 1 and any(name in str(said[0].message) for name in names)


@pytest.mark.parametrize("changes, field", [
    (dict(position="alibi"), "position = 'alibi'"), (dict(norm="rms"), "norm = 'rms'"),
    (dict(xpos_scale_base=64), "xpos_scale_base"), (dict(qk_norm="l2"), "qk_norm = 'l2'"),
    (dict(activation="gelu"), "activation = 'gelu'"), (dict(norm_bias=True), "norm_bias")])
def test_architectures_that_cannot_be_saved(changes, field, tmp_path):
  with pytest.raises(hub.HubError, match=field):
    hub.save(tmp_path / "out", PaLMConfig(37, 16, 2, 4, 6, **changes), {})
  assert not (tmp_path / "out").exists()


def test_a_state_dict_of_palm_rlhf_in_safetensors(tmp_path):
  arrays = numpy_peers.random_arrays(
      "palm-rlhf-pytorch", num_tokens=37, dim=16, depth=2, heads=2, dim_head=8, ff_mult=2)
  arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items() if x.ndim}
  safetensors.numpy.save_file(arrays, tmp_path / "m.safetensors")
  config, params = hub.load(tmp_path / "m.safetensors")
  want = numpy_peers.palm("palm-rlhf-pytorch", arrays, TOKENS, depth=2, heads=2, dim_head=8)
  np.testing.assert_allclose(forward(config, params), want, atol=1e-4)
