"""What programs of the same channels leave in memory, and what the last of them to finish makes of it all.

Each split leaves a row of partial results. RUN rows that follow each other make a run: the program that is the last one
to leave a row of the run merges them, and leaves the result as a row of the next level, until one row is left. So no
program waits for another one, runs are merged side by side, and what is added to what depends on the sizes alone.

The last program of its channels has mean and variance, or the sums of the backward pass, in registers. It makes all
that follows from them by channel; see norms.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch.triton import divide, is_last, number, square_root
from .triton_tiles import Tiling

# Bytes of each kind of partial result that a program reads at once. Of 64 channels in float32, runs have 32 rows of
# statistics, which are of three kinds, or 64 of sums.
MERGED = {"statistics": 8192, "sums": 16384}
MOST_ROWS = 256  # of a run


class Merge(NamedTuple):
    """How the partial results of a launch are merged."""

    numbers: int  # of each kind that all levels leave
    counters: int
    run: int  # rows of a run


def merging(tiles: Tiling, kind: str, state: torch.dtype) -> Merge:
    """Of a launch of these tiles."""
    cols = tiles.constants["COLS"] if tiles.constants["LAST"] else 1
    run = min(MERGED[kind] // (state.itemsize * cols), MOST_ROWS)
    blocks, count, rows, runs = tiles.programs // tiles.splits, tiles.splits, 0, 0
    while count > 1:
        rows += count
        count = -(-count // run)
        runs += count
    return Merge(rows * blocks * cols, runs * blocks, run)


@triton.jit
def merge_statistics(
    k,  # of this program's split, [1, COLS] as the next two
    mean,  # less k
    squares,  # sum of squared deviations from the mean
    partials,  # in the state's dtype: for each level one after the other [blocks, rows, 3, COLS], these three
    counters,
    blocks,  # groups of channels
    positions,  # of a channel
    every,  # positions of a split
    COLS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Whether the program is the last of its channels, and then their means and sums of squared deviations."""
    count = tl.num_programs(0) // blocks  # rows of the level
    index = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    last = count > 0
    while last & (count > 1):
        rows = partials + (block * count).to(tl.int64) * (3 * COLS) + tl.arange(0, COLS)[None, :]
        mine = rows + index * (3 * COLS)
        tl.store(mine, k)
        tl.store(mine + COLS, mean)
        tl.store(mine + 2 * COLS, squares)
        run = index // RUN
        first = run * RUN
        number = tl.minimum(count - first, RUN)
        last = is_last(counters + run * blocks + block, number)
        if last:
            k, mean, squares = _merged(
                rows + first * (3 * COLS), number, positions - first.to(tl.int64) * every, every, COLS, RUN
            )
        partials += (blocks * count).to(tl.int64) * (3 * COLS)
        index, count, every = run, tl.cdiv(count, RUN), every * RUN
        counters += count * blocks
    return last, k + mean, squares


@triton.jit
def _merged(
    rows,  # the first one, at its columns
    number,  # of rows
    positions,  # of all rows, or more where others follow
    every,
    COLS: tl.constexpr,
    RUN: tl.constexpr,
):
    """k, mean and squares of some rows, as those in merge_statistics."""
    row = tl.arange(0, RUN)[:, None]
    mask = row < number
    at = rows + row * (3 * COLS)
    origin = tl.load(rows, cache_modifier=".cg")  # means count from here
    means = tl.load(at, mask, other=0.0, cache_modifier=".cg") - origin
    means = tl.where(mask, means + tl.load(at + COLS, mask, other=0.0, cache_modifier=".cg"), 0.0)
    squares = tl.load(at + 2 * COLS, mask, other=0.0, cache_modifier=".cg")
    count = tl.minimum(tl.maximum(positions - row * every, 0), every).to(origin.dtype)
    mean = tl.sum(count * means, 0, keep_dims=True) / tl.minimum(positions, RUN * every).to(origin.dtype)
    off = tl.where(mask, means - mean, 0.0)  # the square of what does not exist could be infinite
    return origin, mean, tl.sum(squares + count * (off * off), 0, keep_dims=True)


@triton.jit
def merge_sums(
    of_m,  # Σ dm of this program's split, [1, COLS] as the next two
    of_y,  # Σ dm (y - mean)
    of_residual,  # Σ dm (residual - its mean), with NORMALISED
    partials,  # in the state's dtype: for each level one after the other [blocks, rows, 2 or 3, COLS], these sums
    counters,
    blocks,  # groups of channels
    NORMALISED: tl.constexpr,  # whether the residual has a norm
    COLS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Whether the program is the last of its channels, and then the sums over all splits."""
    ROW: tl.constexpr = (3 if NORMALISED else 2) * COLS
    count = tl.num_programs(0) // blocks  # rows of the level
    index = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    last = count > 0
    while last & (count > 1):
        rows = partials + (block * count).to(tl.int64) * ROW + tl.arange(0, COLS)[None, :]
        mine = rows + index * ROW
        tl.store(mine, of_m)
        tl.store(mine + COLS, of_y)
        if NORMALISED:
            tl.store(mine + 2 * COLS, of_residual)
        run = index // RUN
        number = tl.minimum(count - run * RUN, RUN)
        last = is_last(counters + run * blocks + block, number)
        if last:
            row = tl.arange(0, RUN)[:, None]
            mask = row < number
            at = rows + run * RUN * ROW + row * ROW
            # All are asked for before the first is waited for.
            all_m = tl.load(at, mask, other=0.0, cache_modifier=".cg")
            all_y = tl.load(at + COLS, mask, other=0.0, cache_modifier=".cg")
            if NORMALISED:
                all_residual = tl.load(at + 2 * COLS, mask, other=0.0, cache_modifier=".cg")
                of_residual = tl.sum(all_residual, 0, keep_dims=True)
            of_m, of_y = tl.sum(all_m, 0, keep_dims=True), tl.sum(all_y, 0, keep_dims=True)
        partials += (blocks * count).to(tl.int64) * ROW
        index, count = run, tl.cdiv(count, RUN)
        counters += count * blocks
    return last, of_m, of_y, of_residual


@triton.jit
def scale_and_shift(mean, variance, weight, bias, eps):
    """Inverse standard deviation, scale and shift of a norm; weight and bias may be None."""
    root = square_root(variance + eps)
    inverse_std = divide(tl.full(root.shape, 1.0, root.dtype), root)
    scale = inverse_std
    if weight is not None:
        scale *= weight
    shift = -(mean * scale)
    if bias is not None:
        shift += bias
    return inverse_std, scale, shift


@triton.jit
def write_norm(
    m,  # means [1, COLS] of channels c
    v,  # variances
    mean,  # this and what follows as in _statistics of triton_statistics.py
    variance,
    table,
    weight,
    bias,
    running_mean,
    running_var,
    tracked,
    momentum,
    eps,
    correction,
    index,
    norms,
    c,
    C,
    first,  # whether these channels are the first ones
):
    """Mean and variance, the running statistics, and the norm's rows of the table, of each that there is."""
    if mean is not None:
        tl.store(mean + c, m, c < C)
        tl.store(variance + c, v, c < C)
    if tracked is not None:
        momentum = number(momentum, v.dtype)
        _learn(running_mean + c, m, momentum, c < C)
        _learn(running_var + c, v * number(correction, v.dtype), momentum, c < C)
        if first:
            tl.store(tracked, tl.load(tracked) + 1)
    if table is not None:
        of_weight, of_bias = None, None
        if weight is not None:
            of_weight = tl.load(weight + c, c < C, other=0.0)
        if bias is not None:
            of_bias = tl.load(bias + c, c < C, other=0.0)
        inverse_std, scale, shift = scale_and_shift(m, v, of_weight, of_bias, number(eps, v.dtype))
        row = table + c
        tl.store(row + 2 * index * C, scale, c < C)
        tl.store(row + (2 * index + 1) * C, shift, c < C)
        tl.store(row + (2 * norms + index) * C, m, c < C)
        tl.store(row + (3 * norms + index) * C, inverse_std, c < C)


@triton.jit
def _learn(running, new, momentum, mask):
    """`running` moved towards `new` by the momentum, as torch.lerp rounds it."""
    old = tl.load(running, mask, other=0.0)
    low, high = old + momentum * (new - old), new - (new - old) * (1 - momentum)
    tl.store(running, tl.where(momentum < 0.5, low, high), mask)


@triton.jit
def write_gradients(
    of_m,  # Σ dm [1, COLS] of channels c
    of_norm,  # Σ dm (y - mean), or of what else the norm is given
    count,  # as the norm has it
    table,  # [4 NORMS, C]
    sums,  # this and what follows as in BackwardOutputs
    coefficients,
    grad_norms,
    c,
    C,
    INDEX: tl.constexpr,  # of the norm
    NORMS: tl.constexpr,
):
    """What follows from the sums for a norm: norms.py has the formulas."""
    count = -number(count, of_m.dtype)
    scale = tl.load(table + 2 * INDEX * C + c, c < C, other=0.0)
    mean = tl.load(table + (2 * NORMS + INDEX) * C + c, c < C, other=0.0)
    inverse_std = tl.load(table + (3 * NORMS + INDEX) * C + c, c < C, other=0.0)
    of_y = scale * inverse_std * (inverse_std * of_norm) / count
    constant = scale * of_m / count - of_y * mean
    tl.store(sums + (1 + INDEX) * C + c, of_norm, c < C)
    row = coefficients + 3 * INDEX * C + c
    tl.store(row, scale, c < C)
    tl.store(row + C, tl.where(count < 0, of_y, 0.0), c < C)
    tl.store(row + 2 * C, tl.where(count < 0, constant, 0.0), c < C)
    tl.store(grad_norms + 2 * INDEX * C + c, inverse_std * of_norm, c < C)
    tl.store(grad_norms + (2 * INDEX + 1) * C + c, of_m, c < C)
