"""ptxas, NVIDIA's assembler, and the tools beside it: where they are, and what they say."""

import dataclasses
import functools
import glob
import os
import re
import shutil
import subprocess
import sysconfig

from .errors import AotError, UnknownDump, missing_wheel

_WHEELS = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm",
           "cuobjdump": "nvidia-cuda-cuobjdump"}


@functools.cache
def tool(name: str) -> str:
  """The path of ptxas, nvdisasm or cuobjdump: from its wheel, else from PATH."""
  site = sysconfig.get_paths()["purelib"]
  for path in (*sorted(glob.glob(f"{site}/nvidia/*/bin/{name}")), shutil.which(name)):
    if path and os.access(path, os.X_OK):
      return path
  raise missing_wheel(name, _WHEELS[name])


@functools.cache
def version() -> str:
  """ptxas's version. Another ptxas writes other SASS, so a report says which one it was."""
  text = _run(tool("ptxas"), "--version").stdout
  found = re.search(r"release [\d.]+, V([\d.]+)", text)
  if not found:
    raise UnknownDump(f"ptxas --version printed {text!r}")
  return found[1]


@dataclasses.dataclass(frozen=True)
class Resources:
  """Resources of one kernel, as ptxas reports them."""

  registers: int
  spill_stores: int  # bytes per thread
  spill_loads: int
  stack: int  # bytes
  barriers: int
  serialized: bool  # ptxas waits after every wgmma instead of letting several run
  waits: bool = False  # ptxas waits for some wgmma where the program does not


def parse(text: str) -> Resources:
  """Reads what `ptxas -v` prints about a module with one kernel.

  Raises:
    UnknownDump: a figure is missing or stands there twice.
  """
  def figure(pattern):
    found = re.findall(pattern, text)
    if len(found) != 1:
      raise UnknownDump(f"ptxas -v says {len(found)} times {pattern!r}:\n{text[:500]}")
    return int(found[0])

  barriers = re.findall(r"used (\d+) barriers", text)  # absent where there are none
  return Resources(
      registers=figure(r"Used (\d+) registers"),
      # "Registers are spilled ..." repeats the figures in a warning, so the line's start counts.
      spill_stores=figure(r"bytes stack frame, (\d+) bytes spill stores"),
      spill_loads=figure(r"bytes stack frame, \d+ bytes spill stores, (\d+) bytes spill loads"),
      stack=figure(r"(\d+) bytes stack frame"),
      barriers=int(barriers[0]) if barriers else 0,
      # C7510 to C7514 name causes with one effect, C7517 a wait; C7519 is harmless.
      serialized=bool(re.search(
          r"\(C751[0-4]\)|wgmma\.mma_async instructions are serialized", text)),
      waits=bool(re.search(r"\(C7517\)|wait\S* is injected", text)))


def assemble(ptx: str, architecture: str, cubin: str) -> Resources:
  """Assembles a file of PTX into the file `cubin`."""
  done = _run(tool("ptxas"), "-v", "-arch", architecture, ptx, "-o", cubin)
  text = done.stderr + done.stdout
  if done.returncode:
    raise AotError(f"ptxas {version()} refuses {os.path.basename(ptx)}: {text.strip()[:500]}")
  return parse(text)


def disassemble(cubin: str) -> str:
  done = _run(tool("nvdisasm"), "-c", cubin)
  if done.returncode:
    raise AotError(f"nvdisasm cannot read {os.path.basename(cubin)}: {done.stderr.strip()[:500]}")
  return done.stdout


def resource_usage(cubin: str) -> dict[str, dict[str, int]]:
  """{kernel: {"REG", "STACK", "SHARED", ...}} as cuobjdump reads them from a cubin."""
  text = _run(tool("cuobjdump"), "-res-usage", cubin).stdout
  found = {name: {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", line)}
           for name, line in re.findall(r"Function (\S+):\s*\n\s*(.*)", text)}
  # A cubin may hold constants alone.
  if ("Resource usage:" not in text or len(found) != text.count("Function ")
      or any(not {"REG", "STACK", "SHARED"} <= usage.keys() for usage in found.values())):
    raise UnknownDump(f"cuobjdump -res-usage printed {text[:500]!r}")
  return found


def _run(*command):
  return subprocess.run(command, capture_output=True, text=True, check=False)
