"""Native CPU kernels of the multi-step LIF neuron; cpu.cpp says how they go through memory."""

from __future__ import annotations

import ctypes

import torch

from ..launch.cpu import DTYPES, function
from ..launch.layout import as_rows, empty_rows, like_row, like_rows
from ..packing.reference import bytes_of
from ..surrogate.reference import SURROGATES
from .options import Options
from .reference import state_dtype


class _Arguments(ctypes.Structure):
    """As LifArguments in cpu.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("x", "v_init", "spikes", "v_last", "packed", "grad_spikes", "grad_v_last", "grad_x", "grad_v_init"),
                *("grad_threshold", "grad_inverse_tau", "constants"),
            )
        ),
        *((name, ctypes.c_int64) for name in ("T", "N", "x_stride", "grad_stride", "channels", "channel_stride")),
        *((name, ctypes.c_double) for name in ("reset", "alpha")),
        *((name, ctypes.c_int32) for name in ("dtype", "charge", "soft", "detach", "decay_input", "surrogate")),
        ("threads", ctypes.c_int32),
    )


def forward(
    x: torch.Tensor,  # [T, ...]
    v_init: torch.Tensor | None,  # [...]
    options: Options,
    *,
    keep_v: bool,
    pack: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Spikes [T, ...] in x's dtype and layout; if asked for, the last potential [...] and packed spikes."""
    x = as_rows(x)
    outputs = {"spikes": empty_rows(x)}
    if keep_v:
        outputs["v_last"] = torch.empty_like(outputs["spikes"][0], dtype=state_dtype(x.dtype))
    if pack:
        outputs["packed"] = torch.empty(bytes_of(x), dtype=torch.uint8)
    _launch("seal_lif_forward", x, v_init, options, **outputs)
    return outputs["spikes"], outputs.get("v_last"), outputs.get("packed")


def backward(
    grad_spikes: torch.Tensor,  # [T, ...]
    grad_v_last: torch.Tensor | None,  # [...], in the state's dtype
    x: torch.Tensor,  # [T, ...]
    v_init: torch.Tensor | None,  # [...]
    options: Options,
    *,
    parameters: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x [T, ...] and v_init [...]; with `parameters`, each neuron's part [...] in those of θ and 1/τ."""
    x = as_rows(x)
    grads = {"grad_x": empty_rows(x)}
    row = grads["grad_x"][0]
    dtype = state_dtype(x.dtype)
    names = ["grad_v_init"] * (v_init is not None) + ["grad_threshold", "grad_inverse_tau"] * parameters
    grads |= {name: torch.empty_like(row, dtype=dtype) for name in names}
    upstream = {"grad_spikes": like_rows(grad_spikes.to(x.dtype), x)}
    if grad_v_last is not None:
        upstream["grad_v_last"] = like_row(grad_v_last.to(dtype), row)
    _launch("seal_lif_backward", x, v_init, options, **upstream, **grads)
    return tuple(grads.get(name) for name in ("grad_x", "grad_v_init", "grad_threshold", "grad_inverse_tau"))


def _launch(name: str, x: torch.Tensor, v_init: torch.Tensor | None, options: Options, **tensors: torch.Tensor) -> None:
    row = x[0]
    if row.numel() == 0:
        return
    dtype = state_dtype(x.dtype)
    tensors["x"] = x
    tensors["constants"] = constants = options.constants(x.device, dtype)
    if v_init is not None:
        tensors["v_init"] = like_row(v_init.to(dtype), row)
    channels = constants.shape[1]
    arguments = _Arguments(
        **{key: tensor.data_ptr() for key, tensor in tensors.items()},
        T=x.shape[0],
        N=row.numel(),
        x_stride=x.stride(0),
        grad_stride=tensors["grad_spikes"].stride(0) if "grad_spikes" in tensors else 0,
        channels=channels,
        channel_stride=row.stride(1) if channels > 1 else 1,
        reset=options.v_reset or 0.0,
        alpha=options.surrogate.alpha,
        dtype=DTYPES[x.dtype],
        charge=options.charge_kind,
        soft=options.v_reset is None,
        detach=options.detach_reset,
        decay_input=options.decay_input,
        surrogate=list(SURROGATES).index(options.surrogate.name),
        threads=torch.get_num_threads(),
    )
    if function(name)(ctypes.byref(arguments)) != 0:
        raise RuntimeError(f"{name} has no code for {x.dtype}.")
