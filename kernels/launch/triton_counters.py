"""How a program learns that it is the last of several to finish, so that it may use what the others have stored.

Each of them stores its results, and adds 1 to a counter. The last one sets the counter back to 0 for the next launch.
It loads the results of the others with cache_modifier=".cg": from the cache that all multiprocessors share.
"""

import contextlib
import threading

import torch
import triton
import triton.language as tl

from .device import current_stream, is_current

_LEAST = 1024  # counters of a tensor: 4 KiB


@triton.jit
def is_last(counter, programs):
    """Whether so many programs have called this; what any of them stored before is visible to the last one."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last


# (device, stream, how many) -> counters, as launches of a stream follow each other
_counters: dict[tuple[int, int, int], torch.Tensor] = {}


def counters(device: torch.device, number: int) -> torch.Tensor:
    """At least so many int32 zeros, which no other launch uses while the next one does.

    A captured launch may be replayed on any stream, so that its graph has counters of its own, which it sets to 0.
    """
    if device.type != "cuda":
        return torch.zeros(number, dtype=torch.int32, device=device)
    with contextlib.nullcontext() if is_current(device) else torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(number, dtype=torch.int32, device=device)
        # None is ever freed for a larger one: a launch in flight may use it.
        key = (device.index, current_stream(device), max(_LEAST, 1 << (number - 1).bit_length()))
        if key not in _counters:
            # On a thread and a stream of its own, as those of the caller may take memory from a pool of CUDA graphs,
            # which then use it for something else.
            thread = threading.Thread(target=_make_counters, args=(key, torch.cuda.current_stream()))
            thread.start()
            thread.join()
        return _counters[key]


def _make_counters(key: tuple[int, int, int], stream: torch.cuda.Stream) -> None:
    beside = torch.cuda.Stream(stream.device)
    with torch.cuda.stream(beside):
        made = torch.zeros(key[-1], dtype=torch.int32, device=stream.device)
    stream.wait_stream(beside)
    _counters.setdefault(key, made)
