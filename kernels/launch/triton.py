"""What every Triton kernel needs to start: one way to launch, numbers by value, and exact division.

No file of kernels postpones its annotations (`from __future__ import annotations`): the interpreter of Triton 3.2
recognises tl.constexpr only as an object.
"""

import contextlib
import os
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel

from .device import current_stream, is_current

ACCESS = 16  # bytes that one thread reads or writes at once: the widest access there is

# Triton's div_rn takes subnormal numbers for 0 on NVIDIA's GPUs, in 3.2 and 3.3 at least; PTX has the division itself.
_IN_PTX = tl.constexpr(torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1")


class Launch:
    """Launches of a kernel that differ in their tensors alone, so that all else is found out once.

    Args:
        kernel: Takes tensors and then `numbers`.
        blocks: How many programs there are.
        numbers: Sizes and other numbers.
        device: Where it runs.
        num_warps: Of a program.
        constants: Its constants.
    """

    def __init__(self, kernel, blocks: int, numbers: tuple = (), *, device: torch.device, num_warps: int, **constants):
        self.kernel, self.blocks, self.numbers, self.device = kernel, blocks, numbers, device
        self.constants = {"num_warps": num_warps, **constants}
        self.prepared: dict[tuple, tuple] = {}  # what the tensors are to Triton -> what starts the kernel

    def __call__(self, *tensors: Tensor | None) -> None:
        """Start the kernel with these."""
        if not _REPEATS:
            start(self.kernel, self.blocks, *tensors, *self.numbers, device=self.device, **self.constants)
            return
        key, addresses = specialisation(tensors)
        found = self.prepared.get(key)
        if found is None or self.kernel.pre_run_hooks or not is_current(self.device):
            found = start(self.kernel, self.blocks, *tensors, *self.numbers, device=self.device, **self.constants)
            if found is not None:
                self.prepared[key] = found[0], (*self.numbers, *found[1])
            return
        run, last = found
        run(*addresses, *last, stream=current_stream(self.device))


def start(kernel, blocks: int, *arguments, device: torch.device, num_warps: int, **constants) -> tuple | None:
    """Start `kernel` on `device` with one program a block.

    Products and sums stay apart, as fused multiply-adds round differently; Triton's default changes between releases.

    Returns:
        What starts it with other tensors of the same kinds, and its arguments after those given here, or None.
    """
    if _REPEATS and device.type == "cuda" and is_current(device):
        specialised, passed = specialisation(arguments)
        values = constants.values()
        key = (id(kernel), blocks, device.index, num_warps, *constants, *values, *map(type, values), *specialised)
        prepared = _prepared.get(key)
        if prepared is not None and not kernel.pre_run_hooks:
            run, last, _ = prepared
            run(*passed, *last, stream=current_stream(device))
        else:
            compiled = _start(kernel, blocks, arguments, num_warps, constants)
            # 0.0 and -0.0 are two constants, but one key.
            if passed is None or not isinstance(compiled, CompiledKernel) or float in map(type, values):
                return None
            if len(_prepared) >= _MOST_PREPARED:
                _prepared.clear()
            run, last = compiled[blocks, 1, 1], last_arguments(kernel, arguments, constants)
            _prepared[key] = run, last, kernel
        return run, last
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        _start(kernel, blocks, arguments, num_warps, constants)
    return None


def _start(kernel, blocks, arguments, num_warps, constants):
    settle(kernel)
    return kernel[(blocks,)](*arguments, **constants, num_warps=num_warps, enable_fp_fusion=False)


# All that the choice of a compiled kernel depends on -> what starts it, the arguments after those of `start`, and the
# kernel itself, whose id stands for it, as its own hash takes longer.
_prepared: dict[tuple, tuple] = {}
_MOST_PREPARED = 4096
_PLAIN = {torch.Tensor, torch.nn.Parameter}
# Triton before 3.3 takes other arguments to start a compiled kernel, and on AMD's GPUs specialises for more.
_REPEATS = torch.version.hip is None and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


def specialisation(arguments: tuple) -> tuple[tuple, list | None]:
    """What Triton compiles a kernel for, and its arguments with addresses in place of tensors.

    A tensor stands for its dtype and whether 16 bytes divide its address, and an integer for itself: Triton looks at
    its width, whether 16 divides it and whether it is 1, some of it only for some parameters. The values of floats are
    not looked at. Where there is anything else, None takes the place of the arguments.
    """
    key, passed = [], []
    for argument in arguments:
        kind = type(argument)
        if kind is int or argument is None:
            key.append(argument)
        elif kind in _PLAIN:
            address = argument.data_ptr()
            key.append(argument.dtype if address % ACCESS == 0 else (argument.dtype,))
            argument = address
        elif kind is float:
            key.append(float)
        else:
            return (object(),), None
        passed.append(argument)
    return tuple(key), passed


def last_arguments(kernel, arguments: tuple, constants: dict) -> tuple:
    """The constants in the order of the kernel's parameters, which are all that follow `arguments`."""
    parameters = kernel.signature.parameters
    bound = kernel.signature.bind(*arguments, **{name: constants[name] for name in constants if name in parameters})
    bound.apply_defaults()
    return tuple(bound.arguments.values())[len(arguments) :]


_settled: set[int] = set()  # ids of functions, which live as long as their modules


def settle(kernel) -> None:
    """Have the kernel's key in Triton's cache be the same in every process.

    The key holds the constants of the functions that it calls, but, in Triton 3.6, only of those whose own key has been
    asked for before: it depends on which kernels the process has started. So the callees are asked first.
    """
    if id(kernel) in _settled or not isinstance(kernel, triton.runtime.JITFunction):  # as in the interpreter
        return
    _settled.add(id(kernel))
    for name in kernel.fn.__code__.co_names:
        for callee in (kernel.fn.__globals__.get(name), getattr(tl, name, None)):
            settle(callee)
    kernel.cache_key  # noqa: B018


def aligned(dtype: torch.dtype, *strides: int) -> bool:
    """Whether rows of `dtype` at these strides, in elements, all begin where one wide access can."""
    return all(stride * dtype.itemsize % ACCESS == 0 for stride in strides)


def argument(value: float, dtype: torch.dtype) -> float | int:
    """`value` as a kernel takes it, for `number`. Triton passes floats as float32, so float64 goes as its bits."""
    return struct.unpack("<q", struct.pack("<d", value))[0] if dtype == torch.float64 else float(value)


@triton.jit
def number(value, STATE: tl.constexpr):
    """A number from `argument`, in the state's dtype."""
    if STATE == tl.float64:  # noqa: SIM300  to Triton 3.2 a dtype never equals a constexpr, but a constexpr a dtype
        value = tl.cast(tl.cast(value, tl.int64), tl.float64, bitcast=True)
    else:
        value = tl.cast(value, STATE)
    return value


@triton.jit
def size(value, ALIGNED: tl.constexpr):
    """A size or stride, which ALIGNED divides, as int64."""
    return tl.multiple_of(tl.cast(value, tl.int64), ALIGNED)


@triton.jit
def divide(a, b):
    """The quotient rounded to nearest, as IEEE has it; `/` is an approximation in float32."""
    if a.dtype == tl.float64:
        quotient = a / b
    elif _IN_PTX:
        quotient = tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1
        )
    else:
        quotient = tl.div_rn(a, b)
    return quotient


@triton.jit
def square_root(a):
    """The root rounded to nearest, as IEEE has it; Triton's sqrt_rn takes subnormal numbers for 0 in 3.2 at least."""
    if a.dtype == tl.float64:
        root = tl.sqrt(a)
    elif _IN_PTX:
        root = tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [a], tl.float32, is_pure=True, pack=1)
    else:
        root = tl.sqrt_rn(a)
    return root


@triton.jit
def exp_negative(magnitude, rate):
    """e^(-rate·magnitude), both at least 0, with a error of about 2^-22 + 6e-8·rate·magnitude of it: for gradients."""
    if _IN_PTX and magnitude.dtype == tl.float32:  # two instructions; 0 takes the place of less than 2^-126
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [magnitude * (rate * -1.44269504)], tl.float32, is_pure=True, pack=1
        )
    else:
        power = tl.exp(-rate * magnitude)
    return power


@triton.jit
def divide_by_moderate(a, b):
    """The quotient for 1 <= b <= 4, right but for a few units in the last place: for gradients."""
    if _IN_PTX and b.dtype == tl.float32:  # two instructions; `/` takes eight
        quotient = a * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], tl.float32, is_pure=True, pack=1
        )
    else:
        quotient = a / b
    return quotient


@triton.jit
def is_last(counter, programs):
    """Whether so many programs have called this with the counter, which is 0 again then.

    What any of them has stored before is visible to the last one, if it loads with cache_modifier=".cg": from the cache
    that all multiprocessors share.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(counter, 0)
    return last
