"""Architecture of a PaLM, and the named models."""

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal


class _Product(int):
  """A `dim_ff` that is `dim * ff_mult`, and stays so when `dataclasses.replace` changes either."""


@dataclasses.dataclass(frozen=True)
class PaLMConfig:
  """Architecture of a PaLM.

  The first six names and their meaning are those of PaLM-jax. The remaining ones select
  between the two architectures, PaLM (arXiv:2204.02311, section 2) and PaLM-lite (ALiBi,
  RMSNorm, one projection for keys and values), or reproduce the arithmetic of another
  implementation (`palm_haiku.interop`) or of another public model with PaLM's parallel block
  (`palm_haiku.hub`).

  Raises:
    ValueError: a size that is not positive, a `dim_head` that rotary cannot halve, an unknown
      name, or fields that exclude each other.
  """

  num_tokens: int  # vocabulary size
  dim: int  # width of the residual stream
  depth: int  # layers
  heads: int  # query heads
  dim_head: int = 64
  ff_mult: int = 4  # hidden width of the feed-forward branch is dim * ff_mult
  position: str = "rotary"  # "rotary" | "alibi"
  norm: Literal["layer", "rms"] = "layer"  # "layer" (bias-free LayerNorm) | "rms"
  shared_kv: bool = False  # values are the keys
  norm_eps: float = 1e-5  # added to the variance (layer) or to the mean square (rms)
  logits_scale: float | None = None  # None: 1/sqrt(dim), as in the paper
  qk_norm: str | None = None  # of queries and keys: "l2" (a gain per channel) | "layer" (and head)
  xpos_scale_base: int | None = None  # None: no xPos decay on top of rotary
  kv_heads: int = 1  # key and value heads; 1 is multi-query attention
  dim_ff: int = _Product()  # hidden width of the feed-forward branch; left out: dim * ff_mult
  rope_theta: float = 10_000.0  # wavelength base of rotary positions
  window: int | None = None  # keys that a query sees, its own included; None: all before it
  global_every: int | None = None  # every n-th layer has no window and no positions
  activation: str = "swiglu"  # "swiglu" | "gelu" (erf, without a gate)
  norm_bias: bool = False  # norms add a learned bias (position-wise LayerNorm as in Falcon)

  def __post_init__(self):
    stored: dict[Any, str | None] = {True: "l2", False: None}  # by version 0.1
    qk_norm = stored.get(self.qk_norm, self.qk_norm)
    object.__setattr__(self, "qk_norm", qk_norm)
    optional = [name for name in ("window", "global_every") if getattr(self, name) is not None]
    if isinstance(self.dim_ff, _Product) or self.dim_ff is None:
      object.__setattr__(self, "dim_ff", None)
    else:
      optional.append("dim_ff")
    for name in ("num_tokens", "dim", "depth", "heads", "dim_head", "ff_mult", "kv_heads",
                 *optional):
      value = getattr(self, name)
      try:
        size = 0 if isinstance(value, bool) else operator.index(value)
      except TypeError:
        size = 0
      if size < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")
      if size >= 2**31:
        raise ValueError(f"{name} must be less than 2^31; got {value!r}")
      object.__setattr__(self, name, size)  # of NumPy's integers, which JSON cannot hold
    if self.dim_ff in (None, self.dim * self.ff_mult):
      object.__setattr__(self, "dim_ff", _Product(self.dim * self.ff_mult))
    for name, allowed in (
        ("position", ("rotary", "alibi")), ("norm", ("layer", "rms")),
        ("qk_norm", (None, "l2", "layer")), ("activation", ("swiglu", "gelu"))):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; "
                         f"got {getattr(self, name)!r}")
    if self.heads % self.kv_heads:
      raise ValueError(f"kv_heads must divide heads; got {self.kv_heads} and {self.heads}")
    if self.global_every is not None and self.window is None and self.global_every > 1:
      raise ValueError("global_every is for models with a window; give window too")
    if self.norm_bias and self.norm != "layer":
      raise ValueError("norm_bias needs norm='layer'; an RMSNorm has none")
    if not 0 < self.rope_theta < math.inf:
      raise ValueError(f"rope_theta must be positive and finite; got {self.rope_theta}")
    if self.position == "rotary" and self.dim_head % 2:
      raise ValueError(f"rotary positions need an even dim_head; got {self.dim_head}")
    if not self.norm_eps >= 0:
      raise ValueError(f"norm_eps must not be negative; got {self.norm_eps}")
    if self.xpos_scale_base is not None and (
        self.position != "rotary" or not 1 <= self.xpos_scale_base < math.inf):
      raise ValueError("xpos_scale_base must be positive and needs position='rotary'")

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "PaLMConfig":
    """The inverse of `dataclasses.asdict`, with a clear error for an unknown field."""
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(f"unknown config fields: {', '.join(sorted(unknown))}")
    return cls(**fields)

  def is_global(self, layer: int) -> bool:
    """Whether a layer, counted from 0, is one of those without a window and positions."""
    return self.global_every is not None and (layer + 1) % self.global_every == 0

  @property
  def values_are_keys(self) -> bool:
    """Whether attention reads one array as keys and values."""
    return self.shared_kv and self.position == "alibi" and not self.qk_norm

  @property
  def logits_factor(self) -> float:
    """The factor of the logits: `logits_scale`, or 1/sqrt(dim)."""
    return self.dim**-0.5 if self.logits_scale is None else self.logits_scale

  @property
  def num_params(self) -> int:
    """Number of parameters, final norm included and the tied embedding counted once."""
    return (self.num_tokens * self.dim + self.depth * sum(self.layer_params.values())
            + self.dim * (1 + self.norm_bias))

  @property
  def layer_params(self) -> dict[str, int]:
    """Number of parameters of one layer, by the names of `ParallelBlock`'s parameters."""
    inner, keys = self.heads * self.dim_head, self.kv_heads * self.dim_head
    params = {"norm": self.dim, "query": self.dim * inner, "key": self.dim * keys}
    if not self.shared_kv:
      params["value"] = self.dim * keys
    if self.activation == "swiglu":
      params["gate"] = self.dim * self.dim_ff
    params |= {"up": self.dim * self.dim_ff, "attn_out": inner * self.dim,
               "ff_out": self.dim_ff * self.dim}
    if self.norm_bias:
      params["norm_bias"] = self.dim
    if self.qk_norm:
      layer = self.qk_norm == "layer"
      params["query_scale"] = inner if layer else self.dim_head
      params["key_scale"] = keys if layer else self.dim_head
    return params

  def train_flops_per_token(self, seq_len: int, remat: str = "none") -> float:
    """FLOPs of one token, forward and backward: 6N + 12 L H Q T (PaLM, appendix B).

    Args:
      seq_len: T, tokens in a sequence; the causal mask is not taken into account, a window is.
      remat: with the name of a policy, also what it makes the hardware compute again: a layer's
        in-projection, and with "full" its attention too. The out-projection is not needed again.
    """
    window = seq_len if self.window is None else min(self.window, seq_len)
    keys = sum(seq_len if self.is_global(layer) else window for layer in range(self.depth))
    attention = 4 * self.heads * self.dim_head * keys
    again = 0
    if remat != "none":
      again = 2 * self.depth * sum(
          count for name, count in self.layer_params.items()
          if name in ("query", "key", "value", "gate", "up"))
      again += attention if remat == "full" else 0
    return 6 * self.num_params + 3 * attention + again


_LITE: dict[str, Any] = dict(position="alibi", norm="rms", shared_kv=True)

# The first three are table 1 of the paper. `palm-lite` is the model that PaLM-jax trains on
# enwik8. The small ones train on a laptop, on bytes.
configs: dict[str, PaLMConfig] = {
    "palm-540b": PaLMConfig(num_tokens=256_000, dim=18_432, depth=118, heads=48, dim_head=256),
    "palm-62b": PaLMConfig(num_tokens=256_000, dim=8_192, depth=64, heads=32, dim_head=256),
    "palm-8b": PaLMConfig(num_tokens=256_000, dim=4_096, depth=32, heads=16, dim_head=256),
    "palm-lite": PaLMConfig(num_tokens=256, dim=512, depth=8, heads=8, dim_head=64, **_LITE),
    "palm-small": PaLMConfig(num_tokens=256, dim=256, depth=6, heads=8, dim_head=32),
    "palm-tiny": PaLMConfig(num_tokens=256, dim=128, depth=4, heads=4, dim_head=32),
    "palm-lite-tiny": PaLMConfig(num_tokens=256, dim=128, depth=4, heads=4, dim_head=32, **_LITE),
}

# Public models with PaLM's block; `palm_haiku.hub.load` reads their weights.
_RLHF: dict[str, Any] = dict(
    num_tokens=50_304, heads=8, dim_head=128, logits_scale=1.0, xpos_scale_base=512)
_COHERE: dict[str, Any] = dict(num_tokens=256_000, dim_head=128)
_WINDOWS: dict[str, Any] = dict(window=4096, global_every=4, rope_theta=50_000.0)
configs |= {
    "palm-rlhf-150m": PaLMConfig(dim=768, depth=12, **_RLHF),
    "palm-rlhf-410m": PaLMConfig(dim=1024, depth=24, **_RLHF),
    "palm-rlhf-1b": PaLMConfig(dim=2048, depth=16, **_RLHF),
    "palm-rlhf-2.1b": PaLMConfig(dim=2560, depth=24, **_RLHF),
    "command-r": PaLMConfig(
        dim=8192, depth=40, heads=64, kv_heads=64, dim_ff=22_528, rope_theta=8e6,
        logits_scale=0.0625, **_COHERE),
    "command-r-plus": PaLMConfig(
        dim=12_288, depth=64, heads=96, kv_heads=8, dim_ff=33_792, rope_theta=75e6,
        logits_scale=0.8333333333333334, qk_norm="layer", **_COHERE),
    "aya-23-8b": PaLMConfig(
        dim=4096, depth=32, heads=32, kv_heads=8, dim_ff=14_336, logits_scale=0.0625, **_COHERE),
    "command-r7b": PaLMConfig(
        dim=4096, depth=32, heads=32, kv_heads=8, dim_ff=14_336, logits_scale=0.25,
        **_COHERE, **_WINDOWS),
    "command-a": PaLMConfig(
        dim=12_288, depth=64, heads=96, kv_heads=8, dim_ff=36_864, logits_scale=0.25,
        **_COHERE, **_WINDOWS),
    "tiny-aya": PaLMConfig(
        dim=2048, depth=36, heads=16, kv_heads=4, dim_ff=11_008, logits_scale=1.0,
        **_COHERE | {"num_tokens": 262_144}, **_WINDOWS),
    "falcon-7b": PaLMConfig(
        num_tokens=65_024, dim=4544, depth=32, heads=71, logits_scale=1.0, activation="gelu",
        norm_bias=True),
}
