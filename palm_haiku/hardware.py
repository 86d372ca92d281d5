"""What a plan needs to know of chips and of the networks between them, with its sources.

Peak FLOP/s and memory bandwidth are those of `kernels.aot.targets.TARGETS`, from the makers' data
sheets. Here is what a single chip's compiler does not ask for: nominal speeds of links, not
measured, and memory, which has been compared with the compiler's own limit on a v4 alone.
"""

import dataclasses

_CLOUD = "cloud.google.com/tpu/docs/%s: interchip interconnect per chip, both directions"
_HBM = "; memory: what XLA's compiler says that a program may use"
_NVIDIA = "NVIDIA %s data sheet: NVLink, both directions, and memory; one 400 Gb/s port per GPU"


@dataclasses.dataclass(frozen=True)
class Network:
  """Memory that a program may use, and links, of one chip."""

  hbm: float  # bytes
  inside: float  # bytes/s out of one chip, within a slice or node
  between: float  # bytes/s out of one chip, between slices or nodes
  source: str


# Between TPU slices: 200 Gb/s to a host of four chips (eight for v5e and v6e, which hosts share),
# an assumption that the clouds' pages do not state for each of them.
NETWORKS: dict[str, Network] = {
    "v4": Network(30.75 * 2**30, 2400e9 / 8 / 2, 200e9 / 8 / 4, _CLOUD % "v4" + _HBM),
    "v5e": Network(15.75 * 2**30, 1600e9 / 8 / 2, 200e9 / 8 / 8, _CLOUD % "v5e" + _HBM),
    "v5p": Network(95.74 * 2**30, 4800e9 / 8 / 2, 200e9 / 8 / 4, _CLOUD % "v5p" + _HBM),
    "v6e": Network(31.25 * 2**30, 3584e9 / 8 / 2, 200e9 / 8 / 8, _CLOUD % "v6e" + _HBM),
    "h100": Network(80e9, 900e9 / 2, 400e9 / 8, _NVIDIA % "H100 SXM"),
    "h200": Network(141e9, 900e9 / 2, 400e9 / 8, _NVIDIA % "H200 SXM"),
    "b200": Network(180e9, 1800e9 / 2, 400e9 / 8, _NVIDIA % "HGX B200"),
}
