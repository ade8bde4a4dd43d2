"""CUDA graphs: what is captured has been run before, on a side stream, as torch asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")


def captured(function: Callable[[], R]) -> tuple[torch.cuda.CUDAGraph, R]:
    """A graph of what `function` starts on the GPU, and what it returned: a replay overwrites that.

    The warm-up lets kernels compile and libraries allocate their workspaces, which a capture would refuse.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
