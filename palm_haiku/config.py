"""What a PaLM is made of, and the models that have names."""

import dataclasses
import operator
from typing import Any, Mapping


@dataclasses.dataclass(frozen=True)
class PaLMConfig:
  """Architecture of a PaLM.

  The first six names and their meaning are those of PaLM-jax. The remaining ones select
  between the two architectures, PaLM (arXiv:2204.02311, section 2) and PaLM-lite (ALiBi,
  RMSNorm, one projection for keys and values), or reproduce another implementation's
  arithmetic exactly (`palm_haiku.interop`).

  Raises:
    ValueError: a size that is not positive, a `dim_head` that rotary cannot halve, or an
      unknown name.
  """

  num_tokens: int  # vocabulary size
  dim: int  # width of the residual stream
  depth: int  # layers
  heads: int  # query heads; keys and values have one head (multi-query attention)
  dim_head: int = 64
  ff_mult: int = 4  # hidden width of the feed-forward branch is dim * ff_mult
  position: str = "rotary"  # "rotary" | "alibi"
  norm: str = "layer"  # "layer" (bias-free LayerNorm) | "rms"
  shared_kv: bool = False  # values are the keys
  norm_eps: float = 1e-5  # added to the variance (layer) or to the mean square (rms)
  logits_scale: float | None = None  # None: 1/sqrt(dim), as in the paper
  qk_norm: bool = False  # l2-normalise queries and keys, with a learned scale per channel
  xpos_scale_base: int | None = None  # None: no xPos decay on top of rotary

  def __post_init__(self):
    for name in ("num_tokens", "dim", "depth", "heads", "dim_head", "ff_mult"):
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
    for name, allowed in (("position", ("rotary", "alibi")), ("norm", ("layer", "rms"))):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
    if self.position == "rotary" and self.dim_head % 2:
      raise ValueError(f"rotary positions need an even dim_head; got {self.dim_head}")
    if not self.norm_eps >= 0:
      raise ValueError(f"norm_eps must not be negative; got {self.norm_eps}")
    if self.xpos_scale_base is not None and (self.position != "rotary" or self.xpos_scale_base < 1):
      raise ValueError("xpos_scale_base must be positive and needs position='rotary'")

  @property
  def dim_ff(self) -> int:
    """Hidden width of the feed-forward branch."""
    return self.dim * self.ff_mult

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "PaLMConfig":
    """The inverse of `dataclasses.asdict`, with a clear error for an unknown field."""
    unknown = set(fields) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(f"unknown config fields: {', '.join(sorted(unknown))}")
    return cls(**fields)

  @property
  def values_are_keys(self) -> bool:
    """Whether attention reads one array as keys and values."""
    return self.shared_kv and self.position == "alibi" and not self.qk_norm

  @property
  def logits_factor(self) -> float:
    """What the logits are multiplied by: `logits_scale`, or 1/sqrt(dim)."""
    return self.dim**-0.5 if self.logits_scale is None else self.logits_scale

  @property
  def num_params(self) -> int:
    """Number of parameters, final norm included and the tied embedding counted once."""
    projections = self.heads * self.dim_head * 2 + self.dim_head * (1 if self.shared_kv else 2)
    layer = self.dim * (projections + 3 * self.dim_ff + 1)
    layer += 2 * self.dim_head if self.qk_norm else 0
    return self.num_tokens * self.dim + self.depth * layer + self.dim

  def train_flops_per_token(self, seq_len: int, remat: str = "none") -> float:
    """FLOPs of one token, forward and backward: 6N + 12 L H Q T (PaLM, appendix B).

    Args:
      seq_len: T, tokens in a sequence; the causal mask is not taken into account.
      remat: with the name of a policy, also what it makes the hardware compute again: a layer's
        in-projection, and with "full" its attention too. The out-projection is not needed again.
    """
    attention = 4 * self.depth * self.heads * self.dim_head * seq_len
    again = 0
    if remat != "none":
      keys = self.dim_head * (1 if self.shared_kv else 2)
      again = 2 * self.depth * self.dim * (self.heads * self.dim_head + keys + 2 * self.dim_ff)
      again += attention if remat == "full" else 0
    return 6 * self.num_params + 3 * attention + again


_LITE = dict(position="alibi", norm="rms", shared_kv=True)

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
