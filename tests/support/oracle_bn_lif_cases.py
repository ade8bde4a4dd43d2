"""One run of the operator bn_lif beside the oracle, by seed."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

import oracle
import oracle_bn_lif
from oracle_cases import BF16, F16, F32, F64, HALF_UNIT, LEAST, Draw, array, off, require, state_of
from oracle_lif import case_of as lif_case_of
from oracle_lif import neuron_of, shown
from seal_fast import bn_lif
from seal_fast.nn import LIFNode

SHAPES = [
    *((1, 1), (2, 3), (1, 7), (3, 8), (2, 511), (2, 513), (1, 2, 511), (2, 1, 513), (2, 3, 7), (1, 1, 1, 1)),
    *((2, 5, 2, 3), (3, 7, 1, 1), (1, 3, 5, 5), (2, 8, 4, 4), (1, 16, 3, 3), (2, 3, 2, 2, 2)),
]
STEPS = [1, 2, 3, 4, 16, 17, 33]
KINDS = ("no residual", "residual", "normalised residual")


@dataclass
class Case:
    """The arguments of one call, and what flows back into it."""

    y: torch.Tensor  # [T·B, C, ...], or static [B, C, ...]
    residual: torch.Tensor | None
    norms: list[nn.Module]
    options: dict  # of the neuron
    T: int
    batch: int
    static: bool
    grad_spikes: torch.Tensor  # [T·B, C, ...]
    grad_m: torch.Tensor | None

    def __str__(self):
        norms = [f"{norm} weight {shown(norm.weight)} training={norm.training}" for norm in self.norms]
        options = {name: shown(value) for name, value in self.options.items()}
        tensors = f"y {shown(self.y)} {self.y.stride()}, residual {shown(self.residual)}, m {shown(self.grad_m)}"
        return f"{tensors}, T={self.T} static={self.static}, {norms}, {options}"


def rows_of(draw: Draw, shape, dtype) -> torch.Tensor:
    """[N, C, ...] of numbers that make statistics hard."""
    kind = draw.of(["normal", "normal", "normal", "far", "small", "tiny", "large", "constant", "spikes", "nan"])
    scale, offset = {"far": (1.0, 300.0), "small": (1e-3, 0.0), "tiny": (1e-15, 0.0)}.get(kind, (1.5, 0.2))
    if kind == "large":
        scale = 1e15 if dtype != F16 else 100.0  # the cube of its inverse is 0 in float32
    values = draw.normal(shape, F64, scale, offset)
    if kind == "constant":
        values[:, draw.random.integers(shape[1])] = draw.of([0.0, 1.0, -3.7, 1000.0])
    if kind == "spikes":
        values = (values > 0.5).double()
    if kind == "nan" and draw.chance(0.5):
        values[0, draw.random.integers(shape[1])] = torch.nan
    layout = draw.of(["as drawn", "as drawn", "channels_last"]) if len(shape) == 4 else "as drawn"
    values = values.to(dtype)
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    return draw.laid_out(values, broadcast=draw.chance(0.2))


def norm_of(draw: Draw, shape, dtype) -> nn.Module:
    C, kind = shape[1], {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    momentum = draw.of([0.1, 0.1, 0.75, 1.0, 0.0, None])
    # A frame of one element for each channel: torch refuses it where there are no running statistics.
    tracks = draw.chance(0.8) or np.prod(shape) == C
    norm = kind(C, draw.of([1e-5, 1e-3]), momentum, draw.chance(0.8), tracks)
    training = draw.chance(0.7)
    with torch.no_grad():
        if norm.affine:
            norm.weight.copy_(draw.normal(C, F64, 0.5, 1.0))
            norm.bias.copy_(draw.normal(C, F64, 0.3, 0.3))
        if norm.track_running_stats:
            norm.running_mean.copy_(draw.normal(C, F64, 0.5))
            norm.running_var.copy_(draw.normal(C, F64, 1.0).abs() + 0.01)
            norm.num_batches_tracked.fill_(draw.of([0, 3]))
    of_16_bits = dtype in (F16, BF16) and draw.chance(0.3)
    return norm.to(dtype if of_16_bits else state_of(dtype)).train(training)


def case_of(seed: int, steps=STEPS, shapes=SHAPES, dtypes=(F32, F32, F32, F64, F16, BF16)) -> Case:
    draw = Draw(seed)
    dtype, T, shape = draw.of(dtypes), draw.of(steps), draw.of(shapes)
    batch, kind, static = shape[0], draw.of(KINDS), draw.chance(0.3)
    if np.prod(shape) == shape[1] and T == 1:
        T = 2  # one element for each channel has no variance
    static_residual = draw.chance(0.3)

    def rows(is_static):
        return rows_of(draw, (batch if is_static else T * batch, *shape[1:]), dtype)

    y, residual = rows(static), None if kind == "no residual" else rows(static_residual)
    norms = [norm_of(draw, shape, dtype) for _ in range(1 + (kind == "normalised residual"))]
    options = lif_case_of(seed + 10**6, neurons=[shape], dtypes=(dtype,)).options
    constant = static and (residual is None or static_residual)
    grad_m = None
    if draw.chance(0.4):
        grad_m = draw.normal((batch if constant else T * batch, *shape[1:]), dtype)
    grad_spikes = draw.laid_out(draw.normal((T * batch, *shape[1:]), dtype))
    return Case(y, residual, norms, options, T, batch, static, grad_spikes, grad_m)


def norm_before(norm: nn.Module) -> oracle_bn_lif.Norm:
    weight, bias, mean, var = (
        None if each is None else array(each) for each in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    batches = 0 if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
    return oracle_bn_lif.Norm(weight, bias, mean, var, batches, norm.momentum, norm.eps, norm.training)


def leaves_of(case: Case, norms: list[nn.Module], y, residual) -> dict[str, torch.Tensor]:
    leaves = {"y": y, "residual": residual, "tau": case.options["tau"], "threshold": case.options["v_threshold"]}
    for prefix, norm in zip(("", "residual_"), norms, strict=False):
        leaves |= {f"{prefix}weight": norm.weight, f"{prefix}bias": norm.bias}
    return {name: value for name, value in leaves.items() if isinstance(value, torch.Tensor)}


def run(case: Case, backend: str):
    """Copies of the norms that have seen the batch, spikes, m or None, and leaves and their gradients."""
    norms = [copy.deepcopy(norm) for norm in case.norms]
    y = case.y.detach().requires_grad_()
    residual = None if case.residual is None else case.residual.detach().requires_grad_()
    keep_m = case.grad_m is not None
    outputs = bn_lif(
        y,
        norms[0],
        LIFNode(**case.options, backend=backend),
        time_steps=case.T,
        residual=residual,
        residual_bn=norms[1] if len(norms) == 2 else None,
        static=case.static,
        return_membrane_input=keep_m,
    )
    spikes, m = outputs if keep_m else (outputs, None)
    leaves = leaves_of(case, norms, y, residual)
    pairs = [(spikes, case.grad_spikes)] + ([(m, case.grad_m)] if keep_m else [])
    outputs, upstream = zip(*pairs, strict=True)
    return norms, spikes, m, leaves, torch.autograd.grad(outputs, list(leaves.values()), upstream)


def check(case: Case, backend: str, limit: float, slack: float, counts: Counter, worst: dict | None = None) -> None:
    """All that the operator gives, off by at most `limit` times what roundoff explains.

    `counts` adds up spikes, those that rounding may decide, those that it decided, and cases without gradients.
    """
    state, size = state_of(case.y.dtype), case.grad_spikes.numel()
    dtype = np.float64 if state == F64 else np.float32
    norms, spikes, m, leaves, gradients = run(case, backend)
    keep_m = m is not None

    def ratio_of(name, got, right, roundings=1):
        ratio = off(got, right, state, roundings)
        if worst is not None and ratio > worst.get(name, (0.0,))[0]:
            worst[name] = ratio, str(case)
        require(ratio <= limit, f"{name} is off by {ratio:.3g} roundoffs", case, size)

    neuron = neuron_of(case.options, cancels=backend == "torch")
    forward = oracle_bn_lif.membrane_input(
        array(case.y),
        None if case.residual is None else array(case.residual),
        [norm_before(norm) for norm in case.norms],
        case.T,
        case.batch,
        dtype,
    )
    for i, (norm, before, found) in enumerate(zip(norms, case.norms, forward.norms, strict=True)):
        for name, right in found.running.items():
            got = getattr(norm, f"running_{name}")
            units = max(1.0, HALF_UNIT[got.dtype] / np.finfo(dtype).eps)
            ratio_of(f"running_{name}", got, oracle.Gradient(right.value, right.roundoff * units))
        if norm.num_batches_tracked is not None:
            seen = int(norm.num_batches_tracked) - int(before.num_batches_tracked)
            require(seen == int(norm.training), f"norm {i} has seen {seen} batches", case, size)
        if not found.running and norm.running_mean is not None:
            same = torch.equal(norm.running_mean, before.running_mean)
            require(same, f"the fixed statistics of norm {i} have changed", case, size)

    require(
        spikes.dtype == case.y.dtype and spikes.shape == case.grad_spikes.shape, "spikes differ in kind", case, size
    )
    fired = array(spikes).reshape(case.T, case.batch, *spikes.shape[1:])
    require(np.isin(fired, (0, 1)).all(), "spikes are not 0 or 1", case, size)
    followed, wrong, undecided, differ = oracle_bn_lif.follow(forward, fired, neuron, dtype, slack)
    counts.update(spikes=size, undecided=int(undecided.sum()), decided=int(differ.sum()), cases=1)
    require(not wrong.any(), f"{int(wrong.sum())} spikes differ", case, size)
    if keep_m:
        rows = [each.reshape(-1, *spikes.shape[1:])[: len(m)] for each in (forward.m, slack * forward.roundoff)]
        ratio_of("m", m, oracle.Gradient(*rows))

    reach = np.finfo(dtype).eps * followed.roundoff
    if oracle.near_edge(followed.h, reach, neuron, dtype).any():
        counts.update(without_gradients=1)
        return
    largest = 0.99 * torch.finfo(case.y.dtype).max
    expected = oracle_bn_lif.backward(
        forward,
        followed,
        neuron,
        array(case.grad_spikes).reshape(fired.shape),
        array(case.grad_m) if keep_m else None,
        dtype,
        static=(case.static, case.residual is not None and len(case.residual) == case.batch),
        stored=(*(table[case.y.dtype] / np.finfo(dtype).eps for table in (HALF_UNIT, LEAST)), largest),
    )
    for name, got in zip(leaves, gradients, strict=True):
        right = expected[name]
        if name in ("tau", "threshold"):
            right = oracle.summed_like(right, array(leaves[name]))
        require(got.dtype == leaves[name].dtype, f"dtype of {name}'s gradient differs", case, size)
        ratio_of(f"{name}'s gradient", got, right, roundings=3 if name == "tau" and backend != "torch" else 1)
