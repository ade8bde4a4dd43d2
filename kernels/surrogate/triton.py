"""Surrogate derivatives σ'(u) for Triton kernels; reference.py has the formulas' names and sources."""

import triton
import triton.language as tl

from ..launch.triton import divide, divide_by_moderate, exp_negative

_HALF_PI = tl.constexpr(1.5707963267948966)
_INVERSE_ROOT_PI = tl.constexpr(0.5641895835477563)


@triton.jit
def derivative(
    u,  # potential minus threshold, float32 or float64
    alpha,  # sharpness, a scalar in u's dtype
    KIND: tl.constexpr,  # a name of SURROGATES in reference.py
):
    """σ'(u), element-wise."""
    magnitude = tl.abs(u)
    if KIND == "sigmoid":
        # p(1-p) = e/(1+e)^2 with e = exp(-α|u|): no cancellation where p is near 1.
        e = exp_negative(magnitude, alpha)
        slope = divide_by_moderate(alpha * e, (1.0 + e) * (1.0 + e))
    elif KIND == "atan":
        scaled = u * (alpha * _HALF_PI)
        slope = (alpha * 0.5) / (1.0 + scaled * scaled)
    elif KIND == "piecewise_quadratic":
        value = alpha - alpha * alpha * magnitude
        slope = tl.where(value < 0, 0.0, value)  # NaN stays
    elif KIND == "piecewise_exp":
        slope = (alpha * 0.5) * exp_negative(magnitude, alpha)
    elif KIND == "soft_sign":
        width = 1.0 / alpha + magnitude
        slope = 1.0 / (2.0 * alpha * width * width)
    elif KIND == "super_spike":
        width = 1.0 + magnitude
        slope = alpha / (width * width)
    elif KIND == "erf":
        scaled = u * alpha
        slope = (alpha * _INVERSE_ROOT_PI) * tl.exp(-scaled * scaled)
    elif KIND == "triangle":
        value = 1.0 - magnitude
        slope = tl.where(value < 0, 0.0, alpha * value)
    else:
        tl.static_assert(KIND == "rectangle")
        slope = tl.where(magnitude < divide(tl.full((), 0.5, alpha.dtype), alpha), alpha, 0.0)
    return slope
