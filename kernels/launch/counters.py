"""Counters by which the last block of a launch to finish knows itself, in Triton and in CUDA C++."""

from __future__ import annotations

import contextlib
import threading

import torch

from .device import current_stream, is_current

_LEAST = 1024  # counters of a stream: 4 KiB


def counters(device: torch.device, number: int) -> torch.Tensor:
    """At least so many int32 zeros, which no other launch uses until this one has set them back.

    Launches of a stream follow each other, and share them. A launch in a graph has its own, as the graph may run beside
    any stream: of a reserve that is there before the capture, so that the graph need not make zeros.
    """
    if device.type != "cuda":
        return torch.zeros(number, dtype=torch.int32, device=device)
    reserve = _reserves.get(device) or _reserves.setdefault(device, _Reserve())
    with contextlib.nullcontext() if is_current(device) else torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            reserved = reserve.take(number)
            return torch.zeros(number, dtype=torch.int32, device=device) if reserved is None else reserved
    if reserve.low:
        reserve.fill(device)
    # None is ever freed for a larger one: a launch in flight may use it.
    key = (device, current_stream(device), max(_LEAST, 1 << (number - 1).bit_length()))
    found = _counters.get(key)
    return _counters.setdefault(key, _zeros(device, key[-1])) if found is None else found


# (device, stream, how many) -> counters
_counters: dict[tuple[torch.device, int, int], torch.Tensor] = {}


class _Reserve:
    """Zeros of a device for launches in graphs, each of which is given to one launch for ever."""

    SIZE, MOST = 1 << 18, 1 << 22  # int32 made at once, and in all: beyond these, graphs make zeros themselves

    def __init__(self):
        self.lock = threading.Lock()
        self.made: list[torch.Tensor] = []  # keeps the memory, which graphs use
        self.left: torch.Tensor | None = None  # of the last of these
        self.low = True  # and may be filled

    def take(self, number: int) -> torch.Tensor | None:
        """So many zeros, or None where there are too few."""
        with self.lock:
            if self.left is None or len(self.left) < number:
                return None
            taken, self.left = self.left[:number], self.left[number:]
            self.low = len(self.left) < self.SIZE // 2 and self.SIZE * len(self.made) < self.MOST
            return taken

    def fill(self, device: torch.device) -> None:
        """Where it is low; not while a graph is captured."""
        with self.lock:
            if self.low:
                self.left, self.low = _zeros(device, self.SIZE), False
                self.made.append(self.left)


_reserves: dict[torch.device, _Reserve] = {}


def _zeros(device: torch.device, size: int) -> torch.Tensor:
    """Int32 zeros that are there, for any stream.

    They are made on a thread and a stream of their own, as those of the caller may take memory from a pool of CUDA
    graphs, which then use it for something else.
    """
    found = []

    def make():
        stream = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            found.append(torch.zeros(size, dtype=torch.int32, device=device))
        stream.synchronize()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return found[0]
