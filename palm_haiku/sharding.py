"""Meshes, and which of their axes each dimension of a model's arrays is divided over.

A mesh is described in words, such as "data=2,fsdp=4,model=2", or by the name of a preset. Its axes
stay in Auto mode: XLA's partitioner divides the plain products by the shardings of their operands,
and every op of `palm_haiku.kernels` wraps its kernel in a `shard_map` over the axes below.
"""

import contextlib
import dataclasses
import math
import re
import types
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from palm_haiku.config import PaLMConfig
from palm_haiku.lora import IN_DIMS

# Slowest network first: neighbours along the last axis are neighbours in the machine.
AXES = ("data", "fsdp", "seq", "model")

# By name, for `make_mesh`; -1 is all devices that the other axes leave.
PRESETS = {
    "one-chip": "",
    "fsdp": "fsdp=-1",
    "fsdp-tensor": "fsdp=-1,model=4",  # model: within a host, whose chips have the fastest links
    "paper": "data=2,fsdp=256,model=12",  # PaLM-540B on two pods of 3,072 chips (section 4)
}


@dataclasses.dataclass(frozen=True)
class Rules:
  """The mesh axes that each logical axis is divided over; those that a mesh lacks are left out.

  The first group is of activations, the second of parameters and all that is shaped like them.
  """

  batch: tuple[str, ...] = ("data", "fsdp")
  sequence: tuple[str, ...] = ("seq",)
  residual: tuple[str, ...] = ()  # width of the residual stream between layers; () for whole

  embed: tuple[str, ...] = ("fsdp",)  # width, of weights: gathered for each layer when needed
  heads: tuple[str, ...] = ("model",)
  ff: tuple[str, ...] = ("model",)
  vocab: tuple[str, ...] = ("model",)
  layers: tuple[str, ...] = ()


# Between layers a device then keeps the part of the residual stream that it computed, so that
# remat's copies of it are divided too: without, PaLM-540B does not fit the paper's machine.
SHARDED_RESIDUAL = Rules(residual=("model",))

# Logical axes of each parameter, by its name and number of dimensions; those of a layer are stacked
# along one more. A mesh axis that does not divide a dimension leaves it whole: few key heads are
# then repeated on every device of the model axis.
_PARAMETERS = {
    "embedding": ("vocab", "embed"),
    "norm": (None,),
    "norm_bias": (None,),
    "query": ("embed", "heads", None),
    "key": ("embed", None),
    "value": ("embed", None),
    "gate": ("embed", "ff"),
    "up": ("embed", "ff"),
    "attn_out": ("heads", None, "embed"),
    "ff_out": ("ff", "embed"),
    "query_scale": (None,),
    "key_scale": (None,),
}
_BY_HEAD = {"key": ("embed", "heads", None), "value": ("embed", "heads", None),
            "query_scale": ("heads", None), "key_scale": ("heads", None)}


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
  """Sizes of all of `AXES`, from such a text as "data=2,fsdp=-1" or the name of a preset.

  Args:
    text: NAME=SIZE, separated by commas; at most one size is -1, for all devices that are left.
    num_devices: that the sizes must multiply to.

  Raises:
    ValueError: an unknown axis or preset, a size that is no number, or another product.
  """
  sizes = {}
  spelled = PRESETS.get(text, text)
  for entry in filter(None, spelled.split(",")):
    name, _, size = entry.strip().partition("=")
    if name not in AXES or not re.fullmatch(r"-?\d+", size):
      raise ValueError(f"a mesh is written like data=2,fsdp=4,model=2, of {', '.join(AXES)}, or is "
                       f"one of {', '.join(PRESETS)}; got {text!r}")
    if name in sizes:
      raise ValueError(f"a mesh has each axis once; got {name} twice in {text!r}")
    sizes[name] = int(size)
  sizes = dict.fromkeys(AXES, 1) | sizes
  if any(size < 1 and size != -1 for size in sizes.values()):
    raise ValueError(f"sizes of mesh axes must be positive, or -1 for what is left; got {text!r}")
  unknown = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(unknown) > 1:
    raise ValueError(f"only one mesh axis can be -1; got {text!r}")
  if num_devices % known or (not unknown and known != num_devices):
    raise ValueError(f"mesh {text or 'one-chip'!r} is for {'a multiple of ' * len(unknown)}{known} "
                     f"devices; there are {num_devices}")
  return sizes | {name: num_devices // known for name in unknown}


def default_device():
  """The device of what is on no mesh: `jax.default_device`, or the first of this process."""
  device = jax.config.jax_default_device or jax.local_devices()[0]
  return jax.local_devices(backend=device)[0] if isinstance(device, str) else device


def make_mesh(text: str, devices=None) -> Mesh:
  """The mesh that `parse_mesh` describes, over all devices of all processes.

  Where the devices are in several slices, the data axis is divided over the slices first: it
  crosses the slow network between them once a step.

  Raises:
    ValueError: as `parse_mesh`, or a data axis that the slices do not divide.
  """
  devices = jax.devices() if devices is None else devices
  sizes = parse_mesh(text, len(devices))
  shape = tuple(sizes.values())
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1:
    if sizes["data"] % slices:
      raise ValueError(f"the data axis must be a multiple of the {slices} slices; got "
                       f"{sizes['data']}")
    inside = (sizes["data"] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(
        inside, (slices, *[1] * (len(shape) - 1)), devices, allow_split_physical_axes=True)
  elif devices[0].platform == "tpu":
    # An axis of 4 on 8x8x8 chips is half of a row, where no whole row will do.
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  else:
    grid = np.array(devices).reshape(shape)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(config: PaLMConfig, mesh: Mesh | types.SimpleNamespace, rules: Rules, *, batch_size: int,
          seq_len: int) -> None:
  """Raises one line if a model or a batch cannot be divided over a mesh.

  A vocabulary need not be divisible: parameters then keep it whole, and the loss pads it.
  """
  for what, size, axes in (
      ("batch_size", batch_size, rules.batch), ("seq_len", seq_len, rules.sequence),
      ("heads", config.heads, rules.heads), ("dim", config.dim, rules.embed),
      ("dim", config.dim, rules.residual), ("dim_ff", config.dim_ff, rules.ff),
      ("depth", config.depth, rules.layers)):
    over = {axis: mesh.shape[axis] for axis in axes if axis in mesh.shape}
    if size % math.prod(over.values()):
      axes = " x ".join(f"{axis} {n}" for axis, n in over.items() if n > 1)
      raise ValueError(f"{what} must be a multiple of the mesh axes it is divided over, {axes}; "
                       f"got {size}")


def constrain(x: jax.Array, logical: tuple[str | None, ...], rules: Rules) -> jax.Array:
  """An activation, divided over the Auto axes of the mesh in context, if there is one.

  Args:
    x: [..., *logical]; dimensions before the named ones are one batch.
    logical: fields of `Rules`, or None for a dimension that stays whole.
  """
  mesh = jax.sharding.get_abstract_mesh()
  auto = {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}
  if not auto or mesh.size == 1:
    return x
  logical = (None,) * (x.ndim - len(logical)) + logical  # mutant: activation
  return jax.lax.with_sharding_constraint(x, _spec(logical, x.shape, mesh, rules, auto))


def params_shardings(params: Any, mesh: Mesh, rules: Rules = Rules()) -> Any:
  """Shardings of a PaLM's parameters on a mesh.

  Args:
    params: of `PaLM`, as Haiku has them: {module: {name: array or ShapeDtypeStruct}}.

  Returns:
    The same tree of `NamedSharding`.
  """
  def sharding(path, x):
    module, name = (key.key for key in path)
    stack = ("layers",) * ("/layers/" in module)
    logical = (*stack, *_logical(name, x.ndim - len(stack)))  # mutant: parameter
    return NamedSharding(mesh, _spec(logical, x.shape, mesh, rules, set(mesh.axis_names)))

  return jax.tree_util.tree_map_with_path(sharding, params)


def _logical(name: str, ndim: int) -> tuple[str | None, ...]:
  """Logical axes of a parameter, or of an adapter's factor, with this number of dimensions."""
  matrix, _, side = name.partition("_lora_")
  plain, by_head = _PARAMETERS[matrix], _BY_HEAD.get(matrix, ())
  if side == "a":
    return (*plain[:IN_DIMS[matrix]], None)
  if side == "b":
    plain, by_head = ((None, *axes[IN_DIMS[matrix]:]) for axes in (plain, by_head))
  return plain if len(plain) == ndim else by_head


def opt_state_shardings(optimizer: optax.GradientTransformation, params: Any, shardings: Any,
                        mesh: Mesh) -> Any:
  """Shardings of an optimizer's state: like the parameters it belongs to, else everywhere.

  Args:
    params: arrays or ShapeDtypeStructs.
    shardings: their `params_shardings`.
  """
  whole = NamedSharding(mesh, P())
  return optax.tree_map_params(
      optimizer, lambda x, param, sharding: sharding if x.shape == param.shape else whole,
      jax.eval_shape(optimizer.init, params), params, shardings,
      transform_non_params=lambda _: whole)


def batch_sharding(mesh: Mesh, rules: Rules = Rules()) -> NamedSharding:
  """Of int[B, T + 1]: sequences apart, each of them whole, for one more token than is divisible."""
  return NamedSharding(mesh, P(tuple(axis for axis in rules.batch if axis in mesh.shape)))


def in_context(mesh: Mesh | None) -> contextlib.AbstractContextManager:
  """`jax.set_mesh`, or nothing for one device."""
  return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _spec(logical, shape, mesh, rules, allowed) -> P:
  def axes(name, size):
    found = tuple(axis for axis in (getattr(rules, name) if name else ())
                  if axis in allowed and mesh.shape[axis] > 1)
    divides = size % math.prod(mesh.shape[axis] for axis in found) == 0
    return found if found and divides else None

  return P(*map(axes, logical, shape))
