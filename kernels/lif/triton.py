r"""Triton kernels of the multi-step LIF neuron. x is T rows of N numbers, each row dense in memory, whatever its shape.

With θ the threshold, r the reset, d = 1 - 1/τ, and in the order of reference.py, for t = 1…T

    charge  h_t = d v_{t-1} + x_t,   v_{t-1} - (v_{t-1} - r)/τ + x_t   or   v_{t-1} + (x_t - (v_{t-1} - r))/τ
    fire    s_t = h_t ≥ θ;           reset  v_t = (1 - s_t) h_t + s_t r   or   h_t - s_t θ

and with a_t, c_t the gradients of s_t and v_t, g_t = σ'(h_t - θ), for t = T…1

    ∂L/∂h_t = a_t g_t + c_t ∂v_t/∂h_t,   c_{t-1} = d ∂L/∂h_t,   ∂L/∂x_t = ∂L/∂h_t, or 1/τ of it with decay_input

A program takes BLOCK neurons through all time steps, so that forward reads x once and writes the spikes, and backward
reads x and a once and writes ∂L/∂x. Backward recomputes h from x and keeps it in registers, for a chunk of up to 16
steps; between longer runs' chunks the potential goes through memory. Triton has no arrays of registers, but inlines
every call: both kernels recur over the steps of a chunk, and each level of the recursion keeps its own step's values.
A function cannot name itself, as Triton 3.2 hashes what a function names before itself; so it is its own argument.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.triton import ACCESS, aligned, argument, number, size, start
from ..neuron.options import Options
from ..neuron.triton import (
    charge,
    constants_of,
    fire,
    input_slope,
    inverse_tau_slope,
    reset_potential,
    reset_slope,
    reset_threshold_slope,
)
from ..packing.triton import store_bits
from ..surrogate.triton import derivative
from .reference import state_dtype
from .tensors import backward_tensors, forward_tensors

THREADS = 128  # of a program
CHUNK = tl.constexpr(16)  # time steps whose potentials are in registers at once
# Bytes that a thread keeps in registers for the way back, at most: beyond it, few threads run, or registers spill.
KEPT = 256
KEPT_LONG = 192  # where chunks follow each other, whose offsets take registers too
# Neighbours that a thread of _backward takes, at most. On an H200, at T = 4 in bfloat16, it took 102 us with 8, and 94
# with 4, as long as a copy of as many bytes.
NEIGHBOURS = 4

# Triton would compile anew for sizes that are 1 or divisible by 16, as those of another batch or resolution may be. It
# is kept from it; all that kernels need to know is ALIGNED, which has two values for each dtype.
_NUMBERS = ["tau", "inverse_tau", "decay", "threshold", "reset"]
_BY_VALUE = [*_NUMBERS, "N", "x_stride", "C", "channel_stride", "chunks"]


@triton.jit
def _steps_forward(
    recur: tl.constexpr,  # this function
    STEPS: tl.constexpr,  # how many steps to run: the deeper levels run all but the last of them
    first,  # of the steps
    v,  # [BLOCK] potential before it
    x,  # [BLOCK] pointers to the neurons' inputs at step 0, whose rows are x_stride apart
    spikes,  # [BLOCK] likewise, whose rows are N apart; or None
    packed,  # [BLOCK / 8] likewise, whose rows are ceil(N / 8) apart; or None
    mask,
    x_stride,
    N,
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Return the potential after the steps. All of their inputs are asked for before the first is waited for."""
    if STEPS > 0:
        t = first + (STEPS - 1)
        x_t = tl.load(x + t * x_stride, mask, other=0.0).to(v.dtype)
        v = recur(
            recur, STEPS - 1, first, v, x, spikes, packed, mask, x_stride, N,
            tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT,
        )  # fmt: skip
        h = charge(v, x_t, tau, inverse_tau, decay, reset, CHARGE)
        spike = fire(h, threshold)
        if spikes is not None:
            tl.store(spikes + t * N, spike.to(spikes.dtype.element_ty), mask)
        if packed is not None:
            store_bits(packed + t * tl.cdiv(N, 8), spike, mask)
        v = reset_potential(h, spike, threshold, reset, SOFT)
    return v


@triton.jit(do_not_specialize=_BY_VALUE)
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
    C,
    channel_stride,
    chunks,  # of CHUNK steps each, after the first chunk
    STEPS: tl.constexpr,  # of the first chunk
    LONG: tl.constexpr,  # whether there are more chunks
    STATE: tl.constexpr,  # dtype of the potential
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    x += n
    spikes += n
    if packed is not None:
        packed += begin // 8 + tl.arange(0, BLOCK // 8)
    v = tl.full([BLOCK], reset, STATE) if v_init is None else tl.load(v_init + n, mask, other=0.0)
    v = _steps_forward(
        _steps_forward, STEPS, 0, v, x, spikes, packed, mask, x_stride, N,
        tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT,
    )  # fmt: skip
    if LONG:
        for chunk in range(chunks):
            t = STEPS + tl.cast(chunk, tl.int64) * CHUNK
            v = _steps_forward(
                _steps_forward, CHUNK, t, v, x, spikes, packed, mask, x_stride, N,
                tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT,
            )  # fmt: skip
    if v_last is not None:
        tl.store(v_last + n, v, mask)


@triton.jit
def _steps_backward(
    recur: tl.constexpr,  # this function
    STEPS: tl.constexpr,  # how many steps to run: this level runs the first, the deeper ones those after it
    first,  # of the steps
    v,  # [BLOCK] potential before it
    c,  # [BLOCK] gradient of the potential after the last step
    sum_threshold,  # [BLOCK] sum over the steps after these
    sum_inverse_tau,  # [BLOCK] likewise
    x,  # [BLOCK] pointers to the neurons' inputs at step 0, whose rows are x_stride apart
    grad_spikes,  # [BLOCK] likewise, whose rows are grad_stride apart
    grad_x,  # [BLOCK] likewise, whose rows are N apart
    mask,
    x_stride,
    grad_stride,
    N,
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    alpha,
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    """Run the steps forwards on the way in and back on the way out; return c before them, and the two sums."""
    if STEPS > 0:
        x_t = tl.load(x + first * x_stride, mask, other=0.0).to(v.dtype)
        a = tl.load(grad_spikes + first * grad_stride, mask, other=0.0)
        h = charge(v, x_t, tau, inverse_tau, decay, reset, CHARGE)
        spike = fire(h, threshold)
        c, sum_threshold, sum_inverse_tau = recur(
            recur, STEPS - 1, first + 1, reset_potential(h, spike, threshold, reset, SOFT),
            c, sum_threshold, sum_inverse_tau, x, grad_spikes, grad_x, mask, x_stride, grad_stride, N,
            tau, inverse_tau, decay, threshold, reset, alpha, CHARGE, SOFT, DETACH, SURROGATE, PARAMETERS,
        )  # fmt: skip
        g = derivative(h - threshold, alpha, SURROGATE)
        a = a.to(v.dtype)
        dh = tl.fma(a, g, c * reset_slope(h, spike, g, threshold, reset, SOFT, DETACH))
        if PARAMETERS:
            sum_threshold += c * reset_threshold_slope(h, spike, g, threshold, reset, SOFT, DETACH) - a * g
            sum_inverse_tau += dh * inverse_tau_slope(v, x_t, reset, CHARGE)
        dx = dh * input_slope(inverse_tau, CHARGE)
        tl.store(grad_x + first * N, dx.to(grad_x.dtype.element_ty), mask)
        c = dh * decay
    return c, sum_threshold, sum_inverse_tau


@triton.jit(do_not_specialize=[*_BY_VALUE, "alpha", "grad_stride"])
def _backward(
    grad_spikes,  # [T, N], rows grad_stride apart: 0 where one row stands for all
    grad_v_last,  # [N] in the state's dtype, or None
    x,  # [T, N], rows x_stride apart
    v_init,  # [N] in the state's dtype; None: the reset
    grad_x,  # [T, N]
    grad_v_init,  # [N] in the state's dtype, or None
    grad_threshold,  # [N] in the state's dtype, or None: sum over T of each neuron's part
    grad_inverse_tau,  # [N] likewise
    checkpoints,  # [chunks, N] in the state's dtype: room for the potential before each chunk but the first
    constants,  # this and what follows as in constants_of
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    alpha,
    N,
    x_stride,
    grad_stride,
    C,
    channel_stride,
    chunks,
    STEPS: tl.constexpr,  # this and what follows as in _forward
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
    x += n
    grad_spikes += n
    grad_x += n
    v = tl.full([BLOCK], reset, STATE) if v_init is None else tl.load(v_init + n, mask, other=0.0)
    c = tl.zeros([BLOCK], STATE)
    sum_threshold = c
    sum_inverse_tau = c
    if grad_v_last is not None:
        c = tl.load(grad_v_last + n, mask, other=0.0)
    if LONG:
        # Forwards through all chunks but the last, then back through all chunks but the first.
        checkpoints += n
        later = _steps_forward(
            _steps_forward, STEPS, 0, v, x, None, None, mask, x_stride, N,
            tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT,
        )  # fmt: skip
        tl.store(checkpoints, later, mask)
        for i in range(chunks - 1):
            chunk = tl.cast(i, tl.int64)
            later = _steps_forward(
                _steps_forward, CHUNK, STEPS + chunk * CHUNK, later, x, None, None, mask, x_stride, N,
                tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT,
            )  # fmt: skip
            tl.store(checkpoints + (chunk + 1) * N, later, mask)
        tl.debug_barrier()  # Triton may have a thread read what another one wrote
        for i in range(chunks):
            chunk = tl.cast(chunks - 1 - i, tl.int64)
            later = tl.load(checkpoints + chunk * N, mask, other=0.0)
            c, sum_threshold, sum_inverse_tau = _steps_backward(
                _steps_backward, CHUNK, STEPS + chunk * CHUNK, later,
                c, sum_threshold, sum_inverse_tau, x, grad_spikes, grad_x, mask, x_stride, grad_stride, N,
                tau, inverse_tau, decay, threshold, reset, alpha, CHARGE, SOFT, DETACH, SURROGATE, PARAMETERS,
            )  # fmt: skip
    c, sum_threshold, sum_inverse_tau = _steps_backward(
        _steps_backward, STEPS, 0, v,
        c, sum_threshold, sum_inverse_tau, x, grad_spikes, grad_x, mask, x_stride, grad_stride, N,
        tau, inverse_tau, decay, threshold, reset, alpha, CHARGE, SOFT, DETACH, SURROGATE, PARAMETERS,
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
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Spikes [T, ...] in x's dtype and layout; the last potential [...] in the state's dtype; the spikes as bits."""
    x, v_init, *outputs = forward_tensors(x, v_init, keep_v=keep_v, pack=pack)
    _launch(_forward, (x[0], v_init, *outputs), x, options)
    return tuple(outputs)


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
    grad_spikes, grad_v_last, x, v_init, *grads = backward_tensors(
        grad_spikes, grad_v_last, x, v_init, parameters=parameters
    )
    state = state_dtype(x.dtype)
    later_chunks = (x.shape[0] - 1) // CHUNK.value
    checkpoints = x.new_empty((later_chunks, x[0].numel()), dtype=state) if later_chunks else None
    _launch(
        _backward,
        (grad_spikes[0], grad_v_last, x[0], v_init, *grads, checkpoints),
        x,
        options,
        numbers=(options.surrogate.alpha,),
        strides=(grad_spikes.stride(0),),
        kept=(1 + parameters) * (x.dtype.itemsize + state.itemsize),  # a and h; x and v
        DETACH=options.detach_reset,
        SURROGATE=options.surrogate.name,
        PARAMETERS=parameters,
    )
    return tuple(grads)


def _launch(kernel, tensors, x, options, *, numbers=(), strides=(), kept=0, **flags):
    """Start `kernel`, each thread of which keeps so many bytes of each of its neurons at each step."""
    T, row, state = x.shape[0], x[0], state_dtype(x.dtype)
    N = row.numel()
    if N == 0:
        return
    constants, values = options.passed(x.device, state)
    C = 1 if constants is None else constants.shape[1]
    strides = (x.stride(0), *strides)
    together = ACCESS // x.dtype.itemsize if aligned(x.dtype, N, *strides) else 1
    long = T > CHUNK.value  # noqa: SIM300 (in capitals, but no literal)
    neighbours = min(together, NEIGHBOURS) if kept else together
    while neighbours > 1 and neighbours * min(T, CHUNK.value) * kept > (KEPT_LONG if long else KEPT):
        neighbours //= 2
    block = THREADS * neighbours
    start(
        kernel,
        -(-N // block),
        *tensors,
        constants,
        *(argument(value, state) for value in (*values, options.v_reset or 0.0, *numbers)),
        N,
        *strides,
        C,
        row.stride(1) if C > 1 else 1,  # of x [T, B, C, ...]
        (T - 1) // CHUNK.value,
        device=x.device,
        num_warps=THREADS // 32,
        STEPS=(T - 1) % CHUNK.value + 1,
        LONG=long,
        STATE=tl.float64 if state == torch.float64 else tl.float32,
        CHARGE=options.charge_kind,
        SOFT=options.v_reset is None,
        PER_CHANNEL=C > 1,
        ALIGNED=together,
        BLOCK=block,
        **flags,
    )
