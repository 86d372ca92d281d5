"""What the decode kernels of all backends have in common: mesh, `vmap`, lengths.

A backend module has two functions:

  unsupported(query, key, value, *, chip) -> the first requirement that is not met, or None
  forward(query, key, value, lengths, *, alibi_slopes, scale, key_scales, value_scales, chip)
      -> out

with arguments and result as `xla.attend` has them, float32 slopes, and lengths in [0, S].
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ..core import heads as division, partition
from ..core.heads import on_one_device as on_one_device
from ..core.vmap import folding_vmap
from .xla import nan_outside

OP = "decode_attention"


def attention(arrays, alibi_slopes, *, scale, backend, chip):
  """Attention by one backend's kernel: batch over the data axes, heads over the model axis.

  Args:
    arrays: the array arguments of `xla.attend` by name, without the slopes.
  """
  slopes = None if alibi_slopes is None else jnp.asarray(alibi_slopes, jnp.float32)
  local = functools.partial(_one_device, functools.partial(
      backend.forward, scale=scale, chip=chip))
  query, key = arrays["query"], arrays["key"]
  mesh = partition.current(query, key)
  free = partition.to_take_over(mesh)
  if not free:
    return local(arrays, slopes)
  batch, heads = division.sequences_and_heads(query, key, mesh)
  kv_heads = division.divided(key.shape[2], heads, mesh)

  def on_device(arrays, slopes):
    if heads and not kv_heads:
      arrays = {name: division.own(x, 2, heads, mesh)
                if name.startswith(("key", "value")) and x is not None else x
                for name, x in arrays.items()}
    return local(arrays, slopes)

  batch, heads, cache_heads = batch or None, heads or None, kv_heads or None
  specs = dict(query=P(batch, None, heads, None), lengths=P(batch))
  for name in ("key", "value"):
    specs[name] = P(batch, None, cache_heads, None)
    specs[f"{name}_scales"] = P(batch, None, cache_heads)
  specs = {name: None if x is None else specs[name] for name, x in arrays.items()}
  specs = specs, None if slopes is None else P(heads)
  arrays = jax.tree.map(lambda x, spec: partition.reshard(x, spec, mesh), (arrays, slopes), specs)
  return jax.shard_map(on_device, mesh=mesh, axis_names=free, in_specs=specs,
                       out_specs=specs[0]["query"])(*arrays)


def _one_device(forward, arrays, slopes):
  *values, slopes = partition.varying_together(*arrays.values(), slopes)

  def attend(arrays, slopes):
    lengths, max_len = arrays["lengths"], arrays["key"].shape[1]
    out = forward(**arrays | dict(lengths=jnp.clip(lengths, 0, max_len)), alibi_slopes=slopes)
    return nan_outside(out, lengths, max_len)

  return folding_vmap(attend)(dict(zip(arrays, values)), slopes)
