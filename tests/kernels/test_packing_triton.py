"""The Triton kernel that unpacks spikes, without a GPU: in Triton's interpreter, and compiled."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from seal_fast.kernels.launch import triton as launcher
from seal_fast.kernels.packing import triton as kernel
from triton_on_cpu import CAPABILITIES, access_bytes, compiling, registers
from triton_process import interpret

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="compiles nothing under TRITON_INTERPRET=1: kernels are interpreted then",
)


def test_shared_tests(tmp_path):
    interpret(tmp_path, ["kernels/test_packing.py"], "-k", "triton and not 200003", at_least=33)


def launch(T, N, dtype):
    kernel.unpack(torch.zeros(T, (N + 7) // 8, dtype=torch.uint8), N, dtype)


@compiles
@pytest.mark.parametrize("capability", [pytest.param(name, marks=marks) for name, marks in CAPABILITIES.items()])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_register_is_spilled_and_16_bytes_are_written_at_once(dtype, capability):
    with compiling(capability) as kernels:
        launch(3, 64, dtype)
        launch(3, 1001, dtype)
    for compilation, written in zip(kernels, (16, dtype.itemsize), strict=True):
        count, spilled = registers(compilation)
        assert spilled == 0
        assert count <= 40  # measured 20 to 32
        assert access_bytes(compilation) == {1, written}


@compiles
def test_sizes_do_not_compile_anew():
    with compiling(90) as kernels:
        for T, N in ((3, 64), (1, 4), (7, 4096), (3, 1), (1, 7), (3, 1001)):
            launch(T, N, torch.float32)
    assert len({id(compilation) for compilation in kernels}) == 2  # rows aligned and not


def test_two_to_the_33_spikes_are_counted_in_one_grid(monkeypatch):
    started = []
    monkeypatch.setattr(launcher, "start", lambda *arguments, **options: started.append((arguments, options)))
    kernel.unpack(torch.empty(4, 2**30, dtype=torch.uint8, device="meta"), 2**33, torch.bfloat16)
    (((_, blocks, *_, N), options),) = started
    assert blocks * options["BLOCK"] == 4 * 2**33
    assert blocks < 2**31  # the most programs on the first axis
    assert N == 2**33
