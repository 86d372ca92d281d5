"""Transfers between chips in one step, read off the optimized program."""

import math
import re

import numpy as np

from palm_haiku.kernels.aot import hlo

# Bytes that a chip sends for one byte of the largest array, of n chips in a ring.
_SENT = {"all-gather": lambda n: (n - 1) / n, "reduce-scatter": lambda n: (n - 1) / n,
         "all-reduce": lambda n: 2 * (n - 1) / n, "all-to-all": lambda n: (n - 1) / n,
         "collective-permute": lambda n: 1.0, "send": lambda n: 1.0}


def collectives(text: str, axes: dict[str, int], slice_size: int,
                coordinates: list[tuple[int, ...]] | None = None) -> tuple[list[dict], bool]:
  """Transfers between chips in one step, from the optimized HLO.

  Args:
    axes: names and sizes of the mesh, whose devices are the program's in this order.
    slice_size: devices in a slice or node: what leaves one goes over the slower network.
    coordinates: of each device in its slice's torus; None where all reach all others.

  Returns:
    [{kind, axis, count, bytes, sent_bytes, between, dims}], largest first: how often a kind of
    transfer over these axes runs, the bytes of its arrays, what each chip sends of them if it goes
    round a ring, and the dimensions of the torus whose links it can take; and whether the length
    of every loop around them is known (else it counts once).
  """
  counts, known = hlo.calls(text)
  found = {}
  for one in hlo.instructions(text):
    kind = one.opcode.removesuffix("-start")
    if kind not in _SENT or kind == "send" and "is_host_transfer=true" not in one.line:
      continue
    sizes = [array.bytes for array in one.arrays]
    # A started transfer names what it reads and what it makes; the larger is the whole array.
    tuple_of_both = one.opcode.endswith("-start") and kind != "all-reduce"
    size = max(sizes) if tuple_of_both else sum(sizes)
    if kind == "send":
      # XLA for TPUs adds up across slices through the hosts; the data axis alone crosses them.
      group, axis, between, size = [0, slice_size], "data", True, max(sizes)
    else:
      group = _group(one.line, axes)
      axis = "x".join(_axes_of(group, axes)) if len(group) > 1 else ""
      between = len({device // slice_size for device in group}) > 1
    if not axis:
      continue
    if kind == "reduce-scatter" and not tuple_of_both:
      size *= len(group)
    if kind == "all-reduce" and "all-reduce-scatter" in one.computation:
      kind = "reduce-scatter"  # each chip keeps its part
    row = found.setdefault((kind, axis), dict(
        kind=kind, axis=axis, count=0, bytes=0, sent_bytes=0.0, between=between,
        dims=_spanned(group, coordinates)))
    times = counts.get(one.name, 0)
    row["count"] += times
    row["bytes"] += times * size
    row["sent_bytes"] += times * size * _SENT[kind](len(group))
    row["between"] |= between
  return sorted(found.values(), key=lambda row: -row["sent_bytes"]), known


def seconds(found: list[dict], inside: float, between: float, dims: int) -> dict[str, float]:
  """The least time that each network is busy for.

  Args:
    found: of `collectives`.
    inside, between: bytes/s out of a chip, over all its links together.
    dims: of the torus, each of which has its part of the links; 1 for a switch.

  Returns:
    {"inside", "between"}: inside, the time of the dimension that has most to carry.
  """
  load, crossing = [0.0] * dims, 0.0
  for one in found:
    if one["between"]:
      crossing += one["sent_bytes"]
      continue
    over = one["dims"] or range(dims)
    for dim in over:
      load[dim] += one["sent_bytes"] / len(over)
  return {"inside": max(load) * dims / inside, "between": crossing / between}


def _spanned(group, coordinates) -> list[int]:
  """Dimensions of the torus along which the devices of a group stand apart."""
  if coordinates is None:
    return []
  places = np.array([coordinates[device] for device in group])
  return np.flatnonzero((places != places[0]).any(0)).tolist()


def _group(line, axes) -> list[int]:
  """The devices of the first group of a collective, as numbers in the mesh's order."""
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
    # 'fsdp':(4)2 is a part of an axis: of its 4 x 2 x ... devices, those along the 2.
    over = {k: (int(before or 1), int(size or sizes[k]))
            for k, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[2])}
    shape, index = [], []
    for k, n in sizes.items():
      before, size = over.get(k, (1, 1))
      shape += [before, size, n // before // size]
      index += [0, slice(None), 0]
    return devices.reshape(shape)[tuple(index)].ravel().tolist()
  if "replica_groups={}" in line:
    return devices.tolist()
  raise hlo.UnknownDump(f"replica groups of unknown form: {line.strip()[:200]}")


def _axes_of(group, axes) -> list[str]:
  places = np.unravel_index(group, tuple(axes.values()))
  return [name for name, place in zip(axes, places) if len(set(place.tolist())) > 1]
