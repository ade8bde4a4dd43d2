"""The CUDA kernels through NVRTC, which needs no GPU: what comes out, how it is kept on disk, and how it is started."""

import multiprocessing
import re
import struct
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch

from nvrtc import ARCHITECTURES, CUOBJDUMP, compiled, needs_architecture, needs_cupy
from seal_fast.kernels.launch import cupy as launcher
from seal_fast.kernels.lif import cupy as room
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.surrogate.reference import Surrogate

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPS = (4, 16, 17)


PUBLISHED = Options(2.0, False, 1.0, 0.0, Surrogate(), False)
LEARNED = Options(torch.full((4,), 1.7), True, 1.0, -0.3, Surrogate(), False)  # a time constant of each channel


def launched(dtype, T, options=PUBLISHED) -> list[str]:
    """The C++ expressions of the kernels that the launcher starts: of forward, then of backward."""
    x, learned = torch.zeros(T, 2, 4, 32, dtype=dtype), options.in_tensors
    expressions = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "start", lambda path, expression, *_: expressions.append(expression))
        room.forward(x, None, options, keep_v=True, pack=learned)
        room.backward(x, None, x, None, options, parameters=learned)
    return expressions


@needs_cupy
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_need_no_local_memory(arch):
    expressions = [name for dtype in DTYPES for T in STEPS for name in launched(dtype, T)]
    if arch == "sm_90":
        expressions += [name for T in STEPS for name in launched(torch.float32, T, LEARNED)]
    ptx, log = compiled(room.SOURCE, expressions, arch)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) == len(set(expressions))
    assert set(frames) == {("0", "0", "0")}
    assert ".local" not in ptx
    assert not re.search(r"(add|sub|mul|div|fma)\S*\.ftz", ptx)  # expf itself has ex2.approx.ftz


@needs_cupy
@pytest.mark.parametrize("T", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_moves_16_bytes_at_once_and_fuses_nothing(dtype, T):
    forward = launched(dtype, T)[0]
    ptx, _ = compiled(room.SOURCE, [forward], "sm_90")
    loads = re.findall(r"ld\.global\.nc\.(?:v4\.[fub]32|v2\.[fub]64)", ptx)
    stores = re.findall(r"st\.global\.wb\.v4\.u32", ptx)
    assert len(loads) >= min(T, 16)
    assert len(stores) >= min(T, 16)
    assert "fma.rn" not in ptx


@needs_cupy
def test_division_by_tau_is_the_ieee_one():
    forward = launched(torch.float32, 4, Options(1.7, True, 1.0, 0.0, Surrogate(), False))[0]
    ptx, _ = compiled(room.SOURCE, [forward], "sm_90")
    assert ptx.count("div.rn.f32") == 16
    assert "div.approx" not in ptx
    assert "div.full" not in ptx


@needs_cupy
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cubin_is_whole(arch, tmp_path):
    needs_architecture(arch)
    forward = launched(torch.float32, 4)[0]
    symbol, cubin = launcher.build(launcher.source(room.SOURCE), forward, arch)
    ends = [len(cubin)]
    for start, shape in ((0x20, 0x36), (0x28, 0x3A)):  # of the tables of program and of section headers
        size, count = struct.unpack_from("<HH", cubin, shape)
        ends.append(struct.unpack_from("<Q", cubin, start)[0] + size * count)
    assert ends[0] == max(ends[1:])
    if CUOBJDUMP is None:
        pytest.skip("cuobjdump, which comes with Triton, is not installed")
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    command = [CUOBJDUMP, "-res-usage", tmp_path / "kernel.cubin"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"Function {symbol}:" in result.stdout


@needs_cupy
def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(RuntimeError, match=r"NVRTC cannot compile nothing<1>:(.|\n)*kernel\.cu"):
        launcher.build("__global__ void something() { undeclared_name(); }", "nothing<1>", "sm_90")


@needs_cupy
@pytest.mark.parametrize(
    ("capability", "arch"), [((9, 0), "sm_90"), ((8, 0), "sm_80"), ((99, 0), r"compute_\d+"), ((1, 0), None)]
)
def test_architecture_is_the_device_or_the_newest_known(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if arch is None:
        with pytest.raises(RuntimeError, match=r"does not compile for compute capability 1\.0\."):
            launcher.architecture(torch.device("cuda", 0))
    else:
        assert re.fullmatch(arch, launcher.architecture(torch.device("cuda", 0)))


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """Kernels are kept in tmp_path / "kept"; the list has what has been built."""
    built = []

    def build(text, expression, arch):
        built.append((expression, arch))
        return f"symbol of {expression}", f"code\0for {arch}".encode()

    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(launcher, "build", build)
    return built


@needs_cupy
def test_a_kernel_is_built_once_and_then_read_from_disk(builds, tmp_path):
    first = launcher.cached(room.SOURCE, "kernel<1>", "sm_90")
    assert first == ("symbol of kernel<1>", b"code\0for sm_90")
    assert launcher.cached(room.SOURCE, "kernel<1>", "sm_90") == first
    assert builds == [("kernel<1>", "sm_90")]
    launcher.cached(room.SOURCE, "kernel<2>", "sm_90")
    launcher.cached(room.SOURCE, "kernel<1>", "sm_80")
    assert len(builds) == len(list((tmp_path / "kept").iterdir())) == 3


@needs_cupy
@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[:-1], lambda content: content[:32]])
def test_a_damaged_file_is_built_again(builds, tmp_path, damage):
    first = launcher.cached(room.SOURCE, "kernel<1>", "sm_90")
    (file,) = (tmp_path / "kept").iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert launcher.cached(room.SOURCE, "kernel<1>", "sm_90") == first
    assert len(builds) == 2
    assert file.read_bytes() == content


@needs_cupy
def test_a_folder_that_cannot_be_written_is_done_without(builds, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "file" / "kept"))
    for _ in range(2):
        assert launcher.cached(room.SOURCE, "kernel<1>", "sm_90")[1] == b"code\0for sm_90"
    assert len(builds) == 2


def _build(expression, answers):
    answers.put(launcher.cached(room.SOURCE, expression, "sm_90"))


@needs_cupy
def test_processes_may_build_the_same_kernel_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    expression = launched(torch.float32, 4)[0]
    processes = [context.Process(target=_build, args=(expression, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    got = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert got[0] == got[1] == got[2] == launcher.cached(room.SOURCE, expression, "sm_90")
    symbol, code = got[0]
    assert re.fullmatch(r"_Z\S*lif_forward\S*", symbol)
    assert code[:4] == b"\x7fELF"
    assert [file.suffix for file in tmp_path.iterdir()] == [".kernel"]


def test_kernels_start_on_the_current_stream_of_the_tensors_device(monkeypatch):
    """With a CuPy that only notes what it is asked for. Each thread starts its own; one module is loaded a device."""
    calls, loaded, current = [], [], threading.local()

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.device = self.index

        def __exit__(self, *_):
            current.device = None

    class Module:
        def load(self, code):
            loaded.append((current.device, code))

        def get_function(self, symbol):
            def function(grid, block, arguments, stream):
                types_passed = [type(argument) for argument in arguments]
                calls.append((current.device, symbol, grid, block, types_passed, stream.ptr))

            function.ptr = 77
            return function

    fake = types.ModuleType("cupy")
    fake.cuda = types.SimpleNamespace(Device=Device, Module=Module)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(launcher, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launcher, "cached", lambda path, expression, arch: (expression, b"code"))
    streams = {0: 0, 1: 4096}
    monkeypatch.setattr(launcher, "current_stream", lambda device: streams[device.index])
    launcher._function.cache_clear()
    try:
        for index in (1, 0, 1):
            launch = launcher.Launch(
                room.SOURCE, "kernel", 5, 128, (7, 0.1), real=torch.float32, device=torch.device("cuda", index)
            )
            launch(torch.zeros(3), None)
        launcher.Launch(room.SOURCE, "kernel", 5, 128, (0.1,), real=torch.float64, device=torch.device("cuda", 0))()
    finally:
        launcher._function.cache_clear()
    assert loaded == [(1, b"code"), (0, b"code")]
    passed = [np.uint64, np.uint64, np.int64, np.float32]
    assert calls[:3] == [(index, "kernel", (5,), (128,), passed, streams[index]) for index in (1, 0, 1)]
    assert calls[3][4] == [np.float64]


@needs_cupy
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, a function that was never loaded must not be started")
def test_cupy_takes_the_stream_and_the_arguments():
    """It comes as far as the missing driver."""
    import cupy

    function = cupy.cuda.function.Function.__new__(cupy.cuda.function.Function)
    arguments = [np.uint64(0), np.int64(1), np.float32(2), np.float64(3)]
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        function((1,), (128,), arguments, stream=launcher._Stream(4096))
    assert not hasattr(launcher._Stream, "__del__")  # as CuPy's own, which destroys the stream


def test_source_is_whole():
    text = launcher.source(room.SOURCE)
    assert '#include "' not in text
    assert "#pragma once" not in text
    assert text.count("struct float16 {") == 1
    assert text.index("struct float16") < text.index("surrogate_derivative(") < text.index("lif_forward(")
