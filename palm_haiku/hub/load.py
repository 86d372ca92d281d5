"""A model's directory or file as a config and parameters."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from palm_haiku import interop
from palm_haiku.config import PaLMConfig
from palm_haiku.hub import configs, layouts
from palm_haiku.hub.errors import HubError
from palm_haiku.hub.tensors import Tensors
from palm_haiku.sharding import Rules, default_device, params_shardings

_RLHF = "palm-rlhf-pytorch"


def is_model(path) -> bool:
  """Whether a path is a hub directory (its config.json has a model_type) or a weights file."""
  path = pathlib.Path(path)
  if path.is_file():
    return path.suffix in (".safetensors", ".pt", ".pth", ".bin")
  try:
    fields = json.loads((path / "config.json").read_text())
  except (OSError, ValueError):
    return False
  return isinstance(fields, dict) and "model_type" in fields


def load(path, *, mesh: Mesh | None = None,
         rules: Rules = Rules()) -> tuple[PaLMConfig, dict[str, dict[str, jax.Array]]]:
  """The architecture and parameters of a public model.

  Args:
    path: a directory with config.json and safetensors (one file or shards with an index), of a
      cohere, cohere2 or falcon model; or a state dict of PaLM-rlhf-pytorch, .safetensors or, where
      torch is installed, .pt.
    mesh: devices that the parameters are divided over; None for the default device. Each process
      reads only what its devices hold.
    rules: how they are divided.

  Returns:
    The config, and float32 parameters of `PaLM.from_config(config)`.

  Raises:
    HubError: files that are missing, damaged, incomplete, or of an unsupported architecture.
  """
  path = pathlib.Path(path).expanduser()
  if not path.exists():
    raise HubError(f"there is no model at {path}")
  if _is_torch(path):
    return _load_rlhf(_torch_arrays(path), mesh, rules)
  tensors = Tensors(path)
  if _is_rlhf(tensors):
    return _load_rlhf(_all(tensors), mesh, rules)
  described = _described(path)
  config = configs.from_json(described)
  layout = layouts.layout(config, configs.FAMILIES[described["model_type"]])
  _check(tensors, layout, config)
  params: dict[str, dict[str, Any]] = {}
  for (module, name), stored in layout.items():
    stack = (config.depth,) if module == layouts.STACK else ()
    params.setdefault(module, {})[name] = jax.ShapeDtypeStruct((*stack, *stored.shape), np.float32)
  if mesh is None:
    shardings = jax.tree.map(lambda _: SingleDeviceSharding(default_device()), params)
  else:
    shardings = params_shardings(params, mesh, rules)
  # The largest first, while nothing else is in memory.
  for module, name in sorted(layout, key=lambda key: -params[key[0]][key[1]].size):
    shape, stored = params[module][name].shape, layout[module, name]
    params[module][name] = jax.make_array_from_callback(
        shape, shardings[module][name],
        lambda index, shape=shape, stored=stored, stacked=module == layouts.STACK:
        _read(tensors, stored, stacked, shape, index))
  interop.warn_of_not_finite(tensors.not_finite)
  return config, params


def read_config(path) -> PaLMConfig:
  """The architecture of a model that `load` reads; raises as `load`."""
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    return configs.from_json(_described(path))
  # A state dict's sizes are those of its arrays.
  return load(path)[0]


def _described(path) -> dict[str, Any]:
  """The contents of a model's config.json."""
  file = path / "config.json" if path.is_dir() else path.with_name("config.json")
  try:
    fields = json.loads(file.read_text())
  except OSError:
    raise HubError(f"there is no {file}, which describes the model") from None
  except ValueError as error:
    raise HubError(f"{file} is not JSON: {error}") from None
  if not isinstance(fields, dict):
    raise HubError(f"{file} is no JSON object")
  return fields


def _is_torch(path) -> bool:
  return path.is_file() and path.suffix in (".pt", ".pth", ".bin")


def _is_rlhf(tensors) -> bool:
  return "token_emb.weight" in tensors.shapes


def _all(tensors) -> dict[str, np.ndarray]:
  return {name: np.concatenate([part for _, part in tensors.parts(name, slice(0, shape[0]))])
          for name, shape in tensors.shapes.items() if shape}


def _check(tensors: Tensors, layout: layouts.Layout, config: PaLMConfig):
  """Raises where the tensors are not those of the layout."""
  expected = {}
  for (module, _), stored in layout.items():
    for i in range(config.depth if module == layouts.STACK else 1):
      expected[stored.name.format(i=i)] = stored.stored_shape
  for name, shape in expected.items():
    if name not in tensors.shapes:
      raise HubError(f"the model lacks the tensor {name}")
    if tensors.shapes[name] != shape:
      raise HubError(f"{name} must be {list(shape)}, as config.json has it; "
                     f"got {list(tensors.shapes[name])}")
  embedding = layout["palm", "embedding"].name
  for name in tensors.shapes.keys() - expected.keys():
    if name == "lm_head.weight" and tensors.shapes[name] == tensors.shapes[embedding]:
      _check_tied(tensors, embedding, name)
    elif not name.endswith("rotary_emb.inv_freq"):
      raise HubError(f"the model has the tensor {name}, which its architecture does not know")


def _check_tied(tensors: Tensors, embedding: str, head: str):
  rows = slice(0, tensors.shapes[embedding][0])
  for (_, a), (_, b) in zip(tensors.parts(embedding, rows), tensors.parts(head, rows)):
    if not np.array_equal(a, b):
      raise HubError(f"{head} is not the embedding; untied embeddings are not supported")


def _read(tensors: Tensors, stored, stacked: bool, shape, index) -> np.ndarray:
  """A device's part of a parameter, from the parts of the tensors that it is made of."""
  ranges = [range(*part.indices(size)) for part, size in zip(index, shape)]
  out = _aligned([len(r) for r in ranges])
  layers = ranges[0] if stacked else [0]
  for where, i in enumerate(layers):
    block = out[where] if stacked else out
    _read_one(tensors, stored, stored.name.format(i=i), ranges[stacked:], block)
  return out


def _read_one(tensors: Tensors, stored, name: str, ranges, out: np.ndarray):
  span = lambda r: slice(r.start, r.stop)
  order = layouts.to_halves(stored.shape[-1]) if stored.halves else None
  if isinstance(stored, layouts.Vector):
    columns = span(ranges[1]) if len(ranges) > 1 else None
    for first, part in tensors.parts(name, span(ranges[0]), columns):
      tensors.note(name, part)
      out[first: first + len(part)] = part if order is None else part[..., order]
    return
  # Divided along the first dimension of each side alone: the others lie together in the tensor.
  num_in = len(stored.in_dims)
  (in_range, *_), (out_range, *_) = ranges[:num_in], ranges[num_in:]
  in_size, out_size = int(np.prod(stored.in_dims[1:])), int(np.prod(stored.out_dims[1:]))
  columns = slice(in_range.start * in_size, in_range.stop * in_size)
  rows = slice(stored.first_row + out_range.start * out_size,
               stored.first_row + out_range.stop * out_size)
  flat = out.reshape(columns.stop - columns.start, rows.stop - rows.start)
  for first, part in tensors.parts(name, rows, columns):
    tensors.note(name, part)
    flat[:, first: first + len(part)] = part.T
  if order is not None:
    out[...] = out[..., order]


def _aligned(shape) -> np.ndarray:
  """An empty float32 array that a CPU device takes over without a copy."""
  size = 4 * int(np.prod(shape))
  memory = np.empty(size + 64, np.uint8)
  start = -memory.ctypes.data % 64
  return memory[start: start + size].view(np.float32).reshape(shape)


def _load_rlhf(arrays, mesh, rules):
  config, params = interop.load(_RLHF, arrays)
  if mesh is not None:
    params = jax.tree.map(jax.device_put, params, params_shardings(params, mesh, rules))
  return config, params


def _torch_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a state dict that torch saved."""
  try:
    import torch  # pyright: ignore[reportMissingImports]  (nobody needs it for hub directories)
  except ImportError:
    raise HubError(f"{path} is a file of PyTorch's; to read it, pip install torch") from None
  try:
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  except Exception as error:  # of pickle, zipfile or torch
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise HubError(f"torch cannot read {path} as weights alone: {reason}") from None
  for key in ("state_dict", "model"):  # as trainers nest it
    if isinstance(state, dict) and isinstance(state.get(key), dict):
      state = state[key]
  arrays = {}
  for name, tensor in state.items() if isinstance(state, dict) else ():
    if isinstance(tensor, torch.Tensor):
      arrays[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
  if not arrays:
    raise HubError(f"{path} holds no tensors by name")
  return arrays
