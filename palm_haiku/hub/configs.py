"""Architectures as `config.json` describes them, and back."""

import math
from collections.abc import Mapping
from typing import Any

from palm_haiku.config import PaLMConfig
from palm_haiku.hub.errors import HubError

FAMILIES = {"cohere": "cohere", "cohere2": "cohere", "falcon": "falcon"}  # layout by model_type


def from_json(fields: Mapping[str, Any]) -> PaLMConfig:
  """The architecture that a model's `config.json` describes.

  Raises:
    HubError: a field that is missing, or a value that is not supported; the message names it.
  """
  kind = fields.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise HubError(f"model_type {kind!r} is not supported; there are {', '.join(FAMILIES)}, and "
                   "PaLM-rlhf-pytorch's state dicts")
  try:
    return _falcon(fields) if kind == "falcon" else _cohere(fields, kind)
  except KeyError as error:
    raise HubError(f"config.json of a {kind} model lacks {error}") from None
  except (TypeError, AttributeError, ZeroDivisionError) as error:
    raise HubError(f"config.json of a {kind} model is damaged: {error}") from None
  except HubError:
    raise
  except ValueError as error:  # of `PaLMConfig`
    raise HubError(f"config.json of a {kind} model is not possible: {error}") from None


def _cohere(fields, kind) -> PaLMConfig:
  _require(fields, hidden_act="silu", attention_bias=False, tie_word_embeddings=True)
  heads, dim, depth = (
      fields[name] for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
  window = global_every = None
  if kind == "cohere2":
    window, global_every = _layer_kinds(fields, depth)
  return PaLMConfig(
      num_tokens=fields["vocab_size"], dim=dim, depth=depth, heads=heads,
      dim_head=_dim_head(fields, dim, heads), kv_heads=fields.get("num_key_value_heads") or heads,
      dim_ff=fields["intermediate_size"], norm_eps=_number(fields, "layer_norm_eps", 1e-5),
      rope_theta=_rope_theta(fields), logits_scale=_number(fields, "logit_scale", 0.0625),
      qk_norm="layer" if fields.get("use_qk_norm") else None,
      window=window, global_every=global_every)


def _falcon(fields) -> PaLMConfig:
  _require(fields, multi_query=True, parallel_attn=True, new_decoder_architecture=False,
           alibi=False, bias=False, activation="gelu", tie_word_embeddings=True)
  heads, dim = fields["num_attention_heads"], fields["hidden_size"]
  return PaLMConfig(
      num_tokens=fields["vocab_size"], dim=dim, depth=fields["num_hidden_layers"], heads=heads,
      dim_head=_dim_head(fields, dim, heads), dim_ff=fields.get("ffn_hidden_size") or 4 * dim,
      norm_eps=_number(fields, "layer_norm_epsilon", 1e-5), rope_theta=_rope_theta(fields),
      logits_scale=1.0, activation="gelu", norm_bias=True)


def _require(fields, **values):
  """Raises unless each field, where it is given, has the only value that is supported."""
  for name, value in values.items():
    if fields.get(name, value) != value:
      raise HubError(f"{name} = {fields[name]!r} is not supported; only {value!r} is")


def _dim_head(fields, dim, heads) -> int:
  if fields.get("head_dim"):
    return fields["head_dim"]
  if dim % heads:
    raise HubError(f"hidden_size {dim} is no multiple of num_attention_heads {heads}, and there is "
                   "no head_dim")
  return dim // heads


def _rope_theta(fields) -> float:
  """The base of the wavelengths: in rope_parameters since transformers 5, at the top before."""
  parameters = fields.get("rope_parameters") or {}
  for scaling in (parameters, fields.get("rope_scaling") or {}):
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
      raise HubError(f"rope scaling of type {kind!r} is not supported; only 'default' is")
    if any(isinstance(value, dict) for value in scaling.values()):
      raise HubError("rope_parameters by the kind of layer are not supported; only one set is")
    if scaling.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0)) != 1.0:
      raise HubError("partial_rotary_factor is not supported; rotary turns whole heads")
  return float(_number(
      parameters if "rope_theta" in parameters else fields, "rope_theta", 10_000.0))


def _number(fields, name, default):
  value = fields.get(name, default)
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    raise HubError(f"{name} must be a finite number; got {value!r}")
  return value


def _layer_kinds(fields, depth) -> tuple[int | None, int | None]:
  """(window, global_every) of a model whose every n-th layer attends to all positions."""
  kinds = fields.get("layer_types")
  if kinds is None:
    every = fields.get("sliding_window_pattern", 4)
    kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(depth)]
  if len(kinds) != depth:
    raise HubError(f"layer_types has {len(kinds)} entries for {depth} layers")
  every = kinds.index("full_attention") + 1 if "full_attention" in kinds else None
  for i, kind in enumerate(kinds):
    is_global = every is not None and (i + 1) % every == 0
    if kind != ("full_attention" if is_global else "sliding_attention"):
      raise HubError("layer_types is supported where every n-th layer is full_attention and the "
                     f"others are sliding_attention; layer {i} is {kind}")
  return (None if every == 1 else fields["sliding_window"]), every


def to_json(config: PaLMConfig) -> dict[str, Any]:
  """`config.json` of a model as `CohereForCausalLM`, or with a window `Cohere2ForCausalLM`.

  Raises:
    HubError: a field of the config that Cohere's architecture cannot express.
  """
  kind = "cohere" if config.window is config.global_every is None else "cohere2"
  for name, values in (
      ("position", ("rotary",)), ("norm", ("layer",)), ("xpos_scale_base", (None,)),
      ("activation", ("swiglu",)), ("norm_bias", (False,)),
      ("qk_norm", (None, "layer") if kind == "cohere" else (None,))):
    if getattr(config, name) not in values:
      raise HubError(f"{name} = {getattr(config, name)!r} cannot be expressed as a {kind} model")
  fields = {
      "architectures": ["CohereForCausalLM" if kind == "cohere" else "Cohere2ForCausalLM"],
      "model_type": kind, "attention_bias": False, "attention_dropout": 0.0, "dtype": "float32",
      "head_dim": config.dim_head, "hidden_act": "silu", "hidden_size": config.dim,
      "intermediate_size": int(config.dim_ff), "layer_norm_eps": config.norm_eps,
      "logit_scale": config.logits_factor, "num_attention_heads": config.heads,
      "num_hidden_layers": config.depth, "num_key_value_heads": config.kv_heads,
      "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
      "rope_theta": config.rope_theta, "tie_word_embeddings": True, "torch_dtype": "float32",
      "use_cache": True, "vocab_size": config.num_tokens,
  }
  if kind == "cohere":
    return fields | {"use_qk_norm": config.qk_norm == "layer"}
  return fields | {
      # All layers are global where global_every is 1, and no window is ever looked at.
      "sliding_window": config.window or 4096,
      "layer_types": ["full_attention" if config.is_global(i) else "sliding_attention"
                      for i in range(config.depth)]}
