"""Kernels compiled for chips that are not here: python -m benchmarks static [WHAT]."""
