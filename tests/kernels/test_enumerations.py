"""What one language knows and another does not is refused by name: no kernel computes something else in its place."""

import dataclasses
import importlib.util

import pytest
import torch
from torch import nn

import cuda_host
from seal_fast import bn_lif, lif
from seal_fast.kernels.launch import cpu
from seal_fast.kernels.launch.cupy import enumerator, specialised
from seal_fast.kernels.lif import cupy as lif_cupy
from seal_fast.kernels.neuron.cupy import NEURON, SURROGATE
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.seal_loss import cupy as loss_cupy
from seal_fast.kernels.surrogate.reference import SURROGATES, Surrogate
from seal_fast.nn import LIFNode

CHARGES = ("decay", "leak_divide", "leak_multiply", "filter_divide", "filter_multiply")
OBJECTIVES = ("seal", "kd", "tdkd")
LOSS = {"alpha": 0.6, "beta": 0.15, "temperature": 3.0, "gradient": True}
UNKNOWN = "surrogate 'gaussian' has no code in the {} kernels; backend='torch' can run it"

needs_cpu_kernel = pytest.mark.skipif(cpu.library() is None, reason=cpu.missing())
needs_host = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


class Strange(Options):
    """Charges as no kernel does."""

    charge_kind = "quadratic"


@pytest.fixture
def options(monkeypatch):
    """Options of a neuron whose surrogate only torch knows."""
    monkeypatch.setitem(SURROGATES, "gaussian", (1.0, lambda u, alpha: torch.exp(-((u * alpha) ** 2))))
    return Options(2.0, True, 1.0, 0.0, Surrogate("gaussian"), False)


def strange(options):
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return Strange(**{**fields, "surrogate": Surrogate("sigmoid")})


def refused(kernel, options):
    """What kernels of LIF say of `options` forward, and then backward."""
    x = torch.zeros(4, 10)
    for call in (
        lambda: kernel.forward(x, None, options, keep_v=True, pack=False),
        lambda: kernel.backward(x, None, x, None, options, parameters=True),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        yield str(error.value)


def inputs():
    return torch.zeros(4, 2, 5), torch.zeros(2, 5), torch.tensor([0, 1])


@needs_cpu_kernel
def test_every_name_has_a_number_in_native_code():
    assert set(cpu.names("SurrogateKind")) == set(SURROGATES)
    assert set(cpu.names("ChargeKind")) == set(CHARGES)
    assert set(cpu.names("Objective")) == set(OBJECTIVES)
    assert set(cpu.DTYPES) == {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def test_every_name_is_in_the_cuda_source():
    assert [enumerator(SURROGATE, "SurrogateKind", name) for name in SURROGATES] == [
        name.upper() for name in SURROGATES
    ]
    assert [enumerator(NEURON, "ChargeKind", name) for name in CHARGES] == [name.upper() for name in CHARGES]
    for name in (*OBJECTIVES, "weights"):
        assert enumerator(loss_cupy.SOURCE, "Objective", name) == name.upper()


@needs_cpu_kernel
def test_native_code_refuses_a_surrogate_and_a_charge_that_it_lacks(options):
    from seal_fast.kernels.lif import cpu as kernel

    for message in refused(kernel, options):
        assert UNKNOWN.format("cpu") in message
    for message in refused(kernel, strange(options)):
        assert "charge 'quadratic' has no code in the cpu kernels" in message
    x, node = torch.zeros(8, 3, 5, requires_grad=True), LIFNode(surrogate="gaussian", backend="cpu")
    with pytest.raises(ValueError, match=UNKNOWN.format("cpu")):
        bn_lif(x, nn.BatchNorm1d(3), node, time_steps=4)
    with pytest.raises(ValueError, match=UNKNOWN.format("cpu")):
        lif(x, surrogate="gaussian", backend="cpu")
    spikes, _ = lif(x, surrogate="gaussian", backend="torch")
    spikes.sum().backward()
    assert x.grad.any()


@needs_cpu_kernel
def test_native_code_refuses_an_objective_that_it_lacks():
    from seal_fast.kernels.seal_loss import cpu as kernel

    with pytest.raises(ValueError, match="objective 'other' has no code in the cpu kernels"):
        kernel.forward(*inputs(), **LOSS, objective="other")


@needs_cpu_kernel
@pytest.mark.parametrize("field", ["charge", "surrogate"])
def test_native_code_computes_nothing_for_a_number_that_it_lacks(field, options, monkeypatch):
    from seal_fast.kernels.lif import cpu as kernel

    describe = kernel.describe

    def changed(*arguments):
        neuron, constants = describe(*arguments)
        setattr(neuron, field, 99)
        return neuron, constants

    monkeypatch.setattr(kernel, "describe", changed)
    known = dataclasses.replace(options, surrogate=Surrogate())
    with pytest.raises(RuntimeError, match="seal_lif_forward has no code for"):
        kernel.forward(torch.zeros(2, 3), None, known, keep_v=False, pack=False)


@needs_cpu_kernel
def test_native_code_computes_no_objective_and_no_dtype_for_another_number():
    arguments = cpu.structure("LossArguments")
    for numbers in ({"objective": 3}, {"objective": -1}, {"dtype": 4}):
        with pytest.raises(RuntimeError, match="seal_loss has no code for"):
            cpu.run("seal_loss", arguments(**numbers, T=1, K=2, temperature=3.0))


def test_cupy_launchers_refuse_what_the_source_lacks(options):
    for message in refused(lif_cupy, options):
        assert UNKNOWN.format("cupy") in message
    for message in refused(lif_cupy, strange(options)):
        assert "charge 'quadratic' has no code in the cupy kernels" in message
    with pytest.raises(ValueError, match="objective 'other' has no code in the cupy kernels"):
        enumerator(loss_cupy.SOURCE, "Objective", "other")


@needs_host
def test_templates_are_not_compiled_for_other_numbers():
    before = ("float", 1, 4, False)
    kernels = cuda_host.kernels(lif_cupy.SOURCE)
    kernels.compile([specialised("lif_backward", *before, "DECAY", False, False, False, "RECTANGLE", False)])
    for charge, surrogate, message in (("DECAY", 9, "no such SurrogateKind"), (5, "RECTANGLE", "no such ChargeKind")):
        with pytest.raises(RuntimeError, match=message):
            kernels.compile([specialised("lif_backward", *before, charge, False, False, False, surrogate, False)])


@needs_triton
def test_triton_compiles_neither_a_surrogate_nor_a_charge_nor_an_objective_that_it_lacks(options):
    from triton.compiler.errors import CompilationError, CompileTimeAssertionFailure

    from seal_fast.kernels.lif import triton as kernel
    from seal_fast.kernels.seal_loss import triton as loss
    from triton_on_cpu import compiling

    x = torch.zeros(4, 2048)
    known = dataclasses.replace(options, surrogate=Surrogate())
    with compiling(80) as kernels:
        kernel.backward(x, None, x, None, known, parameters=False)
        assert len(kernels) == 1
        for call in (
            lambda: kernel.backward(x, None, x, None, options, parameters=False),
            lambda: kernel.backward(x, None, x, None, strange(options), parameters=False),
            lambda: kernel.forward(x, None, strange(options), keep_v=False, pack=False),
            lambda: loss.forward(*inputs(), **LOSS, objective="other"),
        ):
            with pytest.raises(CompilationError) as error:
                call()
            innermost = error.value
            while innermost.__cause__ is not None:
                innermost = innermost.__cause__
            assert isinstance(innermost, CompileTimeAssertionFailure)
    assert len(kernels) == 1
