"""Triton's kernels in Triton's interpreter, which needs no GPU, no torch and no jax-triton.

Triton decides by an environment variable, when a kernel is decorated, whether it will be
interpreted or compiled. So the interpreter lives in a process of its own (triton_child.py), which
is started when first needed and asked by pickle over a pipe.
"""

import importlib.metadata
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ..core import partition
from . import callbacks
from .mode import Mode

TIMEOUT = 600  # seconds that one launch may take

_worker: subprocess.Popen | None = None
_lock = threading.Lock()


def problem() -> str | None:
  """The missing packages, with the way to install them; or None."""
  try:
    version = importlib.metadata.version("triton")
  except importlib.metadata.PackageNotFoundError:
    return "triton, which is not installed: pip install 'triton>=3.6'"
  if tuple(map(int, version.split(".")[:2])) < (3, 6):
    return f"triton 3.6 or newer; got {version}: pip install 'triton>=3.6'"
  return None


def call(settings: Mode, kernel, *inputs, out_types, grid: int, **constants):
  """Runs `grid` programs of a `triton.jit` kernel, as `kernels.triton.call` does."""
  callbacks.mend()
  path = kernel.fn.__code__.co_filename
  text = settings.triton_source(path)
  is_array = lambda x: isinstance(x, jax.Array | np.ndarray)
  arrays = [x for x in inputs if is_array(x)]

  def launch(*arrays):
    values = iter(arrays)
    arguments = [np.asarray(next(values)) if is_array(x) else x for x in inputs]
    return tuple(_ask(kernel.fn.__name__, path, text, arguments,
                      [(x.shape, x.dtype) for x in out_types], grid, constants))

  if not any(isinstance(x, jax.core.Tracer) for x in arrays):
    return tuple(map(jnp.asarray, launch(*arrays)))  # a callback would be compiled
  outputs = jax.pure_callback(launch, tuple(out_types), *arrays)
  return partition.varying_together(*outputs, *arrays)[:len(out_types)]


def _ask(*request):
  """The outputs of one launch, from the interpreter's process."""
  global _worker
  with _lock:  # under `shard_map`, devices call from threads of their own
    if _worker is None or _worker.poll() is not None:
      program = Path(__file__).with_name("triton_child.py")
      _worker = subprocess.Popen(
          # -P: this folder is not searched for `triton`.
          [sys.executable, "-P", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
          env=os.environ | dict(TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1"))
    assert _worker.stdin and _worker.stdout
    alarm = threading.Timer(TIMEOUT, _worker.kill)
    alarm.start()
    try:
      pickle.dump(request, _worker.stdin, protocol=5)
      _worker.stdin.flush()
      answer = pickle.load(_worker.stdout)
    except (EOFError, OSError):
      raise RuntimeError(f"Triton's interpreter died in {request[0]}, or took more than "
                         f"{TIMEOUT} s") from None
    except BaseException:
      _worker.kill()  # its answer would be taken for that to another question
      raise
    finally:
      alarm.cancel()
  if isinstance(answer, str):
    raise RuntimeError(f"{request[0]}: {answer}")
  return answer


def stop() -> None:
  """Ends the interpreter's process; the next launch starts another."""
  global _worker
  with _lock:
    if _worker is not None:
      assert _worker.stdin
      _worker.stdin.close()
      _worker.wait(timeout=TIMEOUT)
      _worker = None
