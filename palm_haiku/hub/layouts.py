"""Names and layouts of the tensors of each family, beside the parameters of a PaLM.

A tensor of a linear layer is (out, in) and becomes [in, out] here, with heads apart. Rotary of
Cohere turns channels (2i, 2i + 1), here it turns (i, i + dim_head/2): a permutation of the query's
and key's channels within each head.
"""

import dataclasses

import numpy as np

from palm_haiku.config import PaLMConfig


@dataclasses.dataclass(frozen=True)
class Matrix:
  """A parameter [*in_dims, *out_dims] that is stored as rows of a tensor (out, in)."""

  name: str  # {i} is the layer
  in_dims: tuple[int, ...]
  out_dims: tuple[int, ...]
  first_row: int = 0  # of a tensor that holds several parameters
  rows: int | None = None  # of the tensor; None: this parameter's alone
  halves: bool = False  # stored with rotary pairs side by side

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.in_dims, *self.out_dims)

  @property
  def stored_shape(self) -> tuple[int, ...]:
    rows = int(np.prod(self.out_dims)) if self.rows is None else self.rows
    return rows, int(np.prod(self.in_dims))


@dataclasses.dataclass(frozen=True)
class Vector:
  """A parameter that is stored as it is."""

  name: str
  shape: tuple[int, ...]
  halves: bool = False

  @property
  def stored_shape(self) -> tuple[int, ...]:
    return self.shape


Layout = dict[tuple[str, str], Matrix | Vector]  # by (Haiku module, parameter)

STACK = "palm/layers/parallel_block"


def layout(config: PaLMConfig, family: str) -> Layout:
  """Where each parameter of a model is stored.

  Args:
    family: "cohere" (also of cohere2) or "falcon".
  """
  return (_falcon if family == "falcon" else _cohere)(config)


def _cohere(c: PaLMConfig) -> Layout:
  layer = "model.layers.{i}."
  # Global layers have no positions, but the order of channels within a head is free there.
  halves = c.position == "rotary"
  heads = lambda name, heads, **options: Matrix(
      f"{layer}self_attn.{name}_proj.weight", (c.dim,), (heads, c.dim_head), **options)
  kv = lambda name, **options: dataclasses.replace(
      heads(name, c.kv_heads, **options),
      out_dims=(c.kv_heads, c.dim_head) if c.kv_heads > 1 else (c.dim_head,))
  stack = {
      "norm": Vector(f"{layer}input_layernorm.weight", (c.dim,)),
      "query": heads("q", c.heads, halves=halves),
      "key": kv("k", halves=halves),
      "value": kv("v"),
      "gate": Matrix(f"{layer}mlp.gate_proj.weight", (c.dim,), (c.dim_ff,)),
      "up": Matrix(f"{layer}mlp.up_proj.weight", (c.dim,), (c.dim_ff,)),
      "attn_out": Matrix(f"{layer}self_attn.o_proj.weight", (c.heads, c.dim_head), (c.dim,)),
      "ff_out": Matrix(f"{layer}mlp.down_proj.weight", (c.dim_ff,), (c.dim,)),
  }
  if c.qk_norm:
    stack |= {
        "query_scale": Vector(f"{layer}self_attn.q_norm.weight", (c.heads, c.dim_head), halves),
        "key_scale": Vector(f"{layer}self_attn.k_norm.weight", (c.kv_heads, c.dim_head), halves)}
  return _with_stack(stack, {
      "embedding": Vector("model.embed_tokens.weight", (c.num_tokens, c.dim)),
      "norm": Vector("model.norm.weight", (c.dim,))})


def _falcon(c: PaLMConfig) -> Layout:
  layer, queries = "transformer.h.{i}.", c.heads * c.dim_head
  packed = lambda first, dims: Matrix(
      f"{layer}self_attention.query_key_value.weight", (c.dim,), dims, first,
      queries + 2 * c.dim_head)
  stack = {
      "norm": Vector(f"{layer}input_layernorm.weight", (c.dim,)),
      "norm_bias": Vector(f"{layer}input_layernorm.bias", (c.dim,)),
      "query": packed(0, (c.heads, c.dim_head)),
      "key": packed(queries, (c.dim_head,)),
      "value": packed(queries + c.dim_head, (c.dim_head,)),
      "up": Matrix(f"{layer}mlp.dense_h_to_4h.weight", (c.dim,), (c.dim_ff,)),
      "attn_out": Matrix(f"{layer}self_attention.dense.weight", (c.heads, c.dim_head), (c.dim,)),
      "ff_out": Matrix(f"{layer}mlp.dense_4h_to_h.weight", (c.dim_ff,), (c.dim,)),
  }
  return _with_stack(stack, {
      "embedding": Vector("transformer.word_embeddings.weight", (c.num_tokens, c.dim)),
      "norm": Vector("transformer.ln_f.weight", (c.dim,)),
      "norm_bias": Vector("transformer.ln_f.bias", (c.dim,))})


def _with_stack(stack, model) -> Layout:
  return ({("palm", name): where for name, where in model.items()}
          | {(STACK, name): where for name, where in stack.items()})


def to_halves(dim_head: int) -> np.ndarray:
  """Channels of pairs (2i, 2i + 1) in the order of halves (i, i + dim_head/2)."""
  return np.arange(dim_head).reshape(-1, 2).T.reshape(-1)
