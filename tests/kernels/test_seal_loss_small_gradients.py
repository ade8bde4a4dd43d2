"""Gradients to float16 logits under a GradScaler: rounded once, after they have been scaled."""

import gc
import weakref

import pytest
import torch

from seal_fast import seal_loss
from seal_fast.backends import available
from seal_fast.kernels.launch import cpu
from seal_fast.kernels.seal_loss import reference
from small_gradients import FACTOR, OBJECTIVES, PUBLISHED, check, inputs

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
needs_library = pytest.mark.skipif(cpu.library() is None, reason="setup.py found no C++17 compiler")


def scaled_loss(leaf, tensors, backend, **options):
    return FACTOR * seal_loss(leaf, *tensors[1:], **PUBLISHED, backend=backend, **options).loss


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", [name for name in ("cpu", "torch") if name in available("seal_loss")])
def test_what_float16_cannot_hold_before_it_is_scaled_is_kept(backend, objective):
    tensors = inputs()
    leaf = tensors[0].clone().requires_grad_()
    scaled_loss(leaf, tensors, backend, objective=objective).backward()
    check(leaf.grad, tensors, objective)


@needs_library
@pytest.mark.parametrize("name", cpu.ISA)
def test_every_compiled_instruction_set_keeps_it(name, monkeypatch):
    runs = getattr(cpu.library(), f"seal_cpu_runs_{name}", None)
    if runs is None or not runs():
        # An older processor would end the process at the first instruction that it does not know.
        pytest.skip(f"{name} was not compiled, or this processor does not run it")
    cpu.function.cache_clear()
    monkeypatch.setattr(cpu, "isa", lambda: name)
    tensors = inputs()
    leaf = tensors[0].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scaled_loss(leaf, tensors, "cpu"), leaf)
    cpu.function.cache_clear()
    check(gradient, tensors, "seal")


@needs_library
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compiled_calls_keep_it(objective):
    tensors = inputs()
    leaf = tensors[0].clone().requires_grad_()
    compiled = torch.compile(scaled_loss, fullgraph=True, backend="aot_eager")
    compiled(leaf, tensors, "cpu", objective=objective).backward()
    check(leaf.grad, tensors, objective)


@needs_library
def test_a_compiled_loss_whose_factor_comes_from_outside_keeps_it():
    tensors = inputs()
    leaf = tensors[0].clone().requires_grad_()
    loss = torch.compile(seal_loss, fullgraph=True, backend="aot_eager")(leaf, *tensors[1:], **PUBLISHED, backend="cpu")
    (loss.loss * FACTOR).backward()
    check(leaf.grad, tensors, "seal")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    logits, teacher_logits, labels = inputs(2, 3, 5)
    for gradient in (True, False):
        leaf = logits.to(dtype).requires_grad_(gradient)
        arguments = (leaf, teacher_logits, labels, 0.6, 0.15, 3.0, "seal", "cpu", gradient)
        torch.library.opcheck(torch.ops.seal_fast.seal_loss.default, arguments)


@needs_library
def test_a_retained_graph_and_one_of_the_gradient_keep_it():
    tensors = inputs()
    leaf = tensors[0].clone().requires_grad_()
    loss = scaled_loss(leaf, tensors, "cpu")
    for create_graph in (False, False, True):
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True, create_graph=create_graph)
        check(gradient, tensors, "seal")
    with pytest.raises(NotImplementedError, match="twice only with backend='torch'"):
        gradient.sum().backward()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_between_the_passes_one_gradient_is_kept_and_afterwards_none(dtype):
    logits, teacher_logits, labels = inputs()
    leaf = logits.to(dtype).requires_grad_()
    loss = seal_loss(leaf, teacher_logits, labels, **PUBLISHED, backend="cpu").loss
    node, (gradient, *others) = loss.grad_fn, kept(loss.grad_fn)
    assert others == []
    assert gradient.dtype == reference.gradient_dtype(dtype)
    assert gradient.untyped_storage().nbytes() == logits.numel() * (4 if dtype == torch.float16 else dtype.itemsize)
    assert {saved.data_ptr() for saved in node.saved_tensors} == {
        given.data_ptr() for given in (leaf, teacher_logits, labels)
    }
    address, alive = gradient.data_ptr(), weakref.ref(gradient)
    del gradient
    (result,) = torch.autograd.grad(FACTOR * loss, leaf)
    assert kept(node) == []
    assert result.untyped_storage().nbytes() == logits.numel() * dtype.itemsize
    if dtype == torch.float16:
        gc.collect()
        assert alive() is None
    else:
        assert result.data_ptr() == address  # scaled in place


def kept(node) -> list[torch.Tensor]:
    """Tensors that a node keeps as its attributes."""
    return [value for value in vars(node).values() if isinstance(value, torch.Tensor)]


@needs_library
@pytest.mark.parametrize("count", [1, 15, 16, 1000, 1003])
def test_scaling_rounds_once(count):
    from seal_fast.kernels.seal_loss.cpu import scaled

    gradient = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 1e-6
    for factor in (1.0, FACTOR, -2.5, 0.0, 1e12, torch.nan):  # 1e12 goes beyond float16's largest number
        before = gradient.clone()
        got = scaled(gradient, torch.tensor(factor), torch.float16)
        torch.testing.assert_close(got, (before * factor).half(), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(gradient, before)
