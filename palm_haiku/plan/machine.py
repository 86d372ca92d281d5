"""A machine that is planned for, and whether a run can be divided over it."""

import dataclasses
import math
import re
import types

from palm_haiku import sharding
from palm_haiku.kernels.aot import targets
from palm_haiku.kernels.core import chips
from palm_haiku.recipe import TrainConfig

# Facts about a chip's memory and links.
PLANNED = {name: chip for name, chip in chips.CHIPS.items() if chip.network}


class PlanError(Exception):
  """A plan that cannot be made, in one line."""


@dataclasses.dataclass(frozen=True)
class Machine:
  """Chips of one kind: TPU slices, or nodes of GPUs."""

  topology: str  # "v4:12x16x16", "v5p:4x4x4", "h200:8" (GPUs of a node)
  slices: int = 1  # or nodes

  def __post_init__(self):
    if self.chip not in PLANNED:
      raise ValueError(f"no topology is called {self.topology!r}; there are slices of TPUs such as "
                       f"v5p:4x4x4, and GPUs such as h200:8, of {', '.join(PLANNED)}")
    chip, written = chips.ALL[self.chip], self.topology.partition(":")[2]
    if isinstance(chip, chips.Tpu):
      shape, example = targets.slice_shape(chip, written), f"{chip.topology} or {self.chip}:16"
    else:
      shape = (int(written),) if re.fullmatch("[1-9][0-9]{0,5}", written) else None
      example = f"{self.chip}:8"
    if not shape:
      raise ValueError(f"the topology of a {self.chip} is written like {example}; got "
                       f"{self.topology!r}")
    object.__setattr__(self, "topology", f"{self.chip}:{'x'.join(map(str, shape))}")
    if self.slices < 1:
      raise ValueError(f"slices must be at least 1; got {self.slices}")

  @property
  def chip(self) -> str:
    return self.topology.partition(":")[0]

  @property
  def network(self) -> chips.Network:
    network = PLANNED[self.chip].network
    assert network  # what makes a chip planned for
    return network

  @property
  def platform(self) -> str:
    return targets.platform(self.chip) if self.chip in chips.ALL else ""

  @property
  def shape(self) -> tuple[int, ...]:
    """Of a slice, in chips; of a node, (its GPUs,)."""
    return tuple(map(int, self.topology.partition(":")[2].split("x")))

  @property
  def chips(self) -> int:
    return self.slices * math.prod(self.shape)

  def devices(self) -> list:
    """Compile-only devices.

    Raises:
      AotError: the compiler's wheel is not installed, or it knows no such topology.
    """
    from jax.experimental import topologies

    if self.platform == "tpu":
      return targets.devices(self.topology + (f"*{self.slices}" if self.slices > 1 else ""))
    targets.devices(self.chip)  # names the wheel that is missing
    return list(topologies.get_topology_desc(
        platform="cuda", topology_name=self.chip, topology=f"1x{self.slices}x{self.shape[0]}",
        target_config=targets.target_config(chips.GPUS[self.chip])).devices)


def check(config: TrainConfig, machine: Machine) -> None:
  """Raises one line, before anything compiles, if a run cannot be divided over a machine."""
  sizes = sharding.parse_mesh(config.mesh, machine.chips)
  if sizes["data"] % machine.slices and machine.platform == "tpu":
    raise ValueError(f"the data axis must be a multiple of the {machine.slices} slices; got "
                     f"{sizes['data']}")
  sharding.check(config.model, types.SimpleNamespace(shape=sizes), config.rules,
                 batch_size=config.batch_size // config.accumulate, seq_len=config.seq_len)
