"""Spiking neurons as modules."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from ..backends import check_name, shown
from ..kernels.surrogate.reference import Surrogate
from ..ops._arguments import NEURON_OPTIONS, neuron_options


class LIFNode(nn.Module):
    """Leaky integrate-and-fire neurons that keep their membrane potential between calls until `reset`.

    Args:
        tau: Membrane time constant in time steps, at least 1; a float, or a tensor as in the operator `lif`.
        decay_input: Whether the input is divided by tau as well.
        v_threshold: Firing threshold; a float or a tensor.
        v_reset: Potential after a spike; None for soft reset.
        surrogate: Name of the surrogate gradient, or a `Surrogate`.
        detach_reset: Whether the reset passes no gradient to the spike.
        step_mode: "m" for inputs [T, ...], "s" for the input of one time step.
        backend: "auto", "triton", "cupy", "cpu" or "torch". The text of the module says what "auto" stands for here.

    Attributes:
        v: Membrane potential after the last call, or None before the first.

    Raises:
        TypeError, ValueError: As the operator `lif`; also where an input does not have the shape of the kept potential.
    """

    def __init__(
        self,
        tau: float | torch.Tensor = 2.0,
        decay_input: bool = True,
        v_threshold: float | torch.Tensor = 1.0,
        v_reset: float | None = 0.0,
        surrogate: str | Surrogate = "sigmoid",
        detach_reset: bool = False,
        step_mode: str = "m",
        backend: str = "auto",
    ):
        super().__init__()
        if step_mode not in ("s", "m"):
            raise ValueError(f"step_mode must be 's' or 'm'; got {step_mode!r}.")
        options = neuron_options(tau, decay_input, v_threshold, v_reset, surrogate, detach_reset)
        for name, value in options.items():
            setattr(self, name, value)
        self.step_mode = step_mode
        self.backend = check_name(backend)
        self.v: torch.Tensor | None = None

    @property
    def options(self) -> dict:
        """The neuron's options as keyword arguments of the operator `lif`."""
        return {name: getattr(self, name) for name in (*NEURON_OPTIONS, "backend")}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Spikes for x: [T, ...] where step_mode is "m", one time step [...] where it is "s"."""
        steps = x if self.step_mode == "m" else x.unsqueeze(0)
        spikes, self.v = ops.lif(steps, v_init=self.v, **self.options)
        return spikes if self.step_mode == "m" else spikes.squeeze(0)

    def __getstate__(self) -> dict:
        """Copies and pickles keep the potential, but not the graph that made it."""
        return {**self.__dict__, "v": None if self.v is None else self.v.detach()}

    def _apply(self, fn, recurse: bool = True):
        """Moves and casts of the module take the potential along."""
        super()._apply(fn, recurse)
        if self.v is not None:
            self.v = fn(self.v)
        return self

    def detach(self) -> None:
        """Keep the potential, but cut its graph: for backpropagation through time in parts."""
        if self.v is not None:
            self.v = self.v.detach()

    def reset(self) -> None:
        """Forget the membrane potential: the next call starts at rest."""
        self.v = None

    def extra_repr(self) -> str:  # noqa: D102
        surrogate = f"{self.surrogate.name}(alpha={self.surrogate.alpha:g})"
        return (
            f"tau={self.tau}, decay_input={self.decay_input}, v_threshold={self.v_threshold}, v_reset={self.v_reset}, "
            f"surrogate={surrogate}, detach_reset={self.detach_reset}, step_mode={self.step_mode}, "
            f"backend={shown(self.backend, 'lif')}"
        )


def reset_net(network: nn.Module) -> None:
    """Call `reset` of every module in `network` that has one, so that its neurons start at rest: before each batch."""
    for module in network.modules():
        if callable(getattr(module, "reset", None)):
            module.reset()


def detach_net(network: nn.Module) -> None:
    """Call `detach` of every module in `network` that has one: neurons keep their potential, and cut its graph."""
    for module in network.modules():
        if callable(getattr(module, "detach", None)):
            module.detach()
