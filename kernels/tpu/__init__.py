"""What TPU kernels share: sizes in whole tiles, products and their order, VMEM."""
