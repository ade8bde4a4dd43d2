"""cuDNN's fused convolutions in a folded teacher on a GPU: logits, where they are used, graphs."""

import contextlib

import pytest
import torch

from graphs import captured
from seal_fast.models import folded, teacher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

FUNCTIONS = ("cudnn_convolution_relu", "cudnn_convolution_add_relu")
# Of the largest logit. An H200 gave 1.1e-2 for resnet34 in bfloat16; the rest has not been measured there. On a CPU,
# with one rounding instead of two or three, the worst (resnet50) gave 2.2e-2 in bfloat16 and 3.0e-3 in float16, and
# float32 differs from float64 by 2.1e-6.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def asked(monkeypatch):
    """How often each of cuDNN's functions was called."""
    counts = dict.fromkeys(FUNCTIONS, 0)

    def counted(name, function):
        def run(*arguments):
            counts[name] += 1
            return function(*arguments)

        return run

    for name in FUNCTIONS:
        monkeypatch.setattr(torch, name, counted(name, getattr(torch, name)))
    return counts


def network_of(arch, dtype, *, layout=torch.channels_last, **options):
    """A folded teacher, whose batch norms have seen images, in evaluation mode."""
    torch.manual_seed(0)
    network = teacher(arch, num_classes=10, **options).cuda()
    network(images_of(network, 32))
    return folded(network.eval()).to(dtype=dtype, memory_format=layout)


def images_of(network, B, size=32):
    generator = torch.Generator("cuda").manual_seed(B)
    weight = next(network.parameters())
    images = torch.randn(B, weight.shape[1], size, size, generator=generator, device="cuda")
    return images.to(dtype=weight.dtype, memory_format=torch.channels_last)


def plain(network, images):
    """Without fused convolutions, which have no gradient."""
    with torch.enable_grad():
        return network(images).detach()


def check(got, expected):
    assert got.dtype == expected.dtype
    error = (got.double() - expected.double()).abs().max().item()
    assert error <= TOLERANCES[got.dtype] * expected.double().abs().max().item()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet34", {}),
        ("resnet34", {"layout": torch.contiguous_format}),
        ("resnet8", {"in_channels": 1}),
        ("resnet18_dvs", {}),
        ("resnet19", {}),
        ("resnet50", {"stem": "imagenet"}),
    ],
)
@torch.no_grad()
def test_fused_logits_equal_the_unfused(arch, options, dtype, asked):
    network = network_of(arch, dtype, **options)
    blocks = sum(hasattr(module, "downsample") for module in network.modules())
    images = images_of(network, 16)
    expected = plain(network, images)
    assert asked == dict.fromkeys(FUNCTIONS, 0)
    check(network(images), expected)
    relus = 1 + blocks * (2 if arch == "resnet50" else 1)
    assert asked == {"cudnn_convolution_relu": relus, "cudnn_convolution_add_relu": blocks}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@torch.no_grad()
def test_a_captured_graph_has_the_fused_convolutions(dtype, asked, monkeypatch):
    """Those that cuDNN finds fastest, as in the trainers."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    network = network_of("resnet34", dtype)
    images = images_of(network, 128)
    graph, logits = captured(lambda: network(images))
    assert asked["cudnn_convolution_add_relu"] == 2 * 16  # the warm-up's and the capture's
    images.copy_(images.flip(0, -1) * 0.5)
    graph.replay()
    check(logits, plain(network, images))


@torch.no_grad()
def test_images_in_float32_are_cast_as_autocast_would(asked):
    network = network_of("resnet34", torch.bfloat16)
    images = images_of(network, 16).float()
    with torch.autocast("cuda", torch.bfloat16):
        check(network(images), plain(network, images))
    assert asked["cudnn_convolution_add_relu"] == 16


@pytest.mark.parametrize(
    "reason", ["gradients", "deterministic", "all deterministic", "disabled", "float64", "other autocast", "compiled"]
)
@torch.no_grad()
def test_convolutions_are_not_fused_where_cudnn_would_compute_something_else(reason, asked, monkeypatch):
    network = network_of("resnet8", torch.float64 if reason == "float64" else torch.float32)
    images = images_of(network, 4)
    run, context = network, contextlib.nullcontext()
    if reason == "gradients":
        context = torch.enable_grad()
    elif reason == "deterministic":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    elif reason == "all deterministic":
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    elif reason == "disabled":
        monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    elif reason == "other autocast":
        context = torch.autocast("cuda", torch.bfloat16)
    elif reason == "compiled":
        run = torch.compile(network, backend="eager", fullgraph=True)
    with context:
        assert run(images).isfinite().all()
    assert asked == dict.fromkeys(FUNCTIONS, 0)
