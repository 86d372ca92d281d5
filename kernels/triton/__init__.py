"""What Triton kernels share: their call, and device functions."""
