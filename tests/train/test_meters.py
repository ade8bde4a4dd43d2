"""What an epoch adds up to where losses are not finite, and where it is taken up again."""

import math

import pytest
import torch

from seal_fast.train import engine
from seal_fast.train.batches import Batches
from seal_fast.train.errors import NonFiniteError, TrainingError
from seal_fast.train.feed import Feed
from seal_fast.train.meters import Meters
from seal_fast.train.step import Step
from seal_fast.train.tasks import Outcome, TeacherTask

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 1])


def outcome(loss: float) -> Outcome:
    value = torch.tensor(loss, dtype=torch.float64)
    return Outcome(value, {"ce": value / 2}, torch.eye(2).unsqueeze(0))


def test_first_loss_that_is_not_finite_is_named_with_its_parts():
    meters = Meters(CPU)
    for step, loss in enumerate((1.0, 2.0, math.inf, math.nan), 1):
        meters.add(outcome(loss), LABELS, step)
    with pytest.raises(NonFiniteError, match=r"at step 3 \(loss inf, ce inf\)$") as raised:
        meters.read()
    assert (raised.value.step, raised.value.parts) == (3, {"loss": math.inf, "ce": math.inf})


def test_losses_of_skipped_steps_count_in_no_mean_and_too_many_in_a_row_end_the_run():
    meters = Meters(CPU, patience=2)
    for step, loss in enumerate((1.0, math.nan, math.inf, 3.0), 1):
        meters.add(outcome(loss), LABELS, step)
    assert meters.read() == {"loss": 2.0, "ce": 1.0, "accuracy": 1.0}
    meters.add(outcome(math.nan), LABELS, 5)
    meters.read()
    for step in (6, 7):
        meters.add(outcome(math.nan), LABELS, step)
    with pytest.raises(NonFiniteError, match=r"step 7 .*, as in the 2 steps before"):
        meters.read()


def test_meters_that_are_taken_up_again_give_the_same_means():
    whole, first, second = Meters(CPU), Meters(CPU), Meters(CPU)
    feed = Feed([], CPU)
    for meters in (whole, first):
        meters.resume_clock(feed)
        meters.add(outcome(1.0), LABELS, 1)
    state = first.state()
    second.load(state)
    for meters in (whole, second):
        meters.add(outcome(0.1), LABELS, 2)
    second.resume_clock(feed)
    assert second.read() == whole.read()
    assert second.images == whole.images == 4
    assert second.clock()[0] > state["clock"][0] > 0


def half_precision(batches, scale: float = 2.0**16):
    """Train a linear network in float16 on the batches; its weights before and after, and the epoch's figures."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    before = network[1].weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    step = Step(TeacherTask(network), optimizer, scaler, device=CPU, amp="fp16")
    meters = Meters(CPU, patience=engine.SKIPS)
    plan = Batches(2 * len(batches), 2)
    means = engine.train_epoch(step, Feed(batches, CPU), plan, title="", epochs_left=0, meters=meters)
    return before, network[1].weight.detach(), means


def batch(value: float):
    return torch.full((2, 1, 2, 2), value), torch.tensor([0, 2])


def test_a_step_whose_loss_overflows_float16_is_skipped_and_counted():
    before, after, means = half_precision([batch(1e30)])
    assert torch.equal(before, after)
    assert means["skipped"] == 1
    _, after, means = half_precision([batch(1e30), batch(1.0)], scale=2.0)
    assert not torch.equal(before, after)
    assert means["skipped"] == 1
    assert math.isfinite(means["loss"])


def test_a_step_whose_gradient_alone_overflows_float16_is_skipped_and_counted():
    before, after, means = half_precision([batch(1000.0)], scale=2.0**40)
    assert torch.equal(before, after)
    assert means["skipped"] == 1
    assert math.isfinite(means["loss"])


def test_float16_that_never_becomes_finite_ends_the_run():
    with pytest.raises(NonFiniteError, match=f"at step {engine.SKIPS + 1} .*as in the {engine.SKIPS} steps before"):
        half_precision([batch(1e30)] * 30)
    with pytest.raises(TrainingError, match="the gradient is not finite at step 10"):
        half_precision([batch(1e30)] * 10, scale=1e-3)
