r"""The multi-step LIF neuron in torch: the meaning that every kernel reproduces bit for bit.

With θ = v_threshold, r = v_reset (0 where it is None), v_0 = v_init or r, for t = 1…T

    charge  h_t = d v_{t-1} + x_t,                  d = 1 - 1/τ     decay_input=False, r = 0
            h_t = v_{t-1} - (v_{t-1} - r)/τ + x_t                   decay_input=False, r ≠ 0
            h_t = v_{t-1} + (x_t - (v_{t-1} - r))/τ                 decay_input=True
    fire    s_t = 1 if h_t ≥ θ else 0
    reset   v_t = (1 - s_t) h_t + s_t r   hard;     v_t = h_t - s_t θ   soft (v_reset=None)

Each operation is its own torch call, so none is contracted into a fused multiply-add. Gradients are autograd's, with
the surrogate derivative in place of the spike's; `detach_reset` cuts the gradient of s_t inside the reset.
"""

from __future__ import annotations

import torch

from ..surrogate.reference import Surrogate, fire


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the membrane potential for an input of `dtype`: 16-bit inputs keep a float32 state."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def lif(
    x: torch.Tensor,  # [T, ...], any strides
    *,
    tau: float | torch.Tensor,
    decay_input: bool,
    v_threshold: float | torch.Tensor,
    v_reset: float | None,
    surrogate: Surrogate,
    detach_reset: bool,
    v_init: torch.Tensor | None,  # shape of x[0]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return spikes [T, ...] in x's dtype and strides, and the last membrane potential [...] in the state's dtype."""
    dtype = state_dtype(x.dtype)
    reset = 0.0 if v_reset is None else v_reset
    threshold = _per_channel(v_threshold, x, dtype)
    tau, decay = _time_constants(tau, x, dtype)

    v = torch.full_like(x[0], reset, dtype=dtype) if v_init is None else v_init.to(dtype)
    spikes = []
    for x_t in x.unbind(0):
        h = _charge(v, x_t.to(dtype), tau, decay, reset, decay_input)
        s = fire(h - threshold, surrogate)
        s_reset = s.detach() if detach_reset else s
        v = h - s_reset * threshold if v_reset is None else (1.0 - s_reset) * h + s_reset * reset
        spikes.append(s.to(x.dtype))
    return _stack_like(spikes, x), v


def _charge(v, x_t, tau, decay, reset, decay_input):
    if not decay_input:
        if reset == 0.0:
            return v * decay + x_t
        return v - (v - reset) / tau + x_t
    if reset == 0.0:
        return v + (x_t - v) / tau
    return v + (x_t - (v - reset)) / tau


def _time_constants(tau, x, dtype):
    """τ and 1 - 1/τ as tensors of the state's dtype, each rounded once from float64.

    τ is a tensor even where it was a float, because torch on a GPU divides by a Python number as a multiplication with
    its reciprocal, which rounds differently from the IEEE division that the contract asks for.
    """
    if isinstance(tau, torch.Tensor):
        exact = tau.double()
        return _per_channel(exact, x, dtype), _per_channel(1.0 - 1.0 / exact, x, dtype)
    return torch.full((), tau, dtype=dtype, device=x.device), 1.0 - 1.0 / tau


def _per_channel(value, x, dtype):
    """A float as it is; a scalar tensor as it is; a tensor [C] shaped to broadcast along the channels of x[t]."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(dtype)
    return value if value.dim() == 0 else value.reshape(-1, *[1] * (x.dim() - 3))


def _stack_like(steps: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Stack time steps in x's memory format: in the order in which a step lies in memory, then permuted back."""
    order = sorted(range(x.dim() - 1), key=lambda axis: -x.stride(axis + 1))
    inverse = [order.index(axis) + 1 for axis in range(x.dim() - 1)]
    return torch.stack([step.permute(order) for step in steps]).permute(0, *inverse)
