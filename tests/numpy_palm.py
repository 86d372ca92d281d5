"""PaLM and PaLM-lite in numpy and float64, as plain as can be: the oracle of the model's tests."""

import numpy as np

from palm_haiku.kernels import alibi_slopes


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def normalize(x, gain, kind, eps):
  if kind == "layer":
    x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def rotate(x, position):
  """x: [heads, dim_head] of one position."""
  half = x.shape[-1] // 2
  angle = position * 10_000.0 ** (-np.arange(half) / half)
  turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], -1)


def block(x, w, config):
  """x: [T, D]; w: the weights of one layer."""
  length = len(x)
  h = normalize(x, w["norm"], config.norm, config.norm_eps)
  q = np.einsum("td,dhk->thk", h, w["query"])
  k = h @ w["key"]
  v = k if config.shared_kv else h @ w["value"]
  if config.position == "rotary":
    q = np.stack([rotate(q[t], t) for t in range(length)])
    k = np.concatenate([rotate(k[None, t], t) for t in range(length)])
  scores = np.einsum("thk,sk->hts", q, k) / np.sqrt(config.dim_head)
  distance = np.arange(length)[None, :] - np.arange(length)[:, None]
  if config.position == "alibi":
    scores += alibi_slopes(config.heads).astype(float)[:, None, None] * distance
  scores = np.where(distance <= 0, scores, -np.inf)
  attended = np.einsum("hts,sk->thk", softmax(scores), v)
  gate, up = h @ w["gate"], h @ w["up"]
  swiglu = gate / (1 + np.exp(-gate)) * up
  return x + np.einsum("thk,hkd->td", attended, w["attn_out"]) + swiglu @ w["ff_out"]


def palm(params, tokens, config):
  """Logits of one sequence, tokens: [T]; params: the Haiku tree."""
  params = {module: {name: np.asarray(x, np.float64) for name, x in weights.items()}
            for module, weights in params.items()}
  x = params["palm"]["embedding"][tokens]
  for i in range(config.depth):
    x = block(x, {k: v[i] for k, v in params["palm/layers/parallel_block"].items()}, config)
  x = normalize(x, params["palm"]["norm"], config.norm, config.norm_eps)
  return x @ params["palm"]["embedding"].T / np.sqrt(config.dim)
