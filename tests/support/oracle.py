"""The LIF neuron in NumPy, from its formulas: the forward pass bit for bit, gradients in float64 with their rounding.

Nothing here is torch's or autograd's. With u = h - θ, the spike s = [u >= 0] and σ' its surrogate derivative,

    ∂L/∂h = a σ' + c ∂v/∂h         a = ∂L/∂s, c = ∂L/∂v of the potential v after the reset
    ∂L/∂x = ∂L/∂h (1/τ with decay_input)        ∂L/∂v_before = ∂L/∂h (1 - 1/τ)
    ∂v/∂h = 1 - s + (r - h) σ' hard, 1 - θ σ' soft; without the terms in σ' where the reset is detached

Beside each gradient goes its roundoff: how far it may be off where it is computed in a smaller dtype, in units of that
dtype's eps, to first order and with a few roundings for each operation. A roundoff of h itself is taken along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# name -> (default α, largest σ' / α, σ')
SURROGATES = {
    "sigmoid": (4.0, 1 / 4, lambda u, α: α / (2 * np.cosh(np.minimum(np.abs(α * u), 700.0) / 2)) ** 2),
    "atan": (2.0, 1 / 2, lambda u, α: 0.5 * α / (1 + (np.pi / 2 * α * u) ** 2)),
    "piecewise_quadratic": (1.0, 1.0, lambda u, α: np.maximum(α - α * α * np.abs(u), 0.0)),
    "piecewise_exp": (1.0, 1 / 2, lambda u, α: 0.5 * α * np.exp(-α * np.abs(u))),
    "soft_sign": (2.0, 1 / 2, lambda u, α: 0.5 * α / (1 + np.abs(α * u)) ** 2),
    "super_spike": (1.0, 1.0, lambda u, α: α / (1 + np.abs(u)) ** 2),
    "erf": (2.0, np.pi**-0.5, lambda u, α: α * np.pi**-0.5 * np.exp(-((α * u) ** 2))),
    "triangle": (0.3, 1.0, lambda u, α: α * np.maximum(1 - np.abs(u), 0.0)),
    "rectangle": (1.0, 1.0, lambda u, α: np.where(np.abs(u) < 0.5 / α, α, 0.0)),
}
LARGEST_SLOPE = {  # of σ', by α; the rectangle's is infinite at its edges: see `near_edge`
    "sigmoid": lambda α: 0.0963 * α * α,
    "atan": lambda α: 0.511 * α * α,
    "piecewise_quadratic": lambda α: α * α,
    "piecewise_exp": lambda α: 0.5 * α * α,
    "soft_sign": lambda α: α * α,
    "super_spike": lambda α: 2 * α,
    "erf": lambda α: 0.484 * α * α,
    "triangle": lambda α: α,
    "rectangle": lambda α: 0.0,
}


@dataclass(frozen=True)
class Neuron:
    """Options of the neuron; tau and threshold are floats, or float64 arrays, scalar or [C]."""

    tau: float | np.ndarray
    threshold: float | np.ndarray
    decay_input: bool
    v_reset: float | None
    surrogate: str
    alpha: float
    detach_reset: bool
    cancels: bool = False  # whether the sigmoid's derivative is taken as α p (1 - p), which loses digits where p is 1

    def constants(self, dtype, ndim: int) -> Constants:
        """τ, 1 - 1/τ, θ and r of `dtype`, each rounded once, for steps of `ndim` axes."""
        tau, threshold = np.asarray(self.tau, np.float64), np.asarray(self.threshold, np.float64)
        values = tau, 1 - 1 / tau, threshold, np.float64(self.v_reset or 0.0)
        return Constants(*(by_channel(np.asarray(value).astype(dtype), ndim) for value in values))


class Constants(NamedTuple):
    """Of a neuron, shaped to broadcast to a step [B, C, ...]."""

    tau: np.ndarray
    decay: np.ndarray
    threshold: np.ndarray
    reset: np.ndarray


class Run(NamedTuple):
    """A forward pass; all but v_last are [T, ...]."""

    spikes: np.ndarray
    v_last: np.ndarray
    h: np.ndarray  # potential before the spike
    before: np.ndarray  # the potential that the step begins with
    roundoff: np.ndarray  # of h, in units of eps


class Gradient(NamedTuple):
    """A gradient and its roundoff in units of eps."""

    value: np.ndarray
    roundoff: np.ndarray


def by_channel(value: np.ndarray, ndim: int) -> np.ndarray:
    """[C] for [B, C, ...] of `ndim` axes; scalars as they are."""
    return value.reshape(-1, *[1] * (ndim - 2)) if value.ndim else value


def charged(v, x, constants: Constants, decay_input: bool):
    """h, every operation rounded to the dtype of v and x."""
    tau, decay, _, reset = constants
    rests_at_zero = not np.any(reset)
    if decay_input:
        return v + ((x - v) if rests_at_zero else (x - (v - reset))) / tau
    return decay * v + x if rests_at_zero else (v - (v - reset) / tau) + x


def after_reset(h, s, constants: Constants, soft: bool):
    one = np.ones((), h.dtype)
    return h - s * constants.threshold if soft else (one - s) * h + s * constants.reset


def forward(x: np.ndarray, neuron: Neuron, v_init: np.ndarray | None = None) -> Run:
    """The pass of float32 or float64 input [T, ...] in that dtype's arithmetic."""
    constants = neuron.constants(x.dtype, x.ndim - 1)
    v = np.full(x.shape[1:], constants.reset, x.dtype) if v_init is None else v_init.astype(x.dtype)
    seen = []
    with np.errstate(all="ignore"):
        for step in x:
            h = charged(v, step, constants, neuron.decay_input)
            s = (h >= constants.threshold).astype(x.dtype)
            seen.append((s, h, v))
            v = after_reset(h, s, constants, neuron.v_reset is None)
    spikes, h, before = (np.stack(each) for each in zip(*seen, strict=True))
    return Run(spikes, v, h, before, np.zeros(x.shape))


def follow(x: np.ndarray, off: np.ndarray, spikes: np.ndarray, neuron: Neuron, dtype) -> Run:
    """The pass in float64 along given spikes, where x is off by `off`, in units of the eps of `dtype`."""
    constants = Constants(*(value.astype(np.float64) for value in neuron.constants(dtype, x.ndim - 1)))
    tau, decay, threshold, reset = constants
    gain = 1 / tau if neuron.decay_input else np.ones(())
    v = np.full(x.shape[1:], reset)
    v_off = np.zeros(x.shape[1:])
    seen = []
    with np.errstate(all="ignore"):
        for step, step_off, s in zip(x, off, spikes.astype(np.float64), strict=True):
            h = charged(v, step, constants, neuron.decay_input)
            h_off = decay * v_off + gain * step_off + np.abs(v) + (np.abs(v) + np.abs(reset)) / tau
            h_off += gain * np.abs(step) + np.abs(h)
            seen.append((h, v, h_off))
            v = after_reset(h, s, constants, neuron.v_reset is None)
            v_off = h_off + np.abs(s * threshold) + np.abs(v) if neuron.v_reset is None else (1 - s) * h_off
    h, before, roundoff = (np.stack(each) for each in zip(*seen, strict=True))
    return Run(spikes.astype(np.float64), v, h, before, roundoff)


def derivative(u: np.ndarray, neuron: Neuron) -> np.ndarray:
    with np.errstate(all="ignore"):
        return SURROGATES[neuron.surrogate][2](u, neuron.alpha)


def near_edge(h, off, neuron: Neuron, dtype) -> np.ndarray:
    """Where h, off by `off`, is on one side or the other of an edge of the rectangle, whose width is rounded, too."""
    if neuron.surrogate != "rectangle":
        return np.zeros(h.shape, bool)
    constants, half = neuron.constants(dtype, h.ndim - 1), 0.5 / neuron.alpha
    exact = np.float64(dtype(half)) == half
    u = np.abs(h.astype(np.float64) - constants.threshold)
    return np.abs(u - half) <= off + (0.0 if exact else 4 * np.finfo(dtype).eps * half)


def backward(
    x: np.ndarray,  # [T, ...], of the state's dtype or float64
    run: Run,
    neuron: Neuron,
    grad_spikes: np.ndarray,  # [T, ...]
    grad_v_last: np.ndarray | None,  # [...]
    dtype,  # the state's, to which constants are rounded
) -> dict[str, Gradient]:
    """Gradients of x and v_init, and of threshold and tau: each neuron's part, to be summed."""
    rounded = neuron.constants(dtype, x.ndim - 1)
    tau, decay, threshold, reset = (value.astype(np.float64) for value in rounded)
    soft, detached, α = neuron.v_reset is None, neuron.detach_reset, neuron.alpha
    exact = run.h.dtype == np.float64 and run.roundoff.any()
    u = (run.h - (threshold if exact else rounded.threshold)).astype(np.float64)  # as rounded as the neuron's own
    x, h, s, before = (each.astype(np.float64) for each in (x, run.h, run.spikes, run.before))
    c = np.zeros(x.shape[1:]) if grad_v_last is None else grad_v_last.astype(np.float64)
    c_off = np.zeros(c.shape)
    sums = {name: np.zeros((2, *c.shape)) for name in ("threshold", "inverse_tau")}
    dx, dx_off = np.zeros((2, *x.shape))
    with np.errstate(all="ignore"):
        g = derivative(u, neuron)
        # A derivative that is an exponential has the rounding of its exponent; numbers below the least normal are cut.
        g_off = g * (2 + np.abs(np.log(np.maximum(g / (α * SURROGATES[neuron.surrogate][1]), 1e-300)))) + 1e-20 * α
        g_off += LARGEST_SLOPE[neuron.surrogate](α) * run.roundoff
        if neuron.surrogate in ("piecewise_quadratic", "triangle"):
            g_off += α * (np.abs(u) < 1.01 * max(1.0, 1 / α))
        if neuron.surrogate == "sigmoid" and neuron.cancels:
            g_off += α * (u > 0)
        for t in reversed(range(len(x))):
            a, moved = grad_spikes[t].astype(np.float64), run.roundoff[t]
            if soft:
                slope = 1 - (0 if detached else threshold * g[t]) + 0 * h[t]
                slope_off = np.abs(slope) + (0 if detached else np.abs(threshold) * (g_off[t] + 2 * g[t]))
                by_threshold = -s[t] + (0 if detached else threshold * g[t])
                by_threshold_off = slope_off
            else:
                span = np.abs(reset) + np.abs(h[t])
                slope = 1 - s[t] + (0 if detached else (reset - h[t]) * g[t])
                slope_off = np.abs(slope) + (0 if detached else span * (g_off[t] + 3 * g[t]) + moved * g[t])
                by_threshold = np.zeros_like(h[t]) if detached else -(reset - h[t]) * g[t]
                by_threshold_off = np.zeros_like(h[t]) if detached else slope_off
            dh = a * g[t] + c * slope
            dh_off = np.abs(a) * (g_off[t] + g[t]) + c_off * np.abs(slope) + np.abs(c) * (slope_off + np.abs(slope))
            dh_off += np.abs(dh)
            part = -a * g[t] + c * by_threshold
            part_off = np.abs(a) * (g_off[t] + g[t]) + c_off * np.abs(by_threshold) + np.abs(c) * by_threshold_off
            sums["threshold"] += part, part_off + np.abs(part) + np.abs(c * by_threshold)
            difference = (x[t] if neuron.decay_input else 0.0) - (before[t] - reset)
            span = (np.abs(x[t]) if neuron.decay_input else 0.0) + np.abs(before[t]) + np.abs(reset)
            span = span + 2 * moved * (1 + tau if neuron.decay_input else 1.0)
            part, part_off = dh * difference, dh_off * np.abs(difference) + 2 * np.abs(dh) * span
            sums["inverse_tau"] += part, part_off
            dx[t], dx_off[t] = (dh / tau, (dh_off + np.abs(dh)) / tau) if neuron.decay_input else (dh, dh_off)
            c, c_off = dh * decay, dh_off * decay + 2 * np.abs(dh)
    exact_tau = by_channel(np.asarray(neuron.tau, np.float64), x.ndim - 1)
    with np.errstate(all="ignore"):  # τ may be infinite
        of_tau = sums["inverse_tau"][0] / -(exact_tau * exact_tau), sums["inverse_tau"][1] / (exact_tau * exact_tau)
    return {
        "x": Gradient(dx, dx_off),
        "v_init": Gradient(c, c_off),
        "threshold": Gradient(*sums["threshold"]),
        "tau": Gradient(*of_tau),
    }


def summed_like(gradient: Gradient, parameter: np.ndarray) -> Gradient:
    """Each neuron's part [B, C, ...] summed for a scalar or a parameter [C]; summation is given a few roundings."""
    axes = tuple(axis for axis in range(gradient.value.ndim) if axis != 1) if parameter.ndim else None
    with np.errstate(all="ignore"):
        roundoff = gradient.roundoff.sum(axes) + np.abs(gradient.value).sum(axes)
        value = gradient.value.sum(axes)
    return Gradient(value.reshape(parameter.shape), roundoff.reshape(parameter.shape))
