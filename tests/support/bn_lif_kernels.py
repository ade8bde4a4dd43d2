"""What the kernels of bn_lif must give on every backend: torch operations and autograd say it."""

from __future__ import annotations

from itertools import product
from types import ModuleType

import torch

from seal_fast.kernels.bn_lif import norms
from seal_fast.kernels.lif import reference
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.packing.reference import pack
from seal_fast.kernels.surrogate.reference import Surrogate

PUBLISHED = Options(
    tau=2.0, decay_input=False, v_threshold=1.0, v_reset=0.0, surrogate=Surrogate("sigmoid"), detach_reset=False
)
# Of the largest number: float32 measured 4e-7, 16 bits half a unit in the last place.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
LAYOUTS = {
    "contiguous": lambda y: y.contiguous(),
    "channels_last": lambda y: y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y,
}


def normal(shape, dtype, seed: int, layout: str = "contiguous", device: str = "cpu") -> torch.Tensor:
    """Standard normal numbers, made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return LAYOUTS[layout](torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)).to(device)


def per_channel(C: int, count: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> torch.Tensor:
    """[count, C] in the state's dtype: scales around 1 and shifts around 0.3 in turn."""
    values = normal((count, C), torch.float64, seed) * 0.2
    values += torch.tensor([1.0, 0.3, 1.0, 0.3], dtype=torch.float64)[:count].unsqueeze(1)
    return values.to(reference.state_dtype(dtype)).to(device)


def broadcast(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[C] for [rows, C, ...]."""
    return rows.reshape(-1, *[1] * (like.dim() - 2))


def over_time(rows: torch.Tensor, T: int, varies: bool) -> torch.Tensor:
    """[T·B, ...] or static [B, ...] as [T, B, ...]."""
    return rows.unflatten(0, (T, -1)) if varies else rows.expand(T, *rows.shape)


def membrane_input(y, residual, scales, T, *, static) -> torch.Tensor:
    """[T, B, C, ...] in the state's dtype, in the kernels' order of operations."""
    state = scales.dtype
    batch = len(y) if static else len(y) // T
    m = over_time(y.to(state) * broadcast(scales[0], y) + broadcast(scales[1], y), T, not static)
    if residual is not None:
        added = residual.to(state)
        if len(scales) == 4:
            added = added * broadcast(scales[2], y) + broadcast(scales[3], y)
        m = m + over_time(added, T, len(residual) > batch)
    return m


def compare_forward(kernel: ModuleType, y, residual, scales, options: Options, T: int, *, static=False) -> float:
    """Spikes, their bits and the membrane input of `kernel` against torch's; returns the firing rate."""
    spikes, m, packed = kernel.forward(
        y, residual, scales, options, time_steps=T, static=static, keep_m=True, pack=True
    )
    expected_m = membrane_input(y, residual, scales, T, static=static)
    neuron = {name: getattr(options, name) for name in ("tau", "decay_input", "v_threshold", "v_reset")}
    neuron |= {"surrogate": options.surrogate, "detach_reset": options.detach_reset}
    expected, _ = reference.lif(expected_m, v_init=None, **neuron)
    assert spikes.dtype == y.dtype
    assert torch.equal(spikes.unflatten(0, (T, -1)).to(expected.dtype), expected)
    constant = static and (residual is None or len(residual) == len(y))
    assert len(m) == (len(y) if constant else len(spikes))
    assert torch.equal(over_time(m, T, not constant), expected_m.to(y.dtype))
    assert torch.equal(packed, pack(spikes.unflatten(0, (T, -1))))
    only = kernel.forward(y, residual, scales, options, time_steps=T, static=static, keep_m=False, pack=False)
    assert torch.equal(only[0], spikes)
    assert only[1] is None
    assert only[2] is None
    return expected.double().mean().item()


def compare_backward(
    kernel: ModuleType, y, residual, scales, options: Options, T: int, *, static=False, with_m=False, parameters=False
) -> None:
    """Gradients of the membrane input, and their sums by channel, of `kernel` against autograd's."""
    state, batch = scales.dtype, len(y) if static else len(y) // T
    shape = (T * batch, *y.shape[1:])
    layout = "contiguous" if y.is_contiguous() else "channels_last"
    grad_spikes = normal(shape, y.dtype, 11, layout, str(y.device))
    constant = static and (residual is None or len(residual) == batch)
    grad_m = normal((batch if constant else T * batch, *shape[1:]), y.dtype, 12, layout, str(y.device))
    table, counts = table_of(scales, y.dtype), (0 if with_m else 37, 41)[: len(scales) // 2]
    means = norms.means(table)
    outputs = kernel.backward(
        grad_spikes,
        grad_m if with_m else None,
        y,
        residual,
        table,
        options,
        counts=counts,
        time_steps=T,
        static=static,
        steps=True,
        total=True,
        parameters=parameters,
    )
    m = membrane_input(y, residual, scales, T, static=static).detach().clone().requires_grad_()
    neuron = {"decay_input": options.decay_input, "v_reset": options.v_reset, "surrogate": options.surrogate}
    learned = [
        torch.as_tensor(value, dtype=torch.float64).to(y.device).detach().clone().requires_grad_()
        for value in (options.tau, options.v_threshold)
    ]
    spikes, _ = reference.lif(
        m, tau=learned[0], v_threshold=learned[1].to(state), v_init=None, detach_reset=options.detach_reset, **neuron
    )
    loss = (spikes * grad_spikes.unflatten(0, (T, -1)).to(state)).sum()
    if with_m:
        loss = loss + ((m[0] if constant else m) * over_time(grad_m, T, not constant)[: 1 if constant else T]).sum()
    grad, grad_tau, grad_threshold = (
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(
            (m, *learned), torch.autograd.grad(loss, (m, *learned), allow_unused=True), strict=True
        )
    )
    near(outputs[0].unflatten(0, (T, -1)), grad, y.dtype)
    near(outputs[1], grad.double().sum(0), y.dtype)
    axes = [0, 1, *range(3, grad.dim())]
    terms = [over_time(y, T, not static)]
    if len(scales) == 4:
        terms.append(over_time(residual, T, len(residual) > batch))
    sums = [grad.double()] + [
        grad.double() * (term.double() - broadcast(mean, y).double()) for term, mean in zip(terms, means, strict=True)
    ]
    assert outputs.sums.dtype == state
    assert outputs.sums.shape == (len(sums), y.shape[1])
    for got, term in zip(outputs.sums, sums, strict=True):
        scale = term.abs().sum(axes).max() if term.numel() else 1.0  # what rounding is relative to
        assert (got.double() - term.sum(axes)).abs().max() <= SUMS[state] * scale
    _compare_finished(outputs, table.double(), counts)
    if parameters:
        tau = learned[0].detach()
        for got, expected in (
            (outputs.grad_threshold, grad_threshold),
            (outputs.grad_inverse_tau, grad_tau * -(tau * tau)),
        ):
            scale = got.double().abs().sum() + 1e-3
            if expected.dim() == 0:
                assert (got.double().sum() - expected).abs() <= 5e-6 * scale
            else:
                by_channel = got.double().sum([0, *range(2, got.dim())])
                assert (by_channel - expected).abs().max() <= 5e-6 * scale
    else:
        assert outputs.grad_threshold is None
        assert outputs.grad_inverse_tau is None


def table_of(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[4k, C]: the scales [2k, C], and means and inverse standard deviations."""
    k, device = len(scales) // 2, str(scales.device)
    rest = (per_channel(scales.shape[1], k, dtype, seed, device) for seed in (13, 14))
    return torch.cat((scales, *rest))


def _compare_finished(outputs, table: torch.Tensor, counts: tuple[int, ...]) -> None:
    """What follows from the sums: the derivative of batch norm, as in its paper (arXiv 1502.03167)."""
    total, *centred = outputs.sums.double()
    k = len(counts)
    coefficients, gradients = outputs.coefficients.double().reshape(k, 3, -1), outputs.grad_norms.double()
    for i, count in enumerate(counts):
        scale, mean, inverse_std = table[2 * i], table[2 * k + i], table[3 * k + i]
        expected = torch.stack((scale, torch.zeros_like(scale), torch.zeros_like(scale)))
        if count:
            expected[1] = -scale * inverse_std**2 * centred[i] / count
            expected[2] = -scale * total / count - expected[1] * mean
        unit = TOLERANCE[outputs.sums.dtype]
        size = expected.abs().amax(0) + (expected[1] * mean).abs()
        assert ((coefficients[i] - expected).abs() <= unit * size).all()
        assert ((gradients[2 * i] - inverse_std * centred[i]).abs() <= unit * gradients[2 * i].abs()).all()
        assert torch.equal(gradients[2 * i + 1], total)


SUMS = {torch.float32: 1e-6, torch.float64: 1e-13}  # of the sum of magnitudes; measured 2e-7 and 1e-15


def near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal but for rounding, of the largest number; NaN differs."""
    assert got.dtype == dtype
    largest = expected.double().abs().max().clamp_min(1e-3)
    worst = (got.double() - expected.double()).abs().max()
    assert worst <= TOLERANCE[dtype] * largest, f"{worst / largest:.1e} of the largest"


def compare_statistics(kernel: ModuleType, y: torch.Tensor) -> None:
    """Mean and biased variance by channel."""
    mean, variance = kernel.statistics(y)
    axes = [0, *range(2, y.dim())]
    state = reference.state_dtype(y.dtype)
    assert mean.dtype == variance.dtype == state
    expected, expected_variance = y.double().mean(axes), y.double().var(axes, unbiased=False)
    unit = {torch.float32: 1e-6, torch.float64: 1e-14}[state]  # measured 1e-7 and 1e-16
    size = expected.abs() + expected_variance.sqrt()
    assert ((mean.double() - expected).abs() <= unit * size + 1e-30).all()
    assert ((variance.double() - expected_variance).abs() <= 4 * unit * expected_variance + 1e-30).all()


def compare_table(kernel: ModuleType, y: torch.Tensor, *, affine: bool = True, batch: bool = True) -> None:
    """The table's rows of the second of two norms, and its running statistics, in training and with fixed statistics.

    Args:
        kernel: What fills the table.
        y: [N, C, ...].
        affine: Whether the norm has weight and bias.
        batch: Whether it takes the statistics of y.
    """
    state, C, device = reference.state_dtype(y.dtype), y.shape[1], y.device
    count, repeats, eps = y.numel() // C, 3, 1e-3
    weight, bias, running_mean, running_var = per_channel(C, 4, y.dtype, 21, str(device)).unbind()
    running_var.abs_()
    kept = running_mean.clone(), running_var.clone()
    tracked = torch.full((), 6, dtype=torch.int64, device=device)
    for momentum in (0.1, 0.75):  # torch.lerp rounds in another way from 0.5 on
        before = running_mean.double().clone(), running_var.double().clone()
        table = torch.full((8, C), torch.nan, dtype=state, device=device)
        own = (weight, bias) if affine else (None, None)
        seen = (count, repeats) if batch else (0, 1)
        norm = norms.Norm(*own, running_mean, running_var, tracked if batch else None, momentum, eps, *seen)
        kernel.fill_table(table, 1, y, norm)
        assert table[[0, 1, 4, 6]].isnan().all()
        axes = [0, *range(2, y.dim())]
        if batch:
            mean, variance = y.double().mean(axes), y.double().var(axes, unbiased=False)
            unbiased = variance * (count * repeats / (count * repeats - 1))
            _near_each(running_mean, before[0].lerp(mean, momentum), variance.sqrt() + mean.abs())
            _near_each(running_var, before[1].lerp(unbiased, momentum))
        else:
            mean, variance = before
        inverse_std = (variance + eps).rsqrt()
        scale = inverse_std * own[0].double() if affine else inverse_std
        shift = -mean * scale + (own[1].double() if affine else 0)
        for got, expected in zip(table[[2, 3, 5, 7]], (scale, shift, mean, inverse_std), strict=True):
            _near_each(got, expected, scale.abs() * (1 + mean.abs() + variance.sqrt()) + mean.abs() + variance.sqrt())
    if batch:
        assert tracked == 8
    else:
        assert all(torch.equal(*pair) for pair in zip(kept, (running_mean, running_var), strict=True))


def _near_each(got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor | float = 0.0) -> None:
    unit = {torch.float32: 2e-6, torch.float64: 2e-14}[got.dtype]
    assert ((got.double() - expected).abs() <= unit * (expected.abs() + size)).all()


def compare_normalised_gradient(kernel: ModuleType, grad: torch.Tensor, y: torch.Tensor | None) -> None:
    """c0 grad + c1 y + c2, in the same memory and in other."""
    coefficients = per_channel(grad.shape[1], 3, grad.dtype, 5, str(grad.device))
    columns = [broadcast(row, grad).double() for row in coefficients]
    expected = columns[0] * grad.double()
    if y is not None:
        expected = expected + columns[1] * y.double() + columns[2]
    kept = grad.clone(memory_format=torch.preserve_format)
    near(kernel.normalised_gradient(grad, y, coefficients, in_place=False), expected, grad.dtype)
    assert torch.equal(grad, kept)
    near(kernel.normalised_gradient(grad, y, coefficients, in_place=True), expected, grad.dtype)
    assert not torch.equal(grad, kept)


SHAPES = [(3, 5, 2, 3), (2, 64, 4, 4), (1, 3, 1, 1), (5, 48, 3, 3), (2, 7), (3, 130, 2, 2)]  # [B, C, ...]
KINDS = ["no residual", "residual", "static y", "static residual", "normalised residual", "all static"]


def tensors_of(shape, T: int, kind: str, dtype, layout: str, device: str = "cpu"):
    """(y, residual, scales, static) of a kind of call."""
    B, *rest = shape
    static = kind in ("static y", "all static")
    y = normal((B if static else T * B, *rest), dtype, 1, layout, device)
    residual = None
    if kind != "no residual":
        rows = B if kind in ("static residual", "all static") else T * B
        residual = normal((rows, *rest), dtype, 2, layout, device)
        if kind == "residual":
            residual = (residual > 0.5).to(dtype)  # spikes
    count = 4 if kind == "normalised residual" else 2
    return y, residual, per_channel(rest[0], count, dtype, 3, device), static


CASES = [
    (shape, kind, layout)
    for shape, kind, layout in product(SHAPES, KINDS, LAYOUTS)
    if layout == "contiguous" or len(shape) == 4
]
