"""Triton kernels of the batch norm alone: mean and variance by channel, and the gradient that it passes on.

A program takes the mean k of its first tile and adds up y - k and its square. What it then subtracts from its squares
is at most about as many times what is left as it has tiles, so that few digits are lost. A second kernel merges the
mean and the sum of squared deviations of all programs, and makes the norm's rows of the table; see norms.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.triton import ACCESS, argument, divide, number, size, start
from ..lif.reference import state_dtype
from .norms import Norm
from .tensors import BackwardOutputs, alike, dense, inputs
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
COLUMNS = 8  # channels of which a program of _merge or _finish reads what others have left: a sector of the cache
# Rows that it reads at once, and its warps: with few splits, and with many, whose loads have to be asked for together.
FEW, MANY = (64, 4), (1024, 16)
# Of a thread of _normalised_gradient at once, for each tensor. On an H200, in bfloat16, it took 117 us with 1 where a
# channel is contiguous, and 97 with 4, as long as a copy; pipelines took as long, and longer for small maps.
ACCESSES = 4

SIZES = ["C", "inner", "positions", "turns", "blocks"]  # see kernels/lif/triton.py


@triton.jit(do_not_specialize=SIZES)
def _statistics(
    y,  # [outer, C, inner]
    partials,  # [splits, 3, C] in the state's dtype: k; the mean less k; the sum of squared deviations
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
):
    C, inner = size(C, ALIGNED if LAST else 1), size(inner, 1 if LAST else ALIGNED)
    split, c, position, offset, inside, tiles = enter(C, inner, positions, turns, blocks, LAST, ROWS, COLS)
    AXIS: tl.constexpr = 0 if LAST else 1
    EVERY: tl.constexpr = ROWS if LAST else COLS
    count = tl.minimum(positions - position, size(turns, 1) * EVERY).to(STATE)
    n, mask = tile_at(position, offset, inside, c, C, inner, positions, LAST, ROWS, COLS, ALIGNED)
    first = tl.load(y + offset + (c if LAST else 0 * c), c < C, other=0.0).to(STATE)
    apart = tl.where(mask, tl.load(y + n, mask, other=0.0).to(STATE) - first, 0.0)
    k = first + tl.sum(apart, AXIS, keep_dims=True) / tl.minimum(count, EVERY)
    sums = tl.zeros([ROWS, COLS], STATE)
    squares = sums
    for _ in tl.range(tiles, num_stages=STAGES):
        n, mask = tile_at(position, offset, inside, c, C, inner, positions, LAST, ROWS, COLS, ALIGNED)
        apart = tl.where(mask, tl.load(y + n, mask, other=0.0).to(STATE) - k, 0.0)
        sums += apart
        squares = tl.fma(apart, apart, squares)
        position, offset, inside = next_tile(position, offset, inside, C, inner, LAST, ROWS, COLS)
    sums = tl.sum(sums, AXIS, keep_dims=True)
    mean = sums / count
    out = partials + split * (3 * C) + c
    tl.store(out, k, c < C)
    tl.store(out + C, mean, c < C)
    tl.store(out + 2 * C, tl.sum(squares, AXIS, keep_dims=True) - sums * mean, c < C)


@triton.jit(do_not_specialize=["momentum", "eps", "correction", "C", "index", "norms", "positions", "every", "splits"])
def _merge(
    partials,  # as of _statistics; None: the running statistics are taken
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
    C,
    index,  # of the norm in the table
    norms,
    positions,
    every,  # positions of a split
    splits,
    STATE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels of a program
):
    """Two passes: the mean, then the squared deviations from it. A thread's loads wait for no sum of other threads."""
    C, positions, every = size(C, 1), size(positions, 1), size(every, 1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if partials is None:
        m = tl.load(running_mean + c, c < C, other=0.0)
        v = tl.load(running_var + c, c < C, other=0.0)
    else:
        origin = tl.load(partials + c, c < C, other=0.0)  # means count from here
        sums = tl.zeros([SPLITS, BLOCK], STATE)
        for begin in range(0, splits, SPLITS):
            count, means, _, _ = _of_splits(partials, begin, origin, c, C, positions, every, splits, STATE, SPLITS)
            sums += count * means
        apart = tl.sum(sums, 0, keep_dims=True) / positions.to(STATE)
        squares = tl.zeros([SPLITS, BLOCK], STATE)
        for begin in range(0, splits, SPLITS):
            count, means, row, mask = _of_splits(partials, begin, origin, c, C, positions, every, splits, STATE, SPLITS)
            off = tl.where(mask, means - apart, 0.0)  # the square of what does not exist could be infinite
            squares += tl.load(row + 2 * C, mask, other=0.0) + count * (off * off)
        m = origin + apart
        v = tl.sum(squares, 0, keep_dims=True) / positions.to(STATE)
    if mean is not None:
        tl.store(mean + c, m, c < C)
        tl.store(variance + c, v, c < C)
    if tracked is not None:
        momentum = number(momentum, STATE)
        _learn(running_mean + c, m, momentum, c < C)
        _learn(running_var + c, v * number(correction, STATE), momentum, c < C)
        if tl.program_id(0) == 0:
            tl.store(tracked, tl.load(tracked) + 1)
    if table is not None:
        spread = v + number(eps, STATE)
        if spread.dtype == tl.float64:  # noqa: SIM108  Triton 3.2 compiles both sides of a conditional expression
            root = tl.sqrt(spread)
        else:
            root = tl.sqrt_rn(spread)
        scale = divide(tl.full([1, BLOCK], 1.0, STATE), root)
        row = table + c
        tl.store(row + (3 * norms + index) * C, scale, c < C)
        tl.store(row + (2 * norms + index) * C, m, c < C)
        if weight is not None:
            scale *= tl.load(weight + c, c < C, other=0.0)
        shift = -(m * scale)
        if bias is not None:
            shift += tl.load(bias + c, c < C, other=0.0)
        tl.store(row + 2 * index * C, scale, c < C)
        tl.store(row + (2 * index + 1) * C, shift, c < C)


@triton.jit
def _learn(running, new, momentum, mask):
    """`running` moved towards `new` by the momentum, as torch.lerp rounds it."""
    old = tl.load(running, mask, other=0.0)
    low, high = old + momentum * (new - old), new - (new - old) * (1 - momentum)
    tl.store(running, tl.where(momentum < 0.5, low, high), mask)


@triton.jit
def _of_splits(partials, begin, origin, c, C, positions, every, splits, STATE: tl.constexpr, SPLITS: tl.constexpr):
    """Of SPLITS splits from `begin`: counts, 0 where none is; means less origin; where in partials; and which exist."""
    split = begin + tl.arange(0, SPLITS)[:, None]
    count = tl.minimum(tl.maximum(positions - split * every, 0), every).to(STATE)
    mask = (split < splits) & (c < C)
    row = partials + split.to(tl.int64) * (3 * C) + c
    means = (tl.load(row, mask, other=0.0) - origin) + tl.load(row + C, mask, other=0.0)
    return count, tl.where(mask, means, 0.0), row, mask


@triton.jit(do_not_specialize=["count", "residual_count", "C", "splits"])
def _finish(
    partials,  # [splits, norms + 1, C] in the state's dtype, as what follows
    table,  # [4 norms, C]: see norms.py
    sums,  # this and what follows as in BackwardOutputs
    coefficients,
    grad_norms,
    count,  # of y's norm, and of the residual's, in the state's dtype
    residual_count,
    C,
    splits,
    STATE: tl.constexpr,
    NORMALISED: tl.constexpr,  # whether the residual has a norm: norms is 2, else 1
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,  # channels of a program
):
    """Add up the partial sums, and make what follows from the sums: norms.py has the formulas."""
    C = size(C, 1)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    of_m = tl.zeros([SPLITS, BLOCK], STATE)
    of_y, of_residual = of_m, of_m
    for begin in range(0, splits, SPLITS):
        split = begin + tl.arange(0, SPLITS)[:, None]
        mask = (split < splits) & (c < C)
        row = partials + split.to(tl.int64) * ((3 if NORMALISED else 2) * C) + c
        of_m += tl.load(row, mask, other=0.0)
        of_y += tl.load(row + C, mask, other=0.0)
        if NORMALISED:
            of_residual += tl.load(row + 2 * C, mask, other=0.0)
    NORMS: tl.constexpr = 2 if NORMALISED else 1
    total = tl.sum(of_m, 0, keep_dims=True)
    tl.store(sums + c, total, c < C)
    _finish_norm(0, NORMS, tl.sum(of_y, 0, keep_dims=True), total, count, table, sums, coefficients, grad_norms, c, C)
    if NORMALISED:
        centred = tl.sum(of_residual, 0, keep_dims=True)
        _finish_norm(1, NORMS, centred, total, residual_count, table, sums, coefficients, grad_norms, c, C)


@triton.jit
def _finish_norm(
    INDEX: tl.constexpr, NORMS: tl.constexpr, centred, total, count, table, sums, coefficients, grad_norms, c, C
):
    count = -number(count, total.dtype)
    scale = tl.load(table + 2 * INDEX * C + c, c < C, other=0.0)
    mean = tl.load(table + (2 * NORMS + INDEX) * C + c, c < C, other=0.0)
    inverse_std = tl.load(table + (3 * NORMS + INDEX) * C + c, c < C, other=0.0)
    of_y = scale * inverse_std * (inverse_std * centred) / count
    constant = scale * total / count - of_y * mean
    tl.store(sums + (1 + INDEX) * C + c, centred, c < C)
    row = coefficients + 3 * INDEX * C + c
    tl.store(row, scale, c < C)
    tl.store(row + C, tl.where(count < 0, of_y, 0.0), c < C)
    tl.store(row + 2 * C, tl.where(count < 0, constant, 0.0), c < C)
    tl.store(grad_norms + 2 * INDEX * C + c, inverse_std * centred, c < C)
    tl.store(grad_norms + (2 * INDEX + 1) * C + c, total, c < C)


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
) -> None:
    """Write the table's rows of norm `index` for y, and update the norm's running statistics."""
    _take(y, norm, (None, None, table), index, len(table) // 4)


def _take(y: Tensor, norm: Norm, outputs: tuple[Tensor | None, ...], index: int, norms: int) -> None:
    """Statistics of y, if the norm takes them, and what is made of them."""
    state, C = state_dtype(y.dtype), y.shape[1]
    common = {"device": y.device, "STATE": tl.float64 if state == torch.float64 else tl.float32}
    partials, counts = None, (0, 0, 0)
    if norm.count:
        given = inputs(y, None, 1, static=True)
        shared = given.N, C, given.channel_stride, y.dtype
        tiles = tiling(*shared, THREADS * AT_ONCE, y.device, PROGRAMS["statistics"])
        width = tiles.constants["ALIGNED"] * y.dtype.itemsize
        stages = STAGES["wide" if width == ACCESS else "narrow"]
        if width < NARROW:
            tiles = tiling(*shared, THREADS * AT_ONCE // 2, y.device, PROGRAMS["statistics"])
        partials = torch.empty((tiles.splits, 3, C), dtype=state, device=y.device)
        more = {"num_warps": THREADS // 32, **tiles.constants, "STAGES": stages}
        start(_statistics, tiles.programs, given.y, partials, *tiles.sizes, **common, **more)
        counts = given.N // C, tiles.positions, tiles.splits
    rows, warps = _at_once(counts[2], state)
    numbers = (argument(value, state) for value in (norm.momentum, norm.eps, norm.correction))
    arguments = (partials, *outputs, *norm[:5], *numbers, C, index, norms, *counts)
    start(_merge, -(-C // COLUMNS), *arguments, **common, num_warps=warps, SPLITS=rows, BLOCK=COLUMNS)


def _at_once(rows: int, state: torch.dtype) -> tuple[int, int]:
    """How many of so many rows of partial results a program reads at once, and its warps."""
    at_once, warps = FEW if rows <= FEW[0] else MANY
    return at_once * 4 // state.itemsize, warps


def finish(
    partials: Tensor,  # [splits, k + 1, C]
    table: Tensor,  # [4k, C]
    outputs: BackwardOutputs,
    counts: tuple[int, ...],  # of the k norms
) -> None:
    """Fill sums, coefficients and grad_norms. The order of addition depends on the number of splits alone."""
    splits, _, C = partials.shape
    rows, warps = _at_once(splits, partials.dtype)
    start(
        _finish,
        -(-C // COLUMNS),
        partials,
        table,
        outputs.sums,
        outputs.coefficients,
        outputs.grad_norms,
        *(argument(count, partials.dtype) for count in (counts[0], counts[-1])),
        C,
        splits,
        device=partials.device,
        num_warps=warps,
        STATE=tl.float64 if partials.dtype == torch.float64 else tl.float32,
        NORMALISED=len(counts) == 2,
        SPLITS=rows,
        BLOCK=COLUMNS,
    )


def normalised_gradient(
    grad: Tensor,  # [N, C, ...]
    y: Tensor | None,  # [N, C, ...]
    coefficients: Tensor,  # [3, C] in the state's dtype
    *,
    in_place: bool,
) -> Tensor:
    """c0 grad + c1 y + c2, or c0 grad where y is None, in grad's dtype: in grad's own memory, or in new memory."""
    rows = dense(grad)
    out = rows if in_place else torch.empty_like(rows)
    given = inputs(rows, None, 1, static=True)
    elements = THREADS * ACCESSES * ACCESS // grad.dtype.itemsize
    shared = given.N, given.C, given.channel_stride, grad.dtype
    tiles = tiling(*shared, elements, grad.device, PROGRAMS["gradient"])
    start(
        _normalised_gradient,
        tiles.programs,
        rows,
        None if y is None else alike(y, rows),
        coefficients,
        out,
        *tiles.sizes,
        device=grad.device,
        num_warps=THREADS // 32,
        **tiles.constants,
    )
    return grad.copy_(out) if in_place and out is not grad else out
