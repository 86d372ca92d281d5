"""The part of a compilation in its own process: folder/job holds a `Job`.

It leaves folder/result, a pickled ("report", Report) or ("error", AotError).
"""

import glob
import pathlib
import pickle
import re

import jax

from . import build, elf, hlo, llo, ptxas, sass, targets
from .errors import AotError
from .report import GpuKernel, Report, TpuKernel


def main(folder: pathlib.Path) -> None:
  job = pickle.loads((folder / "job").read_bytes())
  try:
    result = ("report", _report(job, folder))
  except AotError as error:
    result = ("error", error)
  except Exception as error:  # whatever a compiler throws at its caller is the answer
    result = ("error", AotError(f"{job.name} does not compile for {job.target}: "
                                f"{type(error).__name__}: {_first_lines(str(error))}"))
  (folder / "result.part").write_bytes(pickle.dumps(result))
  (folder / "result.part").rename(folder / "result")


def _first_lines(text, limit=600):
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  return " | ".join(lines)[:limit] or "without a word"


def _report(job, folder) -> Report:
  function, args, kwargs = build.resolve(job.function), job.args, dict(job.kwargs)
  if job.args is None:
    function, args, kwargs = *function(**kwargs), {}
  if job.backward:
    function, args = build.forward_and_backward(function, args, kwargs)
    kwargs = {}
  args, mesh = build.place(args, job.target)
  lowered = build.lower(function, args, kwargs, job.target, mesh)
  cuda = targets.platform(job.target) == "cuda"
  compiled = lowered.compile({"xla_dump_to": str(folder / "xla")} if cuda else None)

  memory = compiled.memory_analysis()
  text = compiled.as_text() or ""
  loops = " while(" in text
  if cuda:
    kernels = _gpu_kernels(compiled, folder, targets.chip(job.target))
  else:
    loops = not hlo.calls(text)[1]
    kernels = _tpu_kernels(job, folder, targets.chip(job.target), text)
  found = hlo.square(hlo.buffers(text), *job.square) if job.square else ()
  return Report(
      target=job.target, versions=_versions(cuda), kernels=tuple(kernels),
      memory={kind: getattr(memory, f"{kind}_size_in_bytes") for kind in
              ("temp", "argument", "output")},
      square=tuple(found), flops=job.flops, loops=loops, traffic=hlo.traffic(text))


def _versions(cuda):
  found = {"jax": jax.__version__}
  if cuda:
    return found | {"ptxas": ptxas.version()}
  import importlib.metadata
  return found | {"libtpu": importlib.metadata.version("libtpu")}


def _tpu_kernels(job, folder, chip, text):
  kernels, schedules = [], llo.read(folder / "llo", chip)
  calls = hlo.calls_of([schedule.name for schedule in schedules], text)
  product_steps = hlo.product_steps(text)
  for schedule in schedules:
    # XLA says itself how often its own products finish a tile of their result.
    steps = llo.Steps(edge=1 / product_steps.get(schedule.name, 1))
    steps = next((s for pattern, s in job.steps.items() if re.search(pattern, schedule.name)
                  and s != llo.Steps()), steps)
    schedule.set_runs(steps)
    kernels.append(TpuKernel(schedule.name, schedule, calls[schedule.name]))
  return kernels


def _gpu_kernels(compiled, folder, chip):
  kernels = []
  # Mosaic GPU and Triton leave PTX, which ptxas turns into the very code that they run: checked
  # against Mosaic's own dump of its SASS.
  for ptx in sorted((folder / "mosaic").glob("*.ptx")):
    kernels.append(_assembled(ptx, "mosaic_gpu", ptx.stem, chip, _scratch(ptx)))
  for ptx in sorted((folder / "triton").glob("*/*.ptx")):
    shared = re.search(r"shared_mem_bytes: (\d+)", ptx.with_suffix(".compile_info").read_text())
    kernels.append(_assembled(ptx, "triton", None, chip, int(shared[1]) if shared else None))
  seen = {kernel.code.name for kernel in kernels}

  launches = _launches(folder / "xla")
  for number, cubin in enumerate(elf.cubins(compiled.runtime_executable().serialize())):
    path = folder / f"{number}.cubin"
    path.write_bytes(cubin)
    usage = ptxas.resource_usage(str(path))
    if usage.keys() <= seen:
      continue  # nothing but Mosaic's kernels, which lie in the executable too
    for code in sass.parse(ptxas.disassemble(str(path))):
      if code.name in seen:
        continue
      taken = usage[code.name]
      kernels.append(GpuKernel(
          code.name, "xla",
          ptxas.Resources(taken["REG"], code.local_stores, code.local_loads, taken["STACK"],
                          _barriers(code), _serialized(code)),
          launches.get(code.name), code))
  return kernels


def _assembled(ptx, source, name, chip, shared):
  cubin = ptx.with_suffix(".cubin")
  resources = ptxas.assemble(str(ptx), chip.architecture, str(cubin))
  code, = sass.parse(ptxas.disassemble(str(cubin)))
  return GpuKernel(name or code.name, source, resources, shared, code)


def _scratch(ptx):
  """Bytes of shared memory of a Mosaic kernel; None if kernels of its name take different ones.

  Files of resources are numbered as kernels are lowered, PTX as it is compiled, which is another
  order: the name alone tells what belongs together.
  """
  name = ptx.stem.rpartition("_")[0]
  found = {int(n) for file in ptx.parent.glob(f"{glob.escape(name)}_*.resources.txt")
           if re.fullmatch(rf"{re.escape(name)}_\d+\.resources\.txt", file.name)
           for n in re.findall(r"smem_scratch_bytes=(\d+)", file.read_text())}
  return found.pop() if len(found) == 1 else None


def _barriers(code):
  return 1 if code.mix.get("BAR") else 0


def _serialized(code):
  """Where there is no word of ptxas: it fences each wgmma from both sides when it serializes."""
  return any(loop.mix.get("HGMMA", 0) > 1
             and loop.mix.get("WARPGROUP", 0) >= 2 * loop.mix["HGMMA"] for loop in code.loops)


def _launches(folder):
  """{kernel: bytes of shared memory} from XLA's list of what it launches."""
  return {name: int(shared) for path in folder.glob("*thunk_sequence.txt")
          for name, shared in re.findall(
              r"\] (\S+) grid: .* shared_memory: (\d+) bytes", path.read_text())}
