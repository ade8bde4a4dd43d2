"""The selective-alignment distillation loss (SeAl-KD, arXiv 2605.14252) and its ancestors."""

MOST_STEPS = 64  # T that the Triton kernels take: they keep weights [T, T] of a sample in registers
