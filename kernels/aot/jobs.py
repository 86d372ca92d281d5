"""Compiles in processes of their own, so that no compiler can take the caller down with it.

They are forks of one that has imported JAX and waits for the next job; see server.py.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import build, ptxas, server, targets
from .errors import AotError
from .llo import Steps
from .report import Report

ONCE = Steps()


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile; see `report`."""

  target: str
  function: str
  args: tuple | None
  kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  backward: bool = False
  square: tuple[int, int] | None = None
  flops: float | None = None
  steps: Mapping[str, Steps] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    return self.function.rpartition(":")[2]


def report(function: Callable | str, *args, target: str, backward: bool = False,
           square: tuple[int, int] | None = None, flops: float | None = None,
           steps: Steps | Mapping[str, Steps] = ONCE, timeout: float = 600, **kwargs) -> Report:
  """Compiles a function for a chip that is not here and says what its kernels are made of.

  Args:
    function: jitted or not, at the top of a module (another process compiles it), or
      "package.module:name" or "path/to/file.py:name".
    args: its arrays as jax.ShapeDtypeStructs, or pytrees of them. With none at all,
      `function(**kwargs)` returns (a function, its arguments); this is the way to give shardings
      over the devices of a pod.
    target: "h200", "h100", "a100", "b200", "v4", "v5e", "v5p", "v6e", "tpu7x", or a pod such as
      "v5e:16x16" or "v4:12x16x16*2" (two slices).
    backward: report on the function together with its gradient with respect to its floating-point
      arguments.
    square: (T, S): name every buffer as large as T x S. Choose lengths that divide no other
      dimension of the program.
    flops: useful FLOPs of one call, for `Report.utilization`.
    steps: TPU: how often the parts of a kernel run where the program does not say; or, by a
      regular expression that finds the kernel's name, one for each.
    timeout: seconds, after which the compiler is killed.
    kwargs: static arguments of the function.

  Raises:
    AotError: in one line: an unknown target, a missing wheel (with the extra to install), a
      program that does not compile, a compiler that crashed or took too long.
    UnknownDump: a compiler's dump is not of the known form. No figure is given then.
  """
  return run(job(function, *args, target=target, backward=backward, square=square, flops=flops,
                 steps=steps, **kwargs), timeout)


def job(function, *args, target, backward=False, square=None, flops=None,
        steps: Steps | Mapping[str, Steps] = ONCE, **kwargs) -> Job:
  """A run of `report` as a value; arguments as there."""
  targets.chip(target)
  steps = {"": steps} if isinstance(steps, Steps) else dict(steps)
  return Job(target, build.refer(function), args or None, kwargs, backward, square, flops, steps)


def run(job: Job, timeout: float = 600) -> Report:
  """The report of one job; see `report`."""
  try:
    pickled = pickle.dumps(job)
  except (TypeError, AttributeError, pickle.PicklingError) as error:
    raise AotError(f"{job.name}: its arguments cannot be sent to another process: {error}"
                   ) from error
  with tempfile.TemporaryDirectory(prefix="palm-haiku-aot-") as folder:
    folder = pathlib.Path(folder)
    (folder / "job").write_bytes(pickled)
    status = server.run(f"{__package__}.child", folder, _environment(job, folder), timeout)
    if status is None:
      raise AotError(f"{job.name} for {job.target}: not compiled after {timeout:.0f} s")
    if not (folder / "result").exists():
      how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
      tail = " | ".join((folder / "log").read_text(errors="replace").split("\n"))[-600:]
      raise AotError(f"{job.name} for {job.target}: the compiler died ({how}): {tail}")
    kind, value = pickle.loads((folder / "result").read_bytes())
  if kind == "error":
    raise value
  return value


def run_all(jobs: Iterable[Job], timeout: float = 600,
            workers: int | None = None) -> Iterable[tuple[Job, Report | AotError]]:
  """(job, its report or what went wrong), as they finish, several at once.

  Args:
    workers: compilers at a time; one for each core if not given.
  """
  with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count()) as pool:
    running = {pool.submit(run, one, timeout): one for one in jobs}
    for done in concurrent.futures.as_completed(running):
      error = done.exception()
      if error and not isinstance(error, AotError):
        raise error
      yield running[done], error or done.result()


def _environment(job, folder):
  # A name of this package can lie under another one's: the child imports what the caller did.
  path = os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
  wanted = dict(os.environ, PYTHONPATH=path) | targets.environment(job.target)
  if targets.platform(job.target) == "tpu":
    (folder / "llo").mkdir()
    wanted["LIBTPU_INIT_ARGS"] = " ".join(filter(None, (
        os.environ.get("LIBTPU_INIT_ARGS"), f"--xla_jf_dump_to={folder / 'llo'}",
        "--xla_jf_dump_llo_text=true", "--xla_jf_emit_annotations=true",
        # All passes are some hundred MB of text, and half of a compilation's time.
        "--xla_jf_dump_llo_pass_label_regex=.*(packed-bundles-post-ra|pre-delay).*")))
    return wanted
  for name in ("mosaic", "triton"):
    (folder / name).mkdir()
  for name in ("nvdisasm", "cuobjdump"):
    ptxas.tool(name)  # needed later: said now if they are missing
  return wanted | {
      # XLA and Mosaic take the ptxas that PATH names first: the one that the report names.
      "PATH": os.pathsep.join([os.path.dirname(ptxas.tool("ptxas")), os.environ.get("PATH", "")]),
      "MOSAIC_GPU_DUMP_TO": str(folder / "mosaic"), "JAX_TRITON_DUMP_DIR": str(folder / "triton")}
