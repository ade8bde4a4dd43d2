"""What operators with a neuron in them take from it: numbers by value, so that none is copied to the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.neuron.options import Options
from ..kernels.surrogate.reference import Surrogate

SCHEMA = (
    "float tau, float threshold, bool decay_input, float? v_reset, str surrogate, float alpha, bool detach_reset, "
    "str backend"
)


def number_and_tensor(value: float | Tensor) -> tuple[float, Tensor | None]:
    """A value that may be a tensor, as two arguments of the operator."""
    return (0.0, value) if isinstance(value, Tensor) else (float(value), None)


def tensor(value: float | Tensor | None) -> Tensor | None:
    """The value if it is a tensor."""
    return value if isinstance(value, Tensor) else None


def key_of(lif, learned: tuple[float | Tensor, float | Tensor]) -> tuple:
    """All that a plan depends on, of a neuron's options that are no tensors; True equals 1, but is another option."""
    surrogate, numbers = lif.surrogate, [None if isinstance(value, Tensor) else value for value in learned]
    values = *numbers, lif.v_reset, lif.decay_input, lif.detach_reset
    return surrogate.name, surrogate.alpha, *values, *map(type, (surrogate, *values))


def numbers_of(options: dict, backend: str) -> tuple[tuple, tuple[Tensor | None, Tensor | None]]:
    """The checked options of a neuron as the arguments in SCHEMA, and τ and θ where they are tensors."""
    tau, tau_tensor = number_and_tensor(options["tau"])
    threshold, threshold_tensor = number_and_tensor(options["v_threshold"])
    surrogate = options["surrogate"]
    numbers = tau, threshold, options["decay_input"], options["v_reset"], surrogate.name, surrogate.alpha
    return (*numbers, options["detach_reset"], backend), (tau_tensor, threshold_tensor)


def options_of(tau_tensor, threshold_tensor, numbers: tuple) -> Options:
    """What `numbers_of` took apart, as kernels take it."""
    tau, threshold, decay_input, v_reset, surrogate, alpha, detach_reset, _ = numbers
    return Options(
        tau=tau if tau_tensor is None else tau_tensor,
        decay_input=decay_input,
        v_threshold=threshold if threshold_tensor is None else threshold_tensor,
        v_reset=v_reset,
        surrogate=Surrogate(surrogate, alpha),
        detach_reset=detach_reset,
    )


def parameter_gradients(grad_threshold, grad_inverse_tau, tau: Tensor | None, threshold: Tensor | None) -> tuple:
    """Gradients of τ and θ from each neuron's part [B, C, ...] in those of 1/τ and θ."""
    grad_tau = grad_theta = None
    if tau is not None:
        wide = tau.to(torch.promote_types(tau.dtype, grad_inverse_tau.dtype))  # in float16 the square may overflow
        grad_tau = (_summed_like(grad_inverse_tau, tau) / -(wide * wide)).to(tau.dtype)
    if threshold is not None:
        grad_theta = _summed_like(grad_threshold, threshold).to(threshold.dtype)
    return grad_tau, grad_theta


def _summed_like(parts: Tensor, parameter: Tensor) -> Tensor:
    """Each neuron's part [B, C, ...] summed to the parameter's shape, a scalar or [C], in the dtype of the parts."""
    if parameter.dim() == 0 or parameter.shape[0] == 1:
        return parts.sum().reshape(parameter.shape)
    return parts.sum([axis for axis in range(parts.dim()) if axis != 1])
