"""CUDA C++ kernels of the multi-step LIF neuron; cuda.cu says how they go through memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..launch.cupy import ACCESS, NUMBERS, launch, specialised, together
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T, ...] in x's dtype and layout; if asked for, the last potential [...] and packed spikes."""
    *tensors, packed = forward_tensors(x, v_init, keep_v=keep_v, pack=pack)
    x, _, spikes, v_last = tensors
    neuron = passed(options, x.device, state_dtype(x.dtype))
    _launch("lif_forward", x, neuron, ACCESS // x.element_size(), tensors, others=(packed,), flags=(pack,))
    return spikes, v_last, packed


def backward(
    grad_spikes: Tensor,  # [T, ...]
    grad_v_last: Tensor | None,  # [...]
    x: Tensor,  # [T, ...]
    v_init: Tensor | None,  # [...]
    options: Options,
    *,
    parameters: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [T, ...] and v_init [...]; with `parameters`, each neuron's part [...] in those of θ and 1/τ."""
    tensors = backward_tensors(grad_spikes, grad_v_last, x, v_init, parameters=parameters)
    x = tensors.x
    T, row, state = x.shape[0], x[0], state_dtype(x.dtype)
    chunks = -(-T // STEPS)
    checkpoints = torch.empty(chunks - 1, row.numel(), dtype=state, device=x.device) if chunks > 1 else None
    neighbours = ACCESS // x.element_size()
    while neighbours > 1 and neighbours * min(T, STEPS) * state.itemsize > HISTORY:
        neighbours //= 2
    neuron = passed(options, x.device, state)
    _launch(
        "lif_backward",
        x,
        neuron,
        neighbours,
        (*tensors, checkpoints),
        strides=(tensors.grad_spikes.stride(0),),
        numbers=(neuron.alpha,),
        flags=(*neuron.slopes, parameters),
    )
    return tensors[4:]


def _launch(kernel, x, neuron, neighbours, tensors, *, others=(), strides=(), numbers=(), flags=()):
    """Start `kernel` with `neighbours` neurons a thread where all `tensors` let it read and write these at once."""
    T, row = x.shape[0], x[0]
    N = row.numel()
    if N == 0:
        return
    strides = (x.stride(0), *strides)
    if not together(neighbours, tensors, (N, *strides)):
        neighbours = 1
    shape = (NUMBERS[x.dtype], neighbours, min(T, STEPS), T > STEPS)
    by_channel = neuron.channels > 1
    launch(
        SOURCE,
        specialised(kernel, *shape, *neuron.charging, *flags),
        -(-N // (neighbours * THREADS)),
        THREADS,
        (
            *(*tensors, *others, neuron.constants),
            *(T, N, neuron.channels, row.stride(1) if by_channel else 1, *strides),  # of x [T, B, C, ...] if by channel
            *(*neuron.numbers, *numbers),
        ),
        real=state_dtype(x.dtype),
        device=x.device,
    )
