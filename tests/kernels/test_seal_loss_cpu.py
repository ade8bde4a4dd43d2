"""The native loss kernel, and what torch does around it: what the shared tests do not reach."""

import pytest
import torch

from seal_fast import seal_loss, selective_alignment_weights
from seal_fast.kernels.launch import cpu
from seal_fast.kernels.seal_loss import cpu as kernel

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=cpu.missing())


def inputs(T, B, K, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(T * 1000 + K)
    logits = (torch.randn(T, B, K, generator=generator) * scale).to(dtype)
    teacher_logits = (torch.randn(B, K, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, K, (B,), generator=generator)
    if B > 2:
        labels[1] = -100
    return logits, teacher_logits, labels


def run(logits, teacher_logits, labels, backend, **options):
    leaf = logits.detach().requires_grad_()
    parts = seal_loss(leaf, teacher_logits, labels, alpha=0.6, beta=0.15, backend=backend, **options)
    return parts, torch.autograd.grad(parts.loss, leaf)[0]


@pytest.mark.parametrize("objective", ["seal", "kd", "tdkd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("T", "B", "K"),
    [(1, 1, 2), (2, 3, 15), (4, 5, 16), (4, 3, 17), (10, 4, 10), (4, 6, 1000), (64, 2, 33), (3, 2, 32768)],
)
def test_native_loss_equals_float64(T, B, K, dtype, objective):
    logits, teacher_logits, labels = inputs(T, B, K, dtype)
    expected, gradient = run(logits.double(), teacher_logits.double(), labels, "torch", objective=objective)
    got, got_gradient = run(logits, teacher_logits, labels, "cpu", objective=objective)
    for name, left, right in zip(got._fields, got, expected, strict=True):
        assert left.dtype == torch.float32
        # Measured 4e-7; and 1.7e-6 where two classes agree and ela is 0.
        assert left.item() == pytest.approx(right.item(), rel=2e-6, abs=3e-6), name
    # Of the largest entry; measured 7e-7, and half a unit in the last place of 16-bit gradients.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    assert (got_gradient.double() - gradient).abs().max() <= tolerance * gradient.abs().max() + 1e-7


@pytest.mark.parametrize("name", cpu.ISA)
def test_every_compiled_instruction_set_is_right(name, monkeypatch):
    runs = getattr(cpu.library(), f"seal_cpu_runs_{name}", None)
    if runs is None or not runs():
        # The library has one copy for each instruction set; an older processor would end the process at the first one.
        pytest.skip(f"{name} was not compiled, or this processor does not run it")
    logits, teacher_logits, labels = inputs(4, 7, 37)
    logits[0, 2, 5:] = -torch.inf
    teacher_logits[2, 5:] = -torch.inf
    labels[2] = 3
    expected, gradient = run(logits.double(), teacher_logits.double(), labels, "torch", objective="kd")
    cpu.function.cache_clear()
    monkeypatch.setattr(cpu, "isa", lambda: name)
    got, got_gradient = run(logits, teacher_logits, labels, "cpu", objective="kd")
    cpu.function.cache_clear()
    assert got.ce.item() == pytest.approx(expected.ce.item(), rel=1e-6)
    assert torch.equal(got_gradient[0, 2, 5:], torch.zeros(32))
    finite = gradient.isfinite()
    torch.testing.assert_close(got_gradient.double()[finite], gradient[finite], rtol=1e-5, atol=1e-7)


def test_a_gap_that_swallows_the_others_is_computed_anew():
    """Without its largest logit, a row whose others vanish beside it has a softmax of its own."""
    logits = torch.tensor([[[900.0, 1.0, 2.0, 0.5]]])
    teacher_logits = torch.tensor([[800.0, 0.3, -1.0, 2.0]])
    labels = torch.tensor([2])
    expected, gradient = run(logits.double(), teacher_logits.double(), labels, "torch")
    got, got_gradient = run(logits, teacher_logits, labels, "cpu")
    assert got.ela.item() == pytest.approx(expected.ela.item(), rel=1e-6)
    torch.testing.assert_close(got_gradient.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("flat", ["student", "teacher"])
def test_many_steps_do_not_leave_the_range_of_doubles(flat):
    """Logarithms of sums' ratios are taken in products: here of 120 ratios of 1000, or of 1/1000."""
    T, K = 120, 1000
    generator = torch.Generator().manual_seed(0)
    logits, teacher_logits = torch.randn(T, 1, K, generator=generator) * 0.01, torch.zeros(1, K)
    (teacher_logits if flat == "student" else logits)[..., 7] = 60.0
    labels = torch.tensor([7])
    expected, gradient = run(logits.double(), teacher_logits.double(), labels, "torch", objective="kd")
    got, got_gradient = run(logits, teacher_logits, labels, "cpu", objective="kd")
    assert got.ela.item() == pytest.approx(expected.ela.item(), rel=1e-6)  # measured 9e-8
    assert (got_gradient.double() - gradient).abs().max() <= 2e-6 * gradient.abs().max()


def test_all_of_the_outputs_are_written(monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    logits, teacher_logits, labels = inputs(3, 4, 21)
    options = {"alpha": 0.6, "beta": 0.15, "temperature": 3.0, "objective": "seal"}
    parts, gradient = kernel.forward(logits, teacher_logits, labels, gradient=True, **options)
    weights, confidence = kernel.weights(logits)
    assert kernel.forward(logits, teacher_logits, labels, gradient=False, **options)[1] is None
    assert all(not output.isnan().any() for output in (parts, gradient, weights, confidence))


def test_results_do_not_depend_on_the_number_of_threads():
    logits, teacher_logits, labels = inputs(4, 301, 100)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(logits, teacher_logits, labels, "cpu"))
    torch.set_num_threads(before)
    for parts, gradient in results[1:]:
        assert parts == results[0][0]
        assert torch.equal(gradient, results[0][1])


def test_gradient_is_scaled_by_what_comes_in_and_may_be_asked_for_twice():
    logits, teacher_logits, labels = inputs(4, 5, 10)
    leaf = logits.requires_grad_()
    loss = seal_loss(leaf, teacher_logits, labels, alpha=0.6, beta=0.15, backend="cpu").loss
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = once.clone()
    (twice,) = torch.autograd.grad(2.5 * loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(once, kept)
    torch.testing.assert_close(twice, 2.5 * kept, rtol=1e-6, atol=0)
    assert torch.equal(again, kept)


def test_what_was_given_may_change_before_the_only_backward_pass():
    """The gradient is there already; a second pass computes it anew, and says that it cannot."""
    logits, teacher_logits, labels = inputs(2, 3, 4)
    leaf = logits.requires_grad_()
    expected, got = (
        seal_loss(leaf, teacher_logits, labels, alpha=0.6, beta=0.15, backend="cpu").loss for _ in range(2)
    )
    (right,) = torch.autograd.grad(expected, leaf)
    labels.add_(1)
    (gradient,) = torch.autograd.grad(got, leaf, retain_graph=True)
    assert torch.equal(gradient, right)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(got, leaf)


def test_second_derivative_is_refused_in_a_sentence():
    logits, teacher_logits, labels = inputs(2, 3, 4)
    leaf = logits.requires_grad_()
    loss = seal_loss(leaf, teacher_logits, labels, alpha=0.6, beta=0.15, backend="cpu").loss
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice only with backend='torch'"):
        gradient.sum().backward()


def test_opcheck():
    logits, teacher_logits, labels = inputs(3, 4, 7)
    arguments = (logits.requires_grad_(), teacher_logits, labels, 0.6, 0.15, 3.0, "seal", "cpu", True)
    torch.library.opcheck(torch.ops.seal_fast.seal_loss.default, arguments)
    torch.library.opcheck(torch.ops.seal_fast.selective_alignment_weights.default, (logits.detach(), "cpu"))


def test_compiles_whole():
    logits, teacher_logits, labels = inputs(3, 4, 7)

    def step(z):
        parts = seal_loss(z * 1.5, teacher_logits, labels, alpha=0.6, beta=0.15, backend="cpu")
        weights, _ = selective_alignment_weights(z, backend="cpu")
        return parts.loss * 2.0, weights

    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outputs = [function(leaf) for function, leaf in zip((step, compiled), leaves, strict=True)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    for loss, _ in outputs:
        loss.backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("label", [7, -1, -99, 2**31 - 1])
def test_the_operator_that_is_compiled_refuses_labels_too(label, dtype):
    logits, teacher_logits, labels = inputs(3, 4, 7)
    labels = labels.to(dtype)
    labels[2] = label
    arguments = (logits, teacher_logits, labels, 0.6, 0.15, 3.0, "seal", "cpu", False)
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 7\) or -100 to be ignored; got {label}"):
        torch.ops.seal_fast.seal_loss(*arguments)


def test_the_loss_can_be_scaled_in_place():
    logits, teacher_logits, labels = inputs(3, 4, 7)
    gradients = []
    for in_place in (False, True):
        leaf = logits.clone().requires_grad_()
        parts = seal_loss(leaf, teacher_logits, labels, alpha=0.6, beta=0.15, backend="cpu")
        loss, ce = parts.loss, parts.ce.item()
        if in_place:
            loss /= 4
        else:
            loss = loss / 4
        loss.backward()
        assert parts.ce.item() == ce
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_a_graph_that_was_not_retained_says_so_and_one_that_was_is_computed_anew():
    logits, teacher_logits, labels = inputs(3, 4, 7)
    leaf = logits.clone().requires_grad_()
    loss = seal_loss(leaf, teacher_logits, labels, alpha=0.6, beta=0.15, backend="cpu").loss
    torch.autograd.grad(loss, leaf)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf)
    loss = seal_loss(leaf, teacher_logits, labels, alpha=0.6, beta=0.15, backend="cpu").loss
    torch.autograd.grad(loss, leaf, retain_graph=True)
    with torch.no_grad():
        leaf += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # of what the gradient is made of
        torch.autograd.grad(loss, leaf)


def test_a_teacher_that_requires_a_gradient_gets_none():
    logits, teacher_logits, labels = inputs(3, 4, 7)
    leaves = logits.requires_grad_(), teacher_logits.requires_grad_()
    parts = seal_loss(*leaves, labels, alpha=0.6, beta=0.15, backend="cpu")
    parts.loss.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is None
    without = seal_loss(logits.detach(), teacher_logits, labels, alpha=0.6, beta=0.15, backend="cpu")
    assert not any(part.requires_grad for part in without)
