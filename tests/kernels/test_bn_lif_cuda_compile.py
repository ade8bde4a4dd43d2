"""The CUDA kernels of batch norm, residual and LIF through NVRTC, which needs no GPU."""

import re

import pytest
import torch

from bn_lif_kernels import PUBLISHED, per_channel, table_of, tensors_of
from nvrtc import ARCHITECTURES, compiled, needs_cupy
from seal_fast.kernels.bn_lif import cupy as room
from seal_fast.kernels.bn_lif.norms import Norm
from seal_fast.kernels.launch import cupy as launcher
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.surrogate.reference import Surrogate

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")
LEARNED = Options(torch.full((64,), 1.7), True, torch.ones(64), -0.3, Surrogate(), False)


@pytest.fixture
def started(monkeypatch):
    """What would be started: kernel -> (expression, blocks)."""
    launches = {}

    def start(path, expression, blocks, *_):
        launches.setdefault(expression.split("<")[0], []).append((expression, blocks))

    monkeypatch.setattr(launcher, "start", start)
    monkeypatch.setattr(room, "counters", lambda device, number: torch.zeros(number, dtype=torch.int32))
    return launches


def start(dtype, T, kind, layout, options=PUBLISHED, *, with_m=False, shape=(2, 64, 8, 8)):
    y, residual, scales, static = tensors_of(shape, T, kind, dtype, layout)
    call = {"time_steps": T, "static": static}
    table, counts = table_of(scales, dtype), (1,) * (len(scales) // 2)
    found = Norm(None, None, *per_channel(shape[1], 2, dtype, 1), None, 0.1, 1e-5, 0, 1)
    for norm in (found, found._replace(count=1)):
        room.fill_table(table, 0, y, norm)
    spikes, m, _ = room.forward(y, residual, scales, options, **call, keep_m=True, pack=options.in_tensors)
    grad_m = m if with_m else None
    asked = {"counts": counts, "steps": True, "total": True, "parameters": options.in_tensors}
    room.backward(spikes, grad_m, y, residual, table, options, **call, **asked)
    room.normalised_gradient(spikes, spikes, per_channel(shape[1], 3, dtype, 1), in_place=True)


def expressions(started) -> list[str]:
    return sorted({expression for launches in started.values() for expression, _ in launches})


def check(names: list[str], arch: str) -> None:
    ptx, log = compiled(room.SOURCE, names, arch)
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(frames) == len(names)
    assert set(frames) == {("0", "0", "0")}
    assert ".local" not in ptx
    assert not re.search(r"(add|sub|mul|div|fma)\S*\.ftz", ptx)  # but for ex2.approx and rcp.approx


@needs_cupy
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_need_no_local_memory(arch, started):
    for dtype in DTYPES:
        for T in (4, 10):
            for layout in LAYOUTS:
                start(dtype, T, "normalised residual", layout, with_m=True)
                start(dtype, T, "residual", layout)
                start(dtype, T, "no residual", layout)
    check(expressions(started), arch)


@pytest.mark.long
@needs_cupy
def test_learned_constants_and_long_sequences_need_no_local_memory(started):
    for dtype in (*DTYPES, torch.float16, torch.float64):
        for T, layout in ((1, "channels_last"), (4, "channels_last"), (10, "contiguous"), (16, "channels_last")):
            start(dtype, T, "normalised residual", layout, LEARNED, with_m=True)
        start(dtype, 33, "normalised residual", "channels_last", LEARNED, with_m=True)
    check(expressions(started), "sm_90")


def accesses(ptx: str, size: int = 16) -> tuple[int, int]:
    """How often so many bytes at once, 16 or 8, are loaded from global memory, and stored."""
    word = {16: r"(?:v4\.[fub]32|v2\.[fub]64)", 8: r"v2\.[fub]32"}[size]
    loads = re.findall(rf"ld(?:\.relaxed\.cta)?\.global(?:\.nc)?\.{word}", ptx)
    return len(loads), len(re.findall(rf"st\.global\.wb\.{word}", ptx))


@needs_cupy
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bytes_at_once_and_nothing_fused(dtype, layout, started):
    start(dtype, 4, "residual", layout)
    at_least = {"bn_lif_forward": (8, 8), "bn_lif_backward": (12, 4), "moments": (4, 0), "normalised_gradient": (8, 4)}
    for kernel, (loads, stores) in at_least.items():
        ptx, _ = compiled(room.SOURCE, [started[kernel][0][0]], "sm_90")
        in_16_bits = kernel == "bn_lif_backward" and dtype == torch.bfloat16  # whose threads take 4 neighbours
        got = accesses(ptx, 8 if in_16_bits else 16)
        assert got[0] >= loads, kernel
        assert got[1] >= stores, kernel
        if kernel == "bn_lif_forward":
            assert "fma.rn" not in ptx
    ptx, _ = compiled(room.SOURCE, [started["fill_table"][0][0]], "sm_90")
    assert not re.search(r"fma\.rn|\.approx", ptx)
    started.clear()
    start(dtype, 10, "residual", layout)
    ptx, _ = compiled(room.SOURCE, [started["bn_lif_forward"][0][0]], "sm_90")
    assert accesses(ptx) >= (20, 20)
    assert "fma.rn" not in ptx


@needs_cupy
@pytest.mark.parametrize("dtype", DTYPES)
def test_registers_let_two_blocks_run_at_once(dtype, started):
    """A multiprocessor has 65,536 registers, and gives them to a warp in steps of eight a thread."""
    for layout in LAYOUTS:
        for T in (4, 10):
            start(dtype, T, "residual", layout)
    _, log = compiled(room.SOURCE, expressions(started), "sm_90")
    assert max(int(registers) for registers in re.findall(r"Used (\d+) registers", log)) <= 240  # 215 measured


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resolution_and_batch_size_compile_nothing_anew(layout, started):
    for shape in ((2, 64, 8, 8), (32, 64, 16, 16), (128, 256, 8, 8)):
        start(torch.float32, 1, "residual", layout, shape=shape)
    assert all(len({expression for expression, _ in launches}) == 1 for launches in started.values())
    assert {len(launches) for launches in started.values()} == {3}


def test_blocks_are_many_and_threads_add_few_numbers_one_by_one(started):
    """Of 64 channels with 112 x 112 numbers each, in 64 samples: no thread adds up more than 256 positions."""
    for size, C, stride, vector in ((64 * 112 * 112 * 64, 64, 1, 8), (64 * 112 * 112 * 64, 64, 112 * 112, 4)):
        tiling = room._tiling(size, C, stride, vector, blocks=396)
        rows = room.THREADS // tiling.columns
        assert tiling.positions * C * vector == size * (vector if stride == 1 else 1)
        assert tiling.positions <= rows * tiling.slices * room.POSITIONS[1]
        assert tiling.blocks >= 396
    assert room._tiling(64, 64, 1, 4, blocks=396).blocks == 1
