"""What describes a LIF neuron besides its input and state."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..surrogate.reference import Surrogate


@dataclass(frozen=True)
class Options:
    """Options of the neuron, as in lif/reference.py; tau and v_threshold are floats, or tensors, scalar or [C]."""

    tau: float | torch.Tensor
    decay_input: bool
    v_threshold: float | torch.Tensor
    v_reset: float | None
    surrogate: Surrogate
    detach_reset: bool

    @property
    def in_tensors(self) -> bool:
        """Whether tau or v_threshold is a tensor, whose values a launcher cannot know without waiting for them."""
        return isinstance(self.tau, torch.Tensor) or isinstance(self.v_threshold, torch.Tensor)

    def without_tensors(self) -> Options:
        """The same with None in the place of each tensor, to be kept longer than a call."""
        if not self.in_tensors:
            return self
        tau, threshold = (None if isinstance(each, torch.Tensor) else each for each in (self.tau, self.v_threshold))
        return replace(self, tau=tau, v_threshold=threshold)

    def with_tensors(self, tau: torch.Tensor | None, threshold: torch.Tensor | None) -> Options:
        """What `without_tensors` was made of, or with other tensors of the same layout."""
        if tau is None and threshold is None:
            return self
        return replace(
            self,
            tau=self.tau if tau is None else tau,
            v_threshold=self.v_threshold if threshold is None else threshold,
        )

    @property
    def exact_inverse(self) -> bool:
        """Whether multiplying by 1/τ is known to equal dividing by τ: τ is a float and a power of two."""
        return not isinstance(self.tau, torch.Tensor) and math.frexp(self.tau)[0] == 0.5

    @property
    def charge_kind(self) -> str:
        """Which ChargeKind of neuron.cuh charges the potential, in lower case."""
        if not self.decay_input and not self.v_reset:
            return "decay"
        return f"{'filter' if self.decay_input else 'leak'}_{'multiply' if self.exact_inverse else 'divide'}"

    def numbers(self) -> tuple[float, float, float, float]:
        """τ, 1/τ, 1 - 1/τ and threshold, where none of them is a tensor. Kernels round them to the state's dtype."""
        return self.tau, 1.0 / self.tau, 1.0 - 1.0 / self.tau, self.v_threshold

    def constants(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """τ, 1/τ, 1 - 1/τ and threshold as a tensor [4, C] of the state's dtype, rounded once; C is 1 where it may."""
        if not self.in_tensors:
            return torch.tensor(self.numbers(), dtype=dtype, device=device).unsqueeze(1)
        values = [
            value.detach().to(device, torch.float64).reshape(-1)
            if isinstance(value, torch.Tensor)
            else torch.full((1,), value, dtype=torch.float64, device=device)  # as_tensor would wait for the device
            for value in (self.tau, self.v_threshold)
        ]
        channels = max(value.numel() for value in values)
        tau, threshold = (value.expand(channels) for value in values)
        return torch.stack([tau, 1.0 / tau, 1.0 - 1.0 / tau, threshold]).to(dtype)

    def passed(self, device: torch.device, dtype: torch.dtype) -> torch.Tensor | None:
        """What a GPU kernel takes in memory: the constants, where one is a tensor."""
        return self.constants(device, dtype) if self.in_tensors else None

    @property
    def by_value(self) -> tuple[float, float, float, float]:
        """What a GPU kernel takes by value: the numbers, where none is a tensor."""
        return (0.0,) * 4 if self.in_tensors else self.numbers()
