"""One time step of a LIF neuron for Triton kernels: the operations of lif/reference.py, in its order.

v is the potential after the step before, h after the charge, r the reset (0 where it is soft) and θ the threshold.
Potentials are [BLOCK], in the state's dtype; constants are scalars in it or, by channel, [BLOCK].
"""

import triton
import triton.language as tl

from ..launch.triton import divide, number


@triton.jit
def constants_of(
    constants,  # [4, C] or [4, 1] in the state's dtype: τ, 1/τ, 1 - 1/τ and θ; None: they are the numbers that follow
    tau,
    inverse_tau,
    decay,
    threshold,
    begin,  # the program's first neuron, int64
    C,
    channel_stride,  # neuron n has channel n // channel_stride % C
    STATE: tl.constexpr,
    PER_CHANNEL: tl.constexpr,  # whether constants are [4, C]
    BLOCK: tl.constexpr,
):
    """τ, 1/τ, 1 - 1/τ and θ of the program's neurons."""
    if constants is None:
        tau, inverse_tau = number(tau, STATE), number(inverse_tau, STATE)
        decay, threshold = number(decay, STATE), number(threshold, STATE)
    else:
        if PER_CHANNEL:
            # Only the program divides 64-bit numbers: its neurons count from where the first one's channel begins, or
            # from so little before them that 32 bits suffice, and none meets more than one end of a channel of BLOCK.
            channel = (begin // channel_stride % C).to(tl.int32)
            width = tl.minimum(channel_stride, BLOCK).to(tl.int32)
            left = tl.minimum(channel_stride - begin % channel_stride, BLOCK).to(tl.int32)
            constants += (channel + (width - left + tl.arange(0, BLOCK)) // width) % C
        row = C if PER_CHANNEL else 1
        tau, inverse_tau = tl.load(constants), tl.load(constants + row)
        decay, threshold = tl.load(constants + 2 * row), tl.load(constants + 3 * row)
    return tau, inverse_tau, decay, threshold


@triton.jit
def charge(v, x, tau, inverse_tau, decay, reset, CHARGE: tl.constexpr):
    """The potential h before the reset; CHARGE is Options.charge_kind.

    "multiply" stands where 1/τ is a power of two and a product equals the quotient exactly.
    """
    if CHARGE == "decay":  # d = 1 - 1/τ: decay_input=False, r = 0
        h = v * decay + x
    elif CHARGE == "leak_divide":  # decay_input=False
        h = v - divide(v - reset, tau) + x
    elif CHARGE == "leak_multiply":
        h = v - (v - reset) * inverse_tau + x
    elif CHARGE == "filter_divide":  # decay_input=True
        h = v + divide(x - (v - reset), tau)
    else:
        tl.static_assert(CHARGE == "filter_multiply")
        h = v + (x - (v - reset)) * inverse_tau
    return h


@triton.jit
def fire(h, threshold):
    """1 where the neuron fires, else 0; NaN does not fire."""
    return (h - threshold >= 0).to(h.dtype)


@triton.jit
def reset_potential(h, spike, threshold, reset, SOFT: tl.constexpr):
    """The potential after the reset."""
    return h - spike * threshold if SOFT else (1.0 - spike) * h + spike * reset


@triton.jit
def reset_slope(h, spike, g, threshold, reset, SOFT: tl.constexpr, DETACH: tl.constexpr):
    """∂v/∂h across the reset; g is the surrogate derivative."""
    slope = 1.0 if SOFT else 1.0 - spike
    if not DETACH:
        slope = slope - threshold * g if SOFT else tl.fma(reset - h, g, slope)
    return slope


@triton.jit
def reset_threshold_slope(h, spike, g, threshold, reset, SOFT: tl.constexpr, DETACH: tl.constexpr):
    """∂v/∂θ across the reset."""
    slope = -spike if SOFT else 0.0 * spike
    if not DETACH:
        slope += threshold * g if SOFT else (h - reset) * g
    return slope


@triton.jit
def input_slope(inverse_tau, CHARGE: tl.constexpr):
    """∂h/∂x; `charge` refuses unknown kinds."""
    return inverse_tau if CHARGE == "filter_divide" or CHARGE == "filter_multiply" else 1.0


@triton.jit
def inverse_tau_slope(v, x, reset, CHARGE: tl.constexpr):
    """∂h/∂(1/τ)."""
    distance = v - reset
    return x - distance if CHARGE == "filter_divide" or CHARGE == "filter_multiply" else -distance
