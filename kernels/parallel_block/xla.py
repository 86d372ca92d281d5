"""The parallel block in plain JAX: in-projection, attention, out-projection."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ..norms import normalize
from .steps import activate, attention, positioned, project


def in_projection(x: jax.Array, params: Mapping[str, jax.Array], positions: jax.Array | None, *,
                  norm: str, norm_eps: float, **positions_options):
  """All that the layer computes from norm(x), before attention.

  Returns:
    query [..., T, H, Dh]; key [..., T, K, Dh]; value [..., T, K, Dh], which is the key before
    QK-norm and rotary if params have no value; gate, None where params have none, and up
    [..., T, F].
  """
  def kv_heads(name):
    heads = project(h, params[name])
    return heads[..., None, :] if params[name].ndim == 2 else heads

  h = normalize(x, params["norm"], params.get("norm_bias"), kind=norm, eps=norm_eps)
  query, key = project(h, params["query"]), kv_heads("key")
  value = kv_heads("value") if "value" in params else key
  query, key = positioned(query, key, params, positions, norm_eps=norm_eps, **positions_options)
  gate = project(h, params["gate"]) if "gate" in params else None
  return query, key, value, gate, project(h, params["up"])


def out_projection(x: jax.Array | None, attended: jax.Array, gate: jax.Array | None,
                   up: jax.Array | None, params: Mapping[str, jax.Array]):
  """x + attended @ attn_out + act(gate, up) @ ff_out; attended is [..., T, H, Dh]."""
  attn = project(attended, params["attn_out"], axes=2)
  return x + attn + project(activate(gate, up), params["ff_out"])


def parallel_attention_ffn(x, params, *, norm, norm_eps, rotary, rope_theta, xpos_scale_base,
                           query_offset, kv_cache, **attention_options):
  """See the op of the same name.

  The backward pass keeps x and what the matrix products made, and recomputes what is between
  them: of a layer's activations that is less than half, for hardly any time. A policy of
  `jax.checkpoint` knows them by the names that they have in the fused form.
  """
  positions = jnp.asarray(query_offset)[..., None] + jnp.arange(x.shape[-2])
  project_in = functools.partial(
      in_projection, norm=norm, norm_eps=norm_eps, rotary=rotary, rope_theta=rope_theta,
      xpos_scale_base=xpos_scale_base)
  projected = jax.checkpoint(project_in, prevent_cse=False)(x, params, positions)
  query, key, value, gate, up = (
      None if array is None else checkpoint_name(array, f"block_{name}")
      for name, array in zip(("query", "key", "value", "gate", "up"), projected))
  attend, kv_cache = attention(query, key, value, params, rotary=rotary, query_offset=query_offset,
                               kv_cache=kv_cache, **attention_options)
  y = jax.checkpoint(out_projection, prevent_cse=False)(x, attend(), gate, up, params)
  return y if kv_cache is None else (y, kv_cache)
