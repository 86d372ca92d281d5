"""Files of arrays by name: .npz is read and written, other kinds are told apart by content."""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

_WRITE = "write its arrays as .npz: numpy.savez('weights.npz', **arrays)"
_TORCH = ("a PyTorch file; write its arrays as .npz: numpy.savez('weights.npz', **{k: "
          "v.float().numpy() for k, v in torch.load(path).items()})")
_SAFETENSORS = ("a safetensors file; write its arrays as .npz: numpy.savez('weights.npz', "
                "**safetensors.numpy.load_file(path))")
_MSGPACK = ("a msgpack file of Flax; write its arrays as .npz: numpy.savez('weights.npz', "
            "**flax.traverse_util.flatten_dict(flax.serialization.msgpack_restore(data), "
            "sep='.'))")
_EQUINOX = ("an Equinox or .npy file, whose arrays have no names; " + _WRITE)
_HDF5 = f"an HDF5 file; {_WRITE}"
_GGUF = f"a GGUF file; {_WRITE}"
_KINDS = {  # by how a file begins
    b"\x89HDF": _HDF5, b"GGUF": _GGUF, b"\x93NUMPY": _EQUINOX, b"\x1f\x8b": "compressed (gzip)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)", b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ": "compressed (xz)",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull gets it",
    b"<": "a page of HTML or XML, not the file itself"}
_SUFFIXES = {
    ".pt": _TORCH, ".pth": _TORCH, ".bin": _TORCH, ".ckpt": _TORCH, ".safetensors": _SAFETENSORS,
    ".msgpack": _MSGPACK, ".eqx": _EQUINOX, ".h5": _HDF5, ".hdf5": _HDF5, ".keras": _HDF5,
    ".gguf": _GGUF}


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Arrays by name from an .npz file, bfloat16 included.

  Raises:
    ValueError: any other file; the message says what it is and how to make an .npz of it.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise ValueError(f"there is no file {path}")
  kind = _kind(path)
  if kind is not None:
    raise ValueError(f"{path} is {kind}")
  arrays, name = {}, None
  try:
    with np.load(path, allow_pickle=False) as file:
      for name in file.files:
        arrays[name] = _of_known_dtype(name, file[name])
    return arrays
  except (OSError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError,
          TypeError, ValueError) as error:  # RuntimeError: a password.
    where = f"{name!r} in {path}" if name else path
    raise ValueError(f"{where} cannot be read: {error}") from error


def write_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes arrays as an .npz file, under its name only when it is whole."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(path.name + ".draft")
  try:
    with open(draft, "wb") as file:
      np.savez(file, **dict[str, Any](arrays))
    draft.rename(path)
  finally:
    draft.unlink(missing_ok=True)


def _of_known_dtype(name, array):
  if array.dtype == np.dtype("V2"):  # NumPy forgets the name of the only such type.
    return array.view(ml_dtypes.bfloat16)
  if array.dtype.kind == "V":
    raise ValueError(f"NumPy stored it as {array.dtype}, which does not say which type it was; "
                     "store float32 or bfloat16")
  return array


def _kind(path: pathlib.Path) -> str | None:
  """The kind of a file that is no .npz."""
  if path.is_dir():
    return "a directory; name a file of arrays (.npz)"
  with open(path, "rb") as file:
    head = file.read(512)
  if head.startswith(b"PK"):
    try:
      with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    except (zipfile.BadZipFile, EOFError, OSError):
      return _SUFFIXES.get(path.suffix.lower(), "a zip archive that is cut short or damaged")
    if any(name.endswith("data.pkl") for name in names):
      return _TORCH
    if any(name.endswith(".h5") for name in names):
      return _HDF5
    npz = any(name.endswith(".npy") for name in names)
    return None if npz else f"a zip archive without arrays (.npy); {_WRITE}"
  if not head:
    return "empty"
  for begin, kind in _KINDS.items():
    if head.startswith(begin):
      return kind
  if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
    return _SAFETENSORS
  if head[0] == 0x80 and head[1:2] in b"\x02\x03\x04\x05":
    return _TORCH  # a pickle
  if 0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF):  # a map of msgpack
    return _MSGPACK
  if head.startswith(b"{"):
    return _EQUINOX if b"\x93NUMPY" in head else "JSON, which holds no arrays"
  return _SUFFIXES.get(path.suffix.lower(), f"not an .npz file of arrays; {_WRITE}")
