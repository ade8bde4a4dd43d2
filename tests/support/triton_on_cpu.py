"""Triton kernels without a GPU: its interpreter, as a plugin of pytest (-p triton_on_cpu), and its compiler."""

import re

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from sass import dumped
from without_gpu import compiling

__all__ = ["CAPABILITIES", "access_bytes", "compiling", "machine_code", "registers"]

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


def registers(kernel) -> tuple[int, int]:
    """Registers of a thread, and the bytes of memory that it uses in their place."""
    usage = dumped(kernel.asm["cubin"], "--dump-resource-usage")
    count, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return int(count), int(stack) + int(local)


def machine_code(kernel) -> str:
    """What ptxas made of the kernel."""
    return dumped(kernel.asm["cubin"], "-sass")


def access_bytes(kernel) -> set[int]:
    """How many bytes a thread's accesses to global memory move."""
    accesses = re.findall(r"\b(?:ld|st)\.global(?:\.[a-z]\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", kernel.asm["ptx"])
    return {int(count or 1) * int(bits) // 8 for count, bits in accesses}
