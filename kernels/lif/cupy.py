"""CUDA C++ kernels of the multi-step LIF neuron; cuda.cu says how they go through memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..launch.cupy import ACCESS, launch
from ..neuron.options import Options
from ..surrogate.reference import SURROGATES
from .reference import state_dtype
from .tensors import backward_tensors, forward_tensors

SOURCE = Path(__file__).with_name("cuda.cu")
THREADS = 128  # of a block, as in cuda.cu
STEPS = 16  # whose inputs are in registers at once, at most
HISTORY = 128  # bytes of registers for a thread's potentials before each reset, at most: beyond it, few threads run
NUMBERS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "double"}


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
    _launch("lif_forward", x, options, ACCESS // x.element_size(), tensors, others=(packed,), flags=(pack,))
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
    surrogate = options.surrogate
    _launch(
        "lif_backward",
        x,
        options,
        neighbours,
        (*tensors, checkpoints),
        strides=(tensors.grad_spikes.stride(0),),
        numbers=(surrogate.alpha,),
        flags=(options.detach_reset, list(SURROGATES).index(surrogate.name), parameters),
    )
    return tensors[4:]


def _launch(kernel, x, options, neighbours, tensors, *, others=(), strides=(), numbers=(), flags=()):
    """Start `kernel` with `neighbours` neurons a thread where all `tensors` let it read and write these at once."""
    T, row, state = x.shape[0], x[0], state_dtype(x.dtype)
    N = row.numel()
    if N == 0:
        return
    constants, values = options.passed(x.device, state)
    channels = 1 if constants is None else constants.shape[1]
    strides = (x.stride(0), *strides)
    if not _together(neighbours, [tensor for tensor in tensors if tensor is not None], (N, *strides)):
        neighbours = 1
    shape = (NUMBERS[x.dtype], neighbours, min(T, STEPS), T > STEPS)
    neuron = (options.charge_kind, options.v_reset is None, channels > 1)
    template = ", ".join(str(argument).lower() for argument in (*shape, *neuron, *flags))
    launch(
        SOURCE,
        f"{kernel}<{template}>",
        -(-N // (neighbours * THREADS)),
        THREADS,
        (
            *(*tensors, *others, constants),
            *(T, N, channels, row.stride(1) if channels > 1 else 1, *strides),  # of x [T, B, C, ...] if by channel
            *(float(value) for value in (*values, options.v_reset or 0.0, *numbers)),
        ),
        real=state,
        device=x.device,
    )


def _together(neighbours: int, tensors: list[Tensor], strides: tuple[int, ...]) -> bool:
    """Whether rows at these strides, in numbers, and all tensors begin where an access to `neighbours` numbers can."""
    return all(stride % neighbours == 0 for stride in strides) and all(
        tensor.data_ptr() % min(ACCESS, neighbours * tensor.element_size()) == 0 for tensor in tensors
    )
