"""Calls of bn_lif's CUDA kernels on the CPU, beside torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import bn_lif_kernels
import cuda_host
from bn_lif_kernels import (
    CASES,
    LAYOUTS,
    PUBLISHED,
    compare_backward,
    compare_forward,
    normal,
    per_channel,
    table_of,
    tensors_of,
)
from cuda_host_lif import guarded, poisoned
from seal_fast.kernels.bn_lif import cupy as room
from seal_fast.kernels.bn_lif import norms
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.surrogate.reference import Surrogate

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
EVEN, ODD, PAIRS, LONG = (2, 64, 4, 4), (5, 48, 3, 3), (3, 130, 2, 2), (8, 2, 20, 20)


@contextlib.contextmanager
def installed(launch_all: Callable[[], None]):
    """The kernels run on the CPU, all that `launch_all` starts compiled at once; tensors lie in the midst of NaN."""
    with pytest.MonkeyPatch.context() as patch:
        cuda_host.install(patch, room)
        patch.setattr(bn_lif_kernels, "normal", lambda *arguments: guarded(normal(*arguments)))
        with cuda_host.planning():
            launch_all()
        yield


@dataclass(frozen=True)
class Setup:
    """One call of forward and backward."""

    shape: tuple[int, ...]
    kind: str = "normalised residual"
    layout: str = "channels_last"
    dtype: torch.dtype = F32
    T: int = 4
    options: Options = PUBLISHED
    with_m: bool = False
    shift: int = 0  # of y, in numbers, from an aligned address

    def given(self):
        y, residual, scales, static = tensors_of(self.shape, self.T, self.kind, self.dtype, self.layout)
        return guarded(y, self.shift), None if residual is None else guarded(residual), scales, static

    def launch(self):
        """All that `check` starts."""
        y, residual, scales, static = self.given()
        call = {"time_steps": self.T, "static": static}
        room.forward(y, residual, scales, self.options, **call, keep_m=False, pack=False)
        spikes, m, _ = room.forward(y, residual, scales, self.options, **call, keep_m=True, pack=True)
        table, counts = table_of(scales, self.dtype), (1,) * (len(scales) // 2)
        asked = {"counts": counts, "steps": True, "total": True, "parameters": self.options.in_tensors}
        grad_m = m if self.with_m else None
        room.backward(spikes, grad_m, y, residual, table, self.options, **call, **asked)

    def check(self):
        with poisoned():
            y, residual, scales, static = self.given()
            rate = compare_forward(room, y, residual, scales, self.options, self.T, static=static)
            asked = {"with_m": self.with_m, "parameters": self.options.in_tensors}
            compare_backward(room, y, residual, scales, self.options, self.T, static=static, **asked)
        assert 0.02 < rate < 0.9 or y.numel() < 100


def neuron(surrogate, tau=2.0, decay_input=False, threshold=1.0, v_reset=0.0, detach=False):
    return Options(tau, decay_input, threshold, v_reset, Surrogate(surrogate), detach)


def by_channel(first, last, C, dtype=F32):
    return torch.linspace(first, last, C, dtype=dtype)


NEURONS = {
    "soft": neuron("atan", 1.7, v_reset=None),
    "soft, detached": neuron("piecewise_quadratic", decay_input=True, v_reset=None, detach=True),
    "detached": neuron("piecewise_exp", detach=True),
    "another reset": neuron("soft_sign", 1.7, v_reset=-0.3),
    "input decays": neuron("super_spike", 1.7, decay_input=True, v_reset=-0.3),
    "input decays, power of two": neuron("erf", 4.0, decay_input=True, threshold=0.5),
    "scalars": neuron("triangle", torch.tensor(1.7), threshold=torch.tensor(0.75, dtype=F64), v_reset=None),
    "tau by channel": neuron("rectangle", by_channel(1.7, 3.3, 64, F64), decay_input=True, v_reset=-0.3),
    "both by channel": neuron("sigmoid", by_channel(1.7, 3.3, 130), True, by_channel(0.5, 1.3, 130)),
    "threshold by channel": neuron("sigmoid", 2.0, threshold=by_channel(0.5, 1.3, 2), v_reset=None),
}
LAST, FIRST = "channels_last", "contiguous"
SETUPS = {
    **{f"{case[0]}, {case[1]}, {case[2]}": Setup(*case, with_m=i % 2 > 0) for i, case in enumerate(CASES)},
    **{
        f"{dtype}, {kind}, {layout}": Setup(EVEN, kind, layout, dtype, with_m=with_m)
        for dtype in (F64, F16, BF16)
        for kind, layout, with_m in (("normalised residual", LAST, True), ("residual", FIRST, False))
    },
    **{f"bfloat16, {layout}, odd": Setup(ODD, "static residual", layout, BF16) for layout in LAYOUTS},
    **{f"T={T}": Setup(EVEN, T=T, with_m=T > 2) for T in (1, 2, 10, 17)},
    **{f"T={T}, static": Setup(LONG, "all static", FIRST, T=T, with_m=True) for T in (2, 10, 33)},
    "T=17, bfloat16": Setup(EVEN, "static y", FIRST, BF16, 17),
    "T=10, bfloat16": Setup(PAIRS, "residual", LAST, BF16, 10),
    **{name: Setup(EVEN, layout=LAST, options=NEURONS[name]) for name in NEURONS if "by channel" not in name},
    "tau by channel": Setup(EVEN, "residual", FIRST, options=NEURONS["tau by channel"], T=17),
    "both by channel": Setup(PAIRS, options=NEURONS["both by channel"], with_m=True),
    "threshold by channel": Setup(LONG, "residual", LAST, options=NEURONS["threshold by channel"]),
    "many, channels last": Setup(LONG, with_m=True),
    "many, contiguous": Setup(LONG, layout=FIRST, with_m=True),
    "one channel": Setup((3, 1, 4, 3), "residual", FIRST),
    "three axes": Setup((3, 6, 8), "normalised residual", FIRST),
    "not aligned": Setup(EVEN, shift=1),
}


def from_fixed_statistics(setup: Setup, *, affine: bool):
    """Outputs of forward, of norms with fixed statistics and of their table."""
    y, residual, scales, static = setup.given()
    C, k = y.shape[1], len(scales) // 2
    found, table = [], torch.zeros(4 * k, C, dtype=scales.dtype)
    for i in range(k):
        weight, mean, bias, variance = guarded(per_channel(C, 4, setup.dtype, 30 + i)).unbind()
        own = (weight, bias) if affine else (None, None)
        found.append(norms.Norm(*own, mean, variance.abs_(), None, 0.1, (1e-5, 1e-3)[i], 0, 1))
        room.fill_table(table, i, y, found[i])
    call = {"time_steps": setup.T, "static": static, "keep_m": True, "pack": True}
    expected = room.forward(y, residual, norms.scales(table), setup.options, **call)
    return room.forward(y, residual, None, setup.options, **call, norms=tuple(found)), expected
