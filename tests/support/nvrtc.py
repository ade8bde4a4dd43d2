"""CUDA C++ through NVRTC, which needs no GPU: the PTX, and what the assembler says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from seal_fast.kernels.launch import cupy as launcher

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

needs_cupy = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="CuPy, which brings NVRTC to Python, is not installed"
)


def _cuobjdump() -> Path | None:
    """NVIDIA's tool that reads cubins, which Triton brings along."""
    triton = importlib.util.find_spec("triton")
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else None
    return tool if tool and tool.exists() else None


CUOBJDUMP = _cuobjdump()


def needs_architecture(arch: str) -> None:
    """Skip where NVRTC is older than the GPU."""
    from cupy.cuda import nvrtc

    if int(arch.removeprefix("sm_")) not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} is older than {arch} and does not compile for it")


def compiled(source: Path, expressions: list[str], arch: str) -> tuple[str, str]:
    """PTX of a file's kernels, and what the assembler says of them; skips where NVRTC is older than the GPU."""
    from cupy.cuda import nvrtc

    needs_architecture(arch)
    program = nvrtc.createProgram(launcher.source(source), "kernel.cu", (), ())
    for expression in expressions:
        nvrtc.addNameExpression(program, expression)
    nvrtc.compileProgram(program, (*launcher.OPTIONS, f"--gpu-architecture={arch}", "--ptxas-options=-v"))
    ptx, log = nvrtc.getPTX(program), nvrtc.getProgramLog(program)
    nvrtc.destroyProgram(program)
    return ptx.decode() if isinstance(ptx, bytes) else ptx, log
