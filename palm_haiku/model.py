"""PaLM as Haiku modules."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from palm_haiku import kernels, lora
from palm_haiku.config import PaLMConfig
from palm_haiku.kernels import Implementation
from palm_haiku.kernels.core.compat import Array
from palm_haiku.kernels.core.integers import known
from palm_haiku.kernels.norms import normalize
from palm_haiku.sharding import Rules, constrain

# Rematerialisation policies by name. A layer keeps, per token, its input and: with "none" the
# results of its matrix products; with "attention" those of attention.
REMAT_POLICIES = {
    "none": None,
    "attention": jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def palm_params(params: Mapping[str, Any], prefix: str | None = None,
                config: PaLMConfig | None = None) -> tuple[Any, Any]:
  """The parameters of a PaLM, alone or within other modules: its own, and those of its layers.

  Args:
    params: of `hk.transform`, by module.
    prefix: the name of the PaLM there; None finds it where there is one.
    config: that the parameters must be of, if it is given.

  Raises:
    ValueError: there is none, or several and no prefix, or it is not one of this config.
  """
  layers = "/layers/parallel_block"
  names = [name.removesuffix(layers) for name in params if name.endswith(layers)]
  names = [name for name in names if "embedding" in params.get(name, ())]
  if prefix is None and len(names) == 1:
    prefix = names[0]
  if prefix not in names:
    there = ", ".join(map(repr, names or params))
    raise ValueError(f"the parameters hold no PaLM; there is {there}" if not names else
                     f"the parameters hold several PaLMs; pass prefix, one of {there}"
                     if prefix is None else
                     f"the parameters hold no PaLM called {prefix!r}; there is {there}")
  found = params[prefix], params[prefix + layers]
  for part, want in zip(found, _shapes(config) if config else ()):
    for name in sorted(part.keys() | want.keys()):
      shape = tuple(part[name].shape) if name in part else None
      if shape != want.get(name):
        merge = "; lora.merge adds adapters to their weights" if lora.is_adapter(name) else ""
        raise ValueError(f"the parameters are not those of this config: {name} is "
                         f"{shape or 'absent'}, of the config {want.get(name, 'absent')}{merge}")
  return found


@functools.lru_cache(maxsize=8)
def _shapes(config):
  """Shapes by name, as `palm_params` has the parameters."""
  init = hk.transform(lambda: PaLM.from_config(config)(np.zeros(1, np.int32))).init
  params = jax.eval_shape(init, jax.random.key(0))
  return [{name: x.shape for name, x in part.items()} for part in palm_params(params)]


class KVCache(NamedTuple):
  """Keys and values of the positions that a model has already seen."""

  # (keys, values) or (keys,): [depth, ..., max_len, dim_head], or with several kv_heads
  # [depth, ..., max_len, kv_heads, dim_head].
  arrays: tuple[jax.Array, ...]
  length: jax.Array  # int32[], positions filled; or int32[...], by sequence

  @classmethod
  def empty(cls, config: PaLMConfig, lead: tuple[int, ...], max_len: int,
            dtype: DTypeLike = jnp.float32) -> "KVCache":
    """A cache with room for `max_len` positions of sequences with leading dimensions `lead`."""
    heads = (config.kv_heads,) if config.kv_heads > 1 else ()
    zeros = jnp.zeros((config.depth, *lead, max_len, *heads, config.dim_head), dtype)
    return cls((zeros,) if config.values_are_keys else (zeros, zeros), jnp.zeros((), jnp.int32))


class ParallelBlock(hk.Module):
  """One layer: x + attention(norm(x)) + feed_forward(norm(x)) (PaLM, section 2)."""

  def __init__(self, config: PaLMConfig, *, implementation: Implementation = "auto",
               lora_rank: int = 0, name: str | None = "parallel_block"):
    super().__init__(name)
    self.config = config
    self.implementation: Implementation = implementation
    self.lora_rank = lora_rank

  def params(self, depth: int | None = None) -> dict[str, jax.Array]:
    """The layer's parameters, or those of `depth` layers stacked along a new first axis."""
    c = self.config
    stack = () if depth is None else (depth,)

    def matrix(name, shape, fan_in):
      return hk.get_parameter(
          name, (*stack, *shape), init=hk.initializers.RandomNormal(fan_in**-0.5))

    def vector(name, shape, init=jnp.ones):
      return hk.get_parameter(name, (*stack, *shape), init=init)

    kv_heads = (c.kv_heads,) if c.kv_heads > 1 else ()
    params = {
        "norm": vector("norm", (c.dim,)),
        "query": matrix("query", (c.dim, c.heads, c.dim_head), c.dim),
        "key": matrix("key", (c.dim, *kv_heads, c.dim_head), c.dim),
    }
    if c.activation == "swiglu":
      params["gate"] = matrix("gate", (c.dim, c.dim_ff), c.dim)
    params |= {
        "up": matrix("up", (c.dim, c.dim_ff), c.dim),
        "attn_out": matrix("attn_out", (c.heads, c.dim_head, c.dim), c.heads * c.dim_head),
        "ff_out": matrix("ff_out", (c.dim_ff, c.dim), c.dim_ff),
    }
    if not c.shared_kv:
      params["value"] = matrix("value", (c.dim, *kv_heads, c.dim_head), c.dim)
    if c.norm_bias:
      params["norm_bias"] = vector("norm_bias", (c.dim,), jnp.zeros)
    if c.qk_norm:
      of_heads = c.qk_norm == "layer"
      for name, heads in (("query_scale", c.heads), ("key_scale", c.kv_heads)):
        params[name] = vector(name, ((heads, c.dim_head) if of_heads else (c.dim_head,)))
    return lora.adapted(params, self.lora_rank, stack) if self.lora_rank else params

  def __call__(self, x: jax.Array, *, params: Mapping[str, jax.Array] | None = None,
               is_global: bool = False, segment_ids: Array | None = None,
               kv_cache: tuple[jax.Array, ...] | None = None, query_offset: int | Array = 0):
    """Applies the layer.

    Args:
      x: float[..., T, dim].
      params: of one layer, from `params(depth)`; None for the module's own.
      is_global: without the model's window and positions; see `PaLMConfig.global_every`.
      segment_ids: int[..., T]; attention stays within equal ids.
      kv_cache: this layer's arrays of a `KVCache`; see `parallel_attention_ffn`.
      query_offset: position of the first row of x; int[], or with `kv_cache` int[...].

    Returns:
      [..., T, dim] in the dtype of x; with `kv_cache`, a pair of that and the new cache.
    """
    c = self.config
    alibi = c.position == "alibi" and not is_global
    return kernels.parallel_attention_ffn(
        x,
        self.params() if params is None else params,
        norm=c.norm,
        norm_eps=c.norm_eps,
        rotary=c.position == "rotary" and not is_global,
        rope_theta=c.rope_theta,
        xpos_scale_base=None if is_global else c.xpos_scale_base,
        alibi_slopes=kernels.alibi_slopes(c.heads) if alibi else None,
        local_window_size=None if c.window is None or is_global else (c.window - 1, 0),
        segment_ids=segment_ids,
        query_offset=query_offset,
        kv_cache=kv_cache,
        implementation=self.implementation,
    )


class PaLM(hk.Module):
  """A decoder-only language model; tokens in, next-token logits out."""

  def __init__(self, num_tokens: int, dim: int, depth: int, heads: int, dim_head: int = 64,
               ff_mult: int = 4, *, dtype: DTypeLike = jnp.float32, remat: str = "none",
               implementation: Implementation = "auto", rules: Rules = Rules(), lora_rank: int = 0,
               name: str | None = "palm", **architecture):
    """Describes the model; the first six names are PaLM-jax's.

    Args:
      num_tokens, dim, depth, heads, dim_head, ff_mult: sizes; see `PaLMConfig`.
      dtype: of activations and matrix products. Parameters, norms, softmax and logits stay
        float32.
      remat: what the backward pass recomputes: "none" (only what is between the matrix
        products), "attention" (all but attention) or "full" (whole layers).
      implementation: of every op, "auto" or a backend by name.
      rules: how activations are divided over the mesh in context, if there is one.
      lora_rank: of adapters beside the matrices of each layer (`lora`); 0 for none.
      **architecture: the remaining fields of `PaLMConfig`: position, norm, shared_kv, ...
    """
    super().__init__(name)
    self.config = PaLMConfig(num_tokens, dim, depth, heads, dim_head, ff_mult, **architecture)
    if remat not in REMAT_POLICIES:
      raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}; got {remat!r}")
    self.dtype, self.remat = dtype, remat
    self.implementation: Implementation = implementation
    self.rules, self.lora_rank = rules, lora_rank

  @classmethod
  def from_config(cls, config: PaLMConfig, **options) -> "PaLM":
    """A model of the given architecture; `options` are those of `__init__`."""
    return cls(**dataclasses.asdict(config), **options)

  def __call__(self, tokens: Any, *, segment_ids: Array | None = None,
               cache: KVCache | None = None):
    """Logits of the token after each position.

    Args:
      tokens: int[..., T], any leading dimensions, T >= 1.
      segment_ids: int[..., T]; attention stays within equal ids (packed documents).
      cache: what was seen before; the tokens stand at positions cache.length and on, which may
        be another for each sequence.

    Returns:
      float32[..., T, num_tokens]; with `cache`, a pair of that and the new cache. Inside jit
      a token outside the vocabulary makes its sequence NaN.

    Raises:
      ValueError: an empty sequence, tokens that are not integers, or, outside jit, a token
        outside the vocabulary or a cache without room.
    """
    x, embedding, cache = self._hidden(tokens, segment_ids, cache)
    # As one product of two matrices, for the reason that `kernels.parallel_block.steps` has.
    logits = self.config.logits_factor * jnp.einsum(
        "td,vd->tv", x.reshape(-1, x.shape[-1]), jnp.asarray(embedding, self.dtype),
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    logits = logits.reshape(*x.shape[:-1], -1)
    return logits if cache is None else (logits, cache)

  @hk.name_like("__call__")
  def loss(self, tokens: Any, targets: Any, *, segment_ids: Array | None = None,
           weights: Any = None, z_loss: float = 0.0):
    """The loss of each target, without ever holding the logits.

    Args:
      tokens: int[..., T], as for a call.
      targets: int[..., T], the token after each position.
      segment_ids: int[..., T]; attention stays within equal ids.
      weights: float[..., T], each token's loss is multiplied by.
      z_loss: weight of the squared log of the softmax normaliser.

    Returns:
      The loss and log Z of each token, both float32[..., T]; see `linear_cross_entropy`.
    """
    x, embedding, _ = self._hidden(tokens, segment_ids, None)
    targets, weights = _array(targets), _array(weights)
    return kernels.linear_cross_entropy(
        x, embedding, targets, z_loss=z_loss, scale=self.config.logits_factor, weights=weights,
        implementation=self.implementation)

  @hk.transparent
  def _hidden(self, tokens, segment_ids, cache):
    """The normalised residual stream after the last layer, the embedding, and the new cache."""
    c = self.config
    tokens, segment_ids = _array(tokens), _array(segment_ids)
    self._check(tokens, cache)
    embedding = hk.get_parameter(
        "embedding", (c.num_tokens, c.dim), init=hk.initializers.RandomNormal())
    tokens = constrain(tokens, ("batch", "sequence")[-tokens.ndim:], self.rules)
    x: Any = jnp.asarray(embedding, self.dtype).at[tokens].get(mode="fill", fill_value=jnp.nan)
    x = self._between_layers(x)

    if c.global_every is not None:
      x, arrays = self._layers_by_period(x, segment_ids, cache, c.global_every)
    elif cache is None:
      x = hk.layer_stack(c.depth, name="layers")(self._layer(segment_ids=segment_ids))(x)
    else:
      block = self._layer(segment_ids=segment_ids, query_offset=cache.length)
      x, arrays = hk.layer_stack(c.depth, name="layers", with_per_layer_inputs=True)(
          lambda x, *arrays: block(x, kv_cache=arrays))(x, *cache.arrays)
    if cache is not None:
      cache = KVCache(arrays, cache.length + tokens.shape[-1])

    gain = hk.get_parameter("norm", (c.dim,), init=jnp.ones)
    bias = hk.get_parameter("norm_bias", (c.dim,), init=jnp.zeros) if c.norm_bias else None
    return normalize(x, gain, bias, kind=c.norm, eps=c.norm_eps), embedding, cache

  def _layer(self, **inputs):
    def layer(x, **more):
      block = ParallelBlock(
          self.config, implementation=self.implementation, lora_rank=self.lora_rank)
      out = block(x, **inputs, **more)
      return (self._between_layers(out[0]), out[1]) if more else self._between_layers(out)

    policy = REMAT_POLICIES[self.remat]
    return layer if policy is None else hk.remat(layer, policy=policy, prevent_cse=False)

  @hk.transparent
  def _layers_by_period(self, x, segment_ids, cache, every: int):
    """All layers where every n-th is global: a scan over periods of n, then what is left of one.

    Parameters are stacked by layer, as `hk.layer_stack` has them, whatever a layer's kind.
    """
    c = self.config
    with hk.name_scope("layers"):
      block = ParallelBlock(c, implementation=self.implementation, lora_rank=self.lora_rank)
    inputs = dict(segment_ids=segment_ids)
    if cache is not None:
      inputs["query_offset"] = cache.length

    def layer(is_global, x, params, arrays):
      out = block(x, params=params, is_global=is_global, kv_cache=arrays, **inputs)
      x, arrays = (out, None) if arrays is None else out
      return self._between_layers(x), arrays

    policy = REMAT_POLICIES[self.remat]
    if policy is not None:
      layer = jax.checkpoint(layer, policy=policy, prevent_cse=False, static_argnums=(0,))

    def period(x, stacked):
      per_layer = []
      for i in range(len(jax.tree.leaves(stacked)[0])):
        x, arrays = layer(c.is_global(i), x, *jax.tree.map(lambda a: a[i], stacked))
        per_layer.append(arrays)
      return x, jax.tree.map(lambda *a: jnp.stack(a), *per_layer)

    stacked = block.params(c.depth), None if cache is None else cache.arrays
    periods = c.depth // every
    arrays = []
    if periods:
      x, outputs = jax.lax.scan(period, x, jax.tree.map(
          lambda a: a[:periods * every].reshape(periods, every, *a.shape[1:]),
          stacked))
      arrays.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), outputs))
    if c.depth % every:
      x, outputs = period(x, jax.tree.map(lambda a: a[periods * every:], stacked))
      arrays.append(outputs)
    return x, jax.tree.map(lambda *a: jnp.concatenate(a), *arrays)

  def _between_layers(self, x):
    return constrain(x, ("batch", "sequence", "residual")[-x.ndim:], self.rules)

  def _check(self, tokens, cache):
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
      raise ValueError(f"tokens must be integers; got {jnp.result_type(tokens)}")
    if jnp.ndim(tokens) < 1 or 0 in jnp.shape(tokens):
      raise ValueError(f"tokens must be [..., T] with at least one token; got {jnp.shape(tokens)}")
    values = known(tokens)
    if values is not None:
      low, high = int(values.min()), int(values.max())
      if low < 0 or high >= self.config.num_tokens:
        raise ValueError(f"token {low if low < 0 else high} is outside the vocabulary of "
                         f"{self.config.num_tokens} tokens")
    length = None if cache is None else known(cache.length)
    if cache is not None and length is not None:
      room = cache.arrays[0].shape[jnp.ndim(tokens)] - int(length.max())
      if jnp.shape(tokens)[-1] > room:
        raise ValueError(f"the cache has room for {room} more positions; "
                         f"got {jnp.shape(tokens)[-1]} tokens")


def _array(x) -> Any:
  """An array of nested lists, which may hold what is traced; anything else as it is."""
  if not isinstance(x, (list, tuple)):
    return x
  try:
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(x))
    return jnp.asarray(x) if traced else np.asarray(x)
  except (ValueError, TypeError) as error:
    raise ValueError("a list must be rectangular, of numbers; pad sequences to one length"
                     ) from error
