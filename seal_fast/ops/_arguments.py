"""Argument checks: each raises one sentence that names the argument, what was expected and what came.

None of them reads a value from a device other than the CPU, so none waits for one.
"""

from __future__ import annotations

import math
from numbers import Real

import torch

from ..kernels.surrogate.reference import Surrogate

# Options that describe a neuron: arguments of `lif` and attributes of LIFNode.
NEURON_OPTIONS = ("tau", "decay_input", "v_threshold", "v_reset", "surrogate", "detach_reset")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape(tensor: torch.Tensor) -> str:
    """The shape as a user writes it: [4, 2, 10]."""
    return str(list(tensor.shape))


def require_float_tensor(name: str, value: object, layout: str) -> None:
    """A floating-point tensor; `layout` says in words which shape is expected."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor {layout}; got {type(value).__name__}.")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {value.dtype}.")
    if value.layout is not torch.strided or value.is_nested:
        raise not_dense(name, value)


def not_dense(name: str, value: torch.Tensor) -> TypeError:
    """The error of a sparse or nested tensor, whose elements do not lie in memory at strides."""
    layout = "a nested one" if value.is_nested else str(value.layout)
    return TypeError(f"{name} must be a dense tensor, as {name}.to_dense() is; got {layout}.")


def require_device(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Both tensors on one device."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}; got {value.device}.")


def require_number(name: str, value: object, *, above: float | None = None, at_least: float | None = None) -> float:
    """A finite real number, within its bound."""
    is_number = type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
    inside = is_number and (above is None or value > above) and (at_least is None or value >= at_least)
    if inside and -math.inf < value < math.inf:  # math.isfinite is none of torch.compile's functions of a symbol
        return float(value)
    bound = f" above {above:g}" if above is not None else f" of at least {at_least:g}" if at_least is not None else ""
    if not is_number:
        raise TypeError(f"{name} must be a number{bound}; got {type(value).__name__}.")
    raise ValueError(f"{name} must be a finite number{bound}; got {value!r}.")


def require_integer(name: str, value: object, at_least: int) -> int:
    """An integer within its bound."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least {at_least}; got {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be an integer of at least {at_least}; got {value}.")
    return value


# SpikingJelly's class -> the same function here
SPIKINGJELLY_SURROGATES = {
    "Sigmoid": "sigmoid",
    "ATan": "atan",
    "PiecewiseQuadratic": "piecewise_quadratic",
    "PiecewiseExp": "piecewise_exp",
    "SoftSign": "soft_sign",
    "SuperSpike": "super_spike",
    "Erf": "erf",
    "Rect": "rectangle",
}


def as_surrogate(value: str | Surrogate | torch.nn.Module) -> Surrogate:
    """A name, a Surrogate with its own alpha, or one of SpikingJelly's surrogate functions."""
    if isinstance(value, Surrogate):
        return value
    if isinstance(value, str):
        return Surrogate(value)
    kind = type(value)
    if kind.__name__ not in SPIKINGJELLY_SURROGATES or not kind.__module__.startswith("spikingjelly."):
        names = ", ".join(SPIKINGJELLY_SURROGATES)
        raise TypeError(f"surrogate must be a name, a Surrogate, or SpikingJelly's {names}; got {kind.__name__}.")
    if not value.spiking:
        raise ValueError(f"surrogate must fire spikes; got {kind.__name__} with spiking=False, which is smooth.")
    return Surrogate(SPIKINGJELLY_SURROGATES[kind.__name__], value.alpha)


def neuron_options(
    tau: float | torch.Tensor,
    decay_input: bool,
    v_threshold: float | torch.Tensor,
    v_reset: float | None,
    surrogate: str | Surrogate | torch.nn.Module,
    detach_reset: bool,
) -> dict:
    """The options of a LIF neuron as keyword arguments of the kernels, checked as far as can be without its input."""
    if not isinstance(tau, torch.Tensor) and not (tau == math.inf and decay_input is False):
        tau = require_number("tau", tau, at_least=1.0)
    if not isinstance(v_threshold, torch.Tensor):
        v_threshold = require_number("v_threshold", v_threshold)
    if v_reset is not None:
        v_reset = require_number("v_reset", v_reset)
    for name, value in (("decay_input", decay_input), ("detach_reset", detach_reset)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}.")
    return {
        "tau": tau,
        "decay_input": decay_input,
        "v_threshold": v_threshold,
        "v_reset": v_reset,
        "surrogate": as_surrogate(surrogate),
        "detach_reset": detach_reset,
    }


def require_per_channel(name: str, value: float | torch.Tensor, of: str, x: torch.Tensor, dim: int) -> None:
    """A float, a scalar tensor, or a tensor [C], where `dim` of x, called `of`, has the C channels."""
    if not isinstance(value, torch.Tensor):
        return
    require_float_tensor(name, value, "(scalar or [C])")
    require_device(name, value, of, x)
    channels = x.shape[dim] if x.dim() > dim else None
    if value.dim() > 0 and (value.dim() > 1 or value.shape[0] != channels):
        expected = "a scalar" if channels is None else f"a scalar or [{channels}], the channels of {of} {shape(x)}"
        raise ValueError(f"{name} must be {expected}; got {shape(value)}.")
