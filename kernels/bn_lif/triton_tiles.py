"""Tiles for Triton kernels that work by channel, and how programs share them.

In memory a tensor is [outer, C, inner], so that position (o, i) of channel c lies at (o C + c) inner + i. A tile is
[ROWS, COLS], and memory runs along its second axis: [positions, channels] where channels are innermost (LAST), else
[1, positions] of one channel. A program takes some tiles of the same channels, whose positions follow each other.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch.device import multiprocessors
from ..launch.triton import ACCESS

CHANNELS = 64  # most channels of a tile where they are innermost: two lines of the cache, or one in 16 bits
MOST_TURNS = 64  # a thread adds up so many tiles, one after the other; more of them would cost accuracy


class Tiling(NamedTuple):
    """How a launch shares N numbers."""

    programs: int
    splits: int  # programs of the same channels
    positions: int  # of a split, but for the last one
    sizes: tuple[int, ...]  # C, inner, positions of a channel, tiles of a program, and how many programs a split has
    constants: dict[str, int | bool]


def tiling(
    N: int, C: int, channel_stride: int, dtype: torch.dtype, elements: int, device: torch.device, programs: int
) -> Tiling:
    """Tiles of so many elements, a power of two, for N > 0 numbers of which n has channel n // channel_stride % C.

    There are about `programs` for each multiprocessor: as many as run at once, or a multiple of that. Of more, the last
    ones run while most multiprocessors have nothing left to do.
    """
    inner = channel_stride if C > 1 else N
    last = C > 1 and inner == 1
    cols = min(triton.next_power_of_2(C), CHANNELS) if last else elements
    rows = elements // cols if last else 1
    positions, blocks = N // C, -(-C // cols) if last else C
    tiles = -(-positions // (rows if last else cols))
    turns = min(-(-tiles // max(programs * multiprocessors(device) // blocks, 1)), MOST_TURNS)
    splits = -(-tiles // turns)
    aligned = math.gcd(C if last else inner, ACCESS // dtype.itemsize)
    constants = {"LAST": last, "ROWS": rows, "COLS": cols, "ALIGNED": aligned}
    each = turns * (rows if last else cols)
    return Tiling(blocks * splits, splits, each, (C, inner, positions, turns, blocks), constants)


@triton.jit
def enter(C, inner, positions, turns, blocks, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where the program's tiles begin.

    Returns its split; channels c, [1, COLS] or [1, 1]; the number and the memory offset of its first position, which is
    the `inside`-th since the last end of `inner` numbers; and how many tiles it has.
    """
    block = tl.program_id(0) % blocks
    split = (tl.program_id(0) // blocks).to(tl.int64)
    if LAST:
        c = block * COLS + tl.arange(0, COLS)[None, :]
        position = split * turns * ROWS
        inside = position * 0
        offset = position * C
    else:
        c = block + tl.zeros([1, 1], tl.int32)
        position = split * turns * COLS
        outer = position // inner
        inside = position - outer * inner
        offset = (outer * C + block) * inner + inside
    tiles = tl.minimum(tl.cdiv(positions - position, ROWS if LAST else COLS), turns).to(tl.int32)
    return split, c, position, offset, inside, tiles


@triton.jit
def tile_at(
    position,
    offset,
    inside,
    c,
    C,
    inner,
    positions,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Memory offsets [ROWS, COLS] of the tile that begins there, and which of them exist."""
    if LAST:
        left = tl.minimum(positions - position, ROWS).to(tl.int32)
        n = offset + tl.arange(0, ROWS)[:, None] * C + c
        mask = (tl.arange(0, ROWS)[:, None] < left) & (c < C)
    else:
        # A tile meets many ends of short runs, or one of a long run: either way, 32 bits suffice to count them.
        left = tl.multiple_of(tl.minimum(positions - position, COLS).to(tl.int32), ALIGNED)
        width = tl.minimum(inner, COLS).to(tl.int32)
        before = width - tl.minimum(inner - inside, COLS).to(tl.int32)
        next_one = tl.arange(0, COLS)[None, :]
        n = offset + (before + next_one) // width * ((C - 1) * inner) + next_one
        mask = next_one < left
    return tl.max_contiguous(tl.multiple_of(n, [1, ALIGNED]), [1, ALIGNED]), mask


@triton.jit
def next_tile(position, offset, inside, C, inner, LAST: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`position`, `offset` and `inside` of the tile after that one."""
    if LAST:
        position += ROWS
        offset += ROWS * C
    else:
        position += COLS
        inside += COLS
        offset += COLS
        short = tl.minimum(inner, COLS).to(tl.int32)
        ends = tl.where(inner < COLS, inside.to(tl.int32) // short, (inside >= inner).to(tl.int32))
        inside -= ends * inner
        offset += ends * ((C - 1) * inner)
    return position, offset, inside
