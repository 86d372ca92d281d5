"""Facts from measurements: of published training runs, and of chips the kernels ran on."""

# The share of the peak at which a step's products run, where published training runs tell: one
# constant for a chip, the geometric mean of what each of its runs needs, which stands beside it.
# `python -m benchmarks plan` has the runs and computes it again; docs/plan.md has the table.
ACHIEVED: dict[str, float] = {
    "v4": 0.637,  # 0.566 PaLM 540B, 0.717 MaxText 52B
    "v5e": 0.814,  # MaxText 32B
    "v5p": 0.766,  # 0.719 MaxText 32B, 0.779 512B, 0.789 1024B, 0.778 Llama 2 70B
}

# Kinds of chips, as JAX names them, on which the kernels were timed: those of the results under
# benchmarks/results. On others `train` and `generate` check the kernels first.
MEASURED: frozenset[str] = frozenset()
