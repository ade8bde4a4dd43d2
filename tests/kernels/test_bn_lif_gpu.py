"""The GPU kernels of bn_lif on GPU tensors: sizes, syncs, graphs. The shared tests check what they compute."""

import pytest
import torch
from torch import nn

from graphs import captured
from seal_fast import bn_lif, packed_spikes
from seal_fast.backends import available
from seal_fast.nn import LIFNode

BACKENDS = [name for name in ("triton", "cupy") if name in available("bn_lif")]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

T, B, C = 4, 8, 64


@pytest.fixture(params=BACKENDS or ["none"])
def gpu_backend(request):
    return request.param


def norms():
    """Of y and of the residual. To make them waits for the GPU."""
    return [nn.BatchNorm2d(C, device="cuda") for _ in range(2)]


def layer(backend: str, own_norms, y, residual, upstream):
    """Spikes and gradients of a layer with a residual that has a batch norm of its own."""
    bn, residual_bn = own_norms
    leaves = [rows.detach().requires_grad_() for rows in (y, residual)]
    node = LIFNode(decay_input=False, backend=backend)
    spikes = bn_lif(leaves[0], bn, node, time_steps=T, residual=leaves[1], residual_bn=residual_bn)
    return [spikes.detach(), *torch.autograd.grad(spikes, (*leaves, bn.weight, bn.bias), upstream)]


def inputs(dtype, layout, size=31):
    rows = [torch.randn(T * B, C, size, size, device="cuda") for _ in range(3)]
    return [row.to(dtype, memory_format=layout) for row in rows]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_layers_equal_the_composition(gpu_backend, dtype, layout):
    tensors = inputs(dtype, layout)
    used = {backend: norms() for backend in (gpu_backend, "torch")}
    got, expected = (layer(backend, own, *tensors) for backend, own in used.items())
    got, expected = ([*values, own[0].running_var] for values, own in zip((got, expected), used.values(), strict=True))
    # The composition rounds the membrane input to bfloat16; the fused kernel does not.
    share, tolerance = (1e-4, 1e-3) if dtype == torch.float32 else (2e-2, 6e-2)
    differing = (got[0] != expected[0]).float().mean().item()
    errors = {
        name: ((value.float() - right.float()).norm() / right.float().norm()).item()
        for name, value, right in zip(
            ("y", "residual", "weight", "bias", "running_var"), got[1:], expected[1:], strict=True
        )
    }
    assert differing <= share, errors
    assert all(error <= 5 * tolerance for error in errors.values()), errors  # NaN is no error that passes


def test_nothing_waits_for_the_gpu(gpu_backend):
    tensors = inputs(torch.bfloat16, torch.channels_last)
    own = norms()
    layer(gpu_backend, own, *tensors)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(gpu_backend, own, *tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_graph_replays(gpu_backend):
    y, residual, upstream = inputs(torch.float32, torch.channels_last)
    own = norms()
    graph, results = captured(lambda: layer(gpu_backend, own, y, residual, upstream))
    for _ in range(3):  # counters that are not put back would show in the second replay
        y.copy_(torch.randn_like(y))
        graph.replay()
        for got, expected in zip(results, layer(gpu_backend, own, y, residual, upstream), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_two_streams_at_once_do_not_mix_their_sums(gpu_backend, layout):
    """Nor do results differ from run to run."""
    given = [(norms(), *inputs(torch.float32, layout)) for _ in range(2)]
    expected = [layer(gpu_backend, *values) for values in given]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for stream, values in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                got.append(layer(gpu_backend, *values))
        torch.cuda.synchronize()
        for results, right in zip(got, expected, strict=True):
            assert all(torch.equal(*pair) for pair in zip(results, right, strict=True))


def test_packed_spikes_are_unpacked_on_the_gpu(gpu_backend, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    y, residual, _ = inputs(torch.bfloat16, torch.channels_last, 16)
    convolution = nn.Conv2d(C, C, 3, device="cuda", dtype=torch.bfloat16)
    gradients = []
    for packed in (False, True):
        node = LIFNode(backend=gpu_backend)
        with packed_spikes() if packed else torch.enable_grad():
            out = convolution(bn_lif(y, nn.BatchNorm2d(C, device="cuda"), node, time_steps=T, residual=residual))
        gradients.append(torch.autograd.grad(out.float().square().sum(), convolution.weight)[0])
    assert torch.equal(*gradients)
