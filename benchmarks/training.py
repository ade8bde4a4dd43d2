"""Full distillation steps (teacher, student, loss, backward, optimiser): cases, and the contestants that run them."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

import floors
import measure
import peers
import published
import seal_fast
from seal_fast.models import folded
from seal_fast.train.feed import arranged
from seal_fast.train.tasks import DistillTask, parameter_groups

WEIGHTS = {"alpha": 0.6, "beta": 0.15}
# With so small a learning rate all rounds compute on nearly the same weights.
SGD = {"lr": 1e-4, "momentum": 0.9}
WEIGHT_DECAY = 5e-4


class Case(NamedTuple):
    """Networks, and a batch of images, or of events for each of T steps."""

    student: str
    teacher: str
    T: int
    tau: float
    num_classes: int
    channels: int
    size: int  # height and width
    tiny_size: int
    events: bool
    batch: dict[str, int]  # by type of device

    def tiny(self) -> Case:
        """The smallest sizes that run."""
        return self._replace(T=2, size=self.tiny_size, batch=dict.fromkeys(self.batch, 2))


CASES = {
    "resnet18-cifar": Case("resnet18", "resnet34", 4, 2.0, 10, 3, 32, 16, False, {"cpu": 32, "cuda": 128}),
    "resnet19-cifar": Case("resnet19", "resnet34", 4, 2.0, 10, 3, 32, 16, False, {"cpu": 32, "cuda": 128}),
    "resnet18-dvs": Case("resnet18", "resnet19", 10, 2.0, 10, 2, 48, 16, True, {"cpu": 4, "cuda": 32}),
    "preact34-imagenet": Case("preact_resnet34", "resnet34", 4, 1.25, 1000, 3, 224, 64, False, {"cpu": 2, "cuda": 64}),
}


class Problem:
    """What all contestants of a case start from.

    Attributes:
        inputs: Images [B, C, H, W] or events [B, T, C, H, W].
        labels: [B].
        weights: State dict of the student.
        teacher: In evaluation mode, float32, its running statistics those of the inputs.
    """

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        self.case, self.device = case, device
        batch, image = case.batch[device.type], (case.channels, case.size, case.size)
        if case.events:
            self.inputs = torch.poisson(torch.full((batch, case.T, *image), 0.5)).to(device)
        else:
            self.inputs = torch.randn(batch, *image).to(device)
        self.labels = torch.randint(0, case.num_classes, (batch,)).to(device)
        self.weights = make_student(case, device).state_dict()
        self.teacher = seal_fast.models.teacher(
            case.teacher, num_classes=case.num_classes, in_channels=case.channels
        ).to(device)
        settle(self.teacher, self.inputs.mean(1) if case.events else self.inputs)
        self.teacher.requires_grad_(False)

    @functools.cached_property
    def arranged(self) -> torch.Tensor:
        """The inputs as the trainers' feed brings them."""
        return arranged(self.inputs, torch.channels_last)

    @functools.cached_property
    def recorded(self) -> Recorded:
        """One step with the stem once for each image."""
        student = published_student(self, looped(self.case), stem_once=True)
        with counted(student) as spikes, floors.recorded(student, self.teacher) as layers:
            published.logits(student, self.teacher, self.inputs)
        return Recorded(layers, spikes.neuron_steps, spikes.rate)


class Recorded(NamedTuple):
    """What a published network did.

    Attributes:
        layers: Its convolutions and linear layers.
        neuron_steps: Of all its neurons, at all time steps.
        firing_rate: The share of these in which a neuron fired.
    """

    layers: list[floors.Layer]
    neuron_steps: int
    firing_rate: float


@dataclass
class Spikes:
    """How many neurons' steps there were, and in how many of them a neuron fired."""

    neuron_steps: int = 0
    fired: float = 0.0

    @property
    def rate(self) -> float:
        """The share that fired."""
        return self.fired / self.neuron_steps


@contextlib.contextmanager
def counted(network: nn.Module) -> Iterator[Spikes]:
    """Count the spikes of a published network within this context."""
    spikes = Spikes()

    def count(module, arguments, output):
        spikes.neuron_steps += output.numel()
        spikes.fired += output.detach().sum(dtype=torch.float64).item()

    neurons = [module for module in network.modules() if isinstance(module, published.LoopedLIF)]
    handles = [neuron.register_forward_hook(count) for neuron in neurons]
    try:
        yield spikes
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def settle(network: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """The network in evaluation mode, its running statistics those of the inputs."""
    for module in network.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network(inputs)
    return network.eval()


@dataclass
class Step:
    """A full training step.

    Attributes:
        forward: Computes the loss.
        optimizer: Of the student.
        student: The network.
        teacher: The network whose logits it learns from.
        note: What the contestant chose by itself.
    """

    forward: Callable[[], torch.Tensor]
    optimizer: torch.optim.Optimizer
    student: nn.Module
    teacher: nn.Module
    note: str = ""

    def __call__(self) -> torch.Tensor:
        """Run one step and return the loss that it started from."""
        loss = self.forward()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


# What a user of seal_fast gets: the networks, the task and the optimiser as the trainers set them up.


def make_student(case: Case, device: torch.device, backend: str = "auto") -> nn.Module:
    """The student, channels_last."""
    student = seal_fast.models.student(
        case.student,
        num_classes=case.num_classes,
        in_channels=case.channels,
        time_steps=case.T,
        tau=case.tau,
        backend=backend,
    )
    return student.to(device=device, memory_format=torch.channels_last)


def ours(problem: Problem, amp: torch.dtype | None, within=contextlib.nullcontext) -> Step:
    """The step of the trainers in float32 or under autocast to `amp`, its forward pass within a context."""
    student = make_student(problem.case, problem.device)
    student.load_state_dict(problem.weights)
    teacher = folded(problem.teacher).to(dtype=amp or torch.float32, memory_format=torch.channels_last)
    task = DistillTask(student, teacher, method="seal", temperature=3.0, backend="auto", **WEIGHTS)
    groups = parameter_groups(student, WEIGHT_DECAY, spiking=True)

    def forward():
        with torch.autocast(problem.device.type, dtype=amp, enabled=amp is not None), within():
            return task(problem.arranged, problem.labels).loss

    return Step(forward, torch.optim.SGD(groups, **SGD, fused=True), student, teacher)


# What others get.


def looped(case: Case) -> Callable[[], nn.Module]:
    """Makes the published neurons."""
    return functools.partial(published.LoopedLIF, case.tau, case.T)


def published_student(problem: Problem, neuron: Callable[[], nn.Module], stem_once: bool = False) -> nn.Module:
    """The published graph with the problem's weights."""
    case = problem.case
    options = {"num_classes": case.num_classes, "in_channels": case.channels, "time_steps": case.T}
    student = published.Student(case.student, neuron=neuron, stem_once=stem_once, **options).to(problem.device)
    student.load_state_dict(problem.weights)
    return student


def eager(problem: Problem) -> Step:
    """The published step."""
    student = published_student(problem, looped(problem.case))
    loss = published.Distillation(student, problem.teacher, WEIGHTS)
    optimizer = torch.optim.SGD(published.parameter_groups(student, WEIGHT_DECAY), **SGD)
    return Step(lambda: loss(problem.inputs, problem.labels), optimizer, student, loss.teacher)


def compiled(problem: Problem) -> Step:
    """The published step, its forward and backward pass compiled."""
    step = eager(problem)
    return Step(torch.compile(step.forward, dynamic=False), step.optimizer, step.student, step.teacher)


def control(problem: Problem, neurons: str | None = None) -> Step:
    """The published graph, made fast with what else there is, around SpikingJelly's neurons.

    bfloat16, channels_last, the stem once for each image, a fused optimiser; and of the ways to run those neurons the
    one that is named, or the fastest here.
    """
    layers = peers.spikingjelly_layers(problem.device, problem.case.tau, problem.case.T)
    if neurons is None:
        seconds, failed = {}, {}
        for name, neuron in layers.items():
            with measure.noting(failed, name):
                step = _control(problem, neuron)
                step()
                seconds[name] = min(measure.race({name: step}, 0.0, least=2)[name])
        if not seconds:
            raise RuntimeError("; ".join(f"{name}: {failure.reason}" for name, failure in failed.items()))
        neurons = min(seconds, key=seconds.get)
    step = _control(problem, layers[neurons])
    step.note = neurons
    return step


def _control(problem: Problem, neuron: Callable[[], nn.Module]) -> Step:
    fast = {"memory_format": torch.channels_last}
    student = published_student(problem, neuron, stem_once=True).to(**fast)
    teacher = copy.deepcopy(problem.teacher).to(dtype=torch.bfloat16, **fast)
    loss = published.Distillation(student, teacher, WEIGHTS, torch.bfloat16)
    optimizer = torch.optim.SGD(published.parameter_groups(student, WEIGHT_DECAY), **SGD, fused=True)
    return Step(lambda: loss(problem.inputs, problem.labels), optimizer, student, loss.teacher)


def floor(problem: Problem, dtype: torch.dtype) -> Callable[[], None]:
    """The step's convolutions and linear layers alone."""
    return floors.convolutions(problem.recorded.layers, dtype)


F32, BF16 = torch.float32, torch.bfloat16
FLOORS = {F32: "convolutions alone, float32", BF16: "convolutions alone, bfloat16"}
# name -> (makes a step of a problem, the precision of its convolutions)
CONTESTANTS: dict[str, tuple[Callable[[Problem], Callable], torch.dtype]] = {
    "published, eager": (eager, F32),
    "published, torch.compile": (compiled, F32),
    "tuned control": (control, BF16),
    "ours, float32": (functools.partial(ours, amp=None), F32),
    "ours, bfloat16": (functools.partial(ours, amp=BF16), BF16),
    "ours, bfloat16, packed": (functools.partial(ours, amp=BF16, within=seal_fast.packed_spikes), BF16),
    "ours, float32, dense": (functools.partial(ours, amp=None, within=seal_fast.dense_convolutions), F32),
    "ours, bfloat16, dense": (functools.partial(ours, amp=BF16, within=seal_fast.dense_convolutions), BF16),
    **{name: (functools.partial(floor, dtype=dtype), dtype) for dtype, name in FLOORS.items()},
}
if not peers.has_spikingjelly():
    del CONTESTANTS["tuned control"]
if measure.device().type != "cpu":  # where all convolutions are dense
    del CONTESTANTS["ours, float32, dense"], CONTESTANTS["ours, bfloat16, dense"]
