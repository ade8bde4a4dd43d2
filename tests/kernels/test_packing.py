"""Spikes as bits, and back."""

import contextlib
import os
import re

import pytest
import torch

import cuda_host
from cuda_host_lif import MARGIN, poisoned
from nvrtc import ARCHITECTURES, compiled, needs_cupy
from seal_fast import lif, packed_spikes
from seal_fast.backends import available
from seal_fast.kernels.launch import cupy as launcher
from seal_fast.kernels.packing import cupy, reference
from seal_fast.ops import _packed
from seal_fast.ops._dispatch import kernel_module

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 7, 8, 9, 64, 1000, 4099, 8200]
GPU = ("triton", "cupy") if os.environ.get("TRITON_INTERPRET") != "1" else ("cupy",)

needs_host = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())


def spikes_of(T, N, dtype):
    return (torch.rand(T, N, generator=torch.Generator().manual_seed(N)) < 0.3).to(dtype)


def check(unpack, T, N, dtype):
    spikes = spikes_of(T, N, dtype)
    unpacked = unpack(reference.pack(spikes), N, dtype)
    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, spikes)


@pytest.mark.parametrize("backend", available("lif"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [*SIZES, 200_003])
def test_unpacking_gives_what_was_packed(N, dtype, backend):
    unpack = kernel_module("packing", "reference" if backend == "torch" else backend).unpack
    device = "cuda" if backend in GPU else "cpu"
    for T in (0, 1, 3):
        check(lambda packed, *row: unpack(packed.to(device), *row).cpu(), T, N, dtype)
    assert unpack(torch.zeros(3, 0, dtype=torch.uint8, device=device), 0, dtype).shape == (3, 0)


def check_on_the_host(T, N, dtype):
    """The CUDA source, with bytes of ones and numbers of NaN around what it is given."""

    def unpack(packed, *row):
        memory = torch.full((packed.numel() + 2 * MARGIN,), 255, dtype=torch.uint8)
        bits = memory[MARGIN : MARGIN + packed.numel()].view(packed.shape).copy_(packed)
        with poisoned():
            return cupy.unpack(bits, *row)

    check(unpack, T, N, dtype)


@pytest.fixture
def on_the_host(monkeypatch):
    """Of function scope, as on a GPU the launcher starts its own kernels in other tests."""
    cuda_host.install(monkeypatch, cupy)
    with cuda_host.planning():
        for dtype in DTYPES:
            for N in (1, 8):
                cupy.unpack(torch.zeros(1, 1, dtype=torch.uint8), N, dtype)


@needs_host
@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [*SIZES, 4096, 4100])
def test_cuda_source_gives_what_was_packed(N, dtype):
    for T in (0, 1, 3):
        check_on_the_host(T, N, dtype)


@needs_host
@pytest.mark.usefixtures("on_the_host")
def test_cuda_source_writes_numbers_that_are_not_aligned_one_by_one(monkeypatch):
    """As torch allocates aligned memory, only where somebody else does for it."""
    expected, empty = spikes_of(3, 64, torch.float32), torch.empty
    packed = reference.pack(expected)
    monkeypatch.setattr(torch, "empty", lambda T, N, **options: empty(T * N + 1, **options)[1:].view(T, N))
    assert torch.equal(cupy.unpack(packed, 64, torch.float32), expected)


BREAKS = {
    "nothing": ("", ""),
    "rows of bits cut off": ("(N + 7) / 8", "N / 8"),
    "rows of spikes too long": ("spikes += t * N", "spikes += t * (N + 7)"),
    "another row": ("blockIdx.x / blocks;", "blockIdx.x % blocks;"),
    "bits of another access": ("bits[i] >> j", "bits[0] >> j"),
    "always the first bit of a byte": (" >> (n % 8)", ""),
    "no bound": ("if (n >= N) return;", ""),
}


@needs_host
@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("line", BREAKS)
def test_a_broken_line_of_the_cuda_source_is_noticed(line, monkeypatch):
    text = launcher.source(cupy.SOURCE)
    assert BREAKS[line][0] in text
    broken = cuda_host.Kernels(text.replace(*BREAKS[line]))
    broken.compile(["unpack<float, 1>", "unpack<float, 4>"])
    monkeypatch.setattr(cuda_host, "kernels", lambda path: broken)
    with contextlib.nullcontext() if line == "nothing" else pytest.raises(AssertionError):
        for N in (1001, 2052):
            check_on_the_host(3, N, torch.float32)


@needs_cupy
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cuda_source_writes_16_bytes_at_once_and_needs_no_local_memory(arch, monkeypatch):
    started = []
    monkeypatch.setattr(launcher, "start", lambda path, expression, *_: started.append(expression))
    for dtype in DTYPES:
        for N in (64, 1001):
            cupy.unpack(torch.zeros(1, (N + 7) // 8, dtype=torch.uint8), N, dtype)
    wide, single = started[::2], started[1::2]
    for expressions, pattern in ((wide, r"v4\.u32"), (single, r"(?:v2\.u32|u32|u16)")):
        ptx, log = compiled(cupy.SOURCE, expressions, arch)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert frames == [("0", "0", "0")] * len(DTYPES)
        stores = re.findall(r"st\.\S+", ptx)
        assert len(stores) == len(DTYPES) * cupy.ACCESSES
        assert all(re.fullmatch(rf"st\.global\.wb\.{pattern}", store) for store in stores)


def test_two_to_the_33_spikes_are_counted_in_one_grid(monkeypatch):
    started = []
    monkeypatch.setattr(launcher, "start", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(cupy, "reach", lambda _tensors: cupy.ACCESS)
    cupy.unpack(torch.empty(4, 2**30, dtype=torch.uint8, device="meta"), 2**33, torch.bfloat16)
    ((_, _, blocks, threads, (*_, N), *_),) = started
    assert blocks * threads * cupy.ACCESSES * 8 == 4 * 2**33
    assert blocks < 2**31  # the most on the first axis
    assert N == 2**33


@pytest.mark.parametrize("wanted", ["auto", *available("lif")])
def test_the_backward_pass_takes_the_backend_of_the_operators(wanted, monkeypatch):
    taken = []
    monkeypatch.setenv("SEAL_FAST_BACKEND", wanted)
    monkeypatch.setattr(_packed, "_kernel", lambda backend: taken.append(backend) or kernel_module("packing", backend))
    weight = torch.randn(2, 9, device="cuda" if wanted in GPU else "cpu").requires_grad_()
    with packed_spikes():
        spikes, _ = lif(torch.randn(4, 3, 9, device=weight.device))
        out = torch.nn.functional.linear(spikes, weight)
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(gradient, spikes.flatten(0, 1).sum(0).expand(2, -1))
    usual = "cpu" if "cpu" in available("lif") else "torch"
    assert (taken or ["torch"]) == [usual if wanted == "auto" else wanted]


@pytest.mark.parametrize("wanted", ["cupy", "nothing known"])
def test_the_backward_pass_does_without_a_backend_that_cannot_run(wanted, monkeypatch):
    monkeypatch.setenv("SEAL_FAST_BACKEND", wanted)
    weight = torch.randn(2, 9, requires_grad=True)
    with packed_spikes():
        spikes, _ = lif(torch.randn(4, 3, 9), backend="torch")
        out = torch.nn.functional.linear(spikes, weight)
    (gradient,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(gradient, spikes.flatten(0, 1).sum(0).expand(2, -1))
