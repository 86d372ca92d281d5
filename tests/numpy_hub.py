"""Random models of the hub's families as files, and their logits in numpy and float64."""

import json
import math

import numpy as np
import safetensors.numpy

COHERE = dict(
    model_type="cohere", vocab_size=37, hidden_size=24, intermediate_size=44, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, layer_norm_eps=1e-5, logit_scale=0.3,
    hidden_act="silu", attention_bias=False, tie_word_embeddings=True, use_qk_norm=False,
    rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}, bos_token_id=1, eos_token_id=2)
COHERE2 = COHERE | dict(
    model_type="cohere2", num_hidden_layers=5, sliding_window=5,
    layer_types=["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(5)])
FALCON = dict(
    model_type="falcon", vocab_size=37, hidden_size=28, num_hidden_layers=2, num_attention_heads=7,
    multi_query=True, parallel_attn=True, new_decoder_architecture=False, alibi=False, bias=False,
    activation="gelu", tie_word_embeddings=True, layer_norm_epsilon=1e-5, rope_theta=10_000.0)


def tensors(c: dict, seed: int = 0) -> dict[str, np.ndarray]:
  """Random float32 tensors of the model that config.json fields describe."""
  rng = np.random.default_rng(seed)
  falcon = c["model_type"] == "falcon"
  dim, heads = c["hidden_size"], c["num_attention_heads"]
  dim_head = c.get("head_dim") or dim // heads
  matrix = lambda out, into: rng.normal(size=(out, into)) / into**0.5
  gain = lambda *shape: 1 + 0.3 * rng.normal(size=shape)
  model, word = ("transformer", "word_embeddings") if falcon else ("model", "embed_tokens")
  arrays = {f"{model}.{word}.weight": rng.normal(size=(c["vocab_size"], dim))}
  final = f"{model}.ln_f" if falcon else f"{model}.norm"
  arrays[f"{final}.weight"] = gain(dim)
  if falcon:
    arrays[f"{final}.bias"] = 0.3 * rng.normal(size=dim)
  for i in range(c["num_hidden_layers"]):
    layer = f"transformer.h.{i}." if falcon else f"model.layers.{i}."
    arrays[layer + "input_layernorm.weight"] = gain(dim)
    if falcon:
      arrays |= {
          layer + "input_layernorm.bias": 0.3 * rng.normal(size=dim),
          layer + "self_attention.query_key_value.weight": matrix((heads + 2) * dim_head, dim),
          layer + "self_attention.dense.weight": matrix(dim, heads * dim_head),
          layer + "mlp.dense_h_to_4h.weight": matrix(4 * dim, dim),
          layer + "mlp.dense_4h_to_h.weight": matrix(dim, 4 * dim)}
      continue
    kv, hidden = c["num_key_value_heads"], c["intermediate_size"]
    for name, out, into in (
        ("self_attn.q_proj", heads * dim_head, dim), ("self_attn.k_proj", kv * dim_head, dim),
        ("self_attn.v_proj", kv * dim_head, dim), ("self_attn.o_proj", dim, heads * dim_head),
        ("mlp.gate_proj", hidden, dim), ("mlp.up_proj", hidden, dim),
        ("mlp.down_proj", dim, hidden)):
      arrays[f"{layer}{name}.weight"] = matrix(out, into)
    if c.get("use_qk_norm"):
      arrays[layer + "self_attn.q_norm.weight"] = gain(heads, dim_head)
      arrays[layer + "self_attn.k_norm.weight"] = gain(kv, dim_head)
  return {name: x.astype(np.float32) for name, x in arrays.items()}


def write(path, c: dict, arrays: dict, shards: int = 1, prefix: str = "") -> None:
  """The files of a model's directory."""
  path.mkdir(parents=True)
  (path / "config.json").write_text(json.dumps(c))
  arrays = {prefix + name: x for name, x in arrays.items()}
  if shards == 1:
    safetensors.numpy.save_file(arrays, path / "model.safetensors")
    return
  names = sorted(arrays)
  weight_map = {}
  for i in range(shards):
    file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
    part = {name: arrays[name] for name in names[i::shards]}
    safetensors.numpy.save_file(part, path / file)
    weight_map |= dict.fromkeys(part, file)
  (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _norm(x, gain, bias=0.0, eps=1e-5):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain + bias


def _rotate(x, theta, pairs):
  """x: [T, heads, dim_head] at positions 0, 1, ..., by complex numbers."""
  half = x.shape[-1] // 2
  turn = np.exp(1j * np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half))[:, None]
  if pairs:
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)
  turned = (x[..., :half] + 1j * x[..., half:]) * turn
  return np.concatenate([turned.real, turned.imag], -1)


def logits(c: dict, arrays: dict, tokens: np.ndarray) -> np.ndarray:
  """float64[T, vocab_size] of int[T]."""
  w = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
  falcon = c["model_type"] == "falcon"
  heads, dim = c["num_attention_heads"], c["hidden_size"]
  kv = 1 if falcon else c["num_key_value_heads"]
  dim_head = c.get("head_dim") or dim // heads
  eps = c.get("layer_norm_eps", c.get("layer_norm_epsilon"))
  theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
  kinds = c.get("layer_types", ["rotary"] * c["num_hidden_layers"])
  embedding = w["transformer.word_embeddings.weight" if falcon else "model.embed_tokens.weight"]
  x, distance = embedding[tokens], np.arange(len(tokens)) - np.arange(len(tokens))[:, None]
  for i, kind in enumerate(kinds):
    layer = f"transformer.h.{i}." if falcon else f"model.layers.{i}."
    get = lambda name: w[f"{layer}{name}.weight"].T
    h = _norm(x, get("input_layernorm"), w.get(layer + "input_layernorm.bias", 0), eps)
    if falcon:
      q, k, v = np.split(h @ get("self_attention.query_key_value"),
                         [heads * dim_head, (heads + 1) * dim_head], -1)
    else:
      q, k, v = (h @ get(f"self_attn.{name}_proj") for name in "qkv")
    q, k, v = (a.reshape(len(tokens), -1, dim_head) for a in (q, k, v))
    if c.get("use_qk_norm"):
      q = _norm(q, w[layer + "self_attn.q_norm.weight"], eps=eps)
      k = _norm(k, w[layer + "self_attn.k_norm.weight"], eps=eps)
    if kind != "full_attention":
      q, k = _rotate(q, theta, not falcon), _rotate(k, theta, not falcon)
    visible = distance <= 0
    if kind == "sliding_attention":
      visible &= distance > -c["sliding_window"]
    k, v = np.repeat(k, heads // kv, 1), np.repeat(v, heads // kv, 1)
    scores = np.where(visible, np.einsum("thd,shd->hts", q, k) / dim_head**0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    attended = np.einsum("hts,shd->thd", weights, v).reshape(len(tokens), -1)
    if falcon:
      up = h @ get("mlp.dense_h_to_4h")
      gelu = up * (1 + np.vectorize(math.erf)(up / 2**0.5)) / 2
      x = x + attended @ get("self_attention.dense") + gelu @ get("mlp.dense_4h_to_h")
    else:
      gate = h @ get("mlp.gate_proj")
      hidden = gate / (1 + np.exp(-gate)) * (h @ get("mlp.up_proj"))
      x = x + attended @ get("self_attn.o_proj") + hidden @ get("mlp.down_proj")
  final = "transformer.ln_f" if falcon else "model.norm"
  x = _norm(x, w[f"{final}.weight"], w.get(f"{final}.bias", 0), eps)
  return c.get("logit_scale", 1) * x @ embedding.T
