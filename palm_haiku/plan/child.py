"""The process that compiles: one request as a line on stdin, one answer as a line on stdout.

Its parent keeps stdin open: when that closes, whatever ended the parent, nobody waits any more.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax

from palm_haiku import kernels, sharding
from palm_haiku.config import PaLMConfig
from palm_haiku.kernels.aot import AotError, targets
from palm_haiku.model import palm_params
from palm_haiku.plan import transfers
from palm_haiku.plan.machine import Machine, PlanError
from palm_haiku.recipe import TrainConfig
from palm_haiku.train_step import init, program

_KERNEL = r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[^"]*|triton[^"]*)"'


def compile_elsewhere(config: TrainConfig, machine: Machine, timeout: float) -> dict[str, Any]:
  """`compile_step` in a process of its own.

  Raises:
    PlanError: the compiler is missing, refuses the program, dies or takes too long.
  """
  request = json.dumps({"config": dataclasses.asdict(config),
                        "machine": dataclasses.asdict(machine)})
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.getcwd(), *filter(None, sys.path)]))
  environment |= targets.environment(machine.chip)
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    child = subprocess.Popen([sys.executable, "-m", "palm_haiku.plan.child"], text=True,
                             stdin=subprocess.PIPE, stdout=out, stderr=err, env=environment)
    assert child.stdin
    try:
      try:
        child.stdin.write(request + "\n")
        child.stdin.flush()
      except BrokenPipeError:
        pass  # Why it died is told below.
      status = child.wait(timeout)
    except subprocess.TimeoutExpired:
      raise PlanError(f"not compiled after {timeout:.0f} s") from None
    finally:
      child.kill()
      child.wait()
      try:
        child.stdin.close()
      except BrokenPipeError:
        pass
    out.seek(0)
    err.seek(0)
    if status:
      last = (err.read().strip().splitlines() or ["without a word"])[-1]
      how = (f"killed by signal {-status}, perhaps for want of memory" if status < 0
             else f"exit status {status}")
      raise PlanError(f"the compiler died ({how}): {last[:300]}")
    answer = json.loads(out.read().splitlines()[-1])
  if "error" in answer:
    raise PlanError(answer["error"])
  return answer


def compile_step(config: TrainConfig, machine: Machine) -> dict[str, Any]:
  """The compiler's figures of a step, in this process; `estimate.plan` has the meaning."""
  mesh = sharding.make_mesh(config.mesh, machine.devices())
  run = program(config, mesh)
  shape = (config.batch_size, config.seq_len + 1)
  batch = {"tokens": jax.ShapeDtypeStruct(shape, "int32", sharding=run.batch_sharding)}
  if config.mask_documents:
    batch["segment_ids"] = batch["tokens"]
  if config.packing == "best-fit":
    batch["weights"] = jax.ShapeDtypeStruct(
        (config.batch_size, config.seq_len), "float32", sharding=run.batch_sharding)
  start = time.perf_counter()
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    choices = _choices(config)
    lowered = run.step.trace(run.state, batch).lower(lowering_platforms=(machine.platform,))
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  axes = dict(mesh.shape)
  coordinates = [d.coords for d in mesh.devices.flat] if machine.platform == "tpu" else None
  found, known = transfers.collectives(text, axes, machine.chips // machine.slices, coordinates)
  return {
      "state_bytes": memory.argument_size_in_bytes,
      "temporary_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes
                         - memory.alias_size_in_bytes,
      "code_bytes": memory.generated_code_size_in_bytes, "compile_seconds": seconds,
      "axes": [{"name": name, "size": size} for name, size in axes.items()],
      "implementations": choices, "kernels": len(re.findall(_KERNEL, text)),
      "collectives": found, "loops_known": known}


def _choices(config) -> dict[str, dict[str, str]]:
  """The implementation of each op in the step, and why."""
  model, batch = config.model, config.batch_size // config.accumulate
  array = lambda *shape: jax.ShapeDtypeStruct((batch, config.seq_len, *shape), config.dtype)
  key = array(model.kv_heads, model.dim_head)
  ops = {"flash_attention": (array(model.heads, model.dim_head), key,
                             None if model.shared_kv and model.position == "alibi" else key),
         "parallel_attention_ffn": (array(model.dim), _layer(config)),
         "linear_cross_entropy": (array(model.dim), jax.ShapeDtypeStruct(
             (model.num_tokens, model.dim), "float32"))}
  choices = {op: kernels.explain(op, *arrays, implementation=config.implementation)._asdict()
             for op, arrays in ops.items()}
  return choices | {"decode_attention": {
      "implementation": "-", "reason": "no part of training"}}


def _layer(config) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of one layer's parameters."""
  _, stack = palm_params(jax.eval_shape(lambda: init(config)).params)
  return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in stack.items()}


def _out_of_memory(text: str) -> str | None:
  """The compiler's words for a program that is too large for the chip, in fewer."""
  used = re.search(r"Used ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?) hbm", text)
  return f"needs {used[1]}iB of a chip's {used[2]}iB" if used else None


def main() -> None:
  request = json.loads(sys.stdin.readline())

  def leave_with_parent():
    sys.stdin.read()
    os._exit(1)

  threading.Thread(target=leave_with_parent, daemon=True).start()
  config = dict(request["config"])
  config["model"] = PaLMConfig.from_dict(config["model"])
  try:
    answer = compile_step(TrainConfig(**config), Machine(**request["machine"]))
  except (AotError, ValueError) as error:
    answer = {"error": _out_of_memory(str(error)) or str(error)}
  except Exception as error:  # whatever a compiler throws at its caller is the answer
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    answer = {"error": _out_of_memory(str(error))
              or f"{type(error).__name__}: {' | '.join(lines)[:300]}"}
  print(json.dumps(answer), flush=True)
  os._exit(0)  # The thread that waits for the parent may hold stdin.


if __name__ == "__main__":
  main()
