import dataclasses
import io
import json
import pathlib
import re
import zipfile

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from palm_haiku import PaLM, PaLMConfig, array_files, cli, decoder, interop
from palm_haiku.generate import generate
from palm_haiku.loss import next_token_loss
from tests import numpy_peers

SIZES = dict(num_tokens=13, dim=12, depth=2, heads=3, dim_head=6, ff_mult=2)
CASES = pathlib.Path(__file__).parents[2] / "shared" / "peers"
FILES = {
    "palm_jax.palm_A": "palm-jax", "palm_jax.palm_lite_A": "palm-jax-lite",
    "palm_flax_A": "palm-flax", "palm_pytorch.palm_pytorch_A": "palm-pytorch",
    "palm_pytorch.palm_lite_A": "palm-pytorch-lite", "palm_rlhf_pytorch_A": "palm-rlhf-pytorch",
    "palm_rlhf_pytorch_Aqk": "palm-rlhf-pytorch",
}
each_peer = pytest.mark.parametrize("peer", list(interop.PEERS))


def apply(config):
  return jax.jit(hk.without_apply_rng(hk.transform(
      lambda tokens: PaLM.from_config(config)(tokens))).apply)


def random_tokens(*shape):
  return np.random.default_rng(1).integers(0, 13, shape)


@pytest.mark.parametrize("peer, change", [
    ("palm-jax-lite", dict(heads=5, dim_head=7, ff_mult=3)),  # no power of two, odd
    ("palm-rlhf-pytorch", dict(qk=True)), *(
        pytest.param(*case, marks=pytest.mark.full) for case in (
            *((peer, {}) for peer in interop.PEERS),
            ("palm-pytorch-lite", dict(heads=6, depth=1)),
            ("palm-jax", dict(heads=1, dim_head=10)))),
])
def test_logits_are_the_peers(peer, change):
  check_logits(peer, change)


def check_logits(peer, change):
  sizes = SIZES | change
  arrays = numpy_peers.random_arrays(peer, **sizes)
  config, params = interop.load(peer, arrays)
  sizes.pop("qk", None)
  assert {name: getattr(config, name) for name in sizes} == sizes
  tokens = random_tokens(*((200,) if change else (2, 1, 9)))
  want = numpy_peers.palm(peer, arrays, tokens, depth=config.depth, heads=config.heads,
                          dim_head=config.dim_head)
  assert want.std() > 0.3
  np.testing.assert_allclose(apply(config)(params, tokens), want, atol=2e-5)


@pytest.mark.full
@pytest.mark.parametrize("file", FILES)
def test_the_running_peers_are_matched(file):
  path = CASES / f"{file}.npz"
  if not path.exists():
    pytest.skip(f"the peers' recorded cases are not here ({path})")
  peer, case = FILES[file], dict(np.load(path))
  arrays = {name[6:]: x for name, x in case.items() if name.startswith("param/")}
  config, params = interop.load(peer, arrays)
  for name, size in json.loads(str(case["config"])).items():
    if name == "qk_rmsnorm":
      assert config.qk_norm == ("l2" if size else None)
    else:
      assert getattr(config, name) == size
  model = apply(config)
  for name, tokens in case.items():
    if name.startswith("tokens/"):
      logits = model(params, tokens)
      np.testing.assert_allclose(logits, case[name.replace("tokens", "logits")], atol=2e-5)
      np.testing.assert_allclose(logits, case[name.replace("tokens", "logits64")], atol=2e-5)

  def loss_of(arrays):
    # Through the importer's own layout: gradients come back under the peer's names.
    logits = model(arrays, case["tokens/d1"][:, :-1])
    return next_token_loss(logits, case["tokens/d1"][:, 1:]).nll
  loss, grads = jax.value_and_grad(loss_of)(params)
  np.testing.assert_allclose(loss, case["loss64"], rtol=1e-4)
  grads = interop.dump(peer, config, grads)
  for name, want in case.items():
    if name.startswith("grad/"):
      got = grads[name[5:]]
      if peer == "palm-rlhf-pytorch" and name.endswith("gamma"):
        got = got + 1  # dump takes the offset of the gain off
      assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want), name


@each_peer
def test_round_trip(peer):
  arrays = numpy_peers.random_arrays(peer, **SIZES, qk=peer == "palm-rlhf-pytorch")
  back = interop.dump(peer, *interop.load(peer, arrays))
  assert back.keys() == arrays.keys()
  for name, array in arrays.items():
    assert back[name].dtype == np.float32
    # gamma + 1 - 1 rounds.
    np.testing.assert_allclose(back[name], array, rtol=0, atol=1e-7 if "rlhf" in peer else 0)


@pytest.mark.parametrize("peer, architecture", [
    ("palm-pytorch", dict(norm_eps=1e-3)), *(
        pytest.param(*case, marks=pytest.mark.full) for case in (
            ("palm-jax", {}), ("palm-flax", {}),
            ("palm-rlhf-pytorch", dict(xpos_scale_base=512, qk_norm=True)),
            ("palm-jax-lite", dict(position="alibi", norm="rms", shared_kv=True)),
            ("palm-pytorch-lite", dict(position="alibi", norm="rms", shared_kv=True,
                                       norm_eps=1e-16)))),
])
def test_models_of_this_project_become_the_peers(peer, architecture):
  config = PaLMConfig(**SIZES, **architecture)
  model = hk.without_apply_rng(hk.transform(lambda tokens: PaLM.from_config(config)(tokens)))
  tokens = random_tokens(2, 9)
  params = jax.jit(model.init)(jax.random.key(0), tokens)
  # A residual stream so small that the epsilon shows.
  params["palm"] = {"embedding": 0.01 * params["palm"]["embedding"],
                    "norm": 50 * params["palm"]["norm"]}
  arrays = interop.dump(peer, config, params)
  want = jax.jit(model.apply)(params, tokens)
  assert want.std() > 0.1
  got = numpy_peers.palm(peer, arrays, tokens, depth=2, heads=3, dim_head=6)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_state_dict_with_buffers_is_taken():
  for peer in ("palm-pytorch", "palm-rlhf-pytorch"):
    arrays = numpy_peers.random_arrays(peer, **SIZES)
    want = interop.load(peer, arrays)
    layer = "{}.fn." if peer == "palm-pytorch" else "layers.{}.fn."
    first = 1 if peer == "palm-pytorch" else 0
    extra = {layer.format(first + i) + "rotary_emb.inv_freq": np.ones(3) for i in range(2)}
    extra |= {layer.format(first + i) + "norm.beta": np.zeros(12) for i in range(2)}
    embedding = numpy_peers.names(peer, 2)[0]
    tied = "4.weight" if peer == "palm-pytorch" else "to_logits.weight"
    chex.assert_trees_all_equal(
        interop.load(peer, arrays | extra | {tied: arrays[embedding]})[1], want[1])
    for name, bad, message in ((tied, 2 * arrays[embedding], "is not the embedding"),
                               (next(reversed(extra)), np.ones(12), "is not zero")):
      with pytest.raises(ValueError, match=message):
        interop.load(peer, arrays | extra | {name: bad})


def drop(arrays, name):
  return {k: v for k, v in arrays.items() if k != name}


@pytest.mark.parametrize("change, message", [
    (lambda a: {}, "not the parameters of palm-jax: there is no 'layers.0.wi'"),
    (lambda a: drop(a, "layers.1.ff_wo"), "palm-jax lack 'layers.1.ff_wo'"),
    (lambda a: drop(a, "layers.1.wi"), "palm-jax has no parameter 'layers.1.norm.gamma'"),
    (lambda a: a | {"layers.0.wi": a["layers.0.wi"][:, :-1]}, "does not fit"),
    (lambda a: a | {"layers.1.wi": a["layers.1.wi"][:-1]}, r"'layers.1.wi' must be \(12, "),
    (lambda a: a | {"norm.gamma": np.ones(5)}, r"'norm.gamma' must be \(12,\); got \(5,\)"),
    (lambda a: a | {"bias": np.ones(5)}, "palm-jax has no parameter 'bias'"),
    (lambda a: a | {"embedding": np.ones((13, 12), int)}, "'embedding' must be floating point"),
])
def test_arrays_that_do_not_fit_are_named(change, message):
  arrays = numpy_peers.random_arrays("palm-jax", **SIZES)
  with pytest.raises(ValueError, match=message):
    interop.load("palm-jax", change(arrays))


def test_arrays_that_are_not_finite_are_named_once():
  arrays = numpy_peers.random_arrays("palm-jax", **SIZES)
  with pytest.warns(UserWarning, match="too large for float32: 'layers.0.wi' and 1 more$") as said:
    interop.load("palm-jax", arrays | {"norm.gamma": arrays["norm.gamma"] * np.nan,
                                       "layers.0.wi": arrays["layers.0.wi"] + np.float64(1e300)})
  assert [one.category for one in said].count(UserWarning) == 1


def test_heads_are_checked():
  arrays = numpy_peers.random_arrays("palm-jax", **SIZES)
  assert interop.load("palm-jax", arrays, heads=3)[0].heads == 3
  with pytest.raises(ValueError, match="have 3 heads of 6; got heads = 9"):
    interop.load("palm-jax", arrays, heads=9)


@pytest.mark.parametrize("peer, architecture, message", [
    ("palm-jacks", {}, "no peer is called 'palm-jacks'; did you mean palm-jax"),
    ("palm-jax", dict(position="alibi"), "palm-jax has position = 'rotary'"),
    ("palm-jax", dict(norm="rms"), "palm-jax has norm = 'layer'"),
    ("palm-jax", dict(qk_norm=True), "does not normalise queries and keys"),
    ("palm-jax", dict(xpos_scale_base=512), "palm-jax does not have xPos"),
    ("palm-rlhf-pytorch", {}, "palm-rlhf-pytorch has xPos"),
    ("palm-jax", dict(norm_eps=0.0), "adds an epsilon to its norms; this model does not"),
])
def test_architectures_that_a_peer_lacks_are_named(peer, architecture, message):
  with pytest.raises(ValueError, match=message):
    interop.dump(peer, PaLMConfig(**SIZES, **architecture), {})


def test_an_epsilon_that_is_left_out_is_said():
  config = PaLMConfig(**SIZES, position="alibi", norm="rms", shared_kv=True)
  params = interop.load("palm-pytorch-lite",
                        numpy_peers.random_arrays("palm-pytorch-lite", **SIZES))[1]
  with pytest.warns(UserWarning, match="this model's 1e-05 is left out"):
    arrays = interop.dump("palm-pytorch-lite", config, params)
  np.testing.assert_array_equal(arrays["0.weight"], params["palm"]["embedding"])


def test_files(tmp_path):
  arrays = {"a.b": np.arange(3.0), "1.weight": np.ones((2, 2), np.float32)}
  path = tmp_path / "new" / "weights.bin"
  array_files.write_arrays(path, arrays)
  chex.assert_trees_all_equal(array_files.read_arrays(path), arrays)
  assert [p.name for p in path.parent.iterdir()] == ["weights.bin"]
  with pytest.raises(ValueError, match="there is no file"):
    array_files.read_arrays(tmp_path / "absent")
  with pytest.raises(ValueError, match="is a directory"):
    array_files.read_arrays(tmp_path)


def old(arrays):
  """The arrays as PaLM-rlhf-pytorch up to 0.2.3 stores them."""
  return {name: x + 1 if name.endswith("gamma") else x for name, x in arrays.items()}


def test_gains_are_told_apart_by_their_means():
  peer = "palm-rlhf-pytorch"
  arrays = numpy_peers.random_arrays(peer, **SIZES)
  want = interop.load(peer, arrays)
  for one, offset in ((arrays, None), (arrays, 1), (old(arrays), None), (old(arrays), 0)):
    config, params = interop.load(peer, one, gain_offset=offset)
    assert config == want[0]
    chex.assert_trees_all_close(params, want[1], atol=1e-6)
  back = interop.dump(peer, *want, gain_offset=0)
  np.testing.assert_allclose(back["norm.gamma"], old(arrays)["norm.gamma"], atol=1e-6)
  last = {"norm.gamma": 1 + arrays["norm.gamma"]}
  for bad in (old(old(arrays)), old(arrays) | {"norm.gamma": np.zeros(12)}, arrays | last,
              {k: 0.5 * x if k.endswith("gamma") else x for k, x in old(arrays).items()}):
    with pytest.raises(ValueError, match="near 0 .* or near 1 .* say which with gain_offset"):
      interop.load(peer, bad)
    assert interop.load(peer, bad, gain_offset=0)[0] == want[0]
  # Small gains as they are, or large ones minus 1; with a negative one among them the latter.
  small = {k: 0.25 + 0.1 * np.sin(np.arange(x.size)) if k.endswith("gamma") else x
           for k, x in arrays.items()}
  with pytest.raises(ValueError, match="are 0.2.* say which with gain_offset"):
    interop.load(peer, small)
  np.testing.assert_allclose(interop.load(peer, small | {
      "norm.gamma": small["norm.gamma"] - 0.3})[1]["palm"]["norm"], 1 + small["norm.gamma"] - 0.3,
                             atol=1e-6)
  # A final gain that training has moved far away decides nothing.
  assert interop.load(peer, old(arrays) | {"norm.gamma": np.full(12, 3.0)})[0] == want[0]
  with pytest.raises(ValueError, match="gain_offset of palm-jax is 0; got 1"):
    interop.load("palm-jax", numpy_peers.random_arrays("palm-jax", **SIZES), gain_offset=1)


def test_scale_bases_of_xpos():
  arrays = numpy_peers.random_arrays("palm-rlhf-pytorch", **SIZES)
  assert interop.load("palm-rlhf-pytorch", arrays)[0].xpos_scale_base == 512
  assert interop.load(
      "palm-rlhf-pytorch", arrays, xpos_scale_base=64)[0].xpos_scale_base == 64
  for wrong in (0, -1, float("nan"), float("inf")):
    with pytest.raises(ValueError, match="xpos_scale_base must be positive"):
      interop.load("palm-rlhf-pytorch", arrays, xpos_scale_base=wrong)
  with pytest.raises(ValueError, match="palm-flax does not have xPos; got xpos_scale_base = 64"):
    interop.load("palm-flax", {}, xpos_scale_base=64)


@pytest.mark.parametrize("peer, change, other, options, message", [
    ("palm-jax-lite", dict(dim_head=6), "palm-jax", {}, "as palm-jax-lite they have 3 heads of 6"),
    ("palm-jax", dict(dim_head=6), "palm-jax-lite", {}, "as palm-jax they have 3 heads of 6"),
    ("palm-jax", dict(heads=2, dim_head=8), "palm-jax-lite", dict(heads=2),
     "have 1 heads of 16; got heads = 2; as palm-jax they have 2 heads of 8"),
    ("palm-jax-lite", dict(heads=2, dim_head=8), "palm-jax", dict(heads=2),
     "have 4 heads of 4; got heads = 2; as palm-jax-lite they have 2 heads of 8"),
    ("palm-pytorch", {}, "palm-pytorch-lite", {}, "their names are those of palm-pytorch$"),
])
def test_two_models_of_a_peer_are_told_apart(peer, change, other, options, message):
  arrays = numpy_peers.random_arrays(peer, **(SIZES | change))
  with pytest.raises(ValueError, match=message):
    interop.load(other, arrays, **options)


def test_conversion_names_what_arrays_of_the_other_model_would_be():
  config = PaLMConfig(37, 32, 2, 4, 8)
  assert interop.other_reading("palm-jax", config) == "; as palm-jax-lite they have 2 heads of 16"
  assert interop.other_reading("palm-flax", config) == ""
  # As palm-jax they would have 16 heads of 1, which rotary positions can't turn.
  lite = PaLMConfig(37, 32, 2, 8, 2, position="alibi", shared_kv=True)
  assert interop.other_reading("palm-jax-lite", lite) == ""


@pytest.mark.parametrize("options", [
    ["--from", "hub", "--heads", "2"], ["--from", "hub", "--gain-offset", "1"],
    ["--to", "hub", "--gain-offset", "0"], ["--to", "palm-jax", "--heads", "2"],
    ["--to", "palm-rlhf-pytorch", "--xpos-scale-base", "64"]])
def test_options_without_meaning_are_refused(options, tmp_path, capsys):
  assert cli.main(["convert", *options, str(tmp_path), "--out", str(tmp_path / "out")]) == 2
  assert capsys.readouterr().err == (
      f"palm-haiku convert: error: {options[2]} has no meaning for {options[0]} {options[1]}\n")


@pytest.mark.parametrize("peer", list(interop.PEERS))
@pytest.mark.parametrize("wrap", [
    "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "model.{}",
    "state/net.module.{}"])
def test_prefixes_of_names_are_dropped(peer, wrap):
  arrays = numpy_peers.random_arrays(peer, **SIZES)
  want = interop.load(peer, arrays)[1]
  with pytest.warns(UserWarning, match="prefixes of names are dropped") as said:
    got = interop.load(peer, {wrap.format(name): x for name, x in arrays.items()})[1]
  assert len(said) == 1
  chex.assert_trees_all_equal(got, want)


def test_wrappers_of_layers_are_dropped_and_two_models_are_not_mixed():
  arrays = numpy_peers.random_arrays("palm-jax", **SIZES)
  want = interop.load("palm-jax", arrays)[1]
  with pytest.warns(UserWarning, match="'layers.0._orig_mod.norm.gamma' is taken for"):
    got = interop.load("palm-jax", {
        re.sub(r"^(layers\.\d)", r"\1._orig_mod", name): x for name, x in arrays.items()})[1]
  chex.assert_trees_all_equal(got, want)
  with pytest.raises(ValueError, match="'embedding' is there twice"):
    interop.load("palm-jax", arrays | {"module.embedding": arrays["embedding"]})
  both = {f"{name}.{k}": x for name in ("actor", "critic") for k, x in arrays.items()}
  with pytest.raises(ValueError, match="several models: actor., critic."):
    interop.load("palm-jax", both)


@pytest.mark.parametrize("dtype", ["float16", "float64", ">f4", "longdouble", "bfloat16"])
def test_files_of_every_floating_point_type(tmp_path, dtype):
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  arrays = {k: x.astype(dtype) for k, x in numpy_peers.random_arrays("palm-jax", **SIZES).items()}
  np.savez(tmp_path / "weights.npz", **arrays)
  read = array_files.read_arrays(tmp_path / "weights.npz")
  assert read["embedding"].dtype == dtype
  want = {k: x.astype(np.float32) for k, x in arrays.items()}
  chex.assert_trees_all_equal(interop.load("palm-jax", read)[1],
                              interop.load("palm-jax", want)[1])


def test_types_that_numpy_forgets_are_named(tmp_path):
  path = tmp_path / "weights.npz"
  for array, message in ((np.zeros(2, ml_dtypes.float8_e4m3fn), "does not say which type"),
                         (np.zeros(2, ml_dtypes.float8_e5m2), "cannot be read"),
                         (np.array([{}, 1]), "Object arrays cannot be loaded")):
    np.savez(path, **{"a.b": array})
    with pytest.raises(ValueError, match="'a.b' in .*" + message):
      array_files.read_arrays(path)


def zipped(**members):
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w") as archive:
    for name, content in members.items():
      archive.writestr(name.replace("_", "/"), content)
  return stream.getvalue()


def array_bytes():
  stream = io.BytesIO()
  np.save(stream, np.arange(3.0))
  return stream.getvalue()


@pytest.mark.parametrize("content, message", [
    (zipped(archive_data_pkl=b".").replace(b"data/pkl", b"data.pkl"), "is a PyTorch file"),
    (b"\x80\x02\x8a\nl\xfc\x9cF\xf9", "is a PyTorch file"),
    (b"\x08\0\0\0\0\0\0\0{\"a\":{}}", "is a safetensors file"),
    (b"\x81\xa6params\x80", "is a msgpack file"), (b"\xde\x00\x10", "is a msgpack file"),
    (array_bytes(), "is an Equinox or .npy file"), (b'{"depth": 2}\n' + array_bytes(), "Equinox"),
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"), (b"GGUF\x03", "is a GGUF file"),
    (b"\x1f\x8b\x08", r"is compressed \(gzip\)"), (b'{"weight_map": {}}', "is JSON"),
    (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    (b"<!DOCTYPE html>", "is a page"), (b"", "is empty"), (zipped(a=b"b"), "without arrays"),
    (b"PK\x03\x04 cut", "zip archive that is cut short"), (b"something else", "is not an .npz"),
])
def test_other_files_are_named_by_their_content(tmp_path, content, message):
  for name in ("weights.npz", "weights", "[weights]"):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
      array_files.read_arrays(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix, kind", [
    (".pt", "PyTorch"), (".bin", "PyTorch"), (".ckpt", "PyTorch"), (".safetensors", "safetensors"),
    (".msgpack", "msgpack"), (".eqx", "Equinox"), (".H5", "HDF5")])
def test_other_files_are_named_by_their_suffix(tmp_path, suffix, kind):
  path = tmp_path / ("weights" + suffix)
  path.write_bytes(b"unknown to all")
  with pytest.raises(ValueError, match=kind):
    array_files.read_arrays(path)
  array_files.write_arrays(path, {"a": np.ones(2)})  # An .npz is read under any name.
  assert array_files.read_arrays(path)["a"].tolist() == [1, 1]


def test_models_of_any_name_and_within_others():
  config = PaLMConfig(**SIZES)
  params = interop.load("palm-jax", numpy_peers.random_arrays("palm-jax", **SIZES))[1]
  want = interop.dump("palm-jax", config, params)

  class Outer(hk.Module):
    def __init__(self):
      super().__init__("outer")
      self.inner = PaLM.from_config(config, name="policy")

    def __call__(self, tokens):
      return hk.Linear(2)(self.inner(tokens))

  shapes = [jax.eval_shape(hk.transform(f).init, jax.random.key(0), np.zeros((1, 3), np.int32))
            for f in (lambda t: PaLM.from_config(config, name="policy")(t),
                      lambda t: Outer()(t))]
  assert {name for one in shapes for name in one} == {
      "policy", "policy/layers/parallel_block", "outer/~/policy",
      "outer/~/policy/layers/parallel_block", "outer/linear"}
  for one in shapes:
    name = next(name for name in one if name.endswith("policy"))
    renamed = {k.replace("palm", name, 1): x for k, x in params.items()}
    assert renamed.keys() <= one.keys()
    others = {k: {} for k in one if k not in renamed}
    for prefix in (None, name):
      chex.assert_trees_all_equal(
          interop.dump("palm-jax", config, renamed | others, prefix=prefix), want)
    chex.assert_trees_all_equal(decoder.prepare(renamed | others, config),
                                decoder.prepare(params, config))
  both = params | renamed
  chex.assert_trees_all_equal(interop.dump("palm-jax", config, both, prefix="palm"), want)
  for bad, prefix, message in ((both, None, "several PaLMs; pass prefix, one of 'palm', 'outer/~"),
                               (params, "reward", "no PaLM called 'reward'; there is 'palm'"),
                               ({"linear": {}}, None, "hold no PaLM; there is 'linear'")):
    with pytest.raises(ValueError, match=message):
      interop.dump("palm-jax", config, bad, prefix=prefix)
    with pytest.raises(ValueError, match=message):
      generate(bad, config, [1, 2], 1, temperature=0, prefix=prefix)


@pytest.mark.parametrize("changes, message", [
    (dict(depth=1), r"attn_out is \(2, 3, 4, 8\), of the config \(1, 3, 4, 8\)"),
    (dict(heads=2, dim_head=6), r"attn_out is \(2, 3, 4, 8\), of the config \(2, 2, 6, 8\)"),
    (dict(shared_kv=True), r"value is \(2, 8, 4\), of the config absent"),
    (dict(norm_bias=True), r"norm_bias is absent, of the config \(8,\)")])
def test_parameters_of_another_config_are_refused(changes, message):
  config = PaLMConfig(11, 8, 2, 3, 4)
  shapes = jax.eval_shape(hk.transform(lambda: PaLM.from_config(config)(jnp.zeros(1, int))).init,
                          jax.random.key(0))
  params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
  other = dataclasses.replace(config, **changes)
  with pytest.raises(ValueError, match=message):
    generate(params, other, [1], 1, temperature=0)
  with pytest.raises(ValueError, match=message):
    decoder.prepare(params, other)
  adapted = {module: part | {"query_lora_a": part["norm"]} for module, part in params.items()}
  with pytest.raises(ValueError, match="lora.merge adds adapters to their weights"):
    decoder.prepare(adapted, config)
