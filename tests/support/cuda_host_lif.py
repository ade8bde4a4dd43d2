"""Runs of the LIF neuron's CUDA kernels on the CPU beside the reference: random inputs in every layout."""

from __future__ import annotations

import contextlib
import random
import sys
from dataclasses import dataclass
from itertools import product

import pytest
import torch

import cuda_host
from seal_fast.kernels.launch.layout import as_rows
from seal_fast.kernels.lif import cupy as room
from seal_fast.kernels.lif import reference
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.packing.reference import pack
from seal_fast.kernels.surrogate.reference import SURROGATES, Surrogate

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
MARGIN = 2048  # numbers before and after each tensor, which no kernel may read or write; more than a block takes
# Of the largest gradient, besides the rounding to 16 bits. Measured 1e-6, 1e-15, 4e-7 and 7e-5.
GRADIENT = {F32: 2e-6, F64: 1e-14, F16: 2e-6, BF16: 2e-4}
HALF_UNIT = {F32: 0.0, F64: 0.0, F16: 2.0**-11, BF16: 2.0**-8}  # of a number's last place, relative to the number
LEAST = {F32: 0.0, F64: 0.0, F16: 2.0**-25, BF16: 0.0}  # half a unit of the smallest numbers


@dataclass(frozen=True)
class Setup:
    """What a kernel is specialised for, and so compiled anew."""

    dtype: torch.dtype
    T: int
    decay_input: bool
    v_reset: float | None
    tau: float
    surrogate: str
    detach_reset: bool
    form: str  # of tau and the threshold
    packed: bool

    def options(self, channels: int) -> Options:
        tau, threshold = self.tau, 0.75
        if self.form == "scalars":
            tau, threshold = torch.tensor(tau), torch.tensor([threshold], dtype=F64)
        elif self.form == "channels":
            tau, threshold = torch.linspace(tau, 3.3, channels), torch.linspace(threshold, 1.3, channels)
        elif self.form == "tau by channel":
            tau = torch.linspace(tau, 3.3, channels, dtype=F64)
        neuron = self.decay_input, threshold, self.v_reset, Surrogate(self.surrogate), self.detach_reset
        return Options(tau, *neuron)


def balanced(values, number: int, seed: int) -> list:
    """Each of the values as often as the others, in some order."""
    values = list(values)
    column = (values * number)[:number]
    random.Random(seed).shuffle(column)
    return column


def setups() -> list[Setup]:
    """In float32 every surrogate, detached and not, and every kind of neuron three times; then the other dtypes."""
    dtypes = [F32] * 36 + [F64, F16, BF16] * 4
    neurons = list(product([False, True], [0.0, None, -0.3], [2.0, 1.7]))
    surrogates = list(product(SURROGATES, [False, True]))
    columns = (
        balanced([1, 4, 16, 17, 33], 36, 0) + [4] * 3 + [1] * 3 + [16] * 3 + [33] * 3,
        neurons * 3 + balanced(neurons, 12, 1),
        balanced(surrogates, 36, 2) + [("sigmoid", False)] * 3 + balanced(surrogates, 9, 3),
        ["floats"] * 12 + balanced(["scalars", "channels", "tau by channel"], 24, 4) + balanced(FORMS, 12, 5),
        balanced([True, False], 48, 6),
    )
    return [
        Setup(dtype, T, *neuron, *surrogate, form, packed)
        for dtype, T, neuron, surrogate, form, packed in zip(dtypes, *columns, strict=True)
    ]


FORMS = ("floats", "scalars", "channels", "tau by channel")
SETUPS = setups()
# [B, C, M]: a single neuron, odd numbers of them, and one access more or less than a block's 128 threads make, with 1,
# 2, 4 and 8 neurons to a thread.
SHAPES = [
    *((1, 1, 1), (1, 3, 3), (127, 1, 1), (1, 2, 64), (1, 3, 43), (1, 3, 171), (1, 2, 127), (2, 4, 32), (2, 3, 43)),
    *((1, 4, 127), (4, 4, 32), (3, 4, 43), (1, 8, 127), (4, 8, 32), (1, 8, 129)),
]
WIDE, NARROW = (1, 8, 129), (1, 3, 43)


def guarded(source: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """A copy, with the same strides, in the midst of NaN; `shift` numbers off an aligned address."""
    room_for = 1 + sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True))
    memory = torch.full((room_for + 2 * MARGIN + shift,), torch.nan, dtype=source.dtype)
    return memory.as_strided(source.shape, source.stride(), MARGIN + shift).copy_(source)


def channels_last(source: torch.Tensor) -> torch.Tensor:
    return source.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = {
    "contiguous": guarded,
    "channels_last": lambda x: guarded(channels_last(x)),
    "permuted": lambda x: guarded(x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)),
    "one frame for all time steps": lambda x: guarded(x[0]).expand_as(x),
    "every other time step": lambda x: guarded(x.repeat_interleave(2, 0))[::2],
    "not aligned": lambda x: guarded(x, shift=1),
    "time innermost": lambda x: guarded(x.movedim(0, -1).contiguous().movedim(-1, 0)),
}


@contextlib.contextmanager
def poisoned():
    """Memory for outputs is full of NaN, or 255, and so are its margins, which must stay so."""
    empty, empty_like, allocated = torch.empty_strided, torch.empty_like, []

    def poisoned_strided(shape, stride, dtype=None, device=None):
        numbers = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        memory = torch.ones(numbers + 2 * MARGIN, dtype=dtype) * (255 if dtype == torch.uint8 else torch.nan)
        output = memory.as_strided(shape, stride, MARGIN)
        allocated.append((memory, output))
        return output

    def poisoned_empty(*shape, dtype=None, device=None):
        like = torch.zeros(*shape)
        return poisoned_strided(like.shape, like.stride(), dtype)

    def poisoned_like(source, dtype=None):
        like = empty_like(source, dtype=dtype)
        return poisoned_strided(like.shape, like.stride(), like.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        patch.setattr(torch, "empty_strided", poisoned_strided)
        patch.setattr(torch, "empty_like", poisoned_like)
        yield
    assert empty is torch.empty_strided
    for memory, output in allocated:
        for margin in (memory[:MARGIN], memory[MARGIN + output.numel() :]):
            assert (margin == 255).all() if margin.dtype == torch.uint8 else margin.isnan().all(), "written beyond"


@dataclass
class Call:
    """One call of the launcher's forward and backward."""

    setup: Setup
    x: torch.Tensor  # [T, B, C, M]
    grad_spikes: torch.Tensor
    v_init: torch.Tensor | None = None
    grad_v_last: torch.Tensor | None = None
    keep_v: bool = True

    @property
    def options(self) -> Options:
        return self.setup.options(self.x.shape[2])

    def run(self):
        with poisoned():
            forward = room.forward(self.x, self.v_init, self.options, keep_v=self.keep_v, pack=self.setup.packed)
            backward = room.backward(
                self.grad_spikes,
                self.grad_v_last,
                self.x,
                self.v_init,
                self.options,
                parameters=self.options.in_tensors,
            )
        return forward, backward

    def expected(self):
        """Outputs and gradients of the reference; its neurons are channels, so that each has its own tau gradient."""
        dtype, flat = reference.state_dtype(self.x.dtype), (self.x.shape[0], 1, -1)
        options = self.options

        def leaf(value, shape):
            return None if value is None else value.to(dtype).reshape(shape).contiguous().requires_grad_()

        def of_each_neuron(value):
            if not options.in_tensors:
                return value
            values = torch.as_tensor(value, dtype=torch.float64).reshape(1, -1, 1)
            return values.expand(self.x.shape[1:]).reshape(-1).clone().requires_grad_()

        x, v_init = leaf(self.x, flat), leaf(self.v_init, (1, -1))
        tau, threshold = of_each_neuron(options.tau), of_each_neuron(options.v_threshold)
        spikes, v_last = reference.lif(
            x,
            tau=tau,
            decay_input=options.decay_input,
            v_threshold=threshold,
            v_reset=options.v_reset,
            surrogate=options.surrogate,
            detach_reset=options.detach_reset,
            v_init=v_init,
        )
        loss = (spikes * self.grad_spikes.to(dtype).reshape(flat)).sum()
        if self.grad_v_last is not None:
            loss = loss + (v_last * self.grad_v_last.reshape(1, -1)).sum()
        leaves = [value for value in (x, v_init) if value is not None]
        leaves += [threshold, tau] if options.in_tensors else []
        gradients = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
        grad_x, grad_v_init = next(gradients), None if v_init is None else next(gradients)
        grad_threshold = grad_inverse_tau = None
        if options.in_tensors:
            grad_threshold, grad_tau = next(gradients), next(gradients)
            grad_inverse_tau = grad_tau * -(tau.detach() ** 2)
        return (spikes.detach(), v_last.detach()), (grad_x, grad_v_init, grad_threshold, grad_inverse_tau)

    def check(self) -> float:
        """Compare; return the part of spikes that fired."""
        (spikes, v_last, packed), gradients = self.run()
        (expected_spikes, expected_v), expected_gradients = self.expected()
        x = self.x
        assert spikes.dtype == x.dtype
        assert spikes.stride()[1:] == x.stride()[1:] or not in_place(x)
        assert torch.equal(spikes.to(expected_v.dtype).reshape(expected_spikes.shape), expected_spikes)
        assert (v_last is not None) == self.keep_v
        assert v_last is None or same_bits(v_last.reshape(expected_v.shape), expected_v)
        assert (packed is not None) == self.setup.packed
        assert packed is None or torch.equal(packed, pack(spikes))
        for name, got, expected in zip(
            ("x", "v_init", "threshold", "1/tau"), gradients, expected_gradients, strict=True
        ):
            assert (got is None) == (expected is None), name
            if got is None:
                continue
            stored = got.dtype if name == "x" else expected.dtype
            got, expected = got.double().reshape(expected.shape), expected.double()
            allowed = GRADIENT[x.dtype] * max(1e-3, expected.abs().max())
            allowed = allowed + HALF_UNIT.get(stored, 0.0) * expected.abs() + LEAST.get(stored, 0.0)
            worst = ((got - expected).abs() - allowed).max()
            assert worst <= 0, f"gradient of {name}: {worst:.1e} more than allowed"  # NaN fails
        return expected_spikes.mean().item()


def in_place(x: torch.Tensor) -> bool:
    return as_rows(x) is x


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    integers = {4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.contiguous().view(integers), right.contiguous().view(integers))


def call(setup: Setup, shape, layout="contiguous", grad_layout="contiguous", seed=0, state=True, keep_v=True) -> Call:
    """Random numbers, a quarter of which put the potential exactly on the threshold now and then."""
    generator = torch.Generator().manual_seed(seed)
    dtype = reference.state_dtype(setup.dtype)
    x = torch.randn(setup.T, *shape, generator=generator) * 1.5 + 0.5
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.25, (x * 4).round() / 4, x).to(setup.dtype)
    grad = torch.randn(x.shape, generator=generator).to(setup.dtype)
    v_init, grad_v_last = (guarded(torch.randn(shape, generator=generator).to(dtype)) for _ in range(2))
    if not state:
        v_init = grad_v_last = None
    return Call(setup, LAYOUTS[layout](x), LAYOUTS[grad_layout](grad), v_init, grad_v_last, keep_v)


@contextlib.contextmanager
def on_the_cpu():
    """The operator takes CPU tensors for backend "cupy", and the launcher runs its kernels on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["seal_fast.ops.lif"], "resolve", lambda backend, *_: backend)
        cuda_host.install(patch, room)
        yield
