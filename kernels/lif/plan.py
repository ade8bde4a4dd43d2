"""Calls of the neuron with tensors of one layout, by the kernels of any room."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from ..neuron.options import Options


class Plan:
    """What calls of lif that differ in their tensors' elements alone share. A room's own may find out more, once.

    Args:
        kernel: The room's module.
        x: The input [T, ...], or one like it.
        options: Of the neuron; each call gives the tensors among them.
        keep_v: Whether the last potential is returned.
        pack: Whether the spikes are returned as bits as well.
        dense: Whether they are returned as numbers; else as bits alone, which the CPU's kernel can.
    """

    def __init__(
        self, kernel: ModuleType, x: Tensor, options: Options, keep_v: bool, pack: bool, *, dense: bool = True
    ):
        self.kernel, self.keep_v, self.pack, self.dense = kernel, keep_v, pack, dense
        self.options, self.parameters = options.without_tensors(), options.in_tensors
        self.layout = x.stride()
        self.launches: dict = {}  # of a GPU

    def for_layout(self, x: Tensor, options: Options) -> Plan:
        """This plan, or one for x where it lies in another way, as what was saved for the backward pass may."""
        if x.stride() == self.layout:
            return self
        return type(self)(self.kernel, x, options, self.keep_v, self.pack, dense=self.dense)

    def forward(
        self, x: Tensor, v_init: Tensor | None, options: Options
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Spikes [T, ...], unless only bits are kept; and if kept the last potential [...] and the spikes as bits."""
        return self.kernel.forward(x, v_init, options, keep_v=self.keep_v, pack=self.pack, launches=self.launches)

    def backward(
        self, grad_spikes: Tensor, grad_v_last: Tensor | None, x: Tensor, v_init: Tensor | None, options: Options
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, v_init, θ and 1/τ (each neuron's part)."""
        return self.kernel.backward(
            grad_spikes, grad_v_last, x, v_init, options, parameters=self.parameters, launches=self.launches
        )
