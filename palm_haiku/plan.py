"""Compiles a training step for a machine that is not here, and estimates how fast it would be.

The compiler runs in a process of its own (`python -m palm_haiku.plan`), so that one that dies or
runs out of memory leaves a reason and takes nothing with it.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from typing import Any

from palm_haiku.config import PaLMConfig
from palm_haiku.hardware import NETWORKS
from palm_haiku.kernels.aot import AotError, hlo, targets
from palm_haiku.recipe import TrainConfig

# Bytes that a chip sends for one byte of the largest array, of n chips in a ring.
_SENT = {"all-gather": lambda n: (n - 1) / n, "reduce-scatter": lambda n: (n - 1) / n,
         "all-reduce": lambda n: 2 * (n - 1) / n, "all-to-all": lambda n: (n - 1) / n,
         "collective-permute": lambda n: 1.0, "send": lambda n: 1.0}


class PlanError(Exception):
  """A plan that cannot be made, in one line."""


@dataclasses.dataclass(frozen=True)
class Machine:
  """Chips of one kind: TPU slices, or nodes of GPUs."""

  topology: str  # "v4:12x16x16", "v5p:4x4x4", "h200:8" (GPUs of a node)
  slices: int = 1  # or nodes

  def __post_init__(self):
    if self.chip not in NETWORKS:
      raise ValueError(f"no topology is called {self.topology!r}; there are slices of TPUs such as "
                       f"v5p:4x4x4, and GPUs such as h200:8, of {', '.join(NETWORKS)}")
    form = r"\d+(x\d+){1,2}" if self.platform == "tpu" else r"\d+"
    shape = self.topology.partition(":")[2]
    if not re.fullmatch(form, shape) or 0 in map(int, shape.split("x")):
      raise ValueError(f"the topology of a {self.chip} is written like "
                       f"{'v5p:4x4x4' if self.platform == 'tpu' else 'h200:8'}; "
                       f"got {self.topology!r}")
    if self.slices < 1:
      raise ValueError(f"slices must be at least 1; got {self.slices}")

  @property
  def chip(self) -> str:
    return self.topology.partition(":")[0]

  @property
  def platform(self) -> str:
    return targets.platform(self.chip) if self.chip in targets.TARGETS else ""

  @property
  def chips(self) -> int:
    return self.slices * math.prod(map(int, self.topology.partition(":")[2].split("x")))

  def devices(self) -> list:
    """Compile-only devices.

    Raises:
      AotError: the compiler's wheel is not installed, or it knows no such topology.
    """
    from jax.experimental import topologies

    if self.platform == "tpu":
      return targets.devices(self.topology + (f"*{self.slices}" if self.slices > 1 else ""))
    targets.devices(self.chip)  # names the wheel that is missing
    inside = self.topology.partition(":")[2]
    return list(topologies.get_topology_desc(
        platform="cuda", topology_name=self.chip, topology=f"1x{self.slices}x{inside}",
        target_config=targets.chip(self.chip).target_config()).devices)


def check(config: TrainConfig, machine: Machine) -> None:
  """Raises one line, before anything compiles, if a run cannot be divided over a machine."""
  from palm_haiku import sharding

  sizes = sharding.parse_mesh(config.mesh, machine.chips)
  if sizes["data"] % machine.slices and machine.platform == "tpu":
    raise ValueError(f"the data axis must be a multiple of the {machine.slices} slices; got "
                     f"{sizes['data']}")
  mesh = type("Sizes", (), {"shape": sizes})
  sharding.check(config.model, mesh, config.rules,
                 batch_size=config.batch_size // config.accumulate, seq_len=config.seq_len)


def plan(config: TrainConfig, machine: Machine, *, timeout: float = 1800) -> dict[str, Any]:
  """What a step of training needs of each chip, and how long it would take.

  Args:
    config: of the run; its mesh is of the machine's chips.
    timeout: seconds, after which the compiler is killed.

  Returns:
    chips, params, hbm_per_chip_bytes, hbm_limit_bytes, fits, flops_per_chip (that the hardware
    does in a step), step_seconds, mfu, hfu, compile_seconds; and state_bytes, temporary_bytes,
    code_bytes, collectives ({kind, axis, count, bytes, sent_bytes} of one step), loops_known,
    and the roofline: compute_seconds, memory_seconds, network_seconds (by network).

  Raises:
    ValueError: as `check`.
    PlanError: the compiler is missing, refuses the program, dies or takes too long.
  """
  check(config, machine)
  request = json.dumps({"config": dataclasses.asdict(config),
                        "machine": dataclasses.asdict(machine)})
  environment = dict(os.environ, PYTHONPATH=os.pathsep.join([os.getcwd(), *filter(None, sys.path)]))
  environment |= targets.environment(machine.chip)
  try:
    done = subprocess.run([sys.executable, "-m", "palm_haiku.plan"], input=request, text=True,
                          capture_output=True, timeout=timeout, env=environment)
  except subprocess.TimeoutExpired:
    raise PlanError(f"not compiled after {timeout:.0f} s") from None
  if done.returncode:
    last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
    raise PlanError(f"the compiler died (exit status {done.returncode}): {last[:300]}")
  answer = json.loads(done.stdout.splitlines()[-1])
  if "error" in answer:
    raise PlanError(answer["error"])
  return estimate(config, machine, answer)


def estimate(config: TrainConfig, machine: Machine, compiled: dict[str, Any]) -> dict[str, Any]:
  """The roofline of a step, around what its compiler said (see `plan`).

  Each resource is busy for its bytes or FLOPs over its published peak; the step takes as long as
  the busiest of them, as if all overlapped perfectly: a lower bound of time, never a forecast.
  """
  chip, network = targets.chip(machine.chip), NETWORKS[machine.chip]
  peak = chip.tflops * 1e12
  tokens = config.batch_size * config.seq_len
  flops = flops_per_token(config)
  # Parameters, moments and gradients pass through memory; weights once more in each pass over a
  # layer, for each part of a batch. Activations between products are left out.
  passes = (3 if config.remat == "none" else 4) * config.accumulate
  model_axis = next((c["size"] for c in compiled["axes"] if c["name"] == "model"), 1)
  moved = 3 * compiled["state_bytes"] + passes * 2 * config.model.num_params / model_axis
  seconds = {"inside": 0.0, "between": 0.0}
  for one in compiled["collectives"]:
    where = "between" if one["between"] else "inside"
    seconds[where] += one["sent_bytes"] / getattr(network, where)
  compute = tokens * flops / machine.chips / peak
  memory = moved / chip.bandwidth
  step = max(compute, memory, *seconds.values())
  model = config.model.train_flops_per_token(config.seq_len)
  used = compiled["state_bytes"] + compiled["temporary_bytes"] + compiled["code_bytes"]
  return {
      "chips": machine.chips, "params": config.model.num_params, "hbm_per_chip_bytes": used,
      "hbm_limit_bytes": int(network.hbm), "fits": used <= network.hbm,
      "flops_per_chip": tokens * flops / machine.chips, "step_seconds": step,
      "mfu": tokens * model / machine.chips / peak / step,
      "hfu": tokens * flops / machine.chips / peak / step,
      "compute_seconds": compute, "memory_seconds": memory, "network_seconds": seconds,
      **compiled}


def flops_per_token(config: TrainConfig) -> float:
  """FLOPs of one token that the hardware does: products counted in the step as it is traced.

  The step of plain JAX is counted, with all of attention's square; kernels do the same products
  but leave out blocks that the causal mask hides.
  """
  import jax
  from palm_haiku.train_step import init, train_step

  one = dataclasses.replace(config, batch_size=1, batch_ramp="", accumulate=1,
                            implementation="xla", mesh="", shard_residual=False)
  state = jax.eval_shape(lambda: init(one))
  batch = {"tokens": jax.ShapeDtypeStruct((1, config.seq_len + 1), "int32")}
  closed = jax.make_jaxpr(lambda *args: train_step(one, *args))(state, batch)
  return count_flops(closed.jaxpr) / config.seq_len


def model_flops_per_token(model: PaLMConfig, seq_len: int) -> float:
  """FLOPs of one token that the model needs, counted in the gradient of its plain logits."""
  import jax
  import jax.numpy as jnp
  from palm_haiku.model import PaLM
  import haiku as hk

  apply = hk.without_apply_rng(hk.transform(
      lambda tokens: PaLM.from_config(model, implementation="xla")(tokens)))
  tokens = jax.ShapeDtypeStruct((1, seq_len), "int32")
  params = jax.eval_shape(apply.init, jax.random.key(0), tokens)
  grad = jax.grad(lambda params, tokens: jnp.square(apply.apply(params, tokens)).sum())
  return count_flops(jax.make_jaxpr(grad)(params, tokens).jaxpr) / seq_len


def count_flops(jaxpr) -> float:
  """FLOPs of the matrix products of a jaxpr, those in a scan as often as it runs.

  Raises:
    ValueError: a loop of unknown length holds a product.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      depth = math.prod(eqn.invars[0].aval.shape[d] for d in contracted)
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
      continue
    inner = [count_flops(getattr(sub, "jaxpr", sub)) for value in eqn.params.values()
             for sub in (value if isinstance(value, (tuple, list)) else (value,))
             if hasattr(getattr(sub, "jaxpr", sub), "eqns")]
    if eqn.primitive.name == "while" and any(inner):
      raise ValueError("a loop whose length is not known holds matrix products")
    if eqn.primitive.name == "cond":
      total += max(inner, default=0)
    else:
      total += sum(inner) * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
  return total


def collectives(text: str, axes: dict[str, int], slice_size: int) -> tuple[list[dict], bool]:
  """What chips send each other in one step, from the optimized HLO.

  Args:
    axes: names and sizes of the mesh, whose devices are the program's in this order.
    slice_size: devices in a slice or node: what leaves one goes over the slower network.

  Returns:
    [{kind, axis, count, bytes, sent_bytes, between}], largest first: how often a kind of transfer
    over these axes runs, the bytes of its arrays, and what each chip sends of them if it goes
    round a ring; and whether the length of every loop around them is known (else it counts once).
  """
  counts, known = hlo.calls(text)
  found, fused_scatter = {}, False
  for line in text.splitlines():
    if start := hlo._COMPUTATION.match(line):
      fused_scatter = "all-reduce-scatter" in start[2]
    instruction = hlo._INSTRUCTION.match(line)
    if not instruction or instruction[3].removesuffix("-start") not in (*_SENT, "send"):
      continue
    name, shapes, opcode = instruction.groups()
    kind = opcode.removesuffix("-start")
    if kind == "send" and "is_host_transfer=true" not in line:
      continue
    sizes = [hlo.Buffer(name, dtype, tuple(int(d) for d in dims.split(",") if d), kind).bytes
             for dtype, dims in hlo._ARRAY.findall(shapes)]
    # A started transfer names what it reads and what it makes; the larger is the whole array.
    tuple_of_both = opcode.endswith("-start") and kind != "all-reduce"
    size = max(sizes) if tuple_of_both else sum(sizes)
    if kind == "send":
      # XLA for TPUs adds up across slices through the hosts; the data axis alone crosses them.
      group, axis, between, size = [0, slice_size], "data", True, max(sizes)
    else:
      group = _group(line, axes)
      axis = "x".join(_axes_of(group, axes)) if len(group) > 1 else ""
      between = len({device // slice_size for device in group}) > 1
    if not axis:
      continue
    if kind == "reduce-scatter" and not tuple_of_both:
      size *= len(group)
    if fused_scatter and kind == "all-reduce":  # of which each chip keeps its part
      kind = "reduce-scatter"
    row = found.setdefault((kind, axis), dict(kind=kind, axis=axis, count=0, bytes=0,
                                              sent_bytes=0.0, between=between))
    times = counts.get(name, 0)
    row["count"] += times
    row["bytes"] += times * size
    row["sent_bytes"] += times * size * _SENT[kind](len(group))
    row["between"] |= between
  return sorted(found.values(), key=lambda row: -row["sent_bytes"]), known


def _group(line, axes) -> list[int]:
  """The devices of the first group of a collective, as numbers in the mesh's order."""
  import numpy as np

  devices = np.arange(math.prod(axes.values()))
  if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
    return [int(n) for n in pair.groups()]
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
    return [int(n) for n in listed[1].split(",")]
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    order = devices.reshape([int(n) for n in iota[3].split(",")])
    if iota[4]:
      order = order.transpose([int(n) for n in iota[4].split(",")])
    return order.reshape(int(iota[1]), int(iota[2]))[0].tolist()
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
    sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
    over = re.findall(r"'(\w+)'(:)?", named[2])
    if all(not part for _, part in over):
      index = tuple(slice(None) if k in {k for k, _ in over} else 0 for k in sizes)
      return np.atleast_1d(devices.reshape(list(sizes.values()))[index]).ravel().tolist()
  if "replica_groups={}" in line:
    return devices.tolist()
  raise hlo.UnknownDump(f"replica groups of unknown form: {line.strip()[:200]}")


def _axes_of(group, axes) -> list[str]:
  import numpy as np

  places = np.unravel_index(group, tuple(axes.values()))
  return [name for name, place in zip(axes, places) if len(set(place.tolist())) > 1]


def compile_step(config: TrainConfig, machine: Machine) -> dict[str, Any]:
  """What the compiler says of a step, in this process; see `plan`, which calls it in another."""
  import jax
  from palm_haiku import sharding
  from palm_haiku.train_step import program

  mesh = sharding.make_mesh(config.mesh, machine.devices())
  run = program(config, mesh)
  shape = (config.batch_size, config.seq_len + 1)
  batch = {"tokens": jax.ShapeDtypeStruct(shape, "int32", sharding=run.batch_sharding)}
  if config.mask_documents:
    batch["segment_ids"] = batch["tokens"]
  start = time.perf_counter()
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = run.step.trace(run.state, batch).lower(lowering_platforms=(machine.platform,))
  compiled = lowered.compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  text = compiled.as_text()
  axes = dict(mesh.shape)
  found, known = collectives(text, axes, machine.chips // machine.slices)
  return {
      "state_bytes": memory.argument_size_in_bytes,
      "temporary_bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes
                         - memory.alias_size_in_bytes,
      "code_bytes": memory.generated_code_size_in_bytes, "compile_seconds": seconds,
      "axes": [{"name": name, "size": size} for name, size in axes.items()],
      "kernels": len(re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[^"]*|'
                                r'triton[^"]*)"', text)),
      "collectives": found, "loops_known": known}


def _child() -> None:
  request = json.load(sys.stdin)
  config = dict(request["config"])
  config["model"] = PaLMConfig.from_dict(config["model"])
  try:
    answer = compile_step(TrainConfig(**config), Machine(**request["machine"]))
  except (AotError, ValueError) as error:
    answer = {"error": str(error)}
  except Exception as error:  # whatever a compiler throws at its caller is the answer
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    answer = {"error": f"{type(error).__name__}: {' | '.join(lines)[:300]}"}
  print(json.dumps(answer))


if __name__ == "__main__":
  _child()
