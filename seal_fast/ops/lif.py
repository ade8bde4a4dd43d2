"""The multi-step leaky integrate-and-fire neuron."""

from __future__ import annotations

import torch

from ..backends import resolve
from ..kernels.lif import reference
from ..kernels.surrogate.reference import Surrogate
from ._arguments import neuron_options, require_device, require_float_tensor, require_per_channel, shape

_IMPLEMENTATIONS = {"torch": reference.lif}


def lif(
    x: torch.Tensor,
    *,
    tau: float | torch.Tensor = 2.0,
    decay_input: bool = True,
    v_threshold: float | torch.Tensor = 1.0,
    v_reset: float | None = 0.0,
    surrogate: str | Surrogate = "sigmoid",
    detach_reset: bool = False,
    v_init: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run LIF neurons over all T time steps.

    Charge is h = v + (x - (v - v_reset))/tau, or h = v - (v - v_reset)/tau + x without `decay_input`; a spike fires
    where h >= v_threshold; then v is set to v_reset, or lowered by v_threshold where v_reset is None (soft reset).
    The derivative of the spike is the surrogate's.

    Args:
        x: Input current [T, ...], in any strides; float16, bfloat16, float32 or float64.
        tau: Membrane time constant in time steps, at least 1. A float, or a tensor, scalar or [C] for x [T, B, C, ...],
            which may take a gradient.
        decay_input: Whether the input is divided by tau as well.
        v_threshold: Firing threshold; a float or a tensor, as tau.
        v_reset: Potential after a spike; None for soft reset.
        surrogate: Name of the surrogate gradient, or a `Surrogate` with its own alpha.
        detach_reset: Whether the reset passes no gradient to the spike.
        v_init: Membrane potential before the first step, shape of x[0]. None: v_reset, or 0 with soft reset.
        backend: "auto", "triton", "cupy", "cpu" or "torch".

    Returns:
        spikes: 0 or 1, with the shape, dtype and strides of x.
        v_last: Membrane potential after the last step, shape of x[0]; float32 for 16-bit x, else x's dtype.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or value, or the named backend cannot run.
    """
    require_float_tensor("x", x, "[T, ...]")
    if x.dim() < 1 or x.shape[0] == 0:
        raise ValueError(f"x must be [T, ...] with at least one time step; got {shape(x)}.")
    options = neuron_options(tau, decay_input, v_threshold, v_reset, surrogate, detach_reset)
    require_per_channel("tau", tau, x)
    require_per_channel("v_threshold", v_threshold, x)
    if v_init is not None:
        require_float_tensor("v_init", v_init, "with the shape of x[0]")
        require_device("v_init", v_init, "x", x)
        if v_init.shape != x.shape[1:]:
            raise ValueError(f"v_init must have the shape of x[0], {list(x.shape[1:])}; got {shape(v_init)}.")
    return _IMPLEMENTATIONS[resolve(backend, "lif")](x, v_init=v_init, **options)
