"""Attention by everything that one would use instead, behind one signature.

Each function takes query [B, T, H, D], key and value [B, S, K, D], and `alibi`; it is causal. What
an implementation cannot do or does not find here it refuses with `Absent` and the reason.
"""


import jax
import jax.numpy as jnp

from palm_haiku import kernels


class Absent(Exception):
  """Why an implementation has no row."""


def ours(query, key, value, segment_ids=None, *, alibi, implementation, window=None):
  """This project's op."""
  slopes = jnp.asarray(kernels.alibi_slopes(query.shape[-2])) if alibi else None
  return kernels.flash_attention(query, key, value, alibi_slopes=slopes,
                                 segment_ids=segment_ids, local_window_size=window,
                                 implementation=implementation)


def xla_bias(query, key, value, *, alibi):
  """Attention without kernels: jax.nn's XLA form; with ALiBi, a bias array."""
  return jax.nn.dot_product_attention(
      query, key, value, alibi_bias(query, key) if alibi else None, is_causal=True,
      implementation="xla")


def cudnn(query, key, value, *, alibi):
  """cuDNN's flash attention; with ALiBi, through a bias array."""
  return jax.nn.dot_product_attention(
      query, key, value, alibi_bias(query, key) if alibi else None, is_causal=True,
      implementation="cudnn")


def tokamax_gpu(query, key, value, *, alibi):
  """tokamax's Mosaic GPU attention; with ALiBi, through a bias array."""
  tokamax = _import("tokamax")
  return tokamax.dot_product_attention(
      query, key, value, alibi_bias(query, key) if alibi else None, is_causal=True,
      implementation="mosaic_gpu")


def tokamax_tpu(query, key, value, *, alibi, blocks=(1024, 1024, 512)):
  """tokamax's splash attention, of the blocks q, kv and kv_compute."""
  _no(alibi, "tokamax's splash attention has no bias")
  _one_key_head(key)
  return _splash_layout(tokamax_splash_kernel(query.shape[1], _clip(blocks, query, key)),
                        query, key, value)


def jax_splash(query, key, value, *, alibi, blocks=(1024, 1024, 512)):
  """JAX's splash attention, of the blocks q, kv and kv_compute, with its fused backward."""
  _no(alibi, "splash attention has no bias")
  _one_key_head(key)
  kernel = jax_splash_kernel(query.shape[1], query.shape[2], _clip(blocks, query, key))
  return _splash_layout(kernel, query, key, value)


def jax_flash(query, key, value, *, alibi, blocks=(512, 512)):
  """JAX's TPU flash attention, which wants a key head for each query head; with ALiBi, a bias."""
  bias = None
  if alibi:
    bias = jnp.broadcast_to(alibi_bias(query, key, jnp.float32),
                            (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
  kernel = jax_flash_kernel(query.shape[-1], _clip(blocks, query, key), bias)
  groups = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
  return kernel(*(x.swapaxes(1, 2) for x in (query, key, value))).swapaxes(1, 2)


def jax_mosaic_gpu(query, key, value, *, alibi, is_causal=True):
  """JAX's example of a Hopper kernel, for float16."""
  _no(alibi, "attention_mgpu has no bias")
  from jax.experimental.pallas.ops.gpu import attention_mgpu
  if query.dtype != jnp.float16:
    raise Absent(f"attention_mgpu takes float16 alone; got {query.dtype}")
  config = attention_mgpu.TuningConfig(
      block_q=64, block_kv=64 if query.shape[-1] > 128 else 128, max_concurrent_steps=2,
      causal=is_causal, block_q_dkv=64, block_kv_dkv=64, block_q_dq=64, block_kv_dq=64)
  # It leaves the scale to its caller.
  return attention_mgpu.attention(query * query.shape[-1]**-0.5, key, value, config)


PEERS = {
    "jax-nn-xla": xla_bias,
    "cudnn": cudnn,
    "tokamax-gpu": tokamax_gpu,
    "jax-mosaic-gpu": jax_mosaic_gpu,
    "tokamax-tpu": tokamax_tpu,
    "jax-splash": jax_splash,
    "jax-flash": jax_flash,
}
# Where a peer can run at all.
PLATFORMS = {
    "jax-nn-xla": ("cpu", "gpu", "tpu"), "cudnn": ("gpu",), "tokamax-gpu": ("gpu",),
    "jax-mosaic-gpu": ("gpu",), "tokamax-tpu": ("tpu",), "jax-splash": ("tpu",),
    "jax-flash": ("tpu",),
}


def tokamax_glu(x, gate, up):
  """tokamax's gated linear unit, silu(x @ gate) * (x @ up)."""
  return _import("tokamax").gated_linear_unit(x, (gate, up), activation=jax.nn.silu)


# ---- the TPU kernels in the layouts that they are written for


def tokamax_splash_kernel(length, blocks):
  """A function of query [H, T, D], already scaled, and key and value [T, D]."""
  path = "tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_"
  splash, masks = _import(path + "kernel"), _import(path + "mask")
  block_q, block_kv, compute = blocks
  config = splash.SplashConfig(
      block_q=block_q, block_kv=block_kv, block_kv_compute=compute, block_q_dkv=block_q,
      block_kv_dkv=block_kv, block_kv_dkv_compute=compute)
  return splash.make_splash_mqa_single_device(
      masks.CausalMask((length, length)), config=config)


def jax_splash_kernel(length, heads, blocks):
  """A function of query [H, T, D], already scaled, and key and value [T, D]."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
    splash_attention_mask as masks,
  )
  block_q, block_kv, compute = blocks
  sizes = splash.BlockSizes(
      block_q=block_q, block_kv=block_kv, block_kv_compute=compute, block_q_dkv=block_q,
      block_kv_dkv=block_kv, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True)
  return splash.make_splash_mqa(
      masks.MultiHeadMask([masks.CausalMask((length, length)) for _ in range(heads)]),
      block_sizes=sizes, head_shards=1, q_seq_shards=1)


def jax_flash_kernel(dim_head, blocks, bias=None):
  """A function of query, key and value [B, H, T, D]."""
  from jax.experimental.pallas.ops.tpu import flash_attention as flash
  block_q, block_k = blocks
  sizes = flash.BlockSizes(
      block_q=block_q, block_k_major=block_k, block_k=block_k, block_b=1, block_q_major_dkv=block_q,
      block_k_major_dkv=block_k, block_k_dkv=block_k, block_q_dkv=block_q,
      block_k_major_dq=block_k, block_k_dq=block_k, block_q_dq=block_q)
  return lambda query, key, value: flash.flash_attention(
      query, key, value, bias, causal=True, sm_scale=dim_head**-0.5, block_sizes=sizes)


def alibi_bias(query, key, dtype=None):
  """The array [1, H, T, S] that an implementation without ALiBi has to be given."""
  slopes = jnp.asarray(kernels.alibi_slopes(query.shape[2]))
  distance = jnp.arange(key.shape[1]) - jnp.arange(query.shape[1])[:, None]
  return (slopes[:, None, None] * distance)[None].astype(dtype or query.dtype)


def _import(name):
  import importlib
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise Absent(f"not installed here: {error}") from error


def _no(alibi, reason):
  if alibi:
    raise Absent(reason)


def _clip(blocks, query, key):
  """Blocks no longer than the sequences (the first is the query's)."""
  return tuple(min(size, (query if i == 0 else key).shape[1]) for i, size in enumerate(blocks))


def _one_key_head(key):
  if key.shape[2] != 1:
    raise Absent(f"written here for one key head; got {key.shape[2]}")


def _splash_layout(kernel, query, key, value):
  query = (query * query.shape[-1]**-0.5).swapaxes(1, 2)
  return jax.vmap(kernel)(query, key[:, :, 0], value[:, :, 0]).swapaxes(1, 2)
