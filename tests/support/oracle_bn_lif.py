"""Batch norm + residual + LIF in NumPy and float64, from the formulas, with a bound of the rounding of each number.

The membrane input is computed in float64, and the neurons follow the spikes that the operator gave: each must be that
of the oracle's potential, unless this is nearer to the threshold than rounding can tell. Such spikes are counted.

With x̂ = (y - mean)/std, m = weight x̂ + bias, and means ⟨⟩ over all that the statistics are of,

    ∂L/∂weight = Σ x̂ ∂L/∂m        ∂L/∂bias = Σ ∂L/∂m
    ∂L/∂y = weight/std (∂L/∂m - ⟨∂L/∂m⟩ - x̂ ⟨x̂ ∂L/∂m⟩), the first term alone where the statistics are fixed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

import oracle
from oracle import Gradient, by_channel


@dataclass
class Norm:
    """A batch norm; arrays are [C] and in float64."""

    weight: np.ndarray | None
    bias: np.ndarray | None
    running_mean: np.ndarray | None
    running_var: np.ndarray | None
    batches: int  # that the running statistics have seen, before this one
    momentum: float | None  # None: the running statistics are the means of all batches
    eps: float
    training: bool


class Normalised(NamedTuple):
    """What a norm makes of its rows, and what its gradient needs."""

    m: np.ndarray  # [N, C, ...]
    roundoff: np.ndarray  # of m, in units of eps
    unit: np.ndarray  # x̂ [N, C, ...]
    unit_roundoff: np.ndarray
    scale: np.ndarray  # weight/std, [C, ...]
    scale_off: np.ndarray  # of it, relative
    fixed: bool
    running: dict[str, Gradient]  # the statistics after this batch


class Forward(NamedTuple):
    """Up to the membrane input."""

    m: np.ndarray  # [T, B, C, ...]
    roundoff: np.ndarray
    norms: list[Normalised]  # of y, and of the residual where it has one


def sums(count: int, dtype) -> float:
    """Roundings of a sum: of float32 numbers in float64 or pairwise, of float64 numbers one after the other."""
    return np.sqrt(count) + count / 16 if dtype == np.float64 else np.log2(count)


def normalised(rows: np.ndarray, norm: Norm, repeats: int, dtype) -> Normalised:
    """The norm of rows [N, C, ...], each of which stands for so many."""
    axes = tuple(axis for axis in range(rows.ndim) if axis != 1)
    ndim, fixed = rows.ndim, not norm.training and norm.running_mean is not None
    running, summing, mean_off, var_off = {}, 4.0, 0.0, 0.0  # roundings of a sum, and of the statistics
    with np.errstate(all="ignore"):
        if fixed:
            mean, var = norm.running_mean, norm.running_var
            centred = rows - by_channel(mean, ndim)
        else:
            pivot = rows[
                (slice(1), slice(None), *[slice(1)] * (ndim - 2))
            ]  # distances from it are exact where they are small
            distance = rows - pivot
            apart = distance.mean(axes)
            mean = pivot.reshape(-1) + apart
            centred = distance - by_channel(apart, ndim)
            var = (centred**2).mean(axes)
            summing += sums(rows.size // len(mean), dtype)
            mean_off = mean_off + summing / 4 * (np.sqrt(var) + (np.abs(mean) if dtype == np.float64 else 0.0))
            # The square of how far the mean is off adds to the variance.
            var_off = summing * var + np.finfo(dtype).eps * (np.abs(mean) + mean_off) ** 2
        if norm.training and norm.running_mean is not None:
            count = rows.size // rows.shape[1] * repeats
            share = 1 / (norm.batches + 1) if norm.momentum is None else norm.momentum
            for name, old, new, new_off in (
                ("mean", norm.running_mean, mean, mean_off),
                ("var", norm.running_var, var * (count / (count - 1)), 2 * var_off),
            ):
                value = (1 - share) * old + share * new
                running[name] = Gradient(value, np.abs(old) + share * (np.abs(new) + new_off))
        weight = np.ones_like(mean) if norm.weight is None else norm.weight
        bias = np.zeros_like(mean) if norm.bias is None else norm.bias
        inverse_std = 1 / np.sqrt(var + norm.eps)
        scale_off = by_channel(np.asarray(2 + var_off / (2 * (var + norm.eps)) + np.zeros_like(var)), ndim)  # relative
        mean, mean_off, bias, inverse_std, scale = (
            by_channel(value, ndim)
            for value in (mean, mean_off + np.abs(mean), bias, inverse_std, weight * inverse_std)
        )
        unit = centred * inverse_std
        unit_roundoff = (np.abs(rows) + mean_off) * inverse_std + scale_off * np.abs(unit)
        m = scale * centred + bias
        roundoff = np.abs(scale) * (2 * np.abs(rows) + 3 * mean_off + scale_off * np.abs(centred))
        roundoff = roundoff + np.abs(bias) + np.abs(m)
    return Normalised(m, roundoff, unit, unit_roundoff, scale, scale_off, fixed, running)


def over_time(rows: np.ndarray, T: int, batch: int) -> np.ndarray:
    """[T·B, ...] or static [B, ...] as [T, B, ...]."""
    if rows.shape[0] == batch:
        return np.broadcast_to(rows, (T, *rows.shape))
    return rows.reshape(T, batch, *rows.shape[1:])


def membrane_input(y, residual, norms: list[Norm], T: int, batch: int, dtype) -> Forward:
    """Of y and a residual, [T·B, C, ...] or static [B, C, ...], and one norm or two."""
    found = [normalised(y, norms[0], T if len(y) == batch else 1, dtype)]
    m, roundoff = (over_time(each, T, batch) for each in found[0][:2])
    if residual is not None:
        added, added_roundoff = residual, np.zeros(residual.shape)
        if len(norms) == 2:
            found.append(normalised(residual, norms[1], T if len(residual) == batch else 1, dtype))
            added, added_roundoff, *_ = found[1]
        with np.errstate(all="ignore"):
            m = m + over_time(added, T, batch)
            roundoff = roundoff + over_time(added_roundoff, T, batch) + np.abs(m)
    return Forward(m, roundoff, found)


def over_batch(gradient: Gradient, static: bool) -> Gradient:
    """[T, B, ...] as rows [T·B, ...], or the sum over T as [B, ...]."""
    if not static:
        return Gradient(*(each.reshape(-1, *each.shape[2:]) for each in gradient))
    roundoff = gradient.roundoff.sum(0) + np.abs(gradient.value).sum(0)
    return Gradient(gradient.value.sum(0), roundoff)


def through_norm(gradient: Gradient, norm: Normalised, stored: tuple[float, float, float]) -> dict[str, Gradient]:
    """Gradients of a norm's rows, weight and bias.

    `stored` is the rounding of ∂L/∂m in memory, relative to it and least, in units of eps; and the largest number.
    """
    value, roundoff = gradient
    axes = tuple(axis for axis in range(value.ndim) if axis != 1)
    ndim, (_, _, unit, unit_roundoff, scale, scale_off, fixed, _) = value.ndim, norm
    with np.errstate(all="ignore"):
        total, total_off = value.sum(axes), (roundoff + np.abs(value)).sum(axes)
        product = (value * unit).sum(axes)
        product_off = (roundoff * np.abs(unit) + np.abs(value) * (unit_roundoff + np.abs(unit))).sum(axes)
        rows, rows_off = value, roundoff + (2 + stored[0]) * np.abs(value) + stored[1]
        rows_off = np.where(np.abs(value) < stored[2], rows_off, np.inf)
        if not fixed:
            count = value.size // value.shape[1]
            mean, mean_off, along, along_off = (
                by_channel(each / count, ndim) for each in (total, total_off, product, product_off)
            )
            rows = value - mean - unit * along
            rows_off = rows_off + mean_off + 4 * np.abs(mean)
            rows_off = rows_off + unit_roundoff * np.abs(along) + np.abs(unit) * (along_off + 4 * np.abs(along))
        rows, rows_off = scale * rows, np.abs(scale) * (rows_off + scale_off * np.abs(rows))
    return {
        "rows": Gradient(rows, rows_off),
        "weight": Gradient(product, product_off + 4 * np.abs(product)),
        "bias": Gradient(total, total_off),
    }


def follow(forward: Forward, spikes: np.ndarray, neuron: oracle.Neuron, dtype, slack: float):
    """The neurons along spikes [T, B, C, ...]: their run; spikes that are wrong, and that rounding decides.

    `slack` is how many of the roundoffs that the oracle counts a potential may be off.
    """
    run = oracle.follow(forward.m, slack * forward.roundoff, spikes, neuron, dtype)
    threshold = neuron.constants(dtype, spikes.ndim - 1).threshold.astype(np.float64)
    with np.errstate(all="ignore"):
        fires = run.h >= threshold
        reach = np.finfo(dtype).eps * (run.roundoff + np.abs(threshold))
        undecided = np.abs(run.h - threshold) <= reach
    differ = fires != (spikes > 0)
    return run, differ & ~undecided, undecided, differ


def backward(
    forward: Forward,
    run: oracle.Run,
    neuron: oracle.Neuron,
    grad_spikes: np.ndarray,  # [T, B, C, ...]
    grad_m: np.ndarray | None,  # [T·B, C, ...], or [B, C, ...] where nothing in m varies in time
    dtype,
    *,
    static: tuple[bool, bool],  # whether y and the residual are the same at each time step
    stored: tuple[float, float, float],
) -> dict[str, Gradient]:
    """Gradients of y, residual, tau, threshold, and of weight and bias of both norms."""
    T = len(grad_spikes)
    found = oracle.backward(forward.m, run, neuron, grad_spikes, None, dtype)
    dm, off = found.pop("x")
    found.pop("v_init")
    if grad_m is not None:
        added = grad_m.reshape(-1, *dm.shape[1:]).astype(np.float64)
        dm = dm + np.concatenate([added, np.zeros((T - len(added), *added.shape[1:]))])  # one for all steps counts once
        off = off + np.abs(dm)
    gradient = Gradient(dm, off)
    of_y = through_norm(over_batch(gradient, static[0]), forward.norms[0], stored)
    found |= {"y": of_y["rows"], "weight": of_y["weight"], "bias": of_y["bias"]}
    of_residual = over_batch(gradient, static[1])
    if len(forward.norms) == 2:
        of_norm = through_norm(of_residual, forward.norms[1], stored)
        found |= {f"residual_{name}": value for name, value in of_norm.items() if name != "rows"}
        of_residual = of_norm["rows"]
    return found | {"residual": of_residual}
