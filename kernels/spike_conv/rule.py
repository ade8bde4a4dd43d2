"""Where a convolution that skips zeros is faster than a dense one."""

from __future__ import annotations

import torch

# Firing rates below which the kernels are faster than torch's dense convolution, and multiplications of a dense one
# below which the time of a call is the host's.
FORWARD = {torch.float32: 0.8, torch.bfloat16: 0.35}
WEIGHT_GRADIENT = {torch.float32: 0.8, torch.bfloat16: 0.45}
LEAST = 1 << 22


def pays(rates: dict[torch.dtype, float], dtype: torch.dtype, multiplications: int, rate: float) -> bool:
    """Whether zeros are to be skipped."""
    return multiplications >= LEAST and rate <= rates[dtype]
