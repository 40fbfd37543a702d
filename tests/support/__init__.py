"""What tests share: tiny models, zoos, data sets and checkpoints, CUDA kernels on the CPU, a browser."""
