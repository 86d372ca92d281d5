"""The implementation that an op would run, and why, without running it."""

from collections.abc import Mapping

import jax

from . import attention, cross_entropy, decode, parallel_block
from .core import chips, dispatch

OPS = {op.name: op for op in (attention.OP, cross_entropy.OP, decode.OP, parallel_block.OP)}


def explain(op: str, *shapes, implementation: str = "auto",
            chip: str | None = None) -> dispatch.Choice:
  """The implementation that an op would run, and why.

    kernels.explain("flash_attention", (4, 2048, 16, 128), (4, 2048, 1, 128), chip="a100")

  Args:
    op: the name of a public op, such as "flash_attention".
    *shapes: arrays, `jax.ShapeDtypeStruct`s, or shapes (of bfloat16): query, key and value of
      attention, the value None where it is the key, left out where it is like the key; x and params
      of the block; x and embedding of the loss; query and both caches when decoding. They are those
      of all devices; under a mesh, what counts is a device's part of them. Without any, the reason
      says what the answer depends on.
    implementation: what the caller would pass to the op.
    chip: "a100", "rtx4090", "h100", "h200", "b200", "v4", "v5e", "v5p", "v6e", "tpu7x" or "cpu";
      for another GPU its compute capability, such as "sm_86" for an RTX 3090; None for where the
      arrays are, or else the default device.

  Raises:
    ValueError: an unknown op, implementation or chip, or a backend asked for by name that cannot
      run; the message says which requirement failed.
  """
  if op not in OPS:
    raise ValueError(f"no op is called {op!r}; there are {', '.join(sorted(OPS))}")
  on = dispatch.target(*jax.tree.leaves(shapes)) if chip is None else target(chip)
  return dispatch.choose(OPS[op], implementation, *_types(op, shapes), on=on)


def target(chip: str) -> dispatch.Target:
  """A chip by its name."""
  platforms = {"cpu": "cpu"} | dict.fromkeys(chips.GPUS, "gpu") | dict.fromkeys(chips.TPUS, "tpu")
  if chip not in platforms:
    raise ValueError(f"chip must be one of {', '.join(platforms)}; got {chip!r}")
  return dispatch.Target(platforms[chip], None if chip == "cpu" else chip)


def _types(op: str, shapes) -> tuple:
  """The arrays of an op, or their types."""
  ranks = OPS[op].ranks
  if len(shapes) == 2 and len(ranks) == 3:
    shapes = *shapes, shapes[1]
  is_shape = lambda x: isinstance(x, tuple | list)
  shapes = tuple(jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x, jax.numpy.bfloat16) if is_shape(x) else x, given,
      is_leaf=is_shape) for given in shapes)
  if shapes and (len(shapes) != len(ranks) or any(
      given is not None and rank is not None and len(getattr(given, "shape", ())) < rank
      for given, rank in zip(shapes, ranks))):
    raise ValueError(
        f"explain needs the {len(ranks)} arrays of {op} or their shapes; got "
        f"{jax.tree.map(lambda x: getattr(x, 'shape', x), shapes)}")
  _check_heads(op, *shapes[:2])
  return shapes


def _check_heads(op: str, *arrays):
  if not arrays or op == "linear_cross_entropy":
    return
  if op == "parallel_attention_ffn":
    names = arrays[1].keys() if isinstance(arrays[1], Mapping) else set()
    if missing := parallel_block.REQUIRED - names:
      raise ValueError(f"explain needs the params of {op} by their names; they lack "
                       + ", ".join(sorted(missing)))
    key = arrays[1]["key"].shape
    heads, kv_heads = arrays[1]["query"].shape[1], key[1] if len(key) == 3 else 1
  else:
    heads, kv_heads = (x.shape[-2] for x in arrays)
  if kv_heads == 0 or heads % kv_heads:
    raise ValueError(f"{op}: {kv_heads} key/value heads do not divide {heads} query heads")
