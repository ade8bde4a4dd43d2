"""The loop over time in Triton, for every kernel in which neurons run: forwards, or forwards and back again.

A neuron is driven by the current m_t = x_t, or, with a batch norm, by (x_t scale + shift) + residual_t, where the
residual may have scales of its own. With θ the threshold, r the reset, d = 1 - 1/τ, and in the order of
lif/reference.py, for t = 1…T

    charge  h_t = d v_{t-1} + m_t,   v_{t-1} - (v_{t-1} - r)/τ + m_t   or   v_{t-1} + (m_t - (v_{t-1} - r))/τ
    fire    s_t = h_t ≥ θ;           reset  v_t = (1 - s_t) h_t + s_t r   or   h_t - s_t θ

and with a_t, c_t the gradients of s_t and v_t, g_t = σ'(h_t - θ), for t = T…1

    ∂L/∂h_t = a_t g_t + c_t ∂v_t/∂h_t,   c_{t-1} = d ∂L/∂h_t,   ∂L/∂m_t = ∂L/∂h_t, or 1/τ of it with decay_input

Inputs are read once each way. The backward pass computes h again and keeps it in registers, for a chunk of up to 16
steps; between longer runs' chunks the potential goes through memory. Triton has no arrays of registers, but inlines
every call: functions recur over the steps of a chunk, and each level of the recursion keeps its own step's values. A
function cannot name itself, as Triton 3.2 hashes what a function names before itself; so it is its own argument.

Blocks have any one shape; scales, shifts, means and constants broadcast to it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch.triton import Launch, argument
from ..packing.triton import store_bits
from ..surrogate.triton import derivative
from .options import Options
from .triton import (
    charge,
    fire,
    input_slope,
    inverse_tau_slope,
    reset_potential,
    reset_slope,
    reset_threshold_slope,
)

CHUNK = 16  # most time steps that are in registers at once; half of them where a thread keeps too much of each

# Triton would compile anew for sizes that are 1 or divisible by 16, as those of another batch or resolution may be. It
# is kept from it; all that kernels need to know is ALIGNED, which has few values for each dtype.
BY_VALUE = ["tau", "inverse_tau", "decay", "threshold", "reset", "N", "x_stride", "chunks"]


@triton.jit
def _current(x, residual, scale, shift, residual_scale, residual_shift):
    """What drives the neuron at one step; all but x may be None."""
    if scale is not None:
        x = x * scale + shift
    if residual is not None:
        if residual_scale is not None:
            residual = residual * residual_scale + residual_shift
        x += residual
    return x


@triton.jit
def _chunk_forward(
    recur: tl.constexpr,  # this function
    STEPS: tl.constexpr,  # how many steps to run: the deeper levels run all but the last of them
    first,  # of the steps
    v,  # potential before it
    x,  # this and what follows as in run_forward
    residual,
    spikes,  # or None
    m,
    packed,
    n,
    bits,
    mask,
    x_stride,
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
    ONCE: tl.constexpr,
):
    """Return the potential after the steps. All of their inputs are asked for before the first is waited for."""
    if STEPS > 0:
        t = first + (STEPS - 1)
        x_t = tl.load(x + t * x_stride + n, mask, other=0.0).to(v.dtype)
        r_t = None
        if residual is not None:
            r_t = tl.load(residual + t * residual_stride + n, mask, other=0.0).to(v.dtype)
        v = recur(
            recur, STEPS - 1, first, v, x, residual, spikes, m, packed, n, bits, mask, x_stride, residual_stride, N,
            scale, shift, residual_scale, residual_shift, tau, inverse_tau, decay, threshold, reset,
            CHARGE, SOFT, ONCE,
        )  # fmt: skip
        m_t = _current(x_t, r_t, scale, shift, residual_scale, residual_shift)
        h = charge(v, m_t, tau, inverse_tau, decay, reset, CHARGE)
        spike = fire(h, threshold)
        if spikes is not None:
            tl.store(spikes + t * N + n, spike.to(spikes.dtype.element_ty), mask)
        if m is not None:
            first_row = mask & (n + t * N < N)
            tl.store(m + t * N + n, m_t.to(m.dtype.element_ty), first_row if ONCE else mask)
        if packed is not None:
            store_bits(packed + t * tl.cdiv(N, 8) + bits, spike, mask)
        v = reset_potential(h, spike, threshold, reset, SOFT)
    return v


@triton.jit
def run_forward(
    v,  # potential before the first step
    x,  # pointer to the first step, whose rows are x_stride apart; 0 where one row stands for all
    residual,  # likewise, or None
    spikes,  # pointer to the first step, rows N apart
    m,  # rows N apart, the first alone with ONCE; or None
    packed,  # rows ceil(N / 8) apart; or None
    n,  # offsets of the neurons in a row
    bits,  # offsets of their bytes in a row of packed, of 8 neurons each
    mask,  # of the neurons
    x_stride,
    residual_stride,
    N,
    scale,  # this and the next of the batch norm, or None
    shift,
    residual_scale,  # this and the next of the residual's batch norm, or None
    residual_shift,
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    chunks,  # of CHUNK steps, after the first chunk
    STEPS: tl.constexpr,  # of the first chunk
    CHUNK: tl.constexpr,
    LONG: tl.constexpr,  # whether there are more chunks
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    ONCE: tl.constexpr,  # whether the current is the same at each step
):
    """Run all steps; return the potential after the last."""
    v = _chunk_forward(
        _chunk_forward, STEPS, 0, v, x, residual, spikes, m, packed, n, bits, mask, x_stride, residual_stride, N,
        scale, shift, residual_scale, residual_shift, tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT, ONCE,
    )  # fmt: skip
    if LONG:
        for chunk in range(chunks):
            v = _chunk_forward(
                _chunk_forward, CHUNK, STEPS + tl.cast(chunk, tl.int64) * CHUNK, v, x, residual, spikes, m, packed,
                n, bits, mask, x_stride, residual_stride, N, scale, shift, residual_scale, residual_shift,
                tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT, ONCE,
            )  # fmt: skip
    return v


@triton.jit
def _chunk_backward(
    recur: tl.constexpr,  # this function
    STEPS: tl.constexpr,  # how many steps to run: this level runs the first, the deeper ones those after it
    first,  # of the steps
    v,  # potential before it
    c,  # gradient of the potential after the last step
    total,  # this and what follows as run_backward returns it, over the steps after these
    total_x,
    total_residual,
    total_threshold,
    total_inverse_tau,
    x,  # this and what follows as in run_backward
    residual,
    grad_spikes,
    grad_m,
    grad_steps,
    n,
    mask,
    x_stride,
    residual_stride,
    grad_stride,
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
        x_t = tl.load(x + first * x_stride + n, mask, other=0.0)
        a = tl.load(grad_spikes + first * grad_stride + n, mask, other=0.0)
        r_t, r_state = None, None
        if residual is not None:
            r_t = tl.load(residual + first * residual_stride + n, mask, other=0.0)
            r_state = r_t.to(v.dtype)
        a_m = None
        if grad_m is not None:
            first_row = mask & (n + first * N < N)
            a_m = tl.load(grad_m + first * N + n, first_row if ONCE else mask, other=0.0)
        m_t = _current(x_t.to(v.dtype), r_state, scale, shift, residual_scale, residual_shift)
        h = charge(v, m_t, tau, inverse_tau, decay, reset, CHARGE)
        spike = fire(h, threshold)
        c, total, total_x, total_residual, total_threshold, total_inverse_tau = recur(
            recur, STEPS - 1, first + 1, reset_potential(h, spike, threshold, reset, SOFT),
            c, total, total_x, total_residual, total_threshold, total_inverse_tau,
            x, residual, grad_spikes, grad_m, grad_steps, n, mask, x_stride, residual_stride, grad_stride, N,
            scale, shift, residual_scale, residual_shift, mean, residual_mean,
            tau, inverse_tau, decay, threshold, reset, alpha, CHARGE, SOFT, ONCE, DETACH, SURROGATE, PARAMETERS,
        )  # fmt: skip
        g = derivative(h - threshold, alpha, SURROGATE)
        a = a.to(v.dtype)
        dh = tl.fma(a, g, c * reset_slope(h, spike, g, threshold, reset, SOFT, DETACH))
        if PARAMETERS:
            total_threshold += c * reset_threshold_slope(h, spike, g, threshold, reset, SOFT, DETACH) - a * g
            total_inverse_tau += dh * inverse_tau_slope(v, m_t, reset, CHARGE)
        c = dh * decay
        dm = dh * input_slope(inverse_tau, CHARGE)
        if grad_m is not None:
            dm += a_m.to(v.dtype)
        if grad_steps is not None:
            tl.store(grad_steps + first * N + n, dm.to(grad_steps.dtype.element_ty), mask)
        if mean is not None:
            total += dm
            total_x = tl.fma(dm, x_t.to(v.dtype) - mean, total_x)
        if residual_mean is not None:
            total_residual = tl.fma(dm, r_t.to(v.dtype) - residual_mean, total_residual)
    return c, total, total_x, total_residual, total_threshold, total_inverse_tau


@triton.jit
def run_backward(
    v,  # potential before the first step
    c,  # gradient of the potential after the last
    x,  # this and what follows as in run_forward
    residual,
    grad_spikes,  # pointer to the first step, whose rows are grad_stride apart
    grad_m,  # rows N apart, the first alone with ONCE; or None
    grad_steps,  # gradient of the current, rows N apart; or None
    checkpoints,  # rows N apart, one of each chunk but the first: room for the potential before it
    n,
    mask,
    x_stride,
    residual_stride,
    grad_stride,
    N,
    scale,
    shift,
    residual_scale,
    residual_shift,
    mean,  # of the batch norm, or None
    residual_mean,  # likewise
    tau,
    inverse_tau,
    decay,
    threshold,
    reset,
    alpha,
    chunks,
    STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
    LONG: tl.constexpr,
    CHARGE: tl.constexpr,
    SOFT: tl.constexpr,
    ONCE: tl.constexpr,
    DETACH: tl.constexpr,
    SURROGATE: tl.constexpr,
    PARAMETERS: tl.constexpr,
):
    """Run all steps forwards and back.

    Returns:
        The gradient of the potential before the first step; with dm = ∂L/∂m the sums over time Σ dm, Σ dm (x - mean)
        and Σ dm (residual - residual_mean), 0 where there is no such mean; with PARAMETERS, each neuron's part in the
        gradients of θ and 1/τ.
    """
    zero = tl.zeros_like(v)
    total, total_x, total_residual, total_threshold, total_inverse_tau = zero, zero, zero, zero, zero
    if LONG:
        # Forwards through all chunks but the last, then back through all chunks but the first.
        later = _chunk_forward(
            _chunk_forward, STEPS, 0, v, x, residual, None, None, None, n, None, mask, x_stride, residual_stride, N,
            scale, shift, residual_scale, residual_shift, tau, inverse_tau, decay, threshold, reset,
            CHARGE, SOFT, ONCE,
        )  # fmt: skip
        tl.store(checkpoints + n, later, mask)
        for i in range(chunks - 1):
            chunk = tl.cast(i, tl.int64)
            later = _chunk_forward(
                _chunk_forward, CHUNK, STEPS + chunk * CHUNK, later, x, residual, None, None, None, n, None, mask,
                x_stride, residual_stride, N, scale, shift, residual_scale, residual_shift,
                tau, inverse_tau, decay, threshold, reset, CHARGE, SOFT, ONCE,
            )  # fmt: skip
            tl.store(checkpoints + (chunk + 1) * N + n, later, mask)
        tl.debug_barrier()  # Triton may have a thread read what another one wrote
        for i in range(chunks):
            chunk = tl.cast(chunks - 1 - i, tl.int64)
            later = tl.load(checkpoints + chunk * N + n, mask, other=0.0)
            c, total, total_x, total_residual, total_threshold, total_inverse_tau = _chunk_backward(
                _chunk_backward, CHUNK, STEPS + chunk * CHUNK, later,
                c, total, total_x, total_residual, total_threshold, total_inverse_tau,
                x, residual, grad_spikes, grad_m, grad_steps, n, mask, x_stride, residual_stride, grad_stride, N,
                scale, shift, residual_scale, residual_shift, mean, residual_mean,
                tau, inverse_tau, decay, threshold, reset, alpha, CHARGE, SOFT, ONCE, DETACH, SURROGATE, PARAMETERS,
            )  # fmt: skip
    c, total, total_x, total_residual, total_threshold, total_inverse_tau = _chunk_backward(
        _chunk_backward, STEPS, 0, v, c, total, total_x, total_residual, total_threshold, total_inverse_tau,
        x, residual, grad_spikes, grad_m, grad_steps, n, mask, x_stride, residual_stride, grad_stride, N,
        scale, shift, residual_scale, residual_shift, mean, residual_mean,
        tau, inverse_tau, decay, threshold, reset, alpha, CHARGE, SOFT, ONCE, DETACH, SURROGATE, PARAMETERS,
    )  # fmt: skip
    return c, total, total_x, total_residual, total_threshold, total_inverse_tau


def chunk_of(time_steps: int, kept: int, most: int) -> int:
    """How many steps are in registers at once, where a thread keeps `kept` bytes of each and `most` of all, at most."""
    return CHUNK if min(time_steps, CHUNK) * kept <= most else CHUNK // 2


def launch_of(
    kernel,
    programs: int,
    options: Options,
    constants: Tensor | None,  # of the options, the last of the kernel's tensors
    *,
    device: torch.device,
    state: torch.dtype,  # of the potential
    steps: int,  # T
    chunk: int,
    threads: int,
    N: int,
    strides: tuple[int, ...],  # of the inputs
    sizes: tuple[int, ...],
    numbers: tuple[float, ...] = (),
    **flags,
) -> Launch:
    """Of a kernel that takes, after its tensors, a neuron's constants, `numbers`, N, strides, chunks and `sizes`."""
    return Launch(
        kernel,
        programs,
        (
            *(argument(value, state) for value in (*options.by_value, options.v_reset or 0.0, *numbers)),
            *(N, *strides, (steps - 1) // chunk, *sizes),
        ),
        device=device,
        num_warps=threads // 32,
        STEPS=(steps - 1) % chunk + 1,
        CHUNK=chunk,
        LONG=chunk < steps,
        STATE=tl.float64 if state == torch.float64 else tl.float32,
        CHARGE=options.charge_kind,
        SOFT=options.v_reset is None,
        PER_CHANNEL=constants is not None and constants.shape[1] > 1,
        **flags,
    )
