"""Time steps of batch norm + residual + LIF in Triton: a chunk of them, forwards, or forwards and back again.

The neuron is that of lif/triton.py, and as there both functions recur over the steps, so that each level keeps its own
step's values in registers. Blocks have any one shape; scales, shifts, means and constants broadcast to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.triton import argument, start
from ..lif.reference import state_dtype
from ..neuron.options import Options
from ..neuron.triton import (
    charge,
    fire,
    input_slope,
    inverse_tau_slope,
    reset_potential,
    reset_slope,
    reset_threshold_slope,
)
from ..packing.triton import store_bits
from ..surrogate.triton import derivative
from .tensors import Inputs

THREADS = 128  # of a program
CHUNK = 16  # most time steps that are in registers at once; half of them where a thread keeps too much of each

_NUMBERS = ["tau", "inverse_tau", "decay", "threshold", "reset"]
_STRIDES = ["N", "y_stride", "residual_stride"]
BY_VALUE = [*_NUMBERS, *_STRIDES, "chunks"]  # see lif/triton.py


@triton.jit
def _membrane_input(y, residual, scale, shift, residual_scale, residual_shift):
    """The neuron's input m at one step; residual and what belongs to it may be None."""
    m = y * scale + shift
    if residual is not None:
        if residual_scale is not None:
            residual = residual * residual_scale + residual_shift
        m += residual
    return m


@triton.jit
def steps_forward(
    recur: tl.constexpr,  # this function
    STEPS: tl.constexpr,  # how many steps to run: the deeper levels run all but the last of them
    first,  # of the steps
    v,  # potential before it
    y,  # pointers to step 0 here and in what follows, whose rows are y_stride apart
    residual,  # or None
    spikes,  # rows N apart; or None
    m,  # rows N apart; or None
    packed,  # rows ceil(N / 8) apart; or None
    n,  # offsets of the neurons, of packed 8 neurons each
    bits,
    mask,
    y_stride,
    residual_stride,
    N,
    scale,
    shift,
    residual_scale,
    residual_shift,
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    ONCE: tl.constexpr,  # whether m is the same at each step
):
    """Return the potential after the steps. All of their inputs are asked for before the first is waited for."""
    if STEPS > 0:
        t = first + (STEPS - 1)
        y_t = tl.load(y + t * y_stride + n, mask, other=0.0).to(v.dtype)
        r_t = None
        if residual is not None:
            r_t = tl.load(residual + t * residual_stride + n, mask, other=0.0).to(v.dtype)
        v = recur(
            recur, STEPS - 1, first, v, y, residual, spikes, m, packed, n, bits, mask, y_stride, residual_stride, N,
            scale, shift, residual_scale, residual_shift, tau, inverse_tau, decay, threshold, reset,
            CHARGE, SOFT, ONCE,
        )  # fmt: skip
        x = _membrane_input(y_t, r_t, scale, shift, residual_scale, residual_shift)
        h = charge(v, x, tau, inverse_tau, decay, reset, CHARGE)
        spike = fire(h, threshold)
        if spikes is not None:
            tl.store(spikes + t * N + n, spike.to(spikes.dtype.element_ty), mask)
        if m is not None:
            first_row = mask & (n + t * N < N)
            tl.store(m + t * N + n, x.to(m.dtype.element_ty), first_row if ONCE else mask)
        if packed is not None:
            store_bits(packed + t * tl.cdiv(N, 8) + bits, spike, mask)
        v = reset_potential(h, spike, threshold, reset, SOFT)
    return v


@triton.jit
def steps_backward(
    recur: tl.constexpr,  # this function
    STEPS: tl.constexpr,  # how many steps to run: this level runs the first, the deeper ones those after it
    first,  # of the steps
    v,  # potential before it
    c,  # gradient of the potential after the last step
    total,  # Σ dm over the steps after these
    total_y,  # Σ dm (y - mean) likewise
    total_residual,  # Σ dm (residual - residual_mean) likewise, where there is a residual_mean
    total_threshold,  # each neuron's part in the gradient of the threshold, with PARAMETERS
    total_inverse_tau,  # likewise
    y,  # pointers to step 0, as in steps_forward
    residual,
    grad_spikes,  # rows N apart
    grad_m,  # rows N apart, only step 0 with ONCE; or None
    grad_steps,  # rows N apart; or None
    n,
    mask,
    y_stride,
    residual_stride,
    N,
    scale,
    shift,
    residual_scale,
    residual_shift,
    mean,
    residual_mean,
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    alpha,
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    ONCE: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    """Run the steps forwards on the way in and back on the way out; return c before them, and the totals."""
    if STEPS > 0:
        y_t = tl.load(y + first * y_stride + n, mask, other=0.0)
        a = tl.load(grad_spikes + first * N + n, mask, other=0.0)
        r_t, x_r = None, None
        if residual is not None:
            r_t = tl.load(residual + first * residual_stride + n, mask, other=0.0)
            x_r = r_t.to(v.dtype)
        a_m = None
        if grad_m is not None:
            first_row = mask & (n + first * N < N)
            a_m = tl.load(grad_m + first * N + n, first_row if ONCE else mask, other=0.0)
        x = _membrane_input(y_t.to(v.dtype), x_r, scale, shift, residual_scale, residual_shift)
        h = charge(v, x, tau, inverse_tau, decay, reset, CHARGE)
        spike = fire(h, threshold)
        c, total, total_y, total_residual, total_threshold, total_inverse_tau = recur(
            recur, STEPS - 1, first + 1, reset_potential(h, spike, threshold, reset, SOFT),
            c, total, total_y, total_residual, total_threshold, total_inverse_tau,
            y, residual, grad_spikes, grad_m, grad_steps, n, mask, y_stride, residual_stride, N,
            scale, shift, residual_scale, residual_shift, mean, residual_mean,
            tau, inverse_tau, decay, threshold, reset, alpha, CHARGE, SOFT, ONCE, DETACH, SURROGATE, PARAMETERS,
        )  # fmt: skip
        g = derivative(h - threshold, alpha, SURROGATE)
        a = a.to(v.dtype)
        dh = tl.fma(a, g, c * reset_slope(h, spike, g, threshold, reset, SOFT, DETACH))
        if PARAMETERS:
            total_threshold += c * reset_threshold_slope(h, spike, g, threshold, reset, SOFT, DETACH) - a * g
            total_inverse_tau += dh * inverse_tau_slope(v, x, reset, CHARGE)
        c = dh * decay
        dm = dh * input_slope(inverse_tau, CHARGE)
        if grad_m is not None:
            dm += a_m.to(v.dtype)
        if grad_steps is not None:
            tl.store(grad_steps + first * N + n, dm.to(grad_steps.dtype.element_ty), mask)
        total += dm
        total_y = tl.fma(dm, y_t.to(v.dtype) - mean, total_y)
        if residual_mean is not None:
            total_residual = tl.fma(dm, r_t.to(v.dtype) - residual_mean, total_residual)
    return c, total, total_y, total_residual, total_threshold, total_inverse_tau


def chunk_of(time_steps: int, kept: int, most: int) -> int:
    """How many steps are in registers at once, where a thread keeps `kept` bytes of each and `most` of all, at most."""
    return CHUNK if min(time_steps, CHUNK) * kept <= most else CHUNK // 2


def launch(
    kernel,
    programs: int,
    tensors: tuple[Tensor | None, ...],
    given: Inputs,
    options: Options,
    *,
    chunk: int,
    sizes: tuple[int, ...],
    numbers: tuple[float, ...] = (),
    threads: int = THREADS,
    **flags,
) -> None:
    """Start a kernel of `tensors`, of a neuron's constants, of `numbers`, of N and what follows it, and of `sizes`."""
    state = state_dtype(given.y.dtype)
    constants, values = options.passed(given.y.device, state)
    start(
        kernel,
        programs,
        *tensors,
        constants,
        *(argument(value, state) for value in (*values, options.v_reset or 0.0, *numbers)),
        given.N,
        given.y_stride,
        given.residual_stride,
        (given.T - 1) // chunk,
        *sizes,
        device=given.y.device,
        num_warps=threads // 32,
        maxnreg=255,  # without a limit, ptxas may spill some to have only 128
        STEPS=(given.T - 1) % chunk + 1,
        CHUNK=chunk,
        LONG=chunk < given.T,
        STATE=tl.float64 if state == torch.float64 else tl.float32,
        CHARGE=options.charge_kind,
        SOFT=options.v_reset is None,
        PER_CHANNEL=constants is not None and constants.shape[1] > 1,
        ONCE=given.y_stride == given.residual_stride == 0,
        **flags,
    )
