"""The time of a step, from what its compiler said and what the hardware can do."""

from typing import Any

from palm_haiku.hardware import ACHIEVED
from palm_haiku.kernels.aot import targets
from palm_haiku.plan import transfers
from palm_haiku.plan.machine import Machine, check
from palm_haiku.recipe import TrainConfig


def plan(config: TrainConfig, machine: Machine, *, timeout: float = 1800) -> dict[str, Any]:
  """The needs of a training step on each chip, and its expected time.

  Args:
    config: of the run; its mesh is of the machine's chips.
    timeout: seconds, after which the compiler is killed.

  Returns:
    chips, params, hbm_per_chip_bytes, hbm_limit_bytes, fits, flops_per_chip (that the hardware
    does in a step), step_seconds, mfu, hfu, compile_seconds; and state_bytes, temporary_bytes,
    code_bytes, implementations (of each op, with the reason), kernels (in the program),
    collectives (of `transfers.collectives`), loops_known; the roofline: compute_seconds,
    memory_seconds, network_seconds (by network), least_seconds; and achieved, the share of the
    peak that `step_seconds` counts with.

  Raises:
    ValueError: as `check`.
    PlanError: the compiler is missing, refuses the program, dies or takes too long.
  """
  from palm_haiku.plan import child

  check(config, machine)
  return estimate(config, machine, child.compile_elsewhere(config, machine, timeout))


def estimate(config: TrainConfig, machine: Machine, compiled: dict[str, Any]) -> dict[str, Any]:
  """The roofline of a step, around what its compiler said (see `plan`).

  Each resource is busy for its bytes or FLOPs over its published peak. The busiest of them is
  least_seconds, as if all overlapped perfectly. For step_seconds the products run at the share of
  the peak that published runs on such chips achieved; without one, it is least_seconds.
  """
  from palm_haiku.plan.flops import flops_per_token

  chip = targets.chip(machine.chip)
  network = machine.network
  peak, achieved = chip.tflops * 1e12, ACHIEVED.get(machine.chip, 1.0)
  tokens = config.batch_size * config.seq_len
  # Parameters, moments and gradients pass through memory; weights once more in each pass over a
  # layer, for each part of a batch. Activations between products are left out.
  passes = (3 if config.remat == "none" else 4) * config.accumulate
  model_axis = next((c["size"] for c in compiled["axes"] if c["name"] == "model"), 1)
  flops = flops_per_token(config, model_axis)
  moved = 3 * compiled["state_bytes"] + passes * 2 * config.model.num_params / model_axis
  networks = transfers.seconds(compiled["collectives"], network.inside, network.between,
                               network.dims)
  compute = tokens * flops / machine.chips / peak
  others = max(moved / chip.bandwidth, *networks.values())
  step = max(compute / achieved, others)
  model = config.model.train_flops_per_token(config.seq_len)
  used = compiled["state_bytes"] + compiled["temporary_bytes"] + compiled["code_bytes"]
  return {
      "chips": machine.chips, "params": config.model.num_params, "hbm_per_chip_bytes": used,
      "hbm_limit_bytes": int(chip.memory), "fits": used <= chip.memory,
      "flops_per_chip": tokens * flops / machine.chips, "step_seconds": step,
      "mfu": tokens * model / machine.chips / peak / step,
      "hfu": tokens * flops / machine.chips / peak / step,
      "least_seconds": max(compute, others), "achieved": achieved,
      "compute_seconds": compute, "memory_seconds": moved / chip.bandwidth,
      "network_seconds": networks, **compiled}
