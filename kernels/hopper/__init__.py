"""Shared parts of Hopper kernels: layouts and copies, heads as rows, softmax, the product loop."""
