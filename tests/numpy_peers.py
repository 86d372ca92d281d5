"""The other PaLMs' forward passes in numpy and float64, on parameters under their own names.

Written from their formulas, with nothing of this project in them.
"""

import math

import numpy as np


def names(peer, depth):
  """Their names of: embedding, last gain, and for each layer gain, fused, attention out, ff out."""
  layers = []
  for i in range(depth):
    if peer.startswith("palm-jax"):
      head = f"layers.{i}."
      layers.append((head + "norm.gamma", head + "wi", head + "attn_wo", head + "ff_wo"))
    elif peer == "palm-flax":
      norm = f"ParallelTransformer_0.PreNorm_{i}.LayerNorm_0.scale"
      block = f"ParallelTransformer_0.ParallelTransformerBlock_{i}.Dense_"
      layers.append((norm, *(f"{block}{k}.kernel" for k in range(3))))
    elif peer == "palm-rlhf-pytorch":
      head = f"layers.{i}.fn."
      layers.append((head + "norm.gamma", head + "fused_attn_ff_proj.weight",
                     head + "attn_out.weight", head + "ff_out.2.weight"))
    else:
      head = f"{i + 1}.fn."
      layers.append((head + ("norm.g" if peer.endswith("lite") else "norm.gamma"),
                     head + "fused_attn_ff_proj.weight", head + "attn_out.weight",
                     head + "ff_out.1.weight"))
  embedding, gain = {
      "palm-jax": ("embedding", "norm.gamma"), "palm-jax-lite": ("embedding", "norm.gamma"),
      "palm-flax": ("Embed_0.embedding", "LayerNorm_0.scale"),
      "palm-rlhf-pytorch": ("token_emb.weight", "norm.gamma"),
      "palm-pytorch": ("0.weight", f"{depth + 1}.gamma"),
      "palm-pytorch-lite": ("0.weight", f"{depth + 1}.g"),
  }[peer]
  return embedding, gain, layers


def random_arrays(peer, *, num_tokens, dim, depth, heads, dim_head, ff_mult, qk=False, seed=0):
  """Parameters of the given sizes, scaled so that logits are of order one."""
  rng = np.random.default_rng(seed)
  torch = "pytorch" in peer
  inner, hidden = heads * dim_head, dim * ff_mult
  fused = inner + (1 if peer.endswith("lite") else 2) * dim_head + 2 * hidden
  embedding, gain, layers = names(peer, depth)

  def matrix(rows, columns):
    x = rng.normal(size=(rows, columns)) / rows**0.5
    return (x.T if torch else x).astype(np.float32)

  def gains():
    return (rng.normal(size=dim) * 0.1 + (peer != "palm-rlhf-pytorch")).astype(np.float32)

  arrays = {embedding: (rng.normal(size=(num_tokens, dim)) / dim**0.5).astype(np.float32),
            gain: gains()}
  for i, (norm, wi, wo, ff) in enumerate(layers):
    arrays |= {norm: gains(), wi: matrix(dim, fused), wo: matrix(inner, dim),
               ff: matrix(hidden, dim)}
    if qk:
      for which in "qk":
        arrays[f"layers.{i}.fn.{which}_scale"] = rng.uniform(1, 3, dim_head).astype(np.float32)
  return arrays


def slopes(heads):
  def power_of_two(n):
    start = 2 ** (-(2 ** -(math.log2(n) - 3)))
    return [start ** (i + 1) for i in range(n)]
  if math.log2(heads).is_integer():
    return np.array(power_of_two(heads))
  closest = 2 ** math.floor(math.log2(heads))
  return np.array(power_of_two(closest) + power_of_two(2 * closest)[0::2][: heads - closest])


def normalize(peer, x, gain):
  if peer == "palm-jax-lite":
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-5) * gain * x.shape[-1] ** 0.5
  if peer == "palm-pytorch-lite":
    norm = np.linalg.norm(x, axis=-1, keepdims=True) * x.shape[-1] ** -0.5
    return x / np.maximum(norm, 1e-8) * gain
  mean = x.mean(-1, keepdims=True)
  variance = (x**2).mean(-1, keepdims=True) - mean**2
  gain = gain + 1 if peer == "palm-rlhf-pytorch" else gain
  return (x - mean) / np.sqrt(variance + 1e-5) * gain


def rotate(peer, x, sign):
  """x: [..., n, dim_head]; sign: +1 for queries, -1 for keys."""
  n, dim_head = x.shape[-2:]
  angle = np.arange(n)[:, None] / 10_000 ** (np.arange(0, dim_head, 2) / dim_head)
  if peer == "palm-jax":
    sin, cos = np.repeat(np.sin(angle), 2, -1), np.repeat(np.cos(angle), 2, -1)
    turned = np.stack([-x[..., 1::2], x[..., 0::2]], -1).reshape(x.shape)
  else:
    sin, cos = np.tile(np.sin(angle), 2), np.tile(np.cos(angle), 2)
    turned = np.concatenate([-x[..., dim_head // 2:], x[..., : dim_head // 2]], -1)
  x = x * cos + turned * sin
  if peer == "palm-rlhf-pytorch":
    base = (np.arange(0, dim_head, 2) + 0.4 * dim_head) / (1.4 * dim_head)
    power = (np.arange(n)[:, None] - n // 2) / 512
    x = x * np.tile(base**power, 2) ** sign
  return x


def palm(peer, arrays, tokens, *, depth, heads, dim_head):
  """Logits float64[..., n, num_tokens] of tokens [..., n]."""
  arrays = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
  matrix = lambda name: arrays[name].T if "pytorch" in peer else arrays[name]
  embedding, last, layers = names(peer, depth)
  inner = heads * dim_head
  x = arrays[embedding][tokens]
  n = x.shape[-2]
  for i, (norm, wi, wo, ff) in enumerate(layers):
    hidden = len(matrix(ff))
    h = normalize(peer, x, arrays[norm]) @ matrix(wi)
    q = h[..., :inner].reshape(*h.shape[:-1], heads, dim_head).swapaxes(-2, -3)
    k = v = h[..., inner: inner + dim_head]
    if not peer.endswith("lite"):
      v = h[..., inner + dim_head: inner + 2 * dim_head]
    if f"layers.{i}.fn.q_scale" in arrays:
      q = q / np.linalg.norm(q, axis=-1, keepdims=True) * arrays[f"layers.{i}.fn.q_scale"]
      k = k / np.linalg.norm(k, axis=-1, keepdims=True) * arrays[f"layers.{i}.fn.k_scale"]
    if not peer.endswith("lite"):
      q, k = rotate(peer, q, 1), rotate(peer, k, -1)
    scores = q @ k[..., None, :, :].swapaxes(-1, -2) * dim_head**-0.5
    row, column = np.arange(n)[:, None], np.arange(n)
    if peer == "palm-jax-lite":
      scores = scores + slopes(heads)[:, None, None] * column
    elif peer == "palm-pytorch-lite":
      scores = scores - slopes(heads)[:, None, None] * abs(column - row)
    scores = np.where(column <= row, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = (weights @ v[..., None, :, :]).swapaxes(-2, -3).reshape(*x.shape[:-1], inner)
    up, gate = h[..., -2 * hidden: -hidden], h[..., -hidden:]
    x = x + out @ matrix(wo) + (up * gate / (1 + np.exp(-gate))) @ matrix(ff)
  return normalize(peer, x, arrays[last]) @ arrays[embedding].T
