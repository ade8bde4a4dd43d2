"""The loops over batches: what they compute, count and show."""

import argparse
import re

import numpy as np
import pytest
import torch
import tqdm

from golden import CASES, filled_student, filled_teacher
from seal_fast.models.snn import Neuron
from seal_fast.train import engine, run
from seal_fast.train.batches import Batches
from seal_fast.train.feed import Feed
from seal_fast.train.step import Step
from seal_fast.train.tasks import DistillTask, TeacherTask, tau_of

CPU = torch.device("cpu")


def epoch_of(task, batches, optimizer=None, amp="off"):
    """Train on the batches once."""
    optimizer = optimizer or torch.optim.SGD(task.network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = Step(task, optimizer, scaler, device=CPU, amp=amp)
    plan = Batches(sum(len(labels) for _, labels in batches), len(batches[0][1]))
    return engine.train_epoch(step, Feed(batches, CPU), plan, title="", epochs_left=1)


def test_progress_bar_tells_times_speed_loss_accuracy_and_what_remains(monkeypatch):
    shown = []

    class Bar(tqdm.tqdm):
        def set_postfix_str(self, text="", refresh=True):
            shown.append(text)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    batches = [(torch.rand(2, 1, 2, 2), torch.tensor([0, 2]))] * 12
    means = epoch_of(TeacherTask(network), batches)
    pattern = r"ends in \d+:\d+, loss [\d.]+, acc [\d.]+%, \d+ img/s, step \d+ ms, data \d+ ms"
    assert len(shown) == 2
    assert all(re.fullmatch(pattern, text) for text in shown), shown
    assert f"loss {means['loss']:.3f}" in shown[-1]


def test_autocast_reaches_the_network():
    seen = []

    class Network(torch.nn.Linear):
        def forward(self, images):
            logits = super().forward(images.flatten(1))
            seen.append(logits.dtype)
            return logits

    network = Network(4, 3)
    batches = [(torch.rand(2, 1, 2, 2), torch.tensor([0, 2]))]
    for amp in ("off", "bf16"):
        epoch_of(TeacherTask(network), batches, amp=amp)
        engine.evaluate(TeacherTask(network), Feed(batches, CPU), device=CPU, amp=amp)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


def test_evaluation_counts_by_hand():
    """Two classes, three steps; logits and spikes are written down, so that every figure can be computed by hand."""
    logits = torch.tensor(  # [T=3, B=2, K=2]; sums over the first t steps decide
        [[[1.0, 0.0], [1.0, 0.0]], [[0.0, 3.0], [0.0, 0.5]], [[5.0, 0.0], [0.0, 2.0]]]
    )

    current = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 0.0], [2.0, 2.0], [2.0, 0.0], [0.0, 0.0]])  # [T·B, 2 neurons]

    class Network(torch.nn.Module):
        time_steps = 3

        def __init__(self):
            super().__init__()
            self.lif = Neuron(tau=1.0, decay_input=False)

        def forward(self, images):
            self.lif(current, None, time_steps=3)
            return logits

    task = DistillTask(Network(), None, method="ce", alpha=0, beta=0, temperature=3.0, backend="torch")
    batches = [(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))]
    result = engine.evaluate(task, Feed(batches, CPU), device=CPU, amp="off")
    assert result["accuracy_at"] == [0.5, 0.0, 1.0]
    assert result["accuracy"] == 1.0
    assert result["firing_rate"] == {"lif": 5 / 12}
    # The first sample's two neurons at t = 1, 2, 3.
    assert result["raster"]["lif"].tolist() == [[True, False], [False, False], [True, False]]


def test_trainer_takes_the_published_six_steps():
    """The trainer's own loop, parameter groups and optimiser settings, on the golden trajectory in float64."""
    case = CASES["trajectory"]
    options_of = {"num_classes": 10, "in_channels": 3}
    student = filled_student(case["student"], time_steps=4, tau=tau_of(case["decay"]), **options_of)
    teacher = filled_teacher(case["teacher"], **options_of)
    random = np.random.RandomState(case["seed"])
    shape = (case["B"], 3, case["H"], case["H"])
    batches = []
    for _ in case["steps"]:
        images = torch.tensor(random.standard_normal(shape).astype(np.float32)).double()
        batches.append((images, torch.tensor(random.randint(0, 10, case["B"]))))
    task = DistillTask(student, teacher, method="seal", alpha=0.6, beta=0.15, temperature=3.0, backend="auto")
    args = argparse.Namespace(optim="SGDM", lr=case["lr"], wd=case["weight_decay"])
    optimizer = run.optimizer_of(student, args, spiking=True)
    for batch, expected in zip(batches, case["steps"], strict=True):
        means = epoch_of(task, [batch], optimizer)
        for name in ("loss", "ce", "ela", "sta"):
            # measured 4e-8: the meters take each step's value in float32
            assert means[name] == pytest.approx(expected[name], rel=2e-7), name
    norm = torch.stack([p.detach().square().sum() for p in student.parameters()]).sum().sqrt()
    assert norm.item() == pytest.approx(case["param_norm"], abs=1e-6)  # measured 1e-13


def test_meters_weigh_batches_by_their_images():
    meters = engine.Meters(torch.device("cpu"))

    class Outcome:
        def __init__(self, loss):
            self.loss = torch.tensor(loss)
            self.parts = {"ce": torch.tensor(2 * loss)}
            self.logits = torch.eye(4).unsqueeze(0)

    meters.add(Outcome(1.0), torch.tensor([0, 1, 2, 0]))
    outcome = Outcome(4.0)
    outcome.logits = outcome.logits[:, :2]
    meters.add(outcome, torch.tensor([0, 1]))
    assert meters.read() == {"loss": 2.0, "ce": 4.0, "accuracy": 5 / 6}
