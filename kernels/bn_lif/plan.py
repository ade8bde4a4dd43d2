"""Calls of a layer with tensors of one layout, by the kernels of any room."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..lif.reference import state_dtype
from ..neuron.options import Options
from . import ranks
from .norms import Norm, coefficients_of, scales


class Kind(NamedTuple):
    """What calls of a layer have in common besides the layout of their tensors."""

    time_steps: int
    static: bool  # whether y is [B, C, ...], the same at each time step
    keep_m: bool
    pack: bool
    dense: bool = True  # whether the spikes are written as numbers; else as bits alone, which the CPU's kernel can

    def of_kernel(self) -> dict[str, int | bool]:
        """What every room's `forward` takes of it."""
        return {name: value for name, value in self._asdict().items() if name != "dense"}

    def no_gradient(self, y: Tensor) -> Tensor:
        """What stands for the spikes' gradient where none comes: zeros [T·B, C, ...] in the memory of one."""
        return y.new_zeros(()).expand(y.shape[0] * (self.time_steps if self.static else 1), *y.shape[1:])


class Plan:
    """What calls of bn_lif that differ in their tensors' elements alone share. A room's own may find out more, once.

    Args:
        kernel: The room's module.
        y: The layer's input, or one like it; this and residual as in tensors.py.
        residual: Likewise.
        options: Of the neuron; each call gives the tensors among them.
        norms: The batch norms of y and, if it has one, of the residual; each call gives their tensors.
        kind: What else the calls have in common.
        group: Ranks that share the statistics, where they are several.
    """

    def __init__(
        self,
        kernel: ModuleType,
        y: Tensor,
        residual: Tensor | None,
        options: Options,
        norms: list[Norm],
        kind: Kind,
        group: ProcessGroup | None = None,
    ):
        self.kernel, self.kind, self.group = kernel, kind, group
        self.options = options.without_tensors()
        self.counts = tuple(norm.count for norm in norms)
        self.numbers = [norm.numbers for norm in norms]
        self.dtypes = [None if each is None else each.dtype for norm in norms for each in norm.tensors[:2]]
        self.state, self.learned = state_dtype(y.dtype), options.in_tensors
        batch = y.shape[0] if kind.static else y.shape[0] // kind.time_steps
        self.fixed = [kind.static, residual is not None and residual.shape[0] == batch]  # over time: y and residual
        self.lay(y, residual)

    def lay(self, y: Tensor, residual: Tensor | None) -> None:
        """Find out what depends on how the layer's inputs lie."""
        self.layout = _strides(y), _strides(residual)
        self.launches: dict = {}  # of a GPU

    def for_layout(self, y: Tensor, residual: Tensor | None) -> Plan:
        """This plan, or one for inputs that lie in another way, as what was saved for the backward pass may."""
        if self.layout == (_strides(y), _strides(residual)):
            return self
        other = copy.copy(self)
        other.lay(y, residual)
        return other

    def table(self, y: Tensor) -> Tensor:
        """Room for what norms.py says."""
        return torch.empty(4 * len(self.counts), y.shape[1], dtype=self.state, device=y.device)

    def forward(
        self,
        y: Tensor,
        residual: Tensor | None,
        options: Options,
        table: Tensor | None,  # None: not needed afterwards
        norms: list[tuple[Tensor | None, ...]],  # the tensors of each Norm; none where the table is filled already
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Spikes [T·B, C, ...], unless only bits are kept; and if kept the membrane input and the spikes as bits."""
        given = [Norm(*tensors, *numbers) for tensors, numbers in zip(norms, self.numbers, strict=False)]
        call = self.kind.of_kernel()
        if given and table is None and not any(self.counts):
            return self.kernel.forward(y, residual, None, options, **call, norms=tuple(given), launches=self.launches)
        if table is None:
            table = self.table(y)
        for i, norm in enumerate(given):
            self.kernel.fill_table(table, i, residual if i else y, norm, launches=self.launches)
        return self.kernel.forward(y, residual, scales(table), options, **call, launches=self.launches)

    def backward(
        self,
        grad_spikes: Tensor,
        grad_m: Tensor | None,
        y: Tensor,
        residual: Tensor | None,
        options: Options,
        table: Tensor,
        needs: tuple[bool, bool],  # whether y and residual need gradients
    ) -> list[Tensor | None]:
        """Gradients of y, residual, θ, 1/τ (each neuron's part) and each norm's weight and bias."""
        kernel, counts = self.kernel, self.counts
        wanted = (needs[0], residual is not None and needs[1])
        found = kernel.backward(
            *(grad_spikes, grad_m, y, residual, table, options),
            counts=counts if self.group is None else (0,) * len(counts),
            time_steps=self.kind.time_steps,
            static=self.kind.static,
            steps=any(want and not fixed for want, fixed in zip(wanted, self.fixed, strict=True)),
            total=any(want and fixed for want, fixed in zip(wanted, self.fixed, strict=True)),
            parameters=options.in_tensors,
            launches=self.launches,
        )
        coefficients = found.coefficients
        if self.group is not None:
            coefficients = coefficients_of(table, ranks.summed(found.sums, self.group), counts)
        rows = [found.grad_total if fixed else found.grad_steps for fixed in self.fixed]
        grads = [None, rows[1] if wanted[1] else None]
        for i, (count, source) in enumerate(zip(counts, (y, residual), strict=False)):
            if wanted[i]:
                needed_again = i == 0 and wanted[1] and self.fixed[0] == self.fixed[1]
                source = None if isinstance(count, int) and count == 0 else source
                of_norm = coefficients[3 * i : 3 * i + 3]
                grads[i] = kernel.normalised_gradient(
                    rows[i], source, of_norm, in_place=not needed_again, launches=self.launches
                )
        grads += [found.grad_threshold, found.grad_inverse_tau]
        # Not as views, which autograd.grad would hand out: changing one in place would count as a change of the others.
        for row, dtype in zip(found.grad_norms.unbind(), self.dtypes, strict=True):
            grads.append(None if dtype is None else row.data.to(dtype))
        return grads


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tensor.stride()
