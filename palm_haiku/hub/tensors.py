"""Tensors by name from safetensors files, read in parts so that little else is in memory."""

import json
import pathlib
from collections.abc import Iterable

import ml_dtypes  # noqa: F401  (names bfloat16 to numpy)
import numpy as np

from palm_haiku.hub.errors import HubError, library

PREFIXES = ("module.", "_orig_mod.")  # that DistributedDataParallel and torch.compile leave
PART = 2**25  # bytes that are read at once


class Tensors:
  """The tensors of one file or of the shards of a directory."""

  def __init__(self, path: pathlib.Path):
    files = _files(path)
    self._file: dict[str, tuple[pathlib.Path, str]] = {}  # by name without prefixes
    self._shapes: dict[str, tuple[int, ...]] = {}
    self.prefixes: set[str] = set()
    self.not_finite: list[str] = []  # names, of parts that were noted
    for file in files:
      with _open(file) as tensors:
        for stored in tensors.keys():
          name = self._without_prefix(stored)
          if name in self._file:
            raise HubError(f"{name} is stored twice, in {self._file[name][0]} and {file}")
          self._file[name] = file, stored
          self._shapes[name] = tuple(tensors.get_slice(stored).get_shape())

  def _without_prefix(self, name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
      self.prefixes.add(prefix)
      name = name.removeprefix(prefix)
    return name

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return self._shapes

  def parts(self, name: str, rows: slice, columns: slice | None = None
            ) -> Iterable[tuple[int, np.ndarray]]:
    """Blocks of rows of a tensor, as (number of the first row, counted from `rows`; block)."""
    file, stored = self._file[name]
    shape = self._shapes[name]
    size = max(1, PART // (4 * max(1, int(np.prod(shape[1:])))))
    for first in range(rows.start, rows.stop, size):
      last = min(first + size, rows.stop)
      # Opened for each part: pages of a file that stays mapped would count as memory in use.
      with _open(file) as tensors:
        whole = tensors.get_slice(stored)
        try:
          block = whole[first:last] if columns is None else whole[first:last, columns]
        except (AttributeError, TypeError) as error:  # of a type that NumPy does not know
          raise HubError(f"{name} is of {whole.get_dtype()}, which is not supported") from error
      if not (np.issubdtype(block.dtype, np.floating) or block.dtype.name == "bfloat16"):
        raise HubError(f"{name} is of {block.dtype}; only 16- and 32-bit floating point is "
                       "supported, not quantised weights")
      yield first - rows.start, block

  def note(self, name: str, part: np.ndarray) -> None:
    """Adds the name to `not_finite` if a part of it has NaN or infinite values."""
    with np.errstate(over="ignore"):
      finite = np.isfinite(part.astype(np.float32, copy=False)).all()
    if not finite and name not in self.not_finite:
      self.not_finite.append(name)


def _open(file: pathlib.Path):
  safetensors = library("safetensors")
  try:
    return safetensors.safe_open(file, framework="np")
  except (safetensors.SafetensorError, OSError) as error:
    raise HubError(f"{file} is no safetensors file, or is damaged: {error}") from None


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  index = path / "model.safetensors.index.json"
  if not index.is_file():
    file = path / "model.safetensors"
    if not file.is_file():
      raise HubError(f"{path} has no model.safetensors and no model.safetensors.index.json")
    return [file]
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    missing = [name for name in names if not (path / name).is_file()]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise HubError(f"{index} is damaged: {error}") from None
  if missing:
    raise HubError(f"{path} lacks {missing[0]}, a shard of {len(names)}"
                   + (f", and {len(missing) - 1} more" if len(missing) > 1 else ""))
  return [path / name for name in names]
