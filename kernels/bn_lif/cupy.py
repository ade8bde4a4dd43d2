"""CUDA C++ kernels of batch norm, residual and LIF; cuda.cu says how they go through memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..launch.cupy import ACCESS, NUMBERS, launch, specialised, together
from ..launch.device import multiprocessors
from ..lif.reference import state_dtype
from ..neuron.cupy import passed
from ..neuron.options import Options
from .norms import Norm
from .tensors import BackwardOutputs, alike, backward_outputs, channels_of, dense, forward_outputs, inputs

SOURCE = Path(__file__).with_name("cuda.cu")
THREADS = 128  # of a block, as in channels.cuh
STEPS = 16  # whose inputs are in registers at once, at most
HISTORY = 128  # bytes of registers for a thread's potentials before each reset, at most: beyond it, few threads run
# Registers for a thread's neurons, at most, beyond which they spill: potentials, inputs and numbers by channel.
HELD = {"forward": 112, "backward": 136}
# Neighbouring neurons that a thread of backward takes, at most, in 16 bits: 4 or 8. A thread of 4 executes 9 % more
# instructions for each element, but three to four blocks run on a multiprocessor instead of two. On an H200, at T = 4,
# 8 took 3 to 14 % longer for 64 channels of 32 x 32.
NEIGHBOURS_16_BIT = 4
COLUMNS = 32  # threads of a block that lie side by side along the channels, at most
# Of a kernel for each multiprocessor, about; more where a thread would go on for long. On an H200, in bfloat16, with 3
# backward took 10 % less time than with 16 for 64 channels of 32 x 32, and 25 % less for 512 of 4 x 4; others likewise.
# Where a channel is contiguous it took 8 % more, and in float32 23 % more.
BLOCKS = {"moments": 4, "backward": 3, "backward, contiguous": 16, "gradient": 3}
POSITIONS = (4, 256)  # of a thread, at least and at most where there are enough: so many float32 are added one by one


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of y [N, C, ...]."""
    y = dense(y)
    state, C = state_dtype(y.dtype), y.shape[1]
    if y.numel() == 0:
        nothing = torch.full((2, C), math.nan, dtype=state, device=y.device)
        return nothing[0], nothing[1]
    mean, variance = (torch.empty(C, dtype=state, device=y.device) for _ in range(2))
    partials, inner = _moments(y)
    slices = partials.shape[1]
    arguments = (y, partials, *(None,) * 5, mean, variance, None, C, inner, slices, 0, 0, 0.0, 0.0, 0.0)
    _start("fill_table", (NUMBERS[y.dtype],), C, arguments, y)
    return mean, variance


def fill_table(table: Tensor, index: int, y: Tensor, norm: Norm) -> None:
    """Write the table's rows of norm `index` for y [N, C, ...], and update the norm's running statistics.

    The table is contiguous, as are the norm's tensors.
    """
    partials, inner, slices = None, 1, 0
    if norm.count:
        y = dense(y)
        partials, inner = _moments(y)
        slices = partials.shape[1]
    C = table.shape[1]
    tensors = (y, partials, *norm[:5], None, None, table)
    numbers = (float(norm.momentum), float(norm.correction), float(norm.eps))
    _start("fill_table", (NUMBERS[y.dtype],), C, (*tensors, C, inner, slices, len(table) // 4, index, *numbers), y)


def _moments(y: Tensor) -> tuple[Tensor, int]:
    """Partials [C, slices, 3] of dense y; and inner, as in channels.cuh."""
    shape = (y.numel(), *channels_of(y))
    tiling = _tiling(*shape, _neighbours(*shape, (y,)), _blocks("moments", y))
    partials = torch.empty(tiling.C, tiling.slices, 3, dtype=state_dtype(y.dtype), device=y.device)
    _start("moments", (NUMBERS[y.dtype], *tiling.template), tiling.blocks, (y, partials, *tiling.sizes), y)
    return partials, tiling.inner


def forward(
    y: Tensor,  # [T·B, C, ...], or [B, C, ...] where static
    residual: Tensor | None,  # the same, static or not
    scales: Tensor,  # [2, C], or [4, C] for a residual with a batch norm of its own
    options: Options,
    *,
    time_steps: int,
    static: bool,
    keep_m: bool,
    pack: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T·B, C, ...]; if asked for, the membrane input in y's dtype and packed spikes."""
    given = inputs(y, residual, time_steps, static=static)
    outputs = forward_outputs(given, keep_m=keep_m, pack=pack)
    y, residual, T, N, C = given[:5]
    if N == 0:
        return tuple(outputs)
    scales, neuron = scales.contiguous(), passed(options, y.device, state_dtype(y.dtype))
    tensors = (y, residual, scales, *outputs[:2])
    shape = (N, C, given.channel_stride)
    vector = _neighbours(*shape, (*tensors, neuron.constants))
    by_channel = len(scales) + 4 * (neuron.channels > 1) if given.channel_stride == 1 else 0
    while vector > 1 and vector * (min(T, STEPS) + by_channel) > HELD["forward"]:
        vector //= 2
    tiling = _tiling(*shape, vector)
    _start(
        "bn_lif_forward",
        (
            *(NUMBERS[y.dtype], *tiling.template, min(T, STEPS), T > STEPS, *neuron.charging),
            *(_residual_kind(residual, len(scales) // 2), pack),
        ),
        -(-N // (tiling.vector * THREADS)),
        (
            *(*tensors, outputs.packed, neuron.constants, T, N, C, tiling.inner, neuron.channels),
            *(given.y_stride, given.residual_stride, max(given.y_stride, given.residual_stride), *neuron.numbers),
        ),
        y,
    )
    return tuple(outputs)


def backward(
    grad_spikes: Tensor,  # [T·B, C, ...]
    grad_m: Tensor | None,  # as forward's membrane input
    y: Tensor,
    residual: Tensor | None,
    table: Tensor,  # [4, C], or [8, C] where the residual has its own norm; contiguous
    options: Options,
    *,
    counts: tuple[int, ...],  # of each norm in the table
    time_steps: int,
    static: bool,
    steps: bool,
    total: bool,
    parameters: bool,
) -> BackwardOutputs:
    """Gradients of the membrane input, of θ and 1/τ, and of the norms."""
    given = inputs(y, residual, time_steps, static=static)
    outputs = backward_outputs(given, len(counts), steps=steps, total=total, parameters=parameters)
    y, residual, T, N, C = given[:5]
    if N == 0:
        return _add_slices(None, table, counts, outputs)
    state, device, sums = state_dtype(y.dtype), y.device, 1 + len(counts)
    kind = _residual_kind(residual, len(counts))
    grad_spikes, grad_m = (None if tensor is None else alike(tensor.to(y.dtype), y) for tensor in (grad_spikes, grad_m))
    neuron = passed(options, device, state)
    tensors = (grad_spikes, grad_m, y, residual, table, *outputs[:4])
    shape = (N, C, given.channel_stride)
    vector = _neighbours(*shape, (*tensors, neuron.constants), min(NEIGHBOURS_16_BIT, ACCESS // y.element_size()))
    chunk = min(T, STEPS if state.itemsize == 4 else STEPS // 2)
    by_channel = 3 * sums + 4 * (neuron.channels > 1) if given.channel_stride == 1 else 0
    read = sum(tensor is not None for tensor in tensors[:4]) * chunk * y.element_size()
    held = ((chunk + by_channel + 8 * parameters) * state.itemsize + read) // 4
    while vector > 1 and (vector * chunk * state.itemsize > HISTORY or vector * held > HELD["backward"]):
        vector //= 2
    tiling = _tiling(*shape, vector, _blocks("backward" if given.channel_stride == 1 else "backward, contiguous", y))
    chunks = -(-T // chunk)
    checkpoints = torch.empty(chunks - 1, N, dtype=state, device=device) if chunks > 1 else None
    partials = torch.empty(C, tiling.slices, sums, dtype=state, device=device)
    inner, *rest = tiling.sizes[1:]
    _start(
        "bn_lif_backward",
        (
            *(NUMBERS[y.dtype], *tiling.template, chunk, chunks > 1, *neuron.charging, kind),
            *(*neuron.slopes, parameters, grad_m is not None),
        ),
        tiling.blocks,
        (
            *(*tensors, partials, checkpoints, neuron.constants, T, N, C, inner, neuron.channels),
            *(given.y_stride, given.residual_stride, max(given.y_stride, given.residual_stride), *rest),
            *(*neuron.numbers, neuron.alpha),
        ),
        y,
    )
    return _add_slices(partials, table, counts, outputs)


def _add_slices(
    partials: Tensor | None,  # [C, slices, k + 1], or none at all
    table: Tensor,
    counts: tuple[int, ...],
    outputs: BackwardOutputs,
) -> BackwardOutputs:
    """Write the sums and what follows from them."""
    by_channel, C = outputs[4:], table.shape[1]
    slices = 0 if partials is None else partials.shape[1]
    arguments = (partials, table, *by_channel, C, slices, counts[0], counts[-1])
    _start("add_slices", (NUMBERS[table.dtype], 1 + len(counts)), C, arguments, table)
    return outputs


def normalised_gradient(grad: Tensor, y: Tensor | None, coefficients: Tensor, *, in_place: bool) -> Tensor:
    """c0 grad + c1 y + c2 by channel, or c0 grad without y, in grad's dtype; coefficients are [3, C]."""
    rows = dense(grad)
    out = rows if in_place else torch.empty_like(rows)
    if rows.numel():
        y = None if y is None else alike(y, rows)
        coefficients = coefficients.contiguous()
        shape = (rows.numel(), *channels_of(rows))
        tiling = _tiling(*shape, _neighbours(*shape, (rows, y, coefficients, out)), _blocks("gradient", rows))
        template = (NUMBERS[rows.dtype], *tiling.template, y is not None)
        arguments = (rows, y, coefficients, out, *tiling.sizes)
        _start("normalised_gradient", template, tiling.blocks, arguments, rows)
    return grad.copy_(out) if in_place and out is not grad else out


def _start(kernel: str, template: tuple, blocks: int, arguments: tuple, like: Tensor) -> None:
    real = state_dtype(like.dtype)
    launch(SOURCE, specialised(kernel, *template), blocks, THREADS, arguments, real=real, device=like.device)


def _residual_kind(residual: Tensor | None, k: int) -> int:
    """ResidualKind in cuda.cu, of a layer of k norms."""
    return 0 if residual is None else k


def _neighbours(
    size: int, C: int, channel_stride: int, tensors: tuple[Tensor | None, ...], most: int | None = None
) -> int:
    """How many neighbours of rows of `size` numbers, of a channel each or all of one, an access may move.

    They are `most` at most, a power of two; None: as many as the widest access moves.
    """
    stretch = size if C == 1 else C if channel_stride == 1 else channel_stride
    neighbours = math.gcd(most or ACCESS // tensors[0].element_size(), stretch)
    return neighbours if together(neighbours, tensors) else 1


class _Tiling(NamedTuple):
    """How blocks go through [outer, C, inner] numbers; channels.cuh has the rest."""

    vector: int
    C: int
    inner: int
    positions: int
    columns: int
    slices: int

    @property
    def template(self) -> tuple[int, int]:
        return self.vector, self.vector if self.inner == 1 else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.C, self.inner, self.positions, self.columns, self.slices

    @property
    def blocks(self) -> int:
        return -(-self.C // (self.template[1] * self.columns)) * self.slices


def _blocks(kernel: str, like: Tensor) -> int:
    return BLOCKS[kernel] * multiprocessors(like.device)


def _tiling(size: int, C: int, channel_stride: int, vector: int, blocks: int = 1) -> _Tiling:
    """For `size` numbers, about so many blocks."""
    inner = size if C == 1 else channel_stride
    positions = size // (C if inner == 1 else C * vector)
    groups = C // vector if inner == 1 else C  # of channels that a thread takes
    tiles = -(-groups // (COLUMNS if inner == 1 else 1))
    columns = -(-groups // tiles)
    least, most = (-(-positions // (THREADS // columns * each)) for each in reversed(POSITIONS))
    return _Tiling(vector, C, inner, positions, columns, max(least, min(most, -(-blocks // tiles))))
