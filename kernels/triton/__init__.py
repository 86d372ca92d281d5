"""Shared parts of Triton kernels: their call, and device functions."""
