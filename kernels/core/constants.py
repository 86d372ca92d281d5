"""Numbers that kernels of all backends agree on."""

LOG2E = 1.4426950408889634  # log2(e): exp2 is the instruction
LOWEST = -1e30  # a running maximum before the first score: finite, so no inf - inf
FAR = 2**30  # a window this wide is no window
