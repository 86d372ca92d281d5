"""PaLM of any architecture in numpy and float64, as plain as can be: the model's oracle."""

import math

import numpy as np

from palm_haiku.kernels import alibi_slopes


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def normalize(x, gain, kind, eps, bias=0.0):
  if kind == "layer":
    x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain + bias


def rotate(x, position, theta):
  """x: [heads, dim_head] of one position."""
  half = x.shape[-1] // 2
  angle = position * theta ** (-np.arange(half) / half)
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], -1)


def block(x, w, config, layer):
  """x: [T, D]; w: the weights of one layer; layer: its number."""
  length, is_global = len(x), bool(config.global_every) and (layer + 1) % config.global_every == 0
  h = normalize(x, w["norm"], config.norm, config.norm_eps, w.get("norm_bias", 0.0))
  heads = lambda name: (h @ w[name].reshape(len(h[0]), -1)).reshape(length, -1, config.dim_head)
  q, k = heads("query"), heads("key")
  v = k if config.shared_kv else heads("value")
  if config.qk_norm == "l2":
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) * w[name]
            for a, name in ((q, "query_scale"), (k, "key_scale")))
  elif config.qk_norm == "layer":
    q, k = (normalize(a, w[name], "layer", config.norm_eps)
            for a, name in ((q, "query_scale"), (k, "key_scale")))
  if config.position == "rotary" and not is_global:
    q, k = (np.stack([rotate(a[t], t, config.rope_theta) for t in range(length)]) for a in (q, k))
  k, v = (np.repeat(a, config.heads // config.kv_heads, axis=1) for a in (k, v))
  scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(config.dim_head)
  distance = np.arange(length)[None, :] - np.arange(length)[:, None]
  if config.position == "alibi" and not is_global:
    scores += alibi_slopes(config.heads).astype(float)[:, None, None] * distance
  visible = distance <= 0
  if config.window and not is_global:
    visible = visible & (distance > -config.window)
  attended = np.einsum("hts,shk->thk", softmax(np.where(visible, scores, -np.inf)), v)
  up = h @ w["up"]
  if config.activation == "gelu":
    act = up * (1 + np.vectorize(math.erf)(up / np.sqrt(2))) / 2
  else:
    gate = h @ w["gate"]
    act = gate / (1 + np.exp(-gate)) * up
  return x + np.einsum("thk,hkd->td", attended, w["attn_out"]) + act @ w["ff_out"]


def palm(params, tokens, config):
  """Logits of one sequence, tokens: [T]; params: the Haiku tree."""
  params = {module: {name: np.asarray(x, np.float64) for name, x in weights.items()}
            for module, weights in params.items()}
  x = params["palm"]["embedding"][tokens]
  for i in range(config.depth):
    x = block(x, {k: v[i] for k, v in params["palm/layers/parallel_block"].items()}, config, i)
  x = normalize(x, params["palm"]["norm"], config.norm, config.norm_eps,
                params["palm"].get("norm_bias", 0.0))
  return x @ params["palm"]["embedding"].T / np.sqrt(config.dim)
