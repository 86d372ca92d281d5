"""A process that has imported JAX and forks for each compilation: a second of CPU less for each.

`run` starts it by its path: this project's own modules are not imported before the fork, so that
each compilation takes kernels as they are in their files then. It ends with its caller, and so do
the compilers.
"""

import atexit
import contextlib
import gc
import importlib
import os
import pathlib
import pickle
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading

# jax_triton is not among them: it reads the folder of its dumps when it is imported.
_IMPORTS = ("jax", "jax.experimental.pallas.mosaic_gpu", "jax.experimental.pallas.tpu", "haiku",
            "optax")
# Variables that these modules read as they are imported: a server is for one value of each.
_READ_AT_IMPORT = ("JAX_", "XLA_", "TF_", "MOSAIC_", "CUDA_")

_lock = threading.Lock()
_server: tuple[dict, subprocess.Popen, socket.socket] | None = None


def run(module: str, folder: pathlib.Path, environment: dict[str, str],
        timeout: float) -> int | None:
  """Calls `module.main(folder)` in a process of its own.

  Args:
    folder: also takes its output, in `log`; removed if this process dies.
    environment: its variables. Those that name `folder` are read by the compilers alone, and by no
      module of `_IMPORTS`.
    timeout: seconds, after which it is killed with all that it has started.

  Returns:
    Its exit status as `subprocess` gives it, or None after the timeout.
  """
  mine, its = socket.socketpair()
  with mine:
    with its, open(folder / "log", "w") as log:
      _pass_on(its, log, {k: v for k, v in environment.items() if str(folder) not in v})
    try:
      with mine.makefile("wb") as file:
        pickle.dump((module, folder, os.getcwd(), sys.path, environment), file)
      mine.settimeout(timeout)
      return int(mine.recv(10) or 1)
    except ConnectionError:  # what the server does not survive is in the log
      return 1
    except TimeoutError:
      return None
    finally:
      with contextlib.suppress(ConnectionError):
        mine.shutdown(socket.SHUT_WR)  # kills it, if it still runs
        mine.settimeout(None)
        while mine.recv(10):
          pass  # until nobody writes into the folder


def _pass_on(connection, log, environment):
  """Gives the server one end of a connection, starting it if need be."""
  global _server
  read = {k: v for k, v in environment.items() if k.startswith(_READ_AT_IMPORT)}
  with _lock:
    if _server is None or _server[0] != read or _server[1].poll() is not None:
      _stop()
      mine, its = socket.socketpair()
      with its:
        process = subprocess.Popen(
            # -P: this folder is not searched for modules. Forks need a process of one thread.
            [sys.executable, "-P", __file__], stdin=its.fileno(), stdout=log, stderr=log,
            env=environment | {"OPENBLAS_NUM_THREADS": "1"}, start_new_session=True)
      _server = read, process, mine
    socket.send_fds(_server[2], [b"\0"], [connection.fileno()])


def stop() -> None:
  """Ends the server; the next compilation starts another."""
  with _lock:
    _stop()


def _stop():
  global _server
  if _server is not None:
    _server[2].close()
    _server[1].wait()
    _server = None


atexit.register(stop)


def _serve():
  """Forks for each connection that comes; returns in the forks, and when the caller has ended."""
  before = dict(os.environ)
  for module in _IMPORTS:
    importlib.import_module(module)
  set_by_imports = {k: v for k, v in os.environ.items() if before.get(k) != v}
  gc.freeze()  # a collection would write to, and so copy, every page that forks share
  calls = socket.socket(fileno=0)
  while (received := socket.recv_fds(calls, 1, 1)[1]):
    if not os.fork():
      return _attend(socket.socket(fileno=received[0]), set_by_imports)
    os.close(received[0])
    _reap(os.WNOHANG)
  _reap(0)


def _reap(options):
  with contextlib.suppress(ChildProcessError):
    while os.waitpid(-1, options)[0]:
      pass


def _attend(connection, set_by_imports):
  """Forks once more, for the compiler; waits for its end, or kills it if the caller gives up."""
  with connection.makefile("rb") as file:
    module, folder, where, path, environment = pickle.load(file)
  compiler = os.fork()
  os.setpgid(compiler, compiler)  # in both: either may be the first to need it
  if not compiler:
    _take_place(folder / "log", where, path, set_by_imports | environment)
    return importlib.import_module(module).main(folder)
  try:
    ended = os.pidfd_open(compiler)
    if ended not in select.select([connection, ended], [], [])[0]:
      os.killpg(compiler, signal.SIGKILL)
      shutil.rmtree(folder, ignore_errors=True)
    connection.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(compiler, 0)[1]))
  finally:
    os._exit(0)


def _take_place(log, where, path, environment):
  """Gives this process the state that a new one gets from the one that starts it."""
  for source, target in ((os.open(os.devnull, os.O_RDONLY), (0,)),
                         (os.open(log, os.O_WRONLY | os.O_APPEND), (1, 2))):
    for descriptor in target:
      os.dup2(source, descriptor)
  os.chdir(where)
  sys.path[:] = path
  os.environ.clear()
  os.environ.update(environment)


if __name__ == "__main__":
  _serve()
