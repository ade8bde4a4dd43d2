"""The published formulation that benchmarks compare with computes what seal_fast's reference computes, in float64."""

import functools

import pytest
import torch

import published
import seal_fast

TOLERANCE = 1e-9  # measured 1e-15 in logits, loss and statistics, 4e-13 in gradients of up to 99
WEIGHTS = {"alpha": 0.6, "beta": 0.15}
CASES = {  # student -> T, tau, input [B, C, H, W] or [B, T, C, H, W]
    "resnet18": (4, 2.0, (2, 3, 8, 8)),
    "resnet18 on events": (4, 2.0, (2, 4, 2, 8, 8)),
    "resnet19": (2, 2.0, (2, 3, 8, 8)),
    "preact_resnet34": (2, 1.25, (2, 3, 32, 32)),
}


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """What each of the two computes from the same weights, and the two students after it."""
    T, tau, shape = CASES[request.param]
    options = {"num_classes": 10, "in_channels": shape[-3], "time_steps": T}
    arch = request.param.split()[0]
    torch.manual_seed(0)
    ours = seal_fast.models.student(arch, tau=tau, backend="torch", **options).double()
    theirs = published.Student(arch, neuron=functools.partial(published.LoopedLIF, tau, T), **options).double()
    theirs.load_state_dict(ours.state_dict())
    teacher = seal_fast.models.teacher("resnet8", num_classes=10, in_channels=shape[-3]).double().eval()
    inputs, labels = torch.randn(shape).double(), torch.randint(0, 10, shape[:1])

    step = published.Distillation(theirs, teacher, WEIGHTS)
    kept = {}
    theirs.register_forward_hook(lambda module, arguments, logits: kept.update(logits=logits))
    published_loss = step(inputs, labels)
    published_loss.backward()

    events = inputs.dim() == 5
    logits = ours(inputs.transpose(0, 1) if events else inputs)
    with torch.no_grad():
        teacher_logits = teacher(inputs.mean(1) if events else inputs)
    loss = seal_fast.seal_loss(logits, teacher_logits, labels, backend="torch", **WEIGHTS).loss
    loss.backward()
    return (theirs, kept["logits"], published_loss), (ours, logits, loss)


def test_logits_and_loss_are_equal(both):
    (_, logits, loss), (_, expected_logits, expected_loss) = both
    assert expected_logits.std() > 0.01
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=TOLERANCE)


def test_gradients_and_running_statistics_are_equal(both):
    (theirs, *_), (ours, *_) = both
    expected = dict(ours.named_parameters())
    assert max(p.grad.abs().max() for p in expected.values()) > 0.01
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=TOLERANCE, msg=name)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(buffer, ours.get_buffer(name), rtol=0, atol=TOLERANCE, msg=name)


def test_weight_decay_acts_on_the_same_parameters(both):
    (theirs, *_), (ours, *_) = both
    decayed = {name for name, p in ours.named_parameters() if p.dim() > 1}
    names = {id(p): name for name, p in theirs.named_parameters()}
    groups = published.parameter_groups(theirs, 5e-4)
    assert {names[id(p)] for p in groups[0]["params"]} == decayed
    assert {names[id(p)] for p in groups[1]["params"]} == set(names.values()) - decayed
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]
