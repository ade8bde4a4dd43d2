"""CUDA C++ kernels of the multi-step LIF neuron; cuda.cu says how they go through memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..launch.cupy import ACCESS, launch
from ..launch.layout import as_rows, empty_rows, like_row, like_rows
from ..packing.reference import bytes_of
from ..surrogate.reference import SURROGATES
from .options import Options
from .reference import state_dtype

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
    x = as_rows(x)
    state = state_dtype(x.dtype)
    spikes = empty_rows(x)
    v_init = None if v_init is None else like_row(v_init.to(state), x[0])
    v_last = torch.empty_like(spikes[0], dtype=state) if keep_v else None
    packed = torch.empty(bytes_of(x), dtype=torch.uint8, device=x.device) if pack else None
    neighbours = ACCESS // x.element_size()
    _launch("lif_forward", x, options, neighbours, (x, v_init, spikes, v_last), others=(packed,), flags=(pack,))
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
    x = as_rows(x)
    T, row, state = x.shape[0], x[0], state_dtype(x.dtype)
    grad_x = empty_rows(x)
    grad_spikes = like_rows(grad_spikes.to(x.dtype), grad_x)
    grad_v_last, v_init = (None if given is None else like_row(given.to(state), row) for given in (grad_v_last, v_init))
    wanted = (v_init is not None, parameters, parameters)
    sums = [torch.empty_like(grad_x[0], dtype=state) if want else None for want in wanted]
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
        (grad_spikes, grad_v_last, x, v_init, grad_x, *sums, checkpoints),
        strides=(grad_spikes.stride(0),),
        numbers=(surrogate.alpha,),
        flags=(options.detach_reset, list(SURROGATES).index(surrogate.name), parameters),
    )
    return grad_x, *sums


def _launch(kernel, x, options, neighbours, tensors, *, others=(), strides=(), numbers=(), flags=()):
    """Start `kernel` with `neighbours` neurons a thread where all `tensors` let it read and write these at once."""
    T, row, state = x.shape[0], x[0], state_dtype(x.dtype)
    N = row.numel()
    if N == 0:
        return
    if options.in_tensors:
        constants, values = options.constants(x.device, state), (0.0,) * 4
    else:
        constants, values = None, options.numbers()
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
