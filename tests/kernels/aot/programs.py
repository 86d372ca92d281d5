"""Programs of the ahead-of-time tests, some of them bad on purpose."""

import os
import time

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def matmul(x, y):
  return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)


def scores_in_memory(query, key, value):
  """Attention that keeps its scores: float[B, T, H, D], one key head."""
  scores = jnp.einsum("bthd,bskd->bhts", query, key)
  return jnp.einsum("bhts,bskd->bthd", jax.nn.softmax(scores, -1), value)


def normalize(x):
  """float32[128, 256] over its sum, in one warpgroup: 256 values a thread, of 255 registers."""
  def kernel(x_gmem, o_gmem, x_smem, barrier):
    plgpu.copy_gmem_to_smem(x_gmem, x_smem, barrier)
    plgpu.barrier_wait(barrier)
    block = x_smem[...]
    x_smem[...] = block / jnp.sum(block)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_smem, o_gmem)
    plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
      kernel, out_type=x, scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()],
      kernel_name="normalize")(x)


def hopper_attention(query, key, value, *, block_q, block_kv):
  """JAX's example kernel; with block_q 128 and dim_head 128 it has too few registers."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu
  return attention_mgpu.attention(query, key, value, attention_mgpu.TuningConfig(
      block_q=block_q, block_kv=block_kv, max_concurrent_steps=2))


def loop(x, *, start, stop):
  """A TPU kernel of 8 grid steps with a loop of matrix products in each."""
  def kernel(x_ref, o_ref):
    o_ref[...] = jnp.zeros_like(o_ref)

    def body(i, _):
      o_ref[...] += i * jnp.dot(x_ref[...], x_ref[...], preferred_element_type=jnp.float32)
      return 0

    jax.lax.fori_loop(start, stop, body, 0)

  block = pl.BlockSpec((256, 256), lambda i: (i, 0))
  return pl.pallas_call(
      kernel, out_shape=jax.ShapeDtypeStruct((2048, 256), jnp.float32), grid=(8,),
      in_specs=[block], out_specs=block, name="loop")(x)


def hang(x):
  time.sleep(600)
  return x


def crash(x):
  os.abort()
  return x


def widest(x):
  return jnp.full((1 << 20,), x[0].astype(int))


def refuse(x):
  raise ValueError("this program is refused")


def pod():
  """(function, arguments) over the 16 chips of v5e:4x4."""
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

  from palm_haiku.kernels import aot
  mesh = Mesh(np.array(aot.devices("v5e:4x4")).reshape(4, 4), ("data", "model"))
  array = lambda shape, spec: jax.ShapeDtypeStruct(
      shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
  return matmul, (array((4096, 2048), P("data", None)), array((2048, 4096), P(None, "model")))
