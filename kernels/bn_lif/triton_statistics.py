"""Triton kernels of the batch norm alone: mean and variance by channel, and the gradient that it passes on.

A program takes the mean k of its first tile and adds up y - k and its square. What it then subtracts from its squares
is at most about as many times what is left as it has tiles, so that few digits are lost. The program of each channel
that finishes last makes the norm's rows of the table of what all have left; see triton_merge.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.counters import counters
from ..launch.launches import remembered
from ..launch.triton import ACCESS, Launch, argument, size
from ..lif.reference import state_dtype
from .norms import Norm
from .tensors import alike, dense, inputs
from .triton_merge import Merge, merge_statistics, merging, write_norm
from .triton_tiles import enter, next_tile, tile_at, tiling

THREADS = 128  # of a program
AT_ONCE = 16  # elements that a thread of _statistics reads at once
# Bytes of an access; with narrower ones, which are not pipelined, a thread reads half as many elements at once: for
# bfloat16 maps of 7 x 7 pixels, 16 take 96 registers and spill 8 bytes on sm_90.
NARROW = 4
# num_stages of the loop in _statistics: see triton.py. With wide accesses, and with others, whose addresses take the
# registers: for float32 maps of 7 x 7 pixels, Triton 3.6 spills 8 bytes with 4.
STAGES = {"wide": 4, "narrow": 3}
# Programs of _statistics and of _normalised_gradient for each multiprocessor. On an H200, in bfloat16, statistics of
# [4, 256, 64, 32, 32] took 43 us with 2 to 6 and 49 with 16, of [4, 128, 512, 4, 4] 7 us with 4 and 21 with 16. The
# gradient took 109 us with 12 where a channel is contiguous, and 100 with 16.
PROGRAMS = {"statistics": 4, "gradient": 16}
# Registers that a thread of _statistics may have: at most as many as PROGRAMS run with. Left to itself, ptxas takes
# fewer, and spills some.
REGISTERS = {torch.float32: 128, torch.float64: 255}
COLUMNS = 64  # channels of a program of _table
# Of a thread of _normalised_gradient at once, for each tensor. On an H200, in bfloat16, it took 117 us with 1 where a
# channel is contiguous, and 97 with 4, as long as a copy; pipelines took as long, and longer for small maps.
ACCESSES = 4

SIZES = ["C", "inner", "positions", "turns", "blocks"]  # see neuron/triton_steps.py


@triton.jit(do_not_specialize=["momentum", "eps", "correction", "index", "norms", *SIZES])
def _statistics(
    y,  # [outer, C, inner]
    partials,  # this and the next as in merge_statistics
    counters,
    mean,  # [C] in the state's dtype, or None
    variance,  # [C] likewise
    table,  # [4 norms, C] likewise, or None: see norms.py
    weight,  # [C], this and what follows as in Norm, or None
    bias,
    running_mean,
    running_var,
    tracked,  # None: there are no running statistics to update
    momentum,
    eps,
    correction,
    index,  # of the norm in the table
    norms,
    C,
    inner,
    positions,
    turns,
    blocks,
    STATE: tl.constexpr,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,  # of the pipeline
    RUN: tl.constexpr,  # as in merge_statistics
):
    C, inner = size(C, ALIGNED if LAST else 1), size(inner, 1 if LAST else ALIGNED)
    _, c, position, offset, inside, tiles = enter(C, inner, positions, turns, blocks, LAST, ROWS, COLS)
    AXIS: tl.constexpr = 0 if LAST else 1
    EVERY: tl.constexpr = ROWS if LAST else COLS
    every = size(turns, 1) * EVERY
    count = tl.minimum(positions - position, every).to(STATE)
    n, mask = tile_at(position, offset, inside, c, C, inner, positions, LAST, ROWS, COLS, ALIGNED)
    first = tl.load(y + offset + (c if LAST else 0 * c), c < C, other=0.0).to(STATE)
    off = tl.where(mask, tl.load(y + n, mask, other=0.0).to(STATE) - first, 0.0)
    k = first + tl.sum(off, AXIS, keep_dims=True) / tl.minimum(count, EVERY)
    sums = tl.zeros([ROWS, COLS], STATE)
    squares = sums
    for _ in tl.range(tiles, num_stages=STAGES):
        n, mask = tile_at(position, offset, inside, c, C, inner, positions, LAST, ROWS, COLS, ALIGNED)
        off = tl.where(mask, tl.load(y + n, mask, other=0.0).to(STATE) - k, 0.0)
        sums += off
        squares = tl.fma(off, off, squares)
        position, offset, inside = next_tile(position, offset, inside, C, inner, LAST, ROWS, COLS)
    sums = tl.sum(sums, AXIS, keep_dims=True)
    apart = sums / count
    squares = tl.sum(squares, AXIS, keep_dims=True) - sums * apart
    positions = size(positions, 1)
    last, m, squares = merge_statistics(
        k, apart, squares, partials, counters, blocks, positions, every, COLS if LAST else 1, RUN
    )
    if last:
        write_norm(
            m, squares / positions.to(STATE), mean, variance, table, weight, bias, running_mean, running_var, tracked,
            momentum, eps, correction, index, norms, c, C, tl.program_id(0) % blocks == 0,
        )  # fmt: skip


@triton.jit(do_not_specialize=["eps", "C", "index", "norms"])
def _table(
    table,  # this and what follows as in _statistics
    weight,
    bias,
    running_mean,
    running_var,
    eps,
    C,
    index,
    norms,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,  # channels of a program
):
    """The rows of a norm whose statistics are fixed."""
    C = size(C, 1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mean = tl.load(running_mean + c, c < C, other=0.0)
    variance = tl.load(running_var + c, c < C, other=0.0)
    write_norm(
        mean, variance, None, None, table, weight, bias, None, None, None, 0.0, eps, 0.0, index, norms, c, C, False
    )


@triton.jit(do_not_specialize=SIZES)
def _normalised_gradient(
    grad,  # [outer, C, inner]
    y,  # likewise, or None
    coefficients,  # [3, C] in the state's dtype
    out,  # as grad; or grad itself
    C,
    inner,
    positions,
    turns,
    blocks,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    C, inner = size(C, ALIGNED if LAST else 1), size(inner, 1 if LAST else ALIGNED)
    _, c, position, offset, inside, tiles = enter(C, inner, positions, turns, blocks, LAST, ROWS, COLS)
    of_grad = tl.load(coefficients + c, c < C, other=0.0)
    of_y = tl.load(coefficients + C + c, c < C, other=0.0)
    constant = tl.load(coefficients + 2 * C + c, c < C, other=0.0)
    for _ in range(tiles):
        n, mask = tile_at(position, offset, inside, c, C, inner, positions, LAST, ROWS, COLS, ALIGNED)
        value = of_grad * tl.load(grad + n, mask, other=0.0).to(of_grad.dtype)
        if y is not None:
            value += of_y * tl.load(y + n, mask, other=0.0).to(of_grad.dtype) + constant
        tl.store(out + n, value.to(out.dtype.element_ty), mask)
        position, offset, inside = next_tile(position, offset, inside, C, inner, LAST, ROWS, COLS)


def statistics(
    y: Tensor,  # [N, C, ...]
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance by channel, [C] in the state's dtype."""
    state = state_dtype(y.dtype)
    mean, variance = (torch.empty(y.shape[1], dtype=state, device=y.device) for _ in range(2))
    norm = Norm(None, None, None, None, None, 0.0, 0.0, 1, 1)
    _take(y, norm, (mean, variance, None), 0, 0)
    return mean, variance


def fill_table(
    table: Tensor,  # [4k, C] in the state's dtype
    index: int,  # of the norm
    y: Tensor,  # [N, C, ...]
    norm: Norm,
    *,
    launches: dict | None = None,  # those of a plan
) -> None:
    """Write the table's rows of norm `index` for y, and update the norm's running statistics."""
    if norm.count:
        _take(y, norm, (None, None, table), index, len(table) // 4, launches)
        return

    def make() -> Launch:
        """Of the rows of a norm whose statistics are the running ones."""
        C, state = table.shape[1], table.dtype
        return Launch(
            _table,
            -(-C // COLUMNS),
            (argument(norm.eps, state), C, index, len(table) // 4),
            device=table.device,
            num_warps=COLUMNS // 32,
            STATE=tl.float64 if state == torch.float64 else tl.float32,
            BLOCK=COLUMNS,
        )

    remembered(launches, ("fill_table", index), make)(table, *norm[:4])


def _take(
    y: Tensor, norm: Norm, outputs: tuple[Tensor | None, ...], index: int, norms: int, launches: dict | None = None
) -> None:
    """Statistics of y, and what is made of them."""
    state = state_dtype(y.dtype)
    given = inputs(y, None, 1, static=True)

    def make() -> tuple[Launch, Merge]:
        shared = given.N, given.C, given.channel_stride, y.dtype
        tiles = tiling(*shared, THREADS * AT_ONCE, y.device, PROGRAMS["statistics"])
        width = tiles.constants["ALIGNED"] * y.dtype.itemsize
        if width < NARROW:
            tiles = tiling(*shared, THREADS * AT_ONCE // 2, y.device, PROGRAMS["statistics"])
        merge = merging(tiles, "statistics", state)
        numbers = (argument(value, state) for value in (norm.momentum, norm.eps, norm.correction))
        launch = Launch(
            _statistics,
            tiles.programs,
            (*numbers, index, norms, *tiles.sizes),
            device=y.device,
            num_warps=THREADS // 32,
            STATE=tl.float64 if state == torch.float64 else tl.float32,
            maxnreg=REGISTERS[state],
            STAGES=STAGES["wide" if width == ACCESS else "narrow"],
            RUN=merge.run,
            **tiles.constants,
        )
        return launch, merge

    launch, merge = remembered(launches, ("statistics", index), make)
    partials = torch.empty(3 * merge.numbers, dtype=state, device=y.device)
    launch(given.y, partials, counters(y.device, merge.counters), *outputs, *norm[:5])


def normalised_gradient(
    grad: Tensor,  # [N, C, ...]
    y: Tensor | None,  # [N, C, ...]
    coefficients: Tensor,  # [3, C] in the state's dtype
    *,
    in_place: bool,
    launches: dict | None = None,
) -> Tensor:
    """c0 grad + c1 y + c2, or c0 grad where y is None, in grad's dtype: in grad's own memory, or in new memory."""
    rows = dense(grad)
    out = rows if in_place else torch.empty_like(rows)

    def make() -> Launch:
        given = inputs(rows, None, 1, static=True)
        elements = THREADS * ACCESSES * ACCESS // grad.dtype.itemsize
        shared = given.N, given.C, given.channel_stride, grad.dtype
        tiles = tiling(*shared, elements, grad.device, PROGRAMS["gradient"])
        warps = THREADS // 32
        return Launch(
            _normalised_gradient, tiles.programs, tiles.sizes, device=grad.device, num_warps=warps, **tiles.constants
        )

    launch = remembered(launches, ("gradient", rows.shape, rows.stride()), make)
    launch(rows, None if y is None else alike(y, rows), coefficients, out)
    return grad.copy_(out) if in_place and out is not grad else out
