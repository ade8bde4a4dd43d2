"""What all programs of a launch of triton.py add up: the samples that count, and the parts of the loss.

Each program counts the labels itself, and leaves its sums. The last one to do so adds them all up, in the order of the
programs.
"""

import triton
import triton.language as tl

from ..launch.triton import is_last
from . import reference
from .triton_chunk import weighed

IGNORED = tl.constexpr(reference.IGNORED)


@triton.jit
def count_kept(labels, B, label_stride, BLOCK: tl.constexpr):
    """How many samples are not ignored."""
    kept = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, B, BLOCK):
        b = begin + tl.arange(0, BLOCK)
        label = tl.load(labels + b.to(tl.int64) * label_stride, b < B, other=IGNORED)
        kept += (label != IGNORED).to(tl.int32)
    return tl.sum(kept, 0)


@triton.jit
def _sum_of_programs(partials, BLOCK: tl.constexpr):
    programs = tl.num_programs(0)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, programs, BLOCK):
        n = begin + tl.arange(0, BLOCK)
        total += tl.load(partials + n, n < programs, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def finish(partials, parts, counter, ce, ela, sta, steps, alpha, beta, TARGET: tl.constexpr, BLOCK: tl.constexpr):
    """Leave the program's sums over time steps; the last program makes the loss and its parts of all of them."""
    programs = tl.num_programs(0)
    mine = partials + tl.program_id(0)
    tl.store(mine, ce)
    tl.store(mine + programs, ela)
    tl.store(mine + 2 * programs, sta)
    if is_last(counter, programs):
        ce = _sum_of_programs(partials, BLOCK) / steps
        ela = _sum_of_programs(partials + programs, BLOCK) / steps
        sta = 0.0
        if TARGET:
            sta = _sum_of_programs(partials + 2 * programs, BLOCK) / steps
        tl.store(parts, ce + weighed(alpha, ela) + weighed(beta, sta))
        tl.store(parts + 1, ce)
        tl.store(parts + 2, ela)
        tl.store(parts + 3, sta)
