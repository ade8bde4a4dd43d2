"""What describes a LIF neuron besides its input and state."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..surrogate.reference import Surrogate


@dataclass(frozen=True)
class Options:
    """Options of the neuron, as in reference.py; tau and v_threshold are floats, or tensors, scalar or [C]."""

    tau: float | torch.Tensor
    decay_input: bool
    v_threshold: float | torch.Tensor
    v_reset: float | None
    surrogate: Surrogate
    detach_reset: bool

    def per_channel(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """τ and threshold as float64 tensors [C], or [1] where both are the same for all channels."""
        values = [
            torch.as_tensor(value, dtype=torch.float64, device=device).detach().reshape(-1)
            for value in (self.tau, self.v_threshold)
        ]
        channels = max(value.numel() for value in values)
        return tuple(value.expand(channels).contiguous() for value in values)
