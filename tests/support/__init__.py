"""What tests share: tiny models, zoos, data sets and checkpoints, CUDA kernels on the CPU, tiers."""

# Seconds after which a process or thread counts as hung. Far beyond what any takes, on a busy machine, too.
PATIENCE = 900.0
