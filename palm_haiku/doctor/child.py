"""The process that checks: a line of JSON in, a line of JSON out.

Requests are {"machine": true}, answered by what JAX finds here, and {"case": ...}, answered by
what `check.run` returns. It ends with its standard input.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import queue
import sys
import threading
from typing import Any

import jax

from palm_haiku import distributed, kernels
from palm_haiku.doctor import cases, check
from palm_haiku.kernels.core import dispatch

PACKAGES = ("palm-haiku", "jax", "jaxlib", "dm-haiku", "numpy", "jax-cuda13-plugin",
            "jax-cuda12-plugin", "libtpu", "jax-triton", "triton")


def versions() -> dict[str, str]:
  """Of what decides what a kernel is compiled to; those that are installed."""
  found = {"python": platform.python_version()}
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def machine() -> dict[str, Any]:
  """Versions and devices, and what `auto` takes for each op."""
  distributed.start_backend()
  target, devices = dispatch.target(), jax.local_devices()
  auto = {op: kernels.explain(op, *cases.operands(cases.Case(op, "auto", sizes)))._asdict()
          for op, sizes in cases.REAL.items()}
  return dict(versions=versions(), system=platform.platform(), platform=target.platform,
              chip=target.chip, kind=devices[0].device_kind, devices=len(devices),
              capability=getattr(devices[0], "compute_capability", None), auto=auto)


def _answer(request) -> dict[str, Any]:
  if "machine" in request:
    try:
      return machine()
    except distributed.StartError as error:
      return {"error": str(error)}
  return check.run(cases.Case(**request["case"]))


def request(case: cases.Case) -> dict[str, Any]:
  """The request for a check."""
  return {"case": dataclasses.asdict(case)}


def main() -> None:
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # whatever libraries print
  requests: queue.SimpleQueue[str] = queue.SimpleQueue()

  def read():
    for line in sys.stdin:
      requests.put(line)
    os._exit(0)  # even in the midst of a check: nobody waits for it

  threading.Thread(target=read, daemon=True).start()
  # A callback of an interpreter must not wait for a thread that its own program occupies.
  jax.config.update("jax_cpu_enable_async_dispatch", False)
  while True:
    print(json.dumps(_answer(json.loads(requests.get()))), file=answers, flush=True)


if __name__ == "__main__":
  main()
