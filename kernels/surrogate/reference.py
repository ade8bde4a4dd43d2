"""Surrogate gradients in torch: names, default sharpness and formulas.

The spike is s = 1 if u >= 0 else 0, with u = h - v_threshold. Its derivative is replaced by one of the functions below.
Formulas and defaults are SpikingJelly's where it has the function; triangle is that of Bellec et al. 2018
(arXiv 1803.09574), with their dampening 0.3 as default.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch.autograd import forward_ad


def _sigmoid(u: torch.Tensor, alpha: float) -> torch.Tensor:
    p = torch.sigmoid(u * alpha)
    return (1.0 - p) * p * alpha


def _atan(u: torch.Tensor, alpha: float) -> torch.Tensor:
    scaled = u * (math.pi / 2 * alpha)
    return (alpha / 2) / (1.0 + scaled * scaled)


def _piecewise_quadratic(u: torch.Tensor, alpha: float) -> torch.Tensor:
    return torch.relu(alpha - (alpha * alpha) * u.abs())


def _piecewise_exp(u: torch.Tensor, alpha: float) -> torch.Tensor:
    return (alpha / 2) * torch.exp(-alpha * u.abs())


def _soft_sign(u: torch.Tensor, alpha: float) -> torch.Tensor:
    width = 1.0 / alpha + u.abs()
    return 1.0 / (2 * alpha * width * width)


def _super_spike(u: torch.Tensor, alpha: float) -> torch.Tensor:
    width = 1.0 + u.abs()
    return alpha / (width * width)


def _erf(u: torch.Tensor, alpha: float) -> torch.Tensor:
    scaled = u * alpha
    return (alpha / math.sqrt(math.pi)) * torch.exp(-scaled * scaled)


def _triangle(u: torch.Tensor, alpha: float) -> torch.Tensor:
    return alpha * torch.relu(1.0 - u.abs())


def _rectangle(u: torch.Tensor, alpha: float) -> torch.Tensor:
    return alpha * (u.abs() < 0.5 / alpha).to(u.dtype)


# name -> (default alpha, derivative)
SURROGATES: dict[str, tuple[float, Callable[[torch.Tensor, float], torch.Tensor]]] = {
    "sigmoid": (4.0, _sigmoid),
    "atan": (2.0, _atan),
    "piecewise_quadratic": (1.0, _piecewise_quadratic),
    "piecewise_exp": (1.0, _piecewise_exp),
    "soft_sign": (2.0, _soft_sign),
    "super_spike": (1.0, _super_spike),
    "erf": (2.0, _erf),
    "triangle": (0.3, _triangle),
    "rectangle": (1.0, _rectangle),
}


@dataclass(frozen=True)
class Surrogate:
    """A surrogate gradient: its name and its sharpness.

    Args:
        name: One of `SURROGATES`.
        alpha: Sharpness, positive. None takes the default of that name.

    Raises:
        TypeError: alpha is not a number.
        ValueError: The name is unknown, or alpha is not a positive finite number.
    """

    name: str = "sigmoid"
    alpha: float | None = None

    def __post_init__(self):
        if self.name not in SURROGATES:
            raise ValueError(f"surrogate must be one of {', '.join(SURROGATES)}; got {self.name!r}.")
        if self.alpha is None:
            object.__setattr__(self, "alpha", SURROGATES[self.name][0])
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, Real):
            raise TypeError(f"surrogate alpha must be a positive number; got {type(self.alpha).__name__}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"surrogate alpha must be a positive number; got {self.alpha!r}.")
        object.__setattr__(self, "alpha", float(self.alpha))

    def derivative(self, u: torch.Tensor) -> torch.Tensor:
        """σ'(u), element-wise; u is the membrane potential minus the threshold."""
        return SURROGATES[self.name][1](u, self.alpha)


def fire(u: torch.Tensor, surrogate: Surrogate) -> torch.Tensor:
    """1 where u >= 0, else 0 (NaN gives 0); its derivative is the surrogate's, in forward and in reverse mode."""
    if not torch.compiler.is_compiling():
        return _ForwardModeFire.apply(u, surrogate)
    if forward_ad._current_level >= 0:  # its tangent would be 0
        raise RuntimeError("torch.compile cannot take forward-mode AD through neurons; compile what is differentiated.")
    return Fire.apply(u, surrogate)


class Fire(torch.autograd.Function):
    """The spike function; backward multiplies by the surrogate derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: torch.Tensor, surrogate: Surrogate) -> torch.Tensor:  # noqa: D102
        return (u >= 0).to(u.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: D102
        u, ctx.surrogate = inputs
        ctx.save_for_backward(u)
        ctx.save_for_forward(u)

    @staticmethod
    def backward(ctx, grad_spikes):  # noqa: D102
        (u,) = ctx.saved_tensors
        return grad_spikes * ctx.surrogate.derivative(u), None  # u, surrogate


class _ForwardModeFire(Fire):
    """Apart, because torch.compile takes no Function with a jvp of its own."""

    @staticmethod
    def jvp(ctx, tangent_u, _):
        (u,) = ctx.saved_tensors
        return tangent_u * ctx.surrogate.derivative(u)
