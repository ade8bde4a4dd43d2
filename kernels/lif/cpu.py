"""Native CPU kernels of the multi-step LIF neuron; cpu.cpp says how they go through memory."""

from __future__ import annotations

import torch

from ..launch.cpu import DTYPES, run, structure
from ..neuron.cpu import describe
from ..neuron.options import Options
from .reference import state_dtype
from .tensors import BackwardTensors, ForwardTensors, backward_tensors, forward_tensors

_Arguments = structure("LifArguments")


def forward(
    x: torch.Tensor,  # [T, ...]
    v_init: torch.Tensor | None,  # [...]
    options: Options,
    *,
    keep_v: bool,
    pack: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Spikes [T, ...] in x's dtype and layout; if asked for, the last potential [...] and packed spikes."""
    tensors = forward_tensors(x, v_init, keep_v=keep_v, pack=pack)
    _launch("seal_lif_forward", tensors, options)
    return tensors.spikes, tensors.v_last, tensors.packed


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
    tensors = backward_tensors(grad_spikes, grad_v_last, x, v_init, parameters=parameters)
    _launch("seal_lif_backward", tensors, options, grad_stride=tensors.grad_spikes.stride(0))
    return tensors.grad_x, tensors.grad_v_init, tensors.grad_threshold, tensors.grad_inverse_tau


def _launch(name: str, tensors: ForwardTensors | BackwardTensors, options: Options, *, grad_stride: int = 0) -> None:
    x, row = tensors.x, tensors.x[0]
    if row.numel() == 0:
        return
    channel_stride = row.stride(1) if row.dim() > 1 else 1
    neuron, _constants = describe(options, state_dtype(x.dtype), x.device, channel_stride)
    arguments = _Arguments(
        **{key: tensor.data_ptr() for key, tensor in tensors._asdict().items() if tensor is not None},
        T=x.shape[0],
        N=row.numel(),
        x_stride=x.stride(0),
        grad_stride=grad_stride,
        neuron=neuron,
        dtype=DTYPES[x.dtype],
        threads=torch.get_num_threads(),
    )
    run(name, arguments)
