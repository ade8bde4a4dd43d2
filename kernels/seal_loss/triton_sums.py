"""What all programs of a launch of triton.py add up: the samples that count, and the parts of the loss.

Each program counts the labels itself, and leaves its sums. A counter tells which program is the last one to do so; that
one adds them all up, in the order of the programs, and sets the counter back to 0 for the next launch.
"""

import contextlib
import threading

import torch
import triton
import triton.language as tl

from ..launch.device import current_stream, is_current
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
        # From the cache that all processors share.
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
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1:
        ce = _sum_of_programs(partials, BLOCK) / steps
        ela = _sum_of_programs(partials + programs, BLOCK) / steps
        sta = 0.0
        if TARGET:
            sta = _sum_of_programs(partials + 2 * programs, BLOCK) / steps
        tl.store(parts, ce + weighed(alpha, ela) + weighed(beta, sta))
        tl.store(parts + 1, ce)
        tl.store(parts + 2, ela)
        tl.store(parts + 3, sta)
        tl.store(counter, 0)


# (device, stream) -> its counter, as launches of a stream follow each other
_counters: dict[tuple[int, int], torch.Tensor] = {}


def counter(device: torch.device) -> torch.Tensor:
    """A 0 that no other launch uses while the next one does.

    A captured launch may be replayed on any stream, so that its graph has a counter of its own, which it sets to 0.
    """
    if device.type != "cuda":
        return torch.zeros((), dtype=torch.int32, device=device)
    with contextlib.nullcontext() if is_current(device) else torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros((), dtype=torch.int32, device=device)
        key = (device.index, current_stream(device))
        if key not in _counters:
            # On a thread and a stream of its own, as those of the caller may take memory from a pool of CUDA graphs,
            # which then use it for something else.
            thread = threading.Thread(target=_make_counter, args=(key, torch.cuda.current_stream()))
            thread.start()
            thread.join()
        return _counters[key]


def _make_counter(key: tuple[int, int], stream: torch.cuda.Stream) -> None:
    beside = torch.cuda.Stream(stream.device)
    with torch.cuda.stream(beside):
        made = torch.zeros((), dtype=torch.int32, device=stream.device)
    stream.wait_stream(beside)
    _counters.setdefault(key, made)
