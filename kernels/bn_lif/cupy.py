"""CUDA C++ kernels of batch norm, residual and LIF; cuda.cu says how they go through memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..launch.counters import counters
from ..launch.cupy import ACCESS, NUMBERS, Launch, reach, specialised
from ..launch.device import multiprocessors
from ..launch.launches import remembered
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
# 8 took 24 to 52 % longer channels_last, and 2 % where a channel is contiguous.
NEIGHBOURS_16_BIT = 4
COLUMNS = 32  # threads of a block that lie side by side along the channels, at most
# Of a kernel for each multiprocessor, about; more where a thread would go on for long. On an H200 backward of
# [4, 256, 64, 32, 32] in bfloat16 took 130 us with 4, which run at once, 145 with 3 and 164 with 5; in float32 three
# run at once. Where a channel is contiguous it took 171 us with 4, 141 with 3, 158 with 5 and 134 with 16.
BLOCKS = {"moments": 4, "backward": 3, "backward, 16 bits": 4, "backward, contiguous": 16, "gradient": 3}
MERGED = 8  # of blocks' sums that a thread adds up one by one, about, before blocks are merged in two steps
POSITIONS = (4, 256)  # of a thread, at least and at most where there are enough: so many float32 are added one by one


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of y [N, C, ...]."""
    y = dense(y)
    state, C = state_dtype(y.dtype), y.shape[1]
    if y.numel() == 0:
        nothing = torch.full((2, C), math.nan, dtype=state, device=y.device)
        return nothing[0], nothing[1]
    mean, variance = (torch.empty(C, dtype=state, device=y.device) for _ in range(2))
    _moments(y, (*(None,) * 5, mean, variance, None), (0, 0, 0.0, 0.0, 0.0))
    return mean, variance


def fill_table(table: Tensor, index: int, y: Tensor, norm: Norm, *, launches: dict | None = None) -> None:
    """Write the table's rows of norm `index` for y [N, C, ...], and update the norm's running statistics.

    The table is contiguous, as are the norm's tensors.
    """
    numbers = (len(table) // 4, index, float(norm.momentum), float(norm.correction), float(norm.eps))
    if norm.count:
        _moments(dense(y), (*norm[:5], None, None, table), numbers, launches)
        return

    def make() -> Launch:
        C = table.shape[1]
        return _launch("fill_table", (NUMBERS[table.dtype],), -(-C // THREADS), (C, *numbers), table)

    remembered(launches, ("fill_table", index), make)(*norm[:5], table)


def _moments(
    y: Tensor, tensors: tuple[Tensor | None, ...], numbers: tuple[int | float, ...], launches: dict | None = None
) -> None:
    """Mean and variance of dense y, and what follows from them: what the kernel takes as NormRows."""
    within = reach((y,))

    def make() -> tuple[_Tiling, Launch]:
        shape = (y.numel(), *channels_of(y))
        tiling = _tiling(*shape, _neighbours(*shape, y, within), _blocks("moments", y))
        template = (NUMBERS[y.dtype], *tiling.template)
        return tiling, _launch("moments", template, tiling.blocks, (*tiling.sizes, tiling.team, *numbers), y)

    tiling, launch = remembered(launches, ("moments", numbers[1], within), make)
    launch(y, *_meeting(tiling, 3, y), *tensors)


def _meeting(tiling: _Tiling, size: int, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Room for `size` sums of each block and channel, for those of teams of blocks, and counters of the blocks."""
    state, device, tiles, teams = state_dtype(like.dtype), like.device, tiling.tiles, tiling.teams
    partials = torch.empty(tiles * tiling.slices * size * tiling.across, dtype=state, device=device)
    of_teams = None
    if teams > 1:
        of_teams = torch.empty(tiles * teams * size * tiling.across, dtype=torch.float64, device=device)
    return partials, of_teams, counters(device, tiles * (teams + 1))


def forward(
    y: Tensor,  # [T·B, C, ...], or [B, C, ...] where static
    residual: Tensor | None,  # the same, static or not
    scales: Tensor | None,  # [2, C], or [4, C] for a residual with a batch norm of its own; None: of `norms`
    options: Options,
    *,
    time_steps: int,
    static: bool,
    keep_m: bool,
    pack: bool,
    norms: tuple[Norm, ...] = (),  # of y and of a residual that has its own; contiguous, with fixed statistics
    launches: dict | None = None,  # those of a plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T·B, C, ...]; if asked for, the membrane input in y's dtype and packed spikes."""
    given = inputs(y, residual, time_steps, static=static)
    outputs = forward_outputs(given, keep_m=keep_m, pack=pack)
    y, residual, T, N, C = given[:5]
    if N == 0:
        return tuple(outputs)
    if scales is not None:
        scales = scales.contiguous()
    of_norms = [*norms[0][:4], *(norms[1][:4] if len(norms) == 2 else [None] * 4)] if scales is None else [None] * 8
    constants = options.passed(y.device, state_dtype(y.dtype))
    within = reach((y, residual, scales, *outputs[:2], constants))

    def make() -> Launch:
        neuron, k = passed(options, constants), len(norms) if scales is None else len(scales) // 2
        shape = (N, C, given.channel_stride)
        vector = _neighbours(*shape, y, within)
        by_channel = 2 * k + 4 * (neuron.channels > 1) if given.channel_stride == 1 else 0
        while vector > 1 and vector * (min(T, STEPS) + by_channel) > HELD["forward"]:
            vector //= 2
        tiling = _tiling(*shape, vector)
        template = (
            *(NUMBERS[y.dtype], *tiling.template, min(T, STEPS), T > STEPS, *neuron.charging),
            *(_residual_kind(residual, k), pack, scales is None),
        )
        numbers = (
            *(T, N, C, tiling.inner, neuron.channels),
            *(given.y_stride, given.residual_stride, max(given.y_stride, given.residual_stride)),
            *((float(norms[0].eps), float(norms[-1].eps)) if scales is None else (0.0, 0.0)),
            *neuron.numbers,
        )
        return _launch("bn_lif_forward", template, -(-N // (tiling.vector * THREADS)), numbers, y)

    launch = remembered(launches, ("forward", scales is None, within), make)
    launch(y, residual, scales, *of_norms, *outputs, constants)
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
    launches: dict | None = None,
) -> BackwardOutputs:
    """Gradients of the membrane input, of θ and 1/τ, and of the norms."""
    given = inputs(y, residual, time_steps, static=static)
    outputs = backward_outputs(given, len(counts), steps=steps, total=total, parameters=parameters)
    y, residual, T, N, C = given[:5]
    state, device, sums = state_dtype(y.dtype), y.device, 1 + len(counts)
    grad_spikes, grad_m = (None if tensor is None else alike(tensor.to(y.dtype), y) for tensor in (grad_spikes, grad_m))
    chunk = min(T, STEPS if state.itemsize == 4 else STEPS // 2)
    chunks = -(-T // chunk)
    checkpoints = torch.empty(chunks - 1, N, dtype=state, device=device) if chunks > 1 else None
    constants = options.passed(device, state)
    tensors = (grad_spikes, grad_m, y, residual, table, *outputs[:4])
    within = reach((*tensors, constants))

    def make() -> tuple[_Tiling, Launch]:
        neuron, shape = passed(options, constants), (N, C, given.channel_stride)
        vector = _neighbours(*shape, y, within, min(NEIGHBOURS_16_BIT, ACCESS // y.element_size()))
        by_channel = 3 * sums + 4 * (neuron.channels > 1) if given.channel_stride == 1 else 0
        read = sum(tensor is not None for tensor in tensors[:4]) * chunk * y.element_size()
        held = ((chunk + by_channel + 8 * parameters) * state.itemsize + read) // 4
        while vector > 1 and (vector * chunk * state.itemsize > HISTORY or vector * held > HELD["backward"]):
            vector //= 2
        kind = "backward, 16 bits" if y.element_size() == 2 else "backward"
        kind = kind if given.channel_stride == 1 else "backward, contiguous"
        tiling = _tiling(*shape, vector, _blocks(kind, y))
        template = (
            *(NUMBERS[y.dtype], *tiling.template, chunk, chunks > 1, *neuron.charging),
            *(_residual_kind(residual, len(counts)), *neuron.slopes, parameters, grad_m is not None),
        )
        inner, *rest = tiling.sizes[1:]
        numbers = (
            *(T, N, C, inner, neuron.channels),
            *(given.y_stride, given.residual_stride, max(given.y_stride, given.residual_stride)),
            *(*rest, tiling.team, counts[0], counts[-1], *neuron.numbers, neuron.alpha),
        )
        return tiling, _launch("bn_lif_backward", template, tiling.blocks, numbers, y)

    tiling, launch = remembered(launches, ("backward", grad_m is None, within), make)
    launch(*tensors, *_meeting(tiling, sums, y), *outputs[4:], checkpoints, constants)
    return outputs


def normalised_gradient(
    grad: Tensor, y: Tensor | None, coefficients: Tensor, *, in_place: bool, launches: dict | None = None
) -> Tensor:
    """c0 grad + c1 y + c2 by channel, or c0 grad without y, in grad's dtype; coefficients are [3, C]."""
    rows = dense(grad)
    out = rows if in_place else torch.empty_like(rows)
    if rows.numel():
        y = None if y is None else alike(y, rows)
        tensors = (rows, y, coefficients.contiguous(), out)
        within = reach(tensors)

        def make() -> Launch:
            shape = (rows.numel(), *channels_of(rows))
            tiling = _tiling(*shape, _neighbours(*shape, rows, within), _blocks("gradient", rows))
            template = (NUMBERS[rows.dtype], *tiling.template, y is not None)
            return _launch("normalised_gradient", template, tiling.blocks, tiling.sizes, rows)

        remembered(launches, ("gradient", rows.shape, rows.stride(), y is None, within), make)(*tensors)
    return grad.copy_(out) if in_place and out is not grad else out


def _launch(kernel: str, template: tuple, blocks: int, numbers: tuple, like: Tensor) -> Launch:
    real = state_dtype(like.dtype)
    return Launch(SOURCE, specialised(kernel, *template), blocks, THREADS, numbers, real=real, device=like.device)


def _residual_kind(residual: Tensor | None, k: int) -> int:
    """ResidualKind in cuda.cu, of a layer of k norms."""
    return 0 if residual is None else k


def _neighbours(size: int, C: int, channel_stride: int, like: Tensor, within: int, most: int | None = None) -> int:
    """How many neighbours of rows of `size` numbers, of a channel each or all of one, an access moves.

    They are of the dtype of `like`, and `most` at most, a power of two; None: as many as the widest access moves. It is
    1 where the tensors let an access move fewer, `within`.
    """
    stretch = size if C == 1 else C if channel_stride == 1 else channel_stride
    neighbours = math.gcd(most or ACCESS // like.element_size(), stretch)
    return neighbours if neighbours <= within else 1


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
    def across(self) -> int:
        """Channels of a block."""
        return self.template[1] * self.columns

    @property
    def tiles(self) -> int:
        return -(-self.C // self.across)

    @property
    def blocks(self) -> int:
        return self.tiles * self.slices

    @property
    def team(self) -> int:
        """Slices that one block merges at once: all, unless a thread would add up more than MERGED one by one."""
        if self.slices * self.across <= MERGED * THREADS:
            return self.slices
        return math.isqrt(self.slices - 1) + 1

    @property
    def teams(self) -> int:
        return -(-self.slices // self.team)


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
