"""The loss's CUDA kernels through NVRTC, which needs no GPU, and how they are started."""

import os
import re
import sys
import types

import pytest
import torch

import cuda_host
from cuda_host_seal_loss import OBJECTIVES, PUBLISHED
from nvrtc import ARCHITECTURES, compiled, needs_cupy
from seal_fast.backends import _KERNELS
from seal_fast.kernels.launch import cupy as launcher
from seal_fast.kernels.seal_loss import cupy as room
from seal_fast.kernels.seal_loss import reference

CUDA = torch.device("cuda", 1)


@pytest.fixture
def launches(monkeypatch):
    """What would be started: (expression, blocks, threads, shared_bytes)."""
    started = []

    def noted(path, expression, blocks, threads, arguments, codes, device, shared_bytes):
        started.append((expression, blocks, threads, shared_bytes))

    monkeypatch.setattr(launcher, "start", noted)
    monkeypatch.setattr(room, "counters", lambda device, number: None)
    monkeypatch.setattr(room, "shared_memory", lambda device: cuda_host.SHARED_MEMORY)
    return started


def start(T, B, K, dtype=torch.float32, *, objective="seal", gradient=True, teacher_dtype=None, keep=None):
    teacher_logits = torch.zeros(B, K, dtype=teacher_dtype or dtype)
    labels = torch.zeros(B, dtype=torch.int64)
    options = {**PUBLISHED, "objective": objective, "gradient": gradient, "keep": keep}
    room.forward(torch.zeros(T, B, K, dtype=dtype), teacher_logits, labels, **options)


@needs_cupy
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_need_no_local_memory(arch, launches):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        start(4, 2, 1000, dtype)
        start(10, 2, 10, dtype)
    start(1, 2, 32768)
    start(4, 2, 32768)
    start(4, 2, 32768, torch.bfloat16, teacher_dtype=torch.float64, keep="table")
    start(16, 2, 1000, torch.bfloat16, objective="tdkd")
    start(64, 2, 1000, torch.bfloat16)
    for objective in OBJECTIVES:
        start(256, 2, 100, objective=objective)
    start(2, 2, 1001, objective="kd")
    start(4, 2, 100, gradient=False)
    for T in (4, 256):
        room.weights(torch.zeros(T, 2, 100))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (1000, 1001):
            room.scaled(torch.zeros(size, dtype=reference.gradient_dtype(dtype)), torch.ones(()), dtype)
    expressions = [expression for expression, *_ in launches]
    ptx, log = compiled(room.SOURCE, expressions, arch)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) == len(set(expressions))
    assert set(frames) == {("0", "0", "0")}
    assert ".local" not in ptx
    assert max(int(registers) for registers in re.findall(r"Used (\d+) registers", log)) <= 128


@needs_cupy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registers_let_512_samples_run_at_once_on_132_multiprocessors(dtype, launches):
    """An H200 has 132 of them."""
    for shape in ((4, 512, 10), (4, 512, 100), (4, 512, 1000)):
        assert 132 * resident(*compiled_for_sm_90(launches, *shape, dtype)) >= 512  # 792 with the 80 registers measured


def compiled_for_sm_90(launches, *shape):
    """Registers of a thread, and threads of a block."""
    start(*shape)
    expression, _, threads, _ = launches.pop()
    (registers,) = re.findall(r"Used (\d+) registers", compiled(room.SOURCE, [expression], "sm_90")[1])
    return int(registers), threads


def resident(registers, threads):
    """Blocks on a multiprocessor, which has 65,536 registers, and gives them to a warp in steps of eight a thread."""
    return 65536 // (-(-registers // 8) * 8 * threads)


@needs_cupy
@pytest.mark.parametrize("shape", [(4, 128, 100), (4, 512, 1000)])
def test_auto_prefers_the_kernel_with_more_resident_warps(shape, launches):
    """Measured 24 warps, and Triton's 12 and 8; shared memory allows more."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("compiles nothing under TRITON_INTERPRET=1: kernels are interpreted then")
    from seal_fast.kernels.seal_loss import triton
    from triton_on_cpu import compiling
    from triton_on_cpu import registers as registers_of

    registers, threads = compiled_for_sm_90(launches, *shape)
    tensors = torch.zeros(shape), torch.zeros(shape[1:]), torch.zeros(shape[1], dtype=torch.int64)
    with compiling(90) as kernels:
        triton.forward(*tensors, objective="seal", gradient=True, **PUBLISHED)
    others = registers_of(kernels[0])[0], 32 * kernels[0].metadata.num_warps
    assert resident(registers, threads) * threads >= 1.5 * resident(*others) * others[1]
    for operator in ("seal_loss", "selective_alignment_weights"):
        assert [name for name in _KERNELS[operator] if name in ("triton", "cupy")] == ["cupy", "triton"]


@needs_cupy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_read_and_written_16_bytes_at_once(dtype, launches):
    start(4, 2, 1000, dtype)
    ptx, _ = compiled(room.SOURCE, [launches[0][0]], "sm_90")
    assert re.search(r"ld\.global\.nc\.v4", ptx)
    assert re.search(r"st\.global\.v4", ptx)
    assert re.search(r"ld\.shared\.v4", ptx)
    assert re.search(r"st\.shared\.v4", ptx)


def test_one_launch_of_one_block_a_sample(launches):
    for shape in ((1, 1, 2), (4, 128, 100), (4, 512, 1000), (64, 3, 32768)):
        start(*shape)
        assert len(launches) == 1
        _, blocks, threads, _ = launches.pop()
        assert blocks == shape[1]
        assert threads <= 512


@pytest.mark.parametrize(
    ("T", "dtype", "most"),
    [
        *((4, torch.float32, 11_500), (4, torch.bfloat16, 19_200), (10, torch.float32, 5_200)),
        *((10, torch.float16, 9_500), (64, torch.float32, 800), (64, torch.bfloat16, 1_590)),
    ],
)
def test_samples_stay_on_the_chip_up_to_the_documented_size(T, dtype, most, launches):
    for K, kept in ((most, "sample"), (most * 103 // 100, "table")):
        start(T, 1, K, dtype)
        expression, *_, shared_bytes = launches.pop()
        assert kept_by(expression) == kept
        assert shared_bytes <= (cuda_host.SHARED_MEMORY if kept == "sample" else 48 << 10)
    assert f"{most:,}" in room.__doc__


@pytest.mark.parametrize("shared_memory", [48 << 10, 99 << 10, 163 << 10, cuda_host.SHARED_MEMORY])
@pytest.mark.parametrize("T", [1, 64, 65, 100, 232, 233, 256, 4096, 100_000])
def test_no_block_asks_for_more_shared_memory_than_the_device_has(T, shared_memory):
    dtypes = (torch.float32, torch.float32, torch.int64)
    for objective in (*OBJECTIVES, "weights"):
        kernel = room._kernel(T, 10, dtypes, 1, objective, True, shared_memory, None)
        assert kernel.shared_bytes <= shared_memory
        assert kernel.threads <= 512
        assert (kernel.workspace >= T * (16 + T)) == (kept_by(kernel.expression) == "nothing")
        if shared_memory == cuda_host.SHARED_MEMORY:
            assert (kernel.workspace > 0) == (T > 232)
    assert "beyond T = 232" in room.__doc__


def kept_by(expression):
    return expression.split(", ")[6].lower()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_batch_size_compiles_nothing_anew(objective, launches):
    for B in (1, 128, 100_000):
        start(4, B, 16, objective=objective)
    assert len({expression for expression, *_ in launches}) == 1


def test_large_shared_memory_is_asked_for(monkeypatch):
    """With a CuPy that only notes what it is asked for."""
    calls = []
    function = type("Function", (), {"ptr": 77, "__call__": lambda self, *a, **options: calls.append(options)})()
    driver = types.SimpleNamespace(funcSetAttribute=lambda *arguments: calls.append(arguments))
    device = type(
        "Device", (), {"__init__": lambda *_: None, "__enter__": lambda *_: None, "__exit__": lambda *_: None}
    )
    fake = types.ModuleType("cupy")
    fake.cuda = types.SimpleNamespace(Device=device, driver=driver)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(launcher, "_function", lambda *_: function)
    monkeypatch.setattr(launcher, "_granted", {})
    monkeypatch.setattr(launcher, "current_stream", lambda device: 0)
    for shared_bytes in (0, 48 << 10, (48 << 10) + 16):
        launcher.start(room.SOURCE, "kernel", 1, 32, [1], "q", CUDA, shared_bytes)
    assert [call.get("shared_mem") for call in (calls[0], calls[1], calls[3])] == [None, 48 << 10, (48 << 10) + 16]
    assert calls[2] == (77, 8, (48 << 10) + 16)
