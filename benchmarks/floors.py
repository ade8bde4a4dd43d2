"""Convolutions and linear layers of a step alone: on random numbers, its floor, and on spikes like its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from seal_fast.kernels.packing.reference import pack
from seal_fast.ops._spike_tensor import SpikeTensor


class Layer(NamedTuple):
    """A call of a convolution or linear layer: its module, its input, and which gradients it gives."""

    module: nn.Module
    shape: torch.Size
    trains: bool  # whether there is a backward pass
    input_gradient: bool
    firing_rate: float | None = None  # of an input of bits


@contextmanager
def recorded(*networks: nn.Module) -> Iterator[list[Layer]]:
    """The layers that `networks` call inside the context, in the order of the calls."""
    layers: list[Layer] = []

    def record(module, arguments):
        (x,) = arguments
        rate = x.firing_rate() if isinstance(x, SpikeTensor) and x.packed is not None else None
        layers.append(Layer(module, x.shape, torch.is_grad_enabled(), x.requires_grad, rate))

    modules = [m for network in networks for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [module.register_forward_pre_hook(record) for module in modules]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def convolutions(
    layers: list[Layer],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.channels_last,
    *,
    skipping: bool = False,
) -> Callable[[], None]:
    """A function that runs all layers in `dtype` and that layout: forward, and backward where they train.

    All are dense; with `skipping` those that had bits get random bits of the same firing rate, and may skip zeros.
    """
    calls = [_call(layer if skipping else layer._replace(firing_rate=None), dtype, memory_format) for layer in layers]

    def run():
        for call in calls:
            call()

    return run


def _call(layer: Layer, dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], object]:
    module = copy.deepcopy(layer.module).to(dtype=dtype, memory_format=layout)
    run, device = module.forward, module.weight.device
    x = _random(layer.shape, dtype, device, layout)
    if layer.firing_rate is not None:
        x = _fired(layer.shape, layer.firing_rate, dtype, layout)
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


def _fired(shape, rate: float, dtype, layout) -> SpikeTensor:
    """Bits of which so many are set, with the shape and in the layout of a layer's input."""
    like = torch.empty(shape, dtype=dtype, device="meta")
    like = like.contiguous(memory_format=layout) if like.dim() == 4 else like
    packed = pack((torch.rand(1, like.numel()) < rate).to(torch.float32))
    return SpikeTensor.of(packed, like.shape, like.stride(), dtype)
