"""Triton kernels without a GPU: its interpreter, as a plugin of pytest (-p triton_on_cpu), and its compiler."""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(nvidia.__file__).parent / "bin"

# Compute capabilities that kernels are compiled for -> marks of their tests
CAPABILITIES = {
    80: (),
    90: (),
    100: pytest.mark.skipif(
        triton.__version__.startswith("3.2."), reason="Triton 3.2 does not compile for compute capability 10.0"
    ),
}


def pytest_configure(config):
    """Let the interpreter round to bfloat16 as GPUs do: to nearest. It cuts off, which no option changes."""
    convert = interpreter._convert_float

    def convert_to_nearest(values, source, target, rounding):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding)
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view("u2")

    interpreter._convert_float = convert_to_nearest


class _Target:
    """What Triton asks its driver for before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability  # kernels are cached by device

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling(capability: int):
    """Launches compile for this compute capability, 90 for sm_90, and start nothing; yields the list of their kernels.

    Arguments take the way that they take to a GPU, tensors of the CPU included.
    """
    kernels, run = [], JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernels.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver.set_active(_Target(capability))
    JITFunction.run = compile_only
    try:
        yield kernels
    finally:
        JITFunction.run = run
        if torch.cuda.is_available():  # else there is no driver to return to
            driver.reset_active()


def registers(kernel) -> tuple[int, int]:
    """Registers of a thread, and the bytes of memory that it uses in their place."""
    usage = _cuobjdump(kernel, "--dump-resource-usage")
    count, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return int(count), int(stack) + int(local)


def machine_code(kernel) -> str:
    """What ptxas made of the kernel."""
    return _cuobjdump(kernel, "-sass")


def access_bytes(kernel) -> set[int]:
    """How many bytes a thread's accesses to global memory move."""
    accesses = re.findall(r"\b(?:ld|st)\.global(?:\.[a-z]\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", kernel.asm["ptx"])
    return {int(count or 1) * int(bits) // 8 for count, bits in accesses}


def _cuobjdump(kernel, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
