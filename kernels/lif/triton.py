"""Triton kernels of the multi-step LIF neuron. x is T rows of N numbers, each row dense in memory, whatever its shape.

A program takes BLOCK neurons through all time steps, as neuron/triton_steps.py has it: forward reads x once and writes
the spikes; backward reads x and the spikes' gradient once and writes that of x.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launch.launches import remembered
from ..launch.triton import ACCESS, Launch, aligned, number, size
from ..neuron.options import Options
from ..neuron.triton import constants_of
from ..neuron.triton_steps import BY_VALUE, CHUNK, launch_of, run_backward, run_forward
from .reference import state_dtype
from .tensors import backward_tensors, forward_tensors

THREADS = 128  # of a program
# Bytes that a thread keeps in registers for the way back, at most: beyond it, few threads run, or registers spill.
KEPT = 256
KEPT_LONG = 192  # where chunks follow each other, whose offsets take registers too
# Neighbours that a thread of _backward takes, at most. On an H200, at T = 4 in bfloat16, it took 102 us with 8, and 94
# with 4, as long as a copy of as many bytes.
NEIGHBOURS = 4


@triton.jit(do_not_specialize=[*BY_VALUE, "C", "channel_stride"])
def _forward(
    x,  # [T, N], rows x_stride apart: 0 where one row stands for all
    v_init,  # [N] in the state's dtype; None: the reset
    spikes,  # [T, N]
    v_last,  # [N] in the state's dtype, or None
    packed,  # [T, ceil(N / 8)] uint8, or None
    constants,  # this and what follows as in constants_of
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    N,
    x_stride,
    chunks,  # this and the next three as in run_forward
    C,
    channel_stride,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    LONG: tl.constexpr,
    STATE: tl.constexpr,  # dtype of the potential
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,  # divides N and strides
    BLOCK: tl.constexpr,
):
    N, x_stride = size(N, ALIGNED), size(x_stride, ALIGNED)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    n = begin + tl.arange(0, BLOCK)
    mask = n < N
    reset = number(reset, STATE)
    tau, inverse_tau, decay, threshold = constants_of(
        constants, tau, inverse_tau, decay, threshold, begin, C, channel_stride, STATE, PER_CHANNEL, BLOCK
    )
    v = tl.full([BLOCK], reset, STATE) if v_init is None else tl.load(v_init + n, mask, other=0.0)
    v = run_forward(
        v, x, None, spikes, None, packed, n, begin // 8 + tl.arange(0, BLOCK // 8), mask, x_stride, 0, N,
        None, None, None, None, tau, inverse_tau, decay, threshold, reset,
        chunks, STEPS, CHUNK, LONG, CHARGE, SOFT, False,
    )  # fmt: skip
    if v_last is not None:
        tl.store(v_last + n, v, mask)


@triton.jit(do_not_specialize=[*BY_VALUE, "alpha", "grad_stride", "C", "channel_stride"])
def _backward(
    grad_spikes,  # [T, N], rows grad_stride apart: 0 where one row stands for all
    grad_v_last,  # [N] in the state's dtype, or None
    x,  # [T, N], rows x_stride apart
    v_init,  # [N] in the state's dtype; None: the reset
    grad_x,  # [T, N]
    grad_v_init,  # [N] in the state's dtype, or None
    grad_threshold,  # [N] in the state's dtype, or None: sum over T of each neuron's part
    grad_inverse_tau,  # [N] likewise
    checkpoints,  # [chunks, N] in the state's dtype, or None
    constants,  # this and what follows as in _forward
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    alpha,
    N,
    x_stride,
    grad_stride,
    chunks,
    C,
    channel_stride,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    LONG: tl.constexpr,
    STATE: tl.constexpr,
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    PARAMETERS: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    N, x_stride, grad_stride = size(N, ALIGNED), size(x_stride, ALIGNED), size(grad_stride, ALIGNED)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    n = begin + tl.arange(0, BLOCK)
    mask = n < N
    reset, alpha = number(reset, STATE), number(alpha, STATE)
    tau, inverse_tau, decay, threshold = constants_of(
        constants, tau, inverse_tau, decay, threshold, begin, C, channel_stride, STATE, PER_CHANNEL, BLOCK
    )
    v = tl.full([BLOCK], reset, STATE) if v_init is None else tl.load(v_init + n, mask, other=0.0)
    c = tl.zeros([BLOCK], STATE) if grad_v_last is None else tl.load(grad_v_last + n, mask, other=0.0)
    c, _, _, _, sum_threshold, sum_inverse_tau = run_backward(
        v, c, x, None, grad_spikes, None, grad_x, checkpoints, n, mask, x_stride, 0, grad_stride, N,
        None, None, None, None, None, None, tau, inverse_tau, decay, threshold, reset, alpha,
        chunks, STEPS, CHUNK, LONG, CHARGE, SOFT, False, DETACH, SURROGATE, PARAMETERS,
    )  # fmt: skip
    if grad_v_init is not None:
        tl.store(grad_v_init + n, c, mask)
    if PARAMETERS:
        tl.store(grad_threshold + n, sum_threshold, mask)
        tl.store(grad_inverse_tau + n, sum_inverse_tau, mask)


def forward(
    x: Tensor,  # [T, ...]
    v_init: Tensor | None,  # [...]
    options: Options,
    *,
    keep_v: bool,
    pack: bool,
    launches: dict | None = None,  # those of a plan
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T, ...] in x's dtype and layout; the last potential [...] in the state's dtype; the spikes as bits."""
    x, v_init, *outputs = forward_tensors(x, v_init, keep_v=keep_v, pack=pack)
    if x.numel():
        constants = options.passed(x.device, state_dtype(x.dtype))
        launch = remembered(launches, "forward", lambda: _launch(_forward, x, options, constants))
        launch(x, v_init, *outputs, constants)
    return tuple(outputs)


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
    grad_spikes, grad_v_last, x, v_init, *grads = backward_tensors(
        grad_spikes, grad_v_last, x, v_init, parameters=parameters
    )
    if x.numel():
        state, T, grad_stride = state_dtype(x.dtype), len(x), grad_spikes.stride(0)
        checkpoints = x.new_empty(((T - 1) // CHUNK, x[0].numel()), dtype=state) if T > CHUNK else None
        constants = options.passed(x.device, state)

        def make() -> Launch:
            return _launch(
                _backward,
                x,
                options,
                constants,
                strides=(grad_stride,),
                kept=(1 + parameters) * (x.dtype.itemsize + state.itemsize),  # a and h; x and v
                numbers=(options.surrogate.alpha,),
                DETACH=options.detach_reset,
                SURROGATE=options.surrogate.name,
                PARAMETERS=parameters,
            )

        launch = remembered(launches, ("backward", grad_stride), make)
        launch(grad_spikes, grad_v_last, x, v_init, *grads, checkpoints, constants)
    return tuple(grads)


def _launch(kernel, x: Tensor, options: Options, constants: Tensor | None, *, strides=(), kept=0, **others) -> Launch:
    """Of `kernel`, each thread of which keeps so many bytes of each of its neurons at each step."""
    T, row = x.shape[0], x[0]
    N, strides = row.numel(), (x.stride(0), *strides)
    together = ACCESS // x.dtype.itemsize if aligned(x.dtype, N, *strides) else 1
    neighbours = min(together, NEIGHBOURS) if kept else together
    while neighbours > 1 and neighbours * min(T, CHUNK) * kept > (KEPT_LONG if T > CHUNK else KEPT):
        neighbours //= 2
    return launch_of(
        kernel,
        -(-N // (THREADS * neighbours)),
        options,
        constants,
        device=x.device,
        state=state_dtype(x.dtype),
        steps=T,
        chunk=CHUNK,
        threads=THREADS,
        N=N,
        strides=strides,
        sizes=(row.shape[1], row.stride(1)) if row.dim() > 1 else (1, 1),  # of x [T, B, C, ...]
        ALIGNED=together,
        BLOCK=THREADS * neighbours,
        **others,
    )
