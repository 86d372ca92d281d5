import io
import json
import pathlib

import chex
import haiku as hk
import jax
import numpy as np
import pytest

from palm_haiku import PaLM, PaLMConfig, interop
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
    assert getattr(config, {"qk_rmsnorm": "qk_norm"}.get(name, name)) == size
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
  interop.write_arrays(path, arrays)
  chex.assert_trees_all_equal(interop.read_arrays(path), arrays)
  assert [p.name for p in path.parent.iterdir()] == ["weights.bin"]
  array = io.BytesIO()
  np.save(array, np.arange(3.0))
  for content in (b"", b"PK\x03\x04 cut", b"something else", array.getvalue()):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not an .npz file"):
      interop.read_arrays(path)
  with pytest.raises(ValueError, match="there is no file"):
    interop.read_arrays(tmp_path / "absent")
