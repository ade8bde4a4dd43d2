"""The random numbers that a sample brings along for what is left to do to it on the device."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(count: int) -> Tensor:
    """Random numbers for `count` cutout holes, int64 [count,2]: uniform below 2^31."""
    return torch.randint(2**31, (count, 2))
