"""Measurements of the ops and of the whole model: python -m benchmarks NAME."""
