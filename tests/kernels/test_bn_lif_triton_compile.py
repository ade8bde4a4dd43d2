"""The Triton kernels of bn_lif compiled for GPUs, without one: registers, accesses to memory, and when anew.

Launches take the launcher's own way, up to the start of the kernel.
"""

import importlib
import os
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton decides when it is imported: kernels are functions of the interpreter then, without code to look at.
    pytest.skip("compiles nothing under TRITON_INTERPRET=1: kernels are interpreted then", allow_module_level=True)

from bn_lif_kernels import LAYOUTS, PUBLISHED
from seal_fast.kernels.bn_lif import norms as norms_of
from seal_fast.kernels.bn_lif import triton as kernel
from seal_fast.kernels.bn_lif import triton_tiles
from seal_fast.kernels.bn_lif.norms import Norm
from seal_fast.kernels.lif.reference import state_dtype
from seal_fast.nn import LIFNode
from triton_on_cpu import CAPABILITIES, compiling, machine_code, registers

operator = importlib.import_module("seal_fast.ops.bn_lif")  # the package has the function by this name

NAMES = ("_statistics", "_forward", "_backward", "_normalised_gradient")
MOST = dict(zip(NAMES, (128, 160, 255, 112), strict=True))  # registers; measured 120, 149, 236 and 102
SHARED_MEMORY = 99 << 10  # bytes that a block may have on a GPU of compute capability 8.6, 8.9 or 12.0; measured 48 KB


def launch(y, T=4, options=PUBLISHED, *, residual=None, norms=1, static=False, everything=False):
    """All kernels, in the order of NAMES."""
    state = state_dtype(y.dtype)
    C, batch = y.shape[1], len(y) if static else len(y) // T
    table, row = torch.zeros(4 * norms, C, dtype=state), torch.zeros(C, dtype=state)
    kernel.fill_table(table, 0, y, Norm(*[row] * 4, torch.zeros((), dtype=torch.int64), 0.1, 1e-5, y.numel() // C, 1))
    kernel.forward(
        y, residual, norms_of.scales(table), options, time_steps=T, static=static, keep_m=everything, pack=everything
    )
    strides = (y.stride(0), *y.stride()[1:])
    grad = torch.empty_strided((T * batch, *y.shape[1:]), strides, dtype=y.dtype, device=y.device)
    kernel.backward(
        grad,
        grad if everything else None,
        y,
        residual,
        table,
        options,
        counts=(y.numel() // C,) * norms,
        time_steps=T,
        static=static,
        steps=True,
        total=everything,
        parameters=everything,
    )
    kernel.normalised_gradient(y, y, torch.zeros(3, C, dtype=state), in_place=True)


def compiled(capability, *arguments, **options):
    with compiling(capability) as kernels:
        launch(*arguments, **options)
    assert tuple(each.name for each in kernels) == NAMES
    return {each.name: each for each in kernels}


def rows(T, dtype, layout, shape=(2, 64, 8, 8)):
    return LAYOUTS[layout](torch.zeros(T * shape[0], *shape[1:], dtype=dtype))


def accesses(compilation):
    """Bytes of an access to global memory -> how many of a thread's accesses move so many."""
    ptx = compilation.asm["ptx"]
    found = re.findall(r"\b(?:ld|st)\.global(?:\.[a-z]\w+)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global \[.+?\], \[.+?\], (0x\w+)", ptx)
    return Counter([*(int(count or 1) * int(bits) // 8 for count, bits in found), *(int(size, 16) for size in copies)])


# (dtype, T, layout) -> bytes of an access in backward: 16 at most, fewer where a thread keeps more of fewer neurons
BACKWARD_ACCESS = {
    (torch.float32, 4, "contiguous"): 16,
    (torch.float32, 4, "channels_last"): 16,
    (torch.bfloat16, 4, "contiguous"): 16,
    (torch.bfloat16, 4, "channels_last"): 16,
    (torch.float32, 10, "contiguous"): 8,
    (torch.float32, 10, "channels_last"): 8,
    (torch.bfloat16, 10, "contiguous"): 4,
    (torch.bfloat16, 10, "channels_last"): 4,
}


@pytest.mark.parametrize(("dtype", "T", "layout"), BACKWARD_ACCESS, ids=str)
@pytest.mark.parametrize(
    "capability", [pytest.param(capability, marks=marks) for capability, marks in CAPABILITIES.items()]
)
def test_no_register_is_spilled_and_accesses_are_wide(capability, dtype, T, layout):
    y = rows(T, dtype, layout)
    least = dict(zip(NAMES, (4, 3 * T, 4 * T, 3), strict=True))  # wide accesses
    for name, compilation in compiled(capability, y, T, residual=y).items():
        count, spilled = registers(compilation)
        assert spilled == 0, f"{name} keeps {spilled} bytes of a thread in memory"
        assert count <= MOST[name], f"{name} takes {count} registers"
        access = BACKWARD_ACCESS[dtype, T, layout] if name == "_backward" else 16
        assert accesses(compilation)[access] >= least[name], f"{name}: {accesses(compilation)}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("norms", [1, 2])
@pytest.mark.parametrize(
    "capability", [pytest.param(capability, marks=marks) for capability, marks in CAPABILITIES.items()]
)
def test_merging_spills_nothing(capability, norms, dtype, layout):
    kernels = compiled(capability, rows(4, dtype, layout), norms=norms, residual=rows(4, dtype, layout))
    for name in ("_statistics", "_backward"):
        assert registers(kernels[name])[1] == 0, name
        assert kernels[name].metadata.shared <= SHARED_MEMORY, name


EVERYTHING = {"tau": torch.full((64,), 1.7), "decay_input": True, "v_reset": None}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("T", "dtype", "shape"),
    [
        (4, torch.float32, (2, 64, 8, 8)),
        (10, torch.bfloat16, (2, 64, 8, 8)),
        (16, torch.float32, (2, 64, 7, 7)),  # not aligned
        (4, torch.bfloat16, (2, 64, 7, 7)),
        (33, torch.bfloat16, (2, 64, 8, 8)),
        (17, torch.float32, (2, 64, 8, 8)),
    ],
    ids=str,
)
def test_no_register_is_spilled_with_everything_asked_for(T, dtype, shape, layout):
    y = rows(T, dtype, layout, shape)
    options = replace(PUBLISHED, **EVERYTHING)
    for name, compilation in compiled(90, y, T, options, residual=y, norms=2, everything=True).items():
        assert registers(compilation)[1] == 0, name
        assert compilation.metadata.shared <= SHARED_MEMORY, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norms", [1, 2])
@pytest.mark.parametrize("T", [4, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_evaluation_is_one_kernel_that_spills_nothing_and_rounds_each_operation_once(dtype, T, norms, layout):
    y, row = rows(T, dtype, layout), torch.zeros(64, dtype=state_dtype(dtype))
    fixed = (Norm(row, row, row, row, None, 0.1, 1e-5, 0, 1),) * norms
    options = {"time_steps": T, "static": False, "keep_m": False, "pack": False, "norms": fixed}
    with compiling(90) as kernels:
        kernel.forward(y, y, None, PUBLISHED, **options)
    assert [each.name for each in kernels] == ["_forward"]
    count, spilled = registers(kernels[0])
    assert spilled == 0
    assert count <= MOST["_forward"]
    ptx = kernels[0].asm["ptx"]
    kind = "f64" if dtype == torch.float64 else "f32"
    assert f"sqrt.rn.{kind}" in ptx
    assert f"div.rn.{kind}" in ptx
    assert not re.search(r"\bfma\b|\.ftz|\.approx", ptx)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norms", [1, 2])
def test_forward_rounds_each_operation_once(norms, layout):
    y = rows(4, torch.float32, layout)
    forward = compiled(90, y, residual=y, norms=norms, everything=True)["_forward"]
    assert "fma" not in forward.asm["ptx"]
    assert ".ftz" not in forward.asm["ptx"]  # subnormal numbers stay
    assert "FMUL" in machine_code(forward)
    assert "FFMA" not in machine_code(forward)


def test_float64_numbers_are_passed_as_their_bits():
    """The interpreter compares dtypes in its own way: of kernels compiled for a GPU, none may convert an integer."""
    y = rows(4, torch.float64, "contiguous")
    kernels = compiled(90, y, options=replace(PUBLISHED, tau=1.7), residual=y)
    for name in ("_forward", "_backward"):
        assert "cvt.rn.f64.s64" not in kernels[name].asm["ptx"], name


def test_bfloat16_is_rounded_to_nearest():
    """The interpreter's rounding is the tests' own, so that of the GPU is looked at here."""
    kernels = compiled(90, rows(4, torch.bfloat16, "contiguous"))
    for name in ("_backward", "_normalised_gradient"):
        assert "cvt.rn.bf16" in kernels[name].asm["ptx"]
        assert "cvt.rz.bf16" not in kernels[name].asm["ptx"]


def found(kernels):
    """(Name, how many compilations of it there are) of the kernels that were launched."""
    return Counter(name for name, _ in {(each.name, id(each)) for each in kernels}).items()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_do_not_compile_anew(layout):
    """Neither a batch, nor a resolution, nor numbers, nor how many partial results there are."""
    with compiling(90) as kernels:
        for shape in ((2, 64, 8, 8), (1, 64, 4, 2), (3, 64, 24, 24), (70, 64, 56, 56)):
            y = LAYOUTS[layout](torch.zeros(4 * shape[0], *shape[1:], device="meta" if shape[0] == 70 else "cpu"))
            launch(
                y if shape[0] < 70 else torch.empty_like(y, device="cpu"), options=replace(PUBLISHED, tau=1 + shape[0])
            )
    assert found(kernels) == dict.fromkeys(NAMES, 1).items()


def test_channels_compile_anew_only_where_they_are_innermost():
    with compiling(90) as kernels:
        for channels in (3, 64, 130, 1):
            launch(torch.zeros(4, channels, 8, 8))
    assert found(kernels) == dict.fromkeys(NAMES, 1).items()


def test_whole_chunks_more_do_not_compile_anew():
    with compiling(90) as kernels:
        for T in (17, 33, 81):
            launch(torch.zeros(T, 4, 8, 8), T)
    assert found(kernels) == dict.fromkeys(NAMES, 1).items()


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*arguments, **options or {})


@pytest.mark.parametrize("static", [False, True], ids=["varying", "static"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_launch_only_allocates(layout, static):
    """No copy of an input, and nothing that waits for the device."""
    y = LAYOUTS[layout](torch.zeros(8, 6, 40, 50))
    residual = y[:2] if not static else LAYOUTS[layout](torch.zeros(32, 6, 40, 50))
    table, row = torch.zeros(8, 6), torch.zeros(6)
    norm = Norm(*[row] * 4, torch.zeros((), dtype=torch.int64), 0.1, 1e-5, y.numel() // 6, 4 if static else 1)
    grad = LAYOUTS[layout](torch.zeros(32 if static else 8, 6, 40, 50))
    with compiling(90), Calls() as calls:
        kernel.fill_table(table, 0, y, norm)
        kernel.fill_table(table, 1, residual, norm._replace(count=0, num_batches_tracked=None))
        kernel.forward(
            y, residual, norms_of.scales(table), PUBLISHED, time_steps=4, static=static, keep_m=True, pack=True
        )
        options = {"static": static, "time_steps": 4, "steps": True, "total": True, "parameters": True}
        kernel.backward(grad, grad, y, residual, table, PUBLISHED, counts=(12000, 0), **options)
        kernel.normalised_gradient(y, y, torch.zeros(3, 6), in_place=True)
    assert calls.names.count("zeros") == 3  # coefficients, of the test itself, and what are counters on a GPU
    allocations = {"empty_strided", "empty_like", "empty", "zeros"}
    assert set(calls.names) - {"select", "slice", "detach", "view", "alias"} <= allocations


@pytest.mark.parametrize("residual_bn", [None, torch.nn.BatchNorm2d(6)], ids=["a norm", "two norms"])
def test_a_layer_computes_nothing_besides_its_kernels(residual_bn, monkeypatch):
    """Two kernels each way, and for a residual's norm one more; one in evaluation. test_launches.py has the others."""
    monkeypatch.setattr(operator, "resolve", lambda *_: "triton")
    bn, neuron, norms = torch.nn.BatchNorm2d(6), LIFNode(), 1 + (residual_bn is not None)
    y, residual = (torch.zeros(8, 6, 4, 4, requires_grad=True) for _ in range(2))
    arguments = {"time_steps": 4, "residual": residual, "residual_bn": residual_bn}
    with compiling(90) as kernels, Calls() as calls:
        spikes = operator.bn_lif(y, bn, neuron, **arguments)
        spikes.backward(torch.zeros_like(spikes))
    forward, backward = [*["_statistics"] * norms, "_forward"], ["_backward", *["_normalised_gradient"] * norms]
    assert [each.name for each in kernels] == [*forward, *backward]
    views = {"select", "slice", "detach", "view", "alias", "unbind"}
    assert calls.names.count("zeros") == norms + 1  # in place of the counters that a GPU has
    assert set(calls.names) - views - {"zeros", "zeros_like"} <= {"empty_strided", "empty_like", "empty"}
    for module in (bn, residual_bn or bn):
        module.eval()
    with compiling(90) as kernels, Calls() as calls, torch.no_grad():
        operator.bn_lif(y, bn, neuron, **arguments)
    assert [each.name for each in kernels] == ["_forward"]
    assert set(calls.names) - views <= {"empty_strided", "empty_like", "empty"}


def test_constants_in_tensors_are_not_waited_for():
    options = replace(PUBLISHED, tau=torch.tensor([1.7, 2.0, 3.0]), v_threshold=torch.tensor(1.0))
    with compiling(90), Calls() as calls:
        launch(torch.zeros(8, 3, 5, 5), options=options)
    assert "stack" in calls.names
    assert not set(calls.names) & {"_local_scalar_dense", "nonzero", "item", "is_nonzero"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_to_the_33_numbers_are_counted_in_one_grid(layout):
    shape = (2**31, 4, 1) if layout == "channels_last" else (1, 4, 2**31)
    y = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    tiling = triton_tiles.tiling(y.numel(), 4, y.stride(1), y.dtype, 2048, y.device, 12)
    assert tiling.programs < 2**31  # the most programs on the first axis
    assert (
        tiling.programs * tiling.positions * tiling.constants["COLS" if tiling.constants["LAST"] else "ROWS"] >= 2**33
    )
