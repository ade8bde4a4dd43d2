"""Convolutions and linear layers of spikes over the firing rate: kernels that skip zeros, against torch's dense ones.

    pytest benchmarks/bench_spike_conv.py
    pytest benchmarks/bench_spike_conv.py -k "layer1 and forward"

The rates of a shape are timed in turn with one dense call, whose time does not depend on the numbers. The kernels get
bits and are forced at every rate, as `spike_conv2d(backend="cpu")` forces them; making words of the bits, and counting
the spikes as "auto" does before it chooses, is part of their time. Spikes fire independently of each other. The first
line of a group says at which rate the kernels stop being faster.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import figures
import measure
from seal_fast.kernels.packing import cpu as packing
from seal_fast.kernels.packing.reference import pack
from seal_fast.kernels.spike_conv import cpu as kernel

SECTION = (
    "convolutions of spikes; ms: median (range of all but the outer tenths); x: dense time / time, in the same round; "
    "turns: the firing rate from which dense is faster, by interpolation"
)
PERCENT = (2, 5, 10, 20, 30, 50, 80)
DENSE = "torch, dense"
CONTESTANTS = {DENSE: 20, **{f"seal-fast, {percent} %": percent for percent in PERCENT}}  # name -> percent that fire
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# How far sums of another order may lie from each other, the largest being 1: measured up to 6e-6, and 3.3e-3.
CLOSE = {"f32": 3e-5, "bf16": 2e-2}


class Layer(NamedTuple):
    """Spikes [P, C, S, S] and the weights [O, C, K, K] that they meet, padded to keep the size at stride 1."""

    P: int
    C: int
    S: int
    O: int  # noqa: E741
    K: int
    stride: int = 1

    @property
    def geometry(self) -> tuple[tuple[int, int], ...]:
        """Stride, padding and dilation."""
        return (self.stride,) * 2, (self.K // 2,) * 2, (1, 1)

    def tiny(self) -> Layer:
        """The smallest sizes that run the same code."""
        return self._replace(P=2, S=min(self.S, 4))

    def __str__(self):
        spikes, weight = [self.P, self.C, self.S, self.S], [self.O, self.C, self.K, self.K]
        return f"{spikes} x {weight}{f', stride {self.stride}' * (self.stride > 1)}"


# Of ResNet-18 at T = 4 with 32 images of 32 x 32, and others.
LAYERS = {
    "layer1": Layer(128, 64, 32, 64, 3),
    "layer2": Layer(128, 128, 16, 128, 3),
    "layer3": Layer(128, 256, 8, 256, 3),
    "layer4": Layer(128, 512, 4, 512, 3),
    "strided": Layer(128, 64, 32, 128, 3, 2),
    "shortcut": Layer(128, 64, 32, 128, 1, 2),
    "linear": Layer(4096, 512, 1, 512, 1),
    "narrow": Layer(128, 32, 16, 32, 3),
}


class Sides:
    """The dense call and the kernels' one of a layer, for the same numbers.

    Args:
        layer: Whose.
        dtype: Of spikes, weights and outputs.
        operation: "forward" or "weight gradient".
    """

    def __init__(self, layer: Layer, dtype: torch.dtype, operation: str):
        self.layer, self.operation = layer, operation
        P, C, S, O, K, _ = layer  # noqa: E741
        self.generator = torch.Generator().manual_seed(0)
        self.size = (P, C, S, S)
        self.draws = torch.rand(P, S, S, C, generator=self.generator).permute(0, 3, 1, 2)
        self.weight = self._normal(O, C, K, K).to(dtype)
        self.upstream = self._normal(P, O, *kernel.output_size((S, S), (K, K), *layer.geometry)).to(dtype)

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator).contiguous(memory_format=torch.channels_last)

    def spikes(self, percent: float) -> torch.Tensor:
        """Numbers of which so many percent are ones, channels_last."""
        return (self.draws < percent / 100).to(self.weight.dtype)

    def dense(self, spikes: torch.Tensor):
        """A function that has torch compute the outputs, or the gradient."""
        stride, padding, dilation = self.layer.geometry
        if self.layer.S == 1:  # as torch runs a linear layer
            rows, weight, upstream = (tensor.flatten(1) for tensor in (spikes, self.weight, self.upstream))
            if self.operation == "forward":
                return lambda: F.linear(rows, weight)
            return lambda: upstream.t() @ rows
        if self.operation == "forward":
            return lambda: F.conv2d(spikes, self.weight, None, stride, padding, dilation)
        how = (None, stride, padding, dilation, False, (0, 0), 1, (False, True, False))
        return lambda: torch.ops.aten.convolution_backward(self.upstream, spikes, self.weight, *how)[1]

    def sparse(self, spikes: torch.Tensor):
        """A function that has the kernels compute the same from bits."""
        packed = pack(spikes.permute(0, 2, 3, 1).reshape(1, -1)).view(-1)

        def run():
            packing.count(packed)
            words = kernel.words(packed, self.size, channels_last=True)
            if self.operation == "forward":
                return kernel.forward(words, self.size, self.weight, None, *self.layer.geometry)
            into = torch.empty_like(self.weight)
            return kernel.weight_gradient(words, self.size, self.upstream, into, *self.layer.geometry)

        return run

    def step(self, contestant: str, close: float):
        """What is timed of a contestant, after a check of what it computes."""
        spikes = self.spikes(CONTESTANTS[contestant])
        dense = self.dense(spikes)
        if contestant == DENSE:
            return dense
        run, expected = self.sparse(spikes), dense().float()
        assert (run().float().view_as(expected) - expected).abs().max() <= close * expected.abs().max()
        return run


def turn(times: dict[str, list[float]]) -> figures.Figure:
    """The share of spikes from which dense is faster, of the times of all contestants that have some."""
    speeds = {
        CONTESTANTS[name] / 100: figures.ratio(times[DENSE], of_rate)
        for name, of_rate in times.items()
        if name != DENSE
    }
    return figures.crossing(speeds)


@pytest.mark.skipif(measure.device().type != "cpu", reason="kernels that skip zeros are for the CPU")
@pytest.mark.benchmark(timer=measure.replay)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ["forward", "weight gradient"])
@pytest.mark.parametrize("name", LAYERS)
def test_spike_conv(benchmark, report, timed, seconds, tiny, name, operation, dtype, contestant):
    layer = LAYERS[name].tiny() if tiny else LAYERS[name]
    group = f"{operation} of spikes, {name}, {dtype}: {layer}"

    def race(entrants, failed):
        sides, steps = Sides(layer, DTYPES[dtype], operation), {}
        for entrant in entrants:
            with measure.noting(failed, entrant):
                steps[entrant] = sides.step(entrant, CLOSE[dtype])
                steps[entrant]()
        # Eight contestants of 32 groups: rounds are few, and of short calls many.
        return measure.race(steps, seconds / 5, least=5, turn=min(seconds / 50, 0.005), failed=failed)

    benchmark.group = group
    benchmark.extra_info["contestant"] = contestant
    times = timed(SECTION, group, list(CONTESTANTS), race, contestant)
    extra = benchmark.extra_info
    cells = f"  {contestant:28s} {extra['time'].shown('8.3f', 1e3):34s}"
    if contestant != DENSE:
        speed = extra["time_of_first"].inverse().shown("6.2f") if "time_of_first" in extra else "-"
        report(SECTION, group, f"{cells} {speed} x")
        return
    found = turn(times)
    if all(map(math.isfinite, found)):
        extra["turning_rate"] = found
    report(SECTION, group, f"{cells}   1.00 x   turns at {shown(found)}")


def shown(rate: figures.Figure) -> str:
    """A share as text, in percent, where it lies among those that were timed."""
    texts = [
        f"> {PERCENT[-1]}" if each == math.inf else f"< {PERCENT[0]}" if each == -math.inf else f"{100 * each:.0f}"
        for each in rate[:3]
    ]
    return f"{texts[0]} %" if len(set(texts)) == 1 else "{} % ({} to {})".format(*texts)
