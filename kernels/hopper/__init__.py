"""What Hopper kernels share: layouts and copies, heads as rows, the softmax, the product loop."""
