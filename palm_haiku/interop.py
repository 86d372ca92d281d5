"""Weights of the other public PaLMs: lucidrains' in JAX, Flax and PyTorch.

All of them fuse the in-projection into one matrix, query | key | value | up | gate by columns
(query | key | up | gate where values are the keys), and none scales its logits. What is a fixed
permutation or offset of weights happens here; what is arithmetic is a field of `PaLMConfig`.
"""

import collections
import dataclasses
import difflib
import re
import statistics
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from palm_haiku.config import PaLMConfig
from palm_haiku.model import palm_params


@dataclasses.dataclass(frozen=True)
class _Peer:
  """Names and layout of another implementation's parameters.

  In names, {i} counts layers from 0, {n} from 1, and {end} is the number of layers plus 1.
  """

  embedding: str
  gain: str  # of a layer's norm
  fused: str
  attn_out: str
  ff_out: str
  final_gain: str
  position: str = "rotary"
  norm: Literal["layer", "rms"] = "layer"
  transposed: bool = False  # matrices are (out, in)
  pairs: bool = False  # rotary turns channels (2i, 2i + 1), not (i, i + dim_head/2)
  # The offset of a stored gain; where versions differ, the newest first.
  gain_offsets: tuple[int, ...] = (0,)
  xpos_scale_base: int | None = None
  qk_scale: str | None = None  # {which} is q or k
  # Other entries of a state dict: the embedding again, and constants.
  tied: str | None = None
  zero: tuple[str, ...] = ()
  constant: tuple[str, ...] = ()

  @property
  def shared_kv(self) -> bool:
    return self.position == "alibi"

  def norm_eps(self, dim: int) -> float:
    """Epsilon on the mean square (or variance), as `PaLMConfig` has it."""
    if self.norm == "layer":
      return 1e-5
    # PaLM-pytorch clamps the root mean square at 1e-8; PaLM-jax adds to the sum of squares.
    return 1e-5 / dim if self.has_epsilon else 1e-16

  @property
  def has_epsilon(self) -> bool:
    return self.norm == "layer" or not self.transposed


_JAX = _Peer(
    embedding="embedding", gain="layers.{i}.norm.gamma", fused="layers.{i}.wi",
    attn_out="layers.{i}.attn_wo", ff_out="layers.{i}.ff_wo", final_gain="norm.gamma", pairs=True)
_PYTORCH = _Peer(
    embedding="0.weight", gain="{n}.fn.norm.gamma", fused="{n}.fn.fused_attn_ff_proj.weight",
    attn_out="{n}.fn.attn_out.weight", ff_out="{n}.fn.ff_out.1.weight", final_gain="{end}.gamma",
    transposed=True, tied="{past}.weight", zero=("{n}.fn.norm.beta", "{end}.beta"),
    constant=("{n}.fn.rotary_emb.inv_freq",))

PEERS: dict[str, _Peer] = {
    "palm-jax": _JAX,
    "palm-jax-lite": dataclasses.replace(_JAX, position="alibi", norm="rms", pairs=False),
    "palm-flax": _Peer(
        embedding="Embed_0.embedding",
        gain="ParallelTransformer_0.PreNorm_{i}.LayerNorm_0.scale",
        fused="ParallelTransformer_0.ParallelTransformerBlock_{i}.Dense_0.kernel",
        attn_out="ParallelTransformer_0.ParallelTransformerBlock_{i}.Dense_1.kernel",
        ff_out="ParallelTransformer_0.ParallelTransformerBlock_{i}.Dense_2.kernel",
        final_gain="LayerNorm_0.scale"),
    "palm-pytorch": _PYTORCH,
    "palm-pytorch-lite": dataclasses.replace(
        _PYTORCH, position="alibi", norm="rms", gain="{n}.fn.norm.g", final_gain="{end}.g",
        zero=(), constant=("{n}.fn.alibi.bias", "{n}.fn.alibi.slopes")),
    "palm-rlhf-pytorch": _Peer(
        embedding="token_emb.weight", gain="layers.{i}.fn.norm.gamma",
        fused="layers.{i}.fn.fused_attn_ff_proj.weight",
        attn_out="layers.{i}.fn.attn_out.weight", ff_out="layers.{i}.fn.ff_out.2.weight",
        final_gain="norm.gamma", transposed=True, gain_offsets=(1, 0), xpos_scale_base=512,
        qk_scale="layers.{i}.fn.{which}_scale", tied="to_logits.weight",
        zero=("layers.{i}.fn.norm.beta", "norm.beta"),
        constant=("layers.{i}.fn.rotary_emb.inv_freq", "layers.{i}.fn.rotary_emb.scale")),
}


def layout_of(peer: str) -> _Peer:
  """The layout of a peer's parameters; raises ValueError for an unknown one."""
  if peer not in PEERS:
    near = difflib.get_close_matches(peer, PEERS, n=1)
    raise ValueError(f"no peer is called {peer!r}; "
                     + (f"did you mean {near[0]}?" if near else f"there are {', '.join(PEERS)}"))
  return PEERS[peer]


def load(peer: str, arrays: Mapping[str, Any], heads: int | None = None, *,
         gain_offset: int | None = None,
         xpos_scale_base: int | None = None) -> tuple[PaLMConfig, dict[str, Any]]:
  """The architecture and parameters that another PaLM's arrays describe.

  Args:
    peer: palm-jax, palm-jax-lite, palm-flax, palm-pytorch, palm-pytorch-lite or
      palm-rlhf-pytorch.
    arrays: the peer's parameters by their own names. A PyTorch state dict may hold its buffers
      and the embedding's second name as well.
      Prefixes of wrappers (module., _orig_mod.) are dropped, with a warning.
    heads: query heads; the arrays tell them, so this is only checked. PaLM-jax's two models have
      the same names, and heads tell them apart.
    gain_offset: what is added to stored gains. palm-rlhf-pytorch stores them minus 1 from 0.2.4
      on (1), and as they are before (0); None tells by their means.
    xpos_scale_base: of palm-rlhf-pytorch (`rotary_xpos_scale_base`, in no array); None for its
      default of 512.

  Returns:
    The config, and float32 parameters of `PaLM.from_config(config)`.

  Raises:
    ValueError: an unknown peer; arrays that are missing, unknown, or do not fit together; gains
      that are near neither 0 nor 1.
  """
  layout = layout_of(peer)
  if xpos_scale_base is not None and layout.xpos_scale_base is None:
    raise ValueError(f"{peer} does not have xPos; got xpos_scale_base = {xpos_scale_base}")
  arrays = _unwrapped(layout, arrays)
  depth = _depth(layout, peer, arrays)
  offset = np.float32(_gain_offset(layout, peer, arrays, depth, gain_offset))
  left = {name: np.asarray(array) for name, array in arrays.items()}
  not_finite: list[str] = []

  def take(name, shape=None, axes=None):
    if name not in left:
      raise ValueError(f"the parameters of {peer} lack {name!r}")
    array = left.pop(name)
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype.name == "bfloat16"):
      raise ValueError(f"{name!r} must be floating point; got {array.dtype}")
    if array.ndim != (len(shape) if shape else axes) or (shape and array.shape != shape):
      raise ValueError(f"{name!r} must be {shape or f'of {axes} axes'}; got {array.shape}")
    with np.errstate(over="ignore"):
      array = array.astype(np.float32)
    if not np.isfinite(array).all():
      not_finite.append(name)
    return array

  def take_matrix(name, rows=None, columns=None):
    array = take(name, axes=2)
    array = array.T if layout.transposed else array
    if rows not in (None, array.shape[0]) or columns not in (None, array.shape[1]):
      want, got = ((rows or array.shape[0], columns or array.shape[1]), array.shape)
      if layout.transposed:
        want, got = want[::-1], got[::-1]
      raise ValueError(f"{name!r} must be {want}; got {got}")
    return array

  embedding = take(layout.embedding, axes=2)
  num_tokens, dim = embedding.shape
  layers: list[dict[str, np.ndarray]] = []
  inner = hidden = dim_head = 0
  kv = 1 if layout.shared_kv else 2
  qk_norm = layout.qk_scale is not None and layout.qk_scale.format(i=0, which="q") in left
  for i in range(depth):
    attn_out = take_matrix(_name(layout.attn_out, i), inner or None, dim)
    ff_out = take_matrix(_name(layout.ff_out, i), hidden or None, dim)
    inner, hidden = len(attn_out), len(ff_out)
    fused = take_matrix(_name(layout.fused, i), dim)
    dim_head, rest = divmod(fused.shape[1] - inner - 2 * hidden, kv)
    if dim_head < 1 or rest or inner % dim_head or (
        layout.position == "rotary" and dim_head % 2) or (
        layers and dim_head != layers[0]["key"].shape[1]):
      raise ValueError(f"{_name(layout.fused, i)!r} of width {fused.shape[1]} does not fit "
                       f"{inner} channels of attention and {hidden} of feed-forward in {peer}"
                       + _other_model(peer, fused.shape[1] - inner - 2 * hidden, inner))
    parts = np.split(fused, np.cumsum([inner] + [dim_head] * kv + [hidden]), axis=1)
    layer = {  # mutant: a peer's layer
        "norm": take(_name(layout.gain, i), (dim,)) + offset,
        "query": parts[0].reshape(dim, -1, dim_head), "key": parts[1],
        "up": parts[-2], "gate": parts[-1],
        "attn_out": attn_out.reshape(-1, dim_head, dim), "ff_out": ff_out,
    }
    if not layout.shared_kv:
      layer["value"] = parts[2]
    if layout.pairs:
      halves = np.argsort(_pairs(dim_head))  # mutant: rotary pairs
      layer["query"], layer["key"] = layer["query"][..., halves], layer["key"][..., halves]
    if qk_norm and layout.qk_scale:
      for which, name in (("q", "query_scale"), ("k", "key_scale")):
        layer[name] = take(layout.qk_scale.format(i=i, which=which), (dim_head,))
    layers.append(layer)
  final_gain = take(_name(layout.final_gain, 0, depth), (dim,)) + offset

  warn_of_not_finite(not_finite)
  for name, array in left.items():
    _check_rest(layout, peer, name, array, depth, embedding)
  found = inner // dim_head
  if heads is not None and heads != found:
    raise ValueError(f"these parameters have {found} heads of {dim_head}; got heads = {heads}"
                     + _other_model(peer, kv * dim_head, inner))
  config = PaLMConfig(
      num_tokens=num_tokens, dim=dim, depth=depth, heads=found, dim_head=dim_head,
      ff_mult=4 if hidden % dim else hidden // dim, dim_ff=hidden,
      position=layout.position, norm=layout.norm,
      shared_kv=layout.shared_kv, norm_eps=layout.norm_eps(dim), logits_scale=1.0,
      qk_norm="l2" if qk_norm else None,
      xpos_scale_base=layout.xpos_scale_base if xpos_scale_base is None else xpos_scale_base)
  stacked = {name: jnp.asarray(np.stack([layer[name] for layer in layers])) for name in layers[0]}
  return config, {
      "palm": {"embedding": jnp.asarray(embedding), "norm": jnp.asarray(final_gain)},
      "palm/layers/parallel_block": stacked,
  }


def _depth(layout, peer, arrays):
  """The number of layers; raises ValueError where the names are another peer's."""
  depth = 0
  while _name(layout.fused, depth) in arrays:
    depth += 1
  absent = [name for name in (_name(layout.fused, 0), _name(layout.gain, 0)) if name not in arrays]
  if absent:
    fits = [name for name, other in PEERS.items()
            if _name(other.fused, 0) in arrays and _name(other.gain, 0) in arrays]
    raise ValueError(f"these are not the parameters of {peer}: there is no {absent[0]!r}"
                     + (f"; their names are those of {' and '.join(fits)}" if fits else ""))
  return depth


def dump(peer: str, config: PaLMConfig, params: Mapping[str, Any], *, prefix: str | None = None,
         gain_offset: int | None = None) -> dict[str, np.ndarray]:
  """The inverse of `load`: parameters under another PaLM's names.

  A scale of the logits goes into the last gain, and another epsilon than the peer's into the
  scale of the residual stream; both are exact. palm-pytorch-lite alone has no epsilon: a
  warning says that the model's is left out.

  Args:
    peer: see `load`.
    config: of the model.
    params: of `PaLM.from_config(config)`, alone or within other modules.
    prefix: the module's name in params; None where they hold one PaLM.
    gain_offset: as for `load`; None for that of the peer's newest version.

  Returns:
    float32 arrays. For PyTorch use `load_state_dict(..., strict=False)`: buffers and the
    embedding's second name are left out.

  Raises:
    ValueError: an unknown peer, or an architecture that it does not have.
  """
  layout = layout_of(peer)
  eps = layout.norm_eps(config.dim)
  for name, want in (("position", layout.position), ("norm", layout.norm),
                     ("shared_kv", layout.shared_kv)):
    if getattr(config, name) != want:
      raise ValueError(f"{peer} has {name} = {want!r}; this model has {getattr(config, name)!r}")
  plain = PaLMConfig(config.num_tokens, config.dim, config.depth, config.heads, config.dim_head)
  for name in ("kv_heads", "rope_theta", "window", "global_every", "activation", "norm_bias"):
    if getattr(config, name) != getattr(plain, name):
      raise ValueError(f"{peer} has {name} = {getattr(plain, name)!r}; this model has "
                       f"{getattr(config, name)!r}")
  if config.qk_norm and (layout.qk_scale is None or config.qk_norm != "l2"):
    raise ValueError(f"{peer} does not normalise queries and keys as this model does, "
                     f"qk_norm = {config.qk_norm!r}")
  if (config.xpos_scale_base is None) != (layout.xpos_scale_base is None):
    raise ValueError(f"{peer} {'has' if layout.xpos_scale_base else 'does not have'} xPos; this "
                     "model differs")
  # Norms of x with epsilon e are norms of c x with epsilon c^2 e.
  stream = np.float32(1)
  if not layout.has_epsilon:
    if config.norm_eps > 1e-12:
      warnings.warn(f"{peer} adds no epsilon to its norms; this model's {config.norm_eps:g} is "
                    "left out, which changes logits by about as much, relatively", stacklevel=2)
  elif config.norm_eps != eps:
    if not config.norm_eps:
      raise ValueError(f"{peer} adds an epsilon to its norms; this model does not")
    stream = np.float32((eps / config.norm_eps) ** 0.5)
  logits_scale = config.dim**-0.5 if config.logits_scale is None else config.logits_scale
  palm, layers = ({name: np.asarray(x, np.float32) for name, x in part.items()}
                  for part in palm_params(params, prefix, config))
  offset = np.float32(_allowed(layout, peer, gain_offset))
  orient = np.transpose if layout.transposed else np.asarray
  arrays = {layout.embedding: palm["embedding"] * stream}
  for i in range(config.depth):
    layer = {name: x[i] for name, x in layers.items()}
    if layout.pairs:
      pairs = _pairs(config.dim_head)
      layer["query"], layer["key"] = layer["query"][..., pairs], layer["key"][..., pairs]
    parts = [layer["query"].reshape(config.dim, -1), layer["key"]]
    parts += [] if config.shared_kv else [layer["value"]]
    fused = np.concatenate([*parts, layer["up"], layer["gate"]], axis=1)
    arrays |= {
        _name(layout.gain, i): layer["norm"] - offset,
        _name(layout.fused, i): orient(fused),
        _name(layout.attn_out, i): orient(layer["attn_out"].reshape(-1, config.dim) * stream),
        _name(layout.ff_out, i): orient(layer["ff_out"] * stream),
    }
    if config.qk_norm and layout.qk_scale:
      for which, name in (("q", "query_scale"), ("k", "key_scale")):
        arrays[layout.qk_scale.format(i=i, which=which)] = layer[name]
  final_gain = palm["norm"] * np.float32(logits_scale / stream) - offset
  arrays[_name(layout.final_gain, 0, config.depth)] = final_gain
  return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def warn_of_not_finite(names: list[str]) -> None:
  """Warns of weights, by their names, that nothing can be computed with."""
  if names:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    warnings.warn(f"weights are NaN or infinite, or too large for float32: {names[0]!r}{more}",
                  stacklevel=3)


def _unwrapped(layout, arrays) -> dict[str, Any]:
  """The arrays under the names that they had before they were wrapped."""
  wrapper = r"(^|\.)((module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
  bare = {name: re.sub(wrapper, r"\1", name) for name in arrays}
  embedding, fused = layout.embedding, _name(layout.fused, 0)
  prefixes = [name.removesuffix(embedding) for name in bare.values()
              if name.endswith(embedding) and name.removesuffix(embedding)[-1:] in ("", ".", "/")]
  prefixes = [prefix for prefix in prefixes if prefix + fused in bare.values()]
  if len(set(prefixes)) > 1 and "" not in prefixes:
    raise ValueError(f"there are several models: {', '.join(sorted(set(prefixes)))}; pass the "
                     "arrays of one")
  prefix = prefixes[0] if len(set(prefixes)) == 1 else ""
  new = {name: short.removeprefix(prefix) for name, short in bare.items()}
  twice = [name for name, count in collections.Counter(new.values()).items() if count > 1]
  if twice:
    raise ValueError(f"{twice[0]!r} is there twice, with and without a prefix")
  changed = [name for name in new if name != new[name]]
  if changed:
    warnings.warn(f"prefixes of names are dropped: {changed[0]!r} is taken for "
                  f"{new[changed[0]]!r}, and so on", stacklevel=3)
  return {new[name]: array for name, array in arrays.items()}


def _allowed(layout, peer, gain_offset) -> int:
  """The given offset of gains, or the newest."""
  if gain_offset is None:
    return layout.gain_offsets[0]
  if gain_offset not in layout.gain_offsets:
    raise ValueError(f"gain_offset of {peer} is {' or '.join(map(str, layout.gain_offsets))}; "
                     f"got {gain_offset}")
  return gain_offset


def _gain_offset(layout, peer, arrays, depth, given) -> int:
  """The number to add to the stored gains: given, or told by the mean of each."""
  if given is not None or len(layout.gain_offsets) == 1:
    return _allowed(layout, peer, given)
  names = [_name(layout.gain, i) for i in range(depth)] + [_name(layout.final_gain, 0, depth)]
  gains = [arrays[name] for name in names if name in arrays]
  means = [float(np.mean(np.asarray(gain), dtype=np.float64)) for gain in gains]
  middle = statistics.median(means)
  near = {0: [abs(mean) < 0.35 for mean in means], 1: [abs(mean - 1) < 0.35 for mean in means]}
  stored = 0 if abs(middle) < 0.35 else 1 if abs(middle - 1) < 0.35 else None
  if middle > 0.15 and stored == 0 and all(np.all(np.asarray(gain) > 0) for gain in gains):
    stored = None  # They may be small ones, as they are: those minus 1 seldom have one sign.
  if stored is None or any(near[1 - stored]):
    raise ValueError(
        f"the gains of {peer} are near 0 (stored minus 1, from 0.2.4 on) or near 1 (before); the "
        f"means of these are {min(means):.3g} to {max(means):.3g}: say which with gain_offset, 1 "
        "or 0")
  return 1 - stored


def other_reading(peer: str, config: PaLMConfig) -> str:
  """The heads of the other model that arrays of this config may be of, in words; else ""."""
  rest = config.dim_head * (1 if config.shared_kv else 2)
  return _other_model(peer, rest, config.heads * config.dim_head)


def _other_model(peer, rest, inner) -> str:
  """The heads that the arrays have if they are of the other of two models with the same names.

  Args:
    rest: columns of the in-projection that are keys and values.
    inner: channels of the queries.
  """
  other = {"palm-jax": "palm-jax-lite", "palm-jax-lite": "palm-jax"}.get(peer)
  if other is None:
    return ""
  dim_head, odd = divmod(rest, 1 if PEERS[other].shared_kv else 2)
  if dim_head < 1 or odd or inner % dim_head or (
      PEERS[other].position == "rotary" and dim_head % 2):
    return ""
  return f"; as {other} they have {inner // dim_head} heads of {dim_head}"


def _name(template: str, i: int, depth: int = 0) -> str:
  return template.format(i=i, n=i + 1, end=depth + 1, past=depth + 2)


def _pairs(dim_head: int) -> np.ndarray:
  """Channels of the halves layout in the order of the pairs layout."""
  return np.arange(dim_head).reshape(2, -1).T.reshape(-1)


def _check_rest(layout, peer, name, array, depth, embedding):
  """Refuses an array that is not a parameter, unless it is what the peer's arithmetic implies."""
  def known(templates):
    return any(name == _name(template, i, depth) for template in templates for i in range(depth))

  if layout.tied and known((layout.tied,)):
    if not np.array_equal(array.astype(np.float32), embedding):
      raise ValueError(f"{name!r} is not the embedding, to which {peer} ties it")
  elif known(layout.zero):
    if np.any(array):
      raise ValueError(f"{name!r} is not zero, as it is in {peer}")
  elif not known(layout.constant):
    raise ValueError(f"{peer} has no parameter {name!r}")
