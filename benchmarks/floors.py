"""The floor of a training step: its convolutions and linear layers alone, on random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn


class Layer(NamedTuple):
    """A call of a convolution or linear layer: its module, its input's shape, and which gradients it gives."""

    module: nn.Module
    shape: torch.Size
    trains: bool  # whether there is a backward pass
    input_gradient: bool


@contextmanager
def recorded(*networks: nn.Module) -> Iterator[list[Layer]]:
    """The layers that `networks` call inside the context, in the order of the calls."""
    layers: list[Layer] = []

    def record(module, arguments):
        (x,) = arguments
        layers.append(Layer(module, x.shape, torch.is_grad_enabled(), x.requires_grad))

    modules = [m for network in networks for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [module.register_forward_pre_hook(record) for module in modules]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def convolutions(
    layers: list[Layer], dtype: torch.dtype, memory_format: torch.memory_format = torch.channels_last
) -> Callable[[], None]:
    """A function that runs all layers in `dtype` and that layout: forward, and backward where they train."""
    calls = [_call(layer, dtype, memory_format) for layer in layers]

    def run():
        for call in calls:
            call()

    return run


def _call(layer: Layer, dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], object]:
    module = copy.deepcopy(layer.module).to(dtype=dtype, memory_format=layout)
    run, device = module.forward, module.weight.device
    x = _random(layer.shape, dtype, device, layout)
    if not layer.trains:
        return torch.no_grad()(lambda: run(x))
    x.requires_grad_(layer.input_gradient)
    wanted = [tensor for tensor in (x, *module.parameters()) if tensor.requires_grad]
    with torch.no_grad():
        upstream = _random(run(x).shape, dtype, device, layout)
    return lambda: torch.autograd.grad(run(x), wanted, upstream)


def _random(shape, dtype, device, layout) -> torch.Tensor:
    x = torch.randn(shape, device=device).to(dtype)
    return x.contiguous(memory_format=layout) if x.dim() == 4 else x
