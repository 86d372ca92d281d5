"""Several processes that train as one: start, agreement, and what only one of them does.

The engine is `jax.distributed`; SLURM, Kubernetes or Cloud TPU start the processes and
`jax.distributed.initialize` finds them. In a single process everything here is trivial.
"""

import json
import os
import shlex
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

_MESSAGE_BYTES = 2**16  # of what one process tells the others


class StartError(Exception):
  """The processes of a job did not find each other; the message is one line."""


def start(coordinator: str | None = None, num_processes: int | None = None,
          process_id: int | None = None, timeout: int = 300) -> None:
  """Joins the other processes of a job.

  Args:
    coordinator: HOST:PORT of process 0. Without it, and without the next two, what SLURM,
      Kubernetes, Open MPI or Cloud TPU say of the job is used.
    num_processes, process_id: of the job.
    timeout: seconds to wait for all of them.

  If they are not all there in time the process ends, with a line that says so.

  Raises:
    StartError: nothing tells where they are, or the address cannot be used.
  """
  def give_up():
    # From a thread, because XLA would end the process with a stack trace of its own.
    expected = f"the {num_processes}" if num_processes else "all"
    print(f"palm-haiku: error: the job did not start: {expected} processes were not there within "
          f"{timeout} seconds; see that every host runs and reaches "
          f"{coordinator or 'the first one'}", file=sys.stderr, flush=True)
    os._exit(1)

  alarm = threading.Timer(timeout, give_up)
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(coordinator, num_processes, process_id,
                               initialization_timeout=timeout + 60, heartbeat_timeout_seconds=30)
  except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError.
    raise StartError(f"the job did not start: {str(error).splitlines()[0]}") from error
  finally:
    alarm.cancel()


def start_backend() -> None:
  """Starts JAX's backend, so that one that can't start is a line before anything is computed.

  Raises:
    StartError: it does not start.
  """
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # The latter: a plugin that failed to load.
    wanted = os.environ.get("JAX_PLATFORMS")
    why = f": {str(error).splitlines()[0][:200]}" if str(error) else ""
    raise StartError(
        (f"JAX_PLATFORMS={shlex.quote(wanted)} asks for a backend that does not start here{why}; "
         "unset it, or " if wanted else f"JAX's backend does not start{why}; ")
        + "JAX_PLATFORMS=cpu runs on the CPU") from error


def leave(message: str, status: int = 1) -> None:
  """Ends this process with a line, without waiting for the others as a normal end would.

  They notice, and end too. Does nothing in a job of one process.
  """
  if jax.process_count() > 1:
    print(f"{message} (process {jax.process_index()})", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def is_leader() -> bool:
  """Whether this process is the one that prints, logs and writes small files."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Returns when all processes have come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def from_leader(decide: Callable[[], Any], errors: tuple[type[Exception], ...]) -> Any:
  """The leader's decision; all processes return it, or raise the same error.

  Args:
    decide: called by the leader alone; its result is something that JSON can hold.
    errors: that `decide` may raise, each with one message.
  """
  if jax.process_count() == 1:
    return decide()
  said = {}
  if is_leader():
    try:
      said = {"result": decide()}
    except errors as error:
      said = {"error": str(error), "kind": errors.index(
          next(kind for kind in errors if isinstance(error, kind)))}
  text = json.dumps(said).encode()[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES)
  heard = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
  said = json.loads(np.asarray(heard).tobytes())
  if "error" in said:
    raise errors[said["kind"]](said["error"])
  return said["result"]


class AnyProcess:
  """Whether any process has raised a flag, known to all of them at the same step.

  The answer is that of the call before, so that no process waits for the devices of another.
  """

  def __init__(self):
    mesh = Mesh(np.array(jax.devices()), ("all",))
    self._apart = NamedSharding(mesh, P("all"))
    self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, P()))
    self._before = None

  def __call__(self, flag: bool) -> bool:
    """Raises this process's flag, or not; True if one was up at the call before this."""
    if jax.process_count() == 1:
      return flag
    flags = jax.make_array_from_callback(
        (jax.device_count(),), self._apart, lambda index: np.array([flag]))
    before, self._before = self._before, self._any(flags)
    return before is not None and bool(before)


def place(array: np.ndarray, sharding: NamedSharding | None) -> jax.Array | np.ndarray:
  """An array that every process has whole, each giving its own devices their part."""
  if sharding is None:
    return array
  return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
