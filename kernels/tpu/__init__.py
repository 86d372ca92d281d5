"""Shared parts of TPU kernels: sizes in whole tiles, products and their order, VMEM."""
