"""CUDA C++ kernels of the multi-step LIF neuron; cuda.cu says how they go through memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..launch.cupy import ACCESS, NUMBERS, Launch, reach, specialised
from ..launch.launches import remembered
from ..neuron.cupy import passed
from ..neuron.options import Options
from .reference import state_dtype
from .tensors import backward_tensors, forward_tensors

SOURCE = Path(__file__).with_name("cuda.cu")
THREADS = 128  # of a block, as in cuda.cu
STEPS = 16  # whose inputs are in registers at once, at most
HISTORY = 128  # bytes of registers for a thread's potentials before each reset, at most: beyond it, few threads run


def forward(
    x: Tensor,  # [T, ...]
    v_init: Tensor | None,  # [...]
    options: Options,
    *,
    keep_v: bool,
    pack: bool,
    launches: dict | None = None,  # those of a plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T, ...] in x's dtype and layout; if asked for, the last potential [...] and packed spikes."""
    tensors = forward_tensors(x, v_init, keep_v=keep_v, pack=pack)
    x = tensors.x
    if x.numel():
        constants, within = options.passed(x.device, state_dtype(x.dtype)), reach(tensors[:4])

        def make() -> Launch:
            neuron, neighbours = passed(options, constants), ACCESS // x.element_size()
            return _launch("lif_forward", x, neuron, neighbours, within, flags=(pack,))

        remembered(launches, ("forward", within), make)(*tensors, constants)
    return tensors[2:]


def backward(
    grad_spikes: Tensor,  # [T, ...]
    grad_v_last: Tensor | None,  # [...]
    x: Tensor,  # [T, ...]
    v_init: Tensor | None,  # [...]
    options: Options,
    *,
    parameters: bool,
    launches: dict | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [T, ...] and v_init [...]; with `parameters`, each neuron's part [...] in those of θ and 1/τ."""
    tensors = backward_tensors(grad_spikes, grad_v_last, x, v_init, parameters=parameters)
    x, grad_stride = tensors.x, tensors.grad_spikes.stride(0)
    if x.numel():
        T, state = len(x), state_dtype(x.dtype)
        chunks = -(-T // STEPS)
        checkpoints = torch.empty(chunks - 1, x[0].numel(), dtype=state, device=x.device) if chunks > 1 else None
        constants, within = options.passed(x.device, state), reach((*tensors, checkpoints))

        def make() -> Launch:
            neuron, neighbours = passed(options, constants), ACCESS // x.element_size()
            while neighbours > 1 and neighbours * min(T, STEPS) * state.itemsize > HISTORY:
                neighbours //= 2
            others = {"strides": (grad_stride,), "numbers": (neuron.alpha,), "flags": (*neuron.slopes, parameters)}
            return _launch("lif_backward", x, neuron, neighbours, within, **others)

        remembered(launches, ("backward", grad_stride, within), make)(*tensors, checkpoints, constants)
    return tensors[4:]


def _launch(kernel, x, neuron, neighbours, within, *, strides=(), numbers=(), flags=()) -> Launch:
    """Of `kernel`, with `neighbours` neurons a thread where rows and the reach of all tensors let it access these."""
    T, row = x.shape[0], x[0]
    N, strides = row.numel(), (x.stride(0), *strides)
    if neighbours > within or any(apart % neighbours for apart in (N, *strides)):
        neighbours = 1
    shape = (NUMBERS[x.dtype], neighbours, min(T, STEPS), T > STEPS)
    by_channel = neuron.channels > 1
    return Launch(
        SOURCE,
        specialised(kernel, *shape, *neuron.charging, *flags),
        -(-N // (neighbours * THREADS)),
        THREADS,
        (
            *(T, N, neuron.channels, row.stride(1) if by_channel else 1, *strides),  # of x [T, B, C, ...] if by channel
            *(*neuron.numbers, *numbers),
        ),
        real=state_dtype(x.dtype),
        device=x.device,
    )
