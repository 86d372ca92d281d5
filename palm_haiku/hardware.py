"""What a plan needs to know of chips and of the networks between them, with its sources.

Peak FLOP/s and memory bandwidth are those of `kernels.aot.targets.TARGETS`, from the same pages.
All are nominal speeds, none was measured; memory has been compared with the compiler's own limit
on a v4 alone.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Network:
  """Memory that a program may use, and links, of one chip."""

  hbm: float  # bytes
  inside: float  # bytes/s out of one chip, within a slice or node, over all its links
  between: float  # bytes/s out of one chip, between slices or nodes
  dims: int  # of the torus; each has two of a chip's links. 1 for a switch
  source: str


_CLOUD = "cloud.google.com/tpu/docs/%s; memory: what XLA's compiler lets a program use"
_NVIDIA = ("NVIDIA's %s data sheet: memory; NVLink, half of both directions. Between nodes one "
           "400 Gb/s port for a GPU, an assumption")

# Google's pages give what a chip sends and receives together; half of it is here. That of a v4 is
# from "TPU v4: An Optically Reconfigurable Supercomputer" (arXiv:2304.01433), six links of 50 GB/s.
NETWORKS: dict[str, Network] = {
    "v4": Network(30.75 * 2**30, 300e9, 50e9 / 8, 3, _CLOUD % "v4" + "; between slices the 50 Gb/s "
                  "of a v5p, an assumption"),
    "v5e": Network(15.75 * 2**30, 200e9, 25e9 / 8, 2,
                   _CLOUD % "v5e" + "; between slices two 100 Gb/s ports for eight chips"),
    "v5p": Network(95.74 * 2**30, 600e9, 50e9 / 8, 3, _CLOUD % "v5p"),
    "v6e": Network(31.25 * 2**30, 400e9, 100e9 / 8, 2, _CLOUD % "v6e"),
    "h100": Network(80e9, 450e9, 400e9 / 8, 1, _NVIDIA % "H100 SXM"),
    "h200": Network(141e9, 450e9, 400e9 / 8, 1, _NVIDIA % "H200 SXM"),
    "b200": Network(180e9, 900e9, 400e9 / 8, 1, _NVIDIA % "HGX B200"),
}

# The share of the peak at which a step's products run, where published training runs tell: one
# constant for a chip, the geometric mean of what each of its runs needs, which stands beside it.
# `python -m benchmarks plan` has the runs and computes it again; docs/plan.md has the table.
ACHIEVED: dict[str, float] = {
    "v4": 0.637,  # 0.566 PaLM 540B, 0.717 MaxText 52B
    "v5e": 0.814,  # MaxText 32B
    "v5p": 0.766,  # 0.719 MaxText 32B, 0.779 512B, 0.789 1024B, 0.778 Llama 2 70B
}
