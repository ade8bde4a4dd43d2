"""Native CPU kernels of the multi-step LIF neuron; cpu.cpp says how they go through memory."""

from __future__ import annotations

import ctypes

import torch

from ..launch.cpu import DTYPES, function
from ..launch.layout import as_rows, empty_rows, like_rows
from ..surrogate.reference import SURROGATES
from .options import Options
from .reference import state_dtype


class _Arguments(ctypes.Structure):
    """As LifArguments in cpu.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("x", "v_init", "spikes", "v_last", "grad_spikes", "grad_v_last", "grad_x", "grad_v_init"),
                *("grad_threshold", "grad_inverse_tau", "tau", "threshold"),
            )
        ),
        *((name, ctypes.c_int64) for name in ("T", "N", "x_stride", "channels", "channel_stride")),
        *((name, ctypes.c_double) for name in ("reset", "alpha")),
        *((name, ctypes.c_int32) for name in ("dtype", "decay_input", "soft", "detach", "surrogate", "threads")),
    )


def forward(x: torch.Tensor, v_init: torch.Tensor | None, options: Options) -> tuple[torch.Tensor, torch.Tensor]:
    """Spikes [T, ...] in x's dtype and layout, and the last potential [...] in the state's dtype."""
    x = as_rows(x)
    spikes = empty_rows(x)
    v_last = torch.empty_like(spikes[0], dtype=state_dtype(x.dtype))
    _launch("seal_lif_forward", x, v_init, options, spikes=spikes, v_last=v_last)
    return spikes, v_last


def backward(
    grad_spikes: torch.Tensor,  # [T, ...]
    grad_v_last: torch.Tensor | None,  # [...], in the state's dtype
    x: torch.Tensor,  # [T, ...]
    v_init: torch.Tensor | None,  # [...]
    options: Options,
    *,
    parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x [T, ...] and v_init [...]; with `parameters`, each neuron's part [...] in those of θ and 1/τ."""
    x = as_rows(x)
    grad_x = empty_rows(x)
    state = torch.empty_like(grad_x[0], dtype=state_dtype(x.dtype))
    grads = {"grad_x": grad_x, "grad_v_init": state}
    if parameters:
        grads |= {"grad_threshold": torch.empty_like(state), "grad_inverse_tau": torch.empty_like(state)}
    upstream = {"grad_spikes": like_rows(grad_spikes.to(x.dtype), grad_x)}
    if grad_v_last is not None:
        upstream["grad_v_last"] = like_rows(grad_v_last.to(state.dtype), state)
    _launch("seal_lif_backward", x, v_init, options, **upstream, **grads)
    return grad_x, state, grads.get("grad_threshold"), grads.get("grad_inverse_tau")


def _launch(name: str, x: torch.Tensor, v_init: torch.Tensor | None, options: Options, **tensors: torch.Tensor) -> None:
    if x[0].numel() == 0:
        return
    rows = x[0]
    tensors["x"] = x
    tensors["tau"], tensors["threshold"] = options.per_channel(torch.device("cpu"))
    if v_init is not None:
        tensors["v_init"] = like_rows(v_init.to(state_dtype(x.dtype)), rows)
    channels = tensors["tau"].numel()
    arguments = _Arguments(
        **{key: tensor.data_ptr() for key, tensor in tensors.items()},
        T=x.shape[0],
        N=rows.numel(),
        x_stride=x.stride(0),
        channels=channels,
        channel_stride=rows.stride(1) if channels > 1 else 1,
        reset=options.v_reset or 0.0,
        alpha=options.surrogate.alpha,
        dtype=DTYPES[x.dtype],
        decay_input=options.decay_input,
        soft=options.v_reset is None,
        detach=options.detach_reset,
        surrogate=list(SURROGATES).index(options.surrogate.name),
        threads=torch.get_num_threads(),
    )
    if function(name)(ctypes.byref(arguments)) != 0:
        raise RuntimeError(f"{name} has no code for {x.dtype}.")
