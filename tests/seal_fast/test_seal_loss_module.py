"""The distillation loss as a module, beside students and teachers of any kind."""

import pytest
import torch
from torch import nn

import other_layouts
from seal_fast import seal_loss, selective_alignment_weights
from seal_fast.backends import available
from seal_fast.nn import SealLoss


def inputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, generator=generator)
    return logits, torch.randn(6, 5, generator=generator), torch.randint(0, 5, (6,), generator=generator)


@pytest.mark.parametrize("objective", ["seal", "kd", "tdkd"])
def test_module_is_the_operator(objective):
    logits, teacher_logits, labels = inputs()
    expected = seal_loss(logits, teacher_logits, labels, alpha=0.4, beta=0.3, temperature=2.0, objective=objective)
    module = SealLoss(0.4, 0.3, 2.0, objective)
    assert module(logits, teacher_logits, labels) == expected
    flat = SealLoss(0.4, 0.3, 2.0, objective, time_steps=4)
    assert flat(logits.flatten(0, 1), teacher_logits, labels) == expected
    assert flat(logits, teacher_logits, labels) == expected


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", [name for name in available("seal_loss") if name in ("cpu", "torch")])
def test_weights_may_change_between_compiled_calls(backend, dynamic):
    """From the second value on, torch.compile gives the operator a symbol for the number."""
    torch._dynamo.reset()
    module, (logits, teacher_logits, labels) = SealLoss(backend=backend), inputs()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for alpha in (0.6, 0.5, 0.4):
        module.alpha, module.beta, module.temperature = alpha, alpha / 4, 2 + alpha
        leaves = [logits.clone().requires_grad_() for _ in range(2)]
        for call, leaf in zip((compiled, module), leaves, strict=True):
            call(leaf, teacher_logits, labels).loss.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", [name for name in available("seal_loss") if name in ("cpu", "torch")])
def test_the_weights_compile_whole_for_any_size(backend):
    torch._dynamo.reset()
    compiled = torch.compile(selective_alignment_weights, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (5, 6, 7):
        logits = torch.randn(4, 3, size, generator=torch.Generator().manual_seed(size))
        found = compiled(logits, backend=backend)
        for got, right in zip(found, selective_alignment_weights(logits, backend=backend), strict=True):
            torch.testing.assert_close(got, right)


@pytest.mark.parametrize("backend", [name for name in available("seal_loss") if name in ("cpu", "torch")])
def test_what_was_saved_may_come_back_in_another_layout(backend):
    found, expected = other_layouts.gradients_of_loss(*inputs(), backend)
    assert all(torch.equal(got, right) for got, right in zip(found, expected, strict=True))


def test_plain_torch_models_on_both_sides_learn():
    torch.manual_seed(0)
    student, teacher = nn.Linear(8, 5), nn.Linear(8, 5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    images, labels, objective = torch.randn(16, 8), torch.randint(0, 5, (16,)), SealLoss(time_steps=3)
    losses = []
    for _ in range(30):
        logits = student(images.repeat(3, 1) + 0.1 * torch.randn(48, 8))
        with torch.no_grad():
            teacher_logits = teacher(images)
        parts = objective(logits, teacher_logits, labels)
        optimizer.zero_grad()
        parts.loss.backward()
        optimizer.step()
        losses.append(parts.loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, r"alpha must be a finite number of at least 0; got -1\.0\."),
        ({"temperature": 0.0}, r"temperature must be a finite number above 0; got 0\.0\."),
        ({"objective": "mse"}, r"objective must be one of seal, kd, tdkd; got 'mse'\."),
        ({"time_steps": 0}, r"time_steps must be an integer of at least 1; got 0\."),
        ({"backend": "cuda"}, r"backend must be one of auto, .*; got 'cuda'\."),
    ],
)
def test_wrong_options_raise_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        SealLoss(**options)


@pytest.mark.parametrize("time_steps", [None, 5])
def test_rows_that_are_not_time_steps_of_a_batch_raise_a_sentence(time_steps):
    logits, teacher_logits, labels = inputs()
    with pytest.raises(
        ValueError, match=rf"logits must be \[T, B, K\], or .*; got \[24, 5\] with time_steps={time_steps}"
    ):
        SealLoss(time_steps=time_steps)(logits.flatten(0, 1), teacher_logits, labels)


def test_text_names_every_option():
    shown = repr(SealLoss(time_steps=4, backend="torch"))
    assert shown == ("SealLoss(alpha=0.6, beta=0.15, temperature=3, objective=seal, time_steps=4, backend=torch)")
