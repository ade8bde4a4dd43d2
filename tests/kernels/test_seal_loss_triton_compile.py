"""The Triton kernels of the distillation loss compiled for GPUs, without one: registers, accesses, and when anew."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton decides when it is imported: kernels are functions of the interpreter then, without code to look at.
    pytest.skip("compiles nothing under TRITON_INTERPRET=1: kernels are interpreted then", allow_module_level=True)

from seal_fast.kernels.launch import triton as launcher
from seal_fast.kernels.seal_loss import triton as kernel
from triton_on_cpu import CAPABILITIES, access_bytes, compiling, registers


def launch(logits, teacher_logits=None, labels=None, *, objective="seal", gradient=True, alpha=0.6):
    if teacher_logits is None:
        teacher_logits = torch.zeros(logits.shape[1:], dtype=logits.dtype)
    if labels is None:
        labels = torch.zeros(logits.shape[1], dtype=torch.int64)
    kernel.forward(
        logits, teacher_logits, labels,
        alpha=alpha, beta=0.15, temperature=3.0, objective=objective, gradient=gradient,
    )  # fmt: skip


def compiled(capability, *arguments, **options):
    with compiling(capability) as kernels:
        launch(*arguments, **options)
    (compilation,) = kernels  # one launch
    return compilation


# Measured 56 to 253 registers for compute capability 9.0.
@pytest.mark.parametrize(
    ("capability", "T", "K"),
    [
        pytest.param(capability, T, K, marks=marks)
        for capability, marks in CAPABILITIES.items()
        for T, K in [(4, 10), (4, 100), (4, 1000), (10, 10), (10, 1000)]
    ],
    ids=str,
)
def test_no_register_is_spilled(capability, T, K):
    compilation = compiled(capability, torch.zeros(T, 2, K))
    assert registers(compilation)[1] == 0
    if K % 4 == 0:
        assert 16 in access_bytes(compilation)


@pytest.mark.parametrize(
    ("T", "K", "options"),
    [
        (4, 1000, {"objective": "tdkd"}),
        (4, 1001, {}),  # not aligned
        (10, 101, {}),
        (1, 1000, {"gradient": False}),
        (33, 100, {}),
        (64, 1000, {}),
    ],
    ids=str,
)
def test_no_register_is_spilled_for_other_sizes_and_objectives(T, K, options):
    assert registers(compiled(90, torch.zeros(T, 2, K), **options))[1] == 0


def test_16_bit_logits():
    compilation = compiled(90, torch.zeros(4, 2, 1000, dtype=torch.bfloat16))
    assert registers(compilation)[1] == 0
    assert access_bytes(compilation) == {2, 4, 8}  # of single logits, of parts, of four logits and of labels
    assert "cvt.rn.bf16" in compilation.asm["ptx"]
    assert "cvt.rz.bf16" not in compilation.asm["ptx"]


def test_the_gradient_to_float16_logits_is_written_in_float32():
    compilation = compiled(90, torch.zeros(4, 2, 1000, dtype=torch.float16))
    assert registers(compilation)[1] == 0
    assert access_bytes(compilation) == {2, 4, 8, 16}  # of 16-bit logits as above; of four gradients
    assert "cvt.rn.f16" not in compilation.asm["ptx"]


@pytest.mark.parametrize(("T", "K"), [(4, 100), (33, 100)])
def test_weights(T, K):
    with compiling(90) as kernels:
        kernel.weights(torch.zeros(T, 2, K))
    assert registers(kernels[0])[1] == 0
    assert "atom" not in kernels[0].asm["ptx"]


def test_a_sample_is_read_once():
    """Four rows of 1,000 logits by 256 threads: four at once from each row. One row more is the teacher's."""
    ptx = compiled(90, torch.zeros(4, 2, 1000)).asm["ptx"]
    wide = [line for line in ptx.splitlines() if "ld.global" in line and ".v4" in line and "cg" not in line]
    assert len(wide) == 5
    assert sum("st.global" in line and ".v4" in line for line in ptx.splitlines()) == 4


def test_what_a_program_leaves_is_there_before_it_is_counted():
    compilation = compiled(90, torch.zeros(2, 2, 10))
    ptx = compilation.asm["ptx"]
    assert ptx.count("atom.") == 1
    assert ptx.count("atom.global.gpu.acq_rel.add") == 1
    before, after = ptx.split("atom.", 1)
    assert before.count("st.global") >= 3
    assert "ld.global.cg" in after
    assert "ld.global.cg" not in before


def test_batch_sizes_strides_and_numbers_do_not_compile_anew():
    with compiling(90) as kernels:
        launch(torch.zeros(4, 128, 100))
        launch(torch.zeros(4, 1, 100), alpha=1.0)
        launch(torch.zeros(3, 5000, 68))
        launch(torch.zeros(8, 16, 96)[::2])
        launch(
            torch.zeros(5, 4, 100).transpose(0, 1), torch.zeros(10, 100)[::2], torch.zeros(10, dtype=torch.int64)[::2]
        )
    assert len(kernels) == 5
    assert len({id(compilation) for compilation in kernels}) == 1


def test_rows_that_are_not_aligned_compile_once_more():
    with compiling(90) as kernels:
        for K in (64, 33, 63, 60):
            launch(torch.zeros(2, 3, K))
    assert len({id(compilation) for compilation in kernels}) == 2


def test_sizes_of_large_samples_do_not_compile_anew():
    with compiling(90) as kernels:
        for T, B, K in ((4, 2, 4100), (3, 1, 32768), (4, 700, 1028)):
            launch(torch.zeros(T, 1, 1).expand(T, B, K).contiguous(), torch.zeros(B, K))
    assert len({id(compilation) for compilation in kernels}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_gradient_of_any_size_is_scaled_by_one_kernel(dtype):
    with compiling(90) as kernels:
        for size in (8, 1024, 40_000):
            kernel.scaled(torch.zeros(size), torch.tensor(2.0), dtype)
        kernel.scaled(torch.zeros(1023), torch.tensor(2.0), dtype)
    assert len({id(compilation) for compilation in kernels}) == 2  # aligned, and not
    assert access_bytes(kernels[0]) == {4, 16}  # the factor, the gradient
    assert registers(kernels[0])[1] == 0
    conversions = "cvt.rn.f16" in kernels[0].asm["ptx"]
    assert conversions == (dtype == torch.float16)


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **options or {})


@pytest.mark.parametrize(
    "logits", [torch.zeros(4, 2, 10), torch.zeros(10, 2, 4).transpose(0, 2)], ids=["rows", "columns"]
)
def test_a_launch_only_allocates(logits):
    """No copy of an input, and nothing that waits for the device. The counter here is the CPU's."""
    teacher_logits, labels = torch.zeros(10, 2).t(), torch.zeros(2, dtype=torch.int32)
    with compiling(90), Calls() as calls:
        launch(logits, teacher_logits, labels)
        kernel.weights(logits)
    assert calls.names - {"select", "detach", "view", "alias"} == {"empty_like", "new_empty", "zeros"}


def test_two_to_the_33_logits_are_addressed(monkeypatch):
    started = []
    monkeypatch.setattr(launcher, "start", lambda *arguments, **options: started.append((arguments, options)))
    logits = torch.empty(4, 2**16, 2**15, dtype=torch.bfloat16, device="meta")
    teacher_logits = torch.empty(2**16, 2**15, device="meta")
    kernel.forward(
        logits, teacher_logits, torch.empty(2**16, dtype=torch.int64, device="meta"),
        alpha=0.6, beta=0.15, temperature=3.0, objective="seal", gradient=True,
    )  # fmt: skip
    ((_, blocks, *arguments), options) = started[0]
    assert blocks == kernel.MOST_PROGRAMS
    strides = [argument for argument in arguments if isinstance(argument, int)]
    assert 2**31 in strides  # that of time steps, which Triton passes in 64 bits
    assert not options["RESIDENT"]
