"""The native CPU kernels: what the shared tests of `lif` do not reach."""

import subprocess
import sys

import pytest
import torch

from seal_fast import lif
from seal_fast.kernels.launch import cpu
from seal_fast.kernels.launch.layout import is_dense
from seal_fast.kernels.lif import cpu as kernel
from seal_fast.kernels.neuron.options import Options
from seal_fast.nn import Surrogate

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=cpu.missing())


def both(x, upstream, upstream_v, **options):
    """Outputs and gradients of the reference and of the native kernel."""
    results = []
    for backend in ("torch", "cpu"):
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        spikes, v_last = lif(leaf, backend=backend, **options)
        (gradient,) = torch.autograd.grad((spikes, v_last), leaf, (upstream, upstream_v))
        results.append((spikes, v_last, gradient))
    return results


@pytest.mark.parametrize("v_reset", [0.0, None, 0.3])
@pytest.mark.parametrize("decay_input", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(4, 3, 5000), (1, 7), (33, 2, 3, 130), (64, 1, 1025)])
def test_native_kernel_equals_the_reference_beyond_one_piece(shape, dtype, decay_input, v_reset):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) + 0.5).to(dtype)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    upstream_v = torch.randn(shape[1:], generator=generator).to(torch.promote_types(dtype, torch.float32))
    expected, got = both(x, upstream, upstream_v, tau=1.7, decay_input=decay_input, v_reset=v_reset)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    scale = expected[2].abs().max().double()
    # measured: 4e-7, 4e-3, 5e-4 (one unit in the last place of the 16-bit result), 4e-16
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-14}[dtype]
    assert (got[2].double() - expected[2].double()).abs().max() / scale < tolerance


def test_16_bit_gradients_are_rounded_to_nearest():
    values = torch.cat([torch.linspace(-8, 8, 4001), torch.logspace(-10, 4, 999, base=10.0)])
    for dtype in (torch.float16, torch.bfloat16):
        # One step from rest far below a distant threshold: the gradient of x is that of v_last, rounded.
        x = torch.full((1, 5000), -50.0, dtype=dtype, requires_grad=True)
        _, v_last = lif(x, decay_input=False, surrogate="rectangle", backend="cpu")
        (gradient,) = torch.autograd.grad(v_last, x, values)
        assert torch.equal(gradient[0], values.to(dtype)), dtype


def test_16_bit_inputs_are_read_exactly():
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        x = bits.view(dtype).unsqueeze(0)  # every number there is, infinities and NaN included
        expected, got = (lif(x, decay_input=False, v_threshold=2.0, v_reset=None, backend=b) for b in ("torch", "cpu"))
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0, equal_nan=True)


def test_all_of_the_outputs_are_written(monkeypatch):
    """Memory poisoned with NaN beforehand holds none afterwards."""
    empty = torch.empty_strided

    def poisoned(*arguments, **options):
        return empty(*arguments, **options).fill_(torch.nan)

    def poisoned_like(tensor, dtype=None):
        return poisoned(tensor.shape, tensor.stride(), dtype=dtype or tensor.dtype)

    options = Options(torch.tensor([2.0]), True, 1.0, 0.0, Surrogate(), False)
    for size in (1, 63, 64, 65, 4097):
        x = torch.randn(3, 2, size)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_strided", poisoned)
            patch.setattr(torch, "empty_like", poisoned_like)
            spikes, v_last, _ = kernel.forward(x, None, options, keep_v=True, pack=False)
            gradients = kernel.backward(x, x[0], x, x[0], options, parameters=True)
        outputs = (spikes, v_last, *gradients)
        assert len(outputs) == 6
        assert all(not output.isnan().any() for output in outputs)


def test_layouts_are_used_in_place():
    x = torch.randn(8, 3, 6, 5).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2))
    spikes, _ = lif(x, backend="cpu")
    assert spikes.stride() == x.stride()
    assert is_dense(x[0])
    frame = torch.randn(2, 3).expand(4, 2, 3)
    assert lif(frame, backend="cpu")[0].is_contiguous()


def test_results_do_not_depend_on_the_number_of_threads():
    x = torch.randn(5, 3, 7001)
    tau = torch.tensor([2.0, 3.0, 1.5], requires_grad=True)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        spikes, v_last = lif(leaf.unsqueeze(1), tau=tau, backend="cpu")
        gradients = torch.autograd.grad(spikes.sum() + v_last.sum(), (leaf, tau))
        results.append((spikes, v_last, *gradients))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(other, results[0], strict=True))


@pytest.mark.parametrize("name", cpu.ISA)
def test_every_compiled_instruction_set_gives_the_same_bits(name, monkeypatch):
    runs = getattr(cpu.library(), f"seal_cpu_runs_{name}", None)
    if runs is None or not runs():
        # An older processor would end the process at the first instruction that it does not know.
        pytest.skip(f"{name} was not compiled, or this processor does not run it")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, 3, 111, generator=generator)
    expected = lif(x, tau=1.7, backend="torch")
    cpu.function.cache_clear()
    monkeypatch.setattr(cpu, "isa", lambda: name)
    got = lif(x, tau=1.7, backend="cpu")
    cpu.function.cache_clear()
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_without_the_library_the_reference_serves_and_says_so_once():
    program = """
import importlib.machinery, warnings, torch
importlib.machinery.EXTENSION_SUFFIXES.clear()  # of which the library has one
import seal_fast
from seal_fast.kernels.launch import cpu
from seal_fast.kernels.lif import cpu as kernel
assert cpu.library() is None
try:
    kernel._Arguments(T=1)
except RuntimeError as error:
    assert str(error) == "LifArguments is not known: " + cpu.missing() + ".", error
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        seal_fast.lif(torch.zeros(2, 3))
assert [str(w.message) for w in caught if "reference" in str(w.message)] == [
    "seal-fast runs its slower torch reference on the CPU: " + cpu.missing() + "."
], caught
try:
    seal_fast.lif(torch.zeros(2, 3), backend="cpu")
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "backend 'cpu' cannot run lif, because the native library was not built" in result.stdout
