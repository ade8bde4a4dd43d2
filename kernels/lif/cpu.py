"""Native CPU kernels of the multi-step LIF neuron; cpu.cpp says how they go through memory."""

from __future__ import annotations

import ctypes

import torch

from ..launch.cpu import DTYPES, run, structure
from ..launch.layout import as_rows, like_row, like_rows
from ..neuron.cpu import describe
from ..neuron.options import Options
from ..packing.reference import bytes_of
from . import plan
from .reference import state_dtype

_Arguments = structure("LifArguments")


def forward(
    x: torch.Tensor,  # [T, ...]
    v_init: torch.Tensor | None,  # [...]
    options: Options,
    *,
    keep_v: bool,
    pack: bool,
    launches: dict | None = None,  # of GPUs, as the next
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Spikes [T, ...] in x's dtype and layout; if asked for, the last potential [...] and packed spikes."""
    x = as_rows(x)
    return Plan(None, x, options, keep_v, pack).forward(x, v_init, options)


def backward(
    grad_spikes: torch.Tensor,  # [T, ...]
    grad_v_last: torch.Tensor | None,  # [...], in the state's dtype
    x: torch.Tensor,  # [T, ...]
    v_init: torch.Tensor | None,  # [...]
    options: Options,
    *,
    parameters: bool,
    launches: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x [T, ...] and v_init [...]; with `parameters`, each neuron's part [...] in those of θ and 1/τ."""
    x = as_rows(x)
    plan = Plan(None, x, options, keep_v=False, pack=False)
    plan.parameters = parameters
    return plan.backward(grad_spikes, grad_v_last, x, v_init, options)


class Plan(plan.Plan):
    """Calls whose arguments to native code are laid out once."""

    def __init__(self, kernel, x, options, keep_v, pack, *, dense=True):
        super().__init__(kernel, x, options, keep_v, pack, dense=dense)
        rows = as_rows(x)
        self.copies, self.empty = rows is not x, rows[0].numel() == 0
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.state, self.packed = state_dtype(x.dtype), bytes_of(rows)
        self.row, self.row_strides = x.shape[1:], rows.stride()[1:]
        self.strides = rows[0].numel(), *self.row_strides
        self.channel_stride = self.row_strides[1] if len(self.row) > 1 else 1
        N = rows[0].numel()
        self.arguments = _Arguments(T=len(x), N=N, x_stride=rows.stride(0), dtype=DTYPES[x.dtype])
        self.constants = None
        if not options.in_tensors:
            self.arguments.neuron, self.constants = self._neuron(options)

    def forward(self, x, v_init, options):  # noqa: D102
        if self.copies:
            x = as_rows(x)
        arguments, spikes, v_last, packed = _Arguments.from_buffer_copy(self.arguments), None, None, None
        arguments.x = x.data_ptr()
        if self.dense:
            spikes = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
            arguments.spikes = spikes.data_ptr()
        if v_init is not None:
            v_init = self._state(v_init, x)
            arguments.v_init = v_init.data_ptr()
        if self.keep_v:
            v_last = self._empty_row()
            arguments.v_last = v_last.data_ptr()
        if self.pack:
            packed = torch.empty(self.packed, dtype=torch.uint8, device=self.device)
            arguments.packed = packed.data_ptr()
        self._run("seal_lif_forward", arguments, options)
        return spikes, v_last, packed

    def backward(self, grad_spikes, grad_v_last, x, v_init, options):  # noqa: D102
        if self.copies:
            x = as_rows(x)
        arguments, grad_v_init, grad_threshold, grad_inverse_tau = (
            _Arguments.from_buffer_copy(self.arguments),
            *[None] * 3,
        )
        if grad_spikes.dtype is not self.dtype or grad_spikes.stride()[1:] != self.row_strides:
            grad_spikes = like_rows(grad_spikes.to(self.dtype), x)
        grad_x = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        arguments.x, arguments.grad_x = x.data_ptr(), grad_x.data_ptr()
        arguments.grad_spikes, arguments.grad_stride = grad_spikes.data_ptr(), grad_spikes.stride(0)
        if grad_v_last is not None:
            grad_v_last = self._state(grad_v_last, x)
            arguments.grad_v_last = grad_v_last.data_ptr()
        if v_init is not None:
            v_init, grad_v_init = self._state(v_init, x), self._empty_row()
            arguments.v_init, arguments.grad_v_init = v_init.data_ptr(), grad_v_init.data_ptr()
        if self.parameters:
            grad_threshold, grad_inverse_tau = self._empty_row(), self._empty_row()
            arguments.grad_threshold = grad_threshold.data_ptr()
            arguments.grad_inverse_tau = grad_inverse_tau.data_ptr()
        self._run("seal_lif_backward", arguments, options)
        return grad_x, grad_v_init, grad_threshold, grad_inverse_tau

    def _run(self, name: str, arguments: ctypes.Structure, options: Options) -> None:
        if self.empty:
            return
        if self.constants is None:
            arguments.neuron, _constants = self._neuron(options)
        arguments.threads = torch.get_num_threads()
        run(name, arguments)

    def _neuron(self, options: Options) -> tuple[ctypes.Structure, torch.Tensor]:
        return describe(options, self.state, self.device, self.channel_stride)

    def _empty_row(self) -> torch.Tensor:
        return torch.empty_strided(self.row, self.row_strides, dtype=self.state, device=self.device)

    def _state(self, row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if row.dtype is self.state and row.stride() == self.row_strides:
            return row
        return like_row(row.to(self.state), x[0])
