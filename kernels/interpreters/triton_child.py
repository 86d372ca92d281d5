"""The process of Triton's interpreter: kernels over arrays of numpy, asked for by pickle.

It mends what the interpreter gets wrong. Before a kernel runs, its outputs are NaN (ints: -1), and
so are the bytes around every array: what it leaves unwritten or reads past an end shows in the
results; what it writes past an end raises.
"""

import dataclasses
import functools
import os
import pickle
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

_MARGIN = 256  # bytes around each array; keeps the 16-byte alignment that jax-triton promises


class _Array:
  """The part of a torch tensor that Triton's interpreter uses, over a contiguous numpy array."""

  def __init__(self, array):
    array = np.asarray(array)
    fill = 0xFF  # NaN in every floating-point type, -1 in the integers
    self.buffer = np.full(array.nbytes + 2 * _MARGIN + 16, fill, np.uint8)
    start = _MARGIN + (-self.buffer.ctypes.data) % 16
    self.array = self.buffer[start:start + array.nbytes].view(array.dtype).reshape(array.shape)
    self.array[...] = array
    self.margins = self.buffer[:start], self.buffer[start + array.nbytes:]
    self.dtype = array.dtype.name
    self.shape = array.shape

  def check(self):
    if not all((margin == 0xFF).all() for margin in self.margins):
      raise IndexError("a store outside of an array")

  def data_ptr(self):
    return self.array.ctypes.data

  def stride(self):
    return tuple(step // self.array.itemsize for step in self.array.strides)

  def size(self):
    return self.shape

  def storage_offset(self):
    return 0

  # One array is its own storage, on the CPU already, and nothing has to be copied back.
  def untyped_storage(self):
    return self

  def cpu(self):
    return self

  def new_empty(self, *_, **__):
    return _View()

  def copy_(self, _):
    pass


class _View:
  """Becomes the array that it is set to."""

  def set_(self, array, *_):
    self.__class__ = _Array  # pyright: ignore[reportAttributeAccessIssue]
    self.__dict__ = array.__dict__


def _teach_bfloat16(interpreter, tl):
  """Triton's interpreter keeps bfloat16 as uint16: it truncates casts, and multiplies the bits."""
  builder = interpreter.InterpreterBuilder
  convert, dot, cast = interpreter._convert_float, builder.create_dot, builder.create_si_to_fp

  def widen(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)

  def convert_float(data, source, target, rounding):
    if source == tl.bfloat16 and target == tl.float32:
      return widen(data).view(np.uint32)
    if source == tl.float32 and target == tl.bfloat16:
      bits = np.ascontiguousarray(data).view(np.uint32)
      rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
      return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)
    return convert(data, source, target, rounding)

  def create_dot(self, a, b, d, *options):
    wide = lambda x: (interpreter.TensorHandle(widen(x.data), tl.float32)
                      if x.dtype.scalar == tl.bfloat16 else x)
    return dot(self, wide(a), wide(b), d, *options)

  def create_si_to_fp(self, x, target):
    x = cast(self, x, tl.float32)  # that of bfloat16 would be the bits of the integer
    return x if target.scalar == tl.float32 else self.cast_impl(x, target)

  interpreter._convert_float = convert_float
  builder.create_dot, builder.create_si_to_fp = create_dot, create_si_to_fp


def _round_fma_once(interpreter):
  """Triton's interpreter rounds the product of an FMA, as no GPU does."""
  def create_fma(self, x, y, z):
    total = x.data.astype(np.float64) * y.data + z.data
    return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)

  interpreter.InterpreterBuilder.create_fma = create_fma


def _patch_language_once(interpreter):
  """Triton patches its language at each call of a device function; that is most of the time."""
  patch_all, patch_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
  done = set()

  def patch_language(function):
    module = function.__globals__["__name__"]
    if module not in done:  # what is patched depends on the modules that its globals name
      patch_all(function)
      done.add(module)
    return mock.Mock()  # its restore() does nothing

  def patch_tensors(tensor, scope):
    patch_tensor(tensor, scope)
    # Triton 3.6 hands numpy an array of one element here, which numpy 2.4 and later refuse.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

  interpreter._patch_lang, interpreter._patch_lang_tensor = patch_language, patch_tensors


def _leave_out_unread_checks(interpreter):
  """Without `debug`, Triton drops its test of 32-bit overflow after computing it: half the time."""
  builder = interpreter.interpreter_builder
  builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _look_types_up_once(interpreter, tl):
  """Triton makes its table of numpy's types anew at each operation."""
  original = interpreter._get_np_dtype
  cached = functools.cache(original)

  def numpy_type(of):
    scalar = of.scalar
    return original(scalar) if isinstance(scalar, tl.pointer_type) else cached(scalar)

  interpreter._get_np_dtype = numpy_type


def _serve():
  answers = os.fdopen(os.dup(1), "wb")
  os.dup2(2, 1)  # what a kernel prints must not meet the answers
  import importlib.util

  import ml_dtypes  # noqa: F401  (names bfloat16 to numpy)
  from triton import language as tl  # pyright: ignore[reportAttributeAccessIssue]
  from triton.runtime import interpreter

  _teach_bfloat16(interpreter, tl)
  _round_fma_once(interpreter)
  _patch_language_once(interpreter)
  _leave_out_unread_checks(interpreter)
  _look_types_up_once(interpreter, tl)

  @functools.cache
  def load(path, text):
    # Triton reads a kernel's source from its file.
    file = Path(path)
    if text != file.read_text():
      file = Path(tempfile.mkdtemp()) / file.name
      file.write_text(text)
    spec = importlib.util.spec_from_file_location(f"kernels{load.cache_info().misses}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  while True:
    try:
      name, path, text, inputs, out_types, grid, constants = pickle.load(sys.stdin.buffer)
    except EOFError:
      return
    try:
      arguments = [_Array(x) if isinstance(x, np.ndarray) else x for x in inputs]
      outs = [_Array(np.frombuffer(b"\xff" * (int(np.prod(shape)) * dtype.itemsize),
                                   dtype).reshape(shape)) for shape, dtype in out_types]
      getattr(load(path, text), name)[(grid,)](*arguments, *outs, **constants)
      for x in (*arguments, *outs):
        if isinstance(x, _Array):
          x.check()
      answer = [x.array for x in outs]
    except Exception as error:
      answer = f"{type(error).__name__}: {error}"
    pickle.dump(answer, answers, protocol=5)
    answers.flush()


if __name__ == "__main__":
  _serve()
