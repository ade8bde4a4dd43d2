"""A training step as one CUDA graph takes the same steps as piece by piece."""

import pytest
import torch

from seal_fast.models import folded, student, teacher
from seal_fast.train import tasks
from seal_fast.train.errors import TrainingError
from seal_fast.train.step import GraphedStep, Step
from seal_fast.train.tasks import DistillTask, TeacherTask

CPU = torch.device("cpu")
WEIGHTS = {"alpha": 0.6, "beta": 0.15, "temperature": 3.0}
SIZES = [6, 6, 6, 6, 6, 6, 2, 6, 6]  # the last batch of an epoch may be smaller


class Repeated(GraphedStep):
    """Without a GPU nothing can be captured; what a replay would do on the device is done by the host."""

    def _warm_up(self, inputs, labels):
        return Step.__call__(self, inputs, labels)

    def _capture(self, function):
        return function


def trained(kind, device, network, optimizer, method="ce", sizes=SIZES, **options):
    """Losses and weights of steps on batches of these sizes, the learning rate halved midway."""
    device = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    network = network().to(device)
    optimizer = optimizer(network.parameters())
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    if method == "ann":
        task = TeacherTask(network)
    else:
        reference = None if method == "ce" else teacher_of().to(device)
        task = DistillTask(network, reference, method=method, backend="auto", **WEIGHTS)
    if issubclass(kind, GraphedStep):
        options = {"batch_size": 6, **options}
    step = kind(task, optimizer, scaler, device=device, amp="off", **options)
    losses = []
    for index, size in enumerate(sizes):
        if index == 5:
            for group in optimizer.param_groups:
                lr = group["lr"]
                group["lr"] = lr.fill_(lr / 2) if isinstance(lr, torch.Tensor) else lr / 2
        images = torch.randn(size, 1, 8, 8, generator=generator).to(device)
        labels = torch.randint(10, (size,), generator=generator).to(device)
        losses.append(step(images, labels).loss.detach().clone())
    return torch.stack(losses).cpu(), [p.detach().cpu() for p in network.parameters()]


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))


def resnet8():
    torch.manual_seed(0)
    return student("resnet8", num_classes=10, in_channels=1, time_steps=2)


def teacher_of():
    torch.manual_seed(1)
    return folded(teacher("resnet18", num_classes=10, in_channels=1).eval()).to(memory_format=torch.channels_last)


class Transposed(torch.nn.Module):
    """[B, T, K] -> [T, B, K]."""

    def forward(self, x):
        return x.transpose(0, 1)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)


def adam(parameters):
    parameters = list(parameters)
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


def test_a_loss_keeps_no_graph():
    """It would keep the gradients' nodes, and with them the stream that they were made on."""
    network = linear()
    optimizer = sgd(network.parameters())
    step = Step(TeacherTask(network), optimizer, torch.amp.GradScaler("cpu", enabled=False), device=CPU, amp="off")
    outcome = step(torch.randn(6, 1, 8, 8), torch.arange(6))
    assert not outcome.loss.requires_grad
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_batches_rates_and_results_pass_through_the_graphs_own_places():
    expected = trained(Step, "cpu", linear, sgd, "ann")
    losses, weights = trained(Repeated, "cpu", linear, sgd, "ann")
    # The learning rate is a float32 tensor for a graph: 0.1 differs from it by 1.5e-9; measured 6e-8.
    torch.testing.assert_close(losses, expected[0], rtol=1e-6, atol=0)
    for got, right in zip(weights, expected[1], strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", [SIZES, [2, *SIZES]], ids=["from the start", "resumed before the last batch"])
def test_a_batch_of_another_size_is_not_captured_and_others_are_warmed_up(sizes):
    captured, warmed_up = [], []

    class Counted(Repeated):
        def _warm_up(self, inputs, labels):
            warmed_up.append(inputs is self.batch[0] and labels is self.batch[1])
            return super()._warm_up(inputs, labels)

        def _captured(self):
            captured.append(len(self.batch[0]))
            super()._captured()

    trained(Counted, "cpu", linear, sgd, "ann", sizes)
    assert captured == [6] * (sizes.count(6) - GraphedStep.WARM_UP)
    assert warmed_up == [True] * GraphedStep.WARM_UP  # on what is captured, so that the same kernels run


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_an_optimizer_is_told_of_the_capture_alone(optimizer):
    """Adam raises where it is captured and was not told, as by a checkpoint of a run without graphs; else it warns."""
    told = []

    class Captured(Repeated):
        def _capture(self, function):
            with self._capturable():
                told.extend(group.get("capturable") for group in self.optimizer.param_groups)
            return function

    made = []
    trained(Captured, "cpu", linear, lambda parameters: made.append(optimizer(parameters)) or made[0], "ann")
    assert told == ([True] if optimizer is adam else [None])
    assert all(not group.get("capturable") for group in made[0].param_groups)


def test_a_step_that_cannot_be_captured_says_what_to_do(monkeypatch):
    class Refused(GraphedStep):
        _warm_up = Repeated._warm_up

    def refused(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", refused)
    with pytest.raises(TrainingError, match=r"graph \(operation not permitted .+\); pass --cuda_graph false\.$"):
        trained(Refused, "cpu", linear, sgd, "ann")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a graph is captured")


@needs_gpu
def test_a_capture_frees_the_workspaces_of_the_steps_before_it():
    """cuBLAS keeps 8 MiB or more for each thread and stream; the network's own tensors are smaller."""
    streams = []

    class Watched(GraphedStep):
        def _capture(self, function):
            streams.append(self.stream.cuda_stream)
            return super()._capture(function)

    def workspaces():
        return [
            block["size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["stream"] == streams[0] and segment["segment_pool_id"] == (0, 0)
            for block in segment["blocks"]
            if block["state"] == "active_allocated" and block["size"] >= 1 << 22
        ]

    trained(Watched, "cuda", linear, sgd, "ann")
    assert len(streams) == 1
    assert workspaces() == []


@needs_gpu
@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize(("network", "method"), [(linear, "ann"), (resnet8, "ce")])
def test_a_graph_takes_the_same_steps(network, method, optimizer):
    expected = trained(Step, "cuda", network, optimizer, method)
    losses, weights = trained(GraphedStep, "cuda", network, optimizer, method)
    # Nothing but the learning rate's rounding and the order of cuDNN's sums differs, but a spike may flip where a
    # potential meets the threshold. Of an H200's nine losses one differed by 1.1e-3, with Adam.
    torch.testing.assert_close(losses, expected[0], rtol=5e-3, atol=0)
    if optimizer is adam and network is resnet8:
        return  # where a gradient is nearly nothing, a step has its sign: weights are not alike where losses are
    for got, right in zip(weights, expected[1], strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams run side by side")
def test_a_teacher_beside_the_student_gives_the_same_losses():
    """A race would give the loss another batch's reference; two batches are never the same."""
    expected = trained(Step, "cuda", resnet8, sgd, "seal")[0]
    for overlap in (False, True):
        losses = trained(GraphedStep, "cuda", resnet8, sgd, "seal", overlap=overlap)[0]
        # As above: the order of cuDNN's sums, and spikes that flip. Not measured with a teacher yet.
        torch.testing.assert_close(losses, expected, rtol=5e-3, atol=0)


class Streams:
    """Streams that note what waits for what; where a thing is launched, `note` knows."""

    def __init__(self, monkeypatch):
        self.noted, self.made, self.entered = [], [], ["default"]
        streams = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_stream(self, other):
                streams.noted.append(f"{self.name} waits for {other.name}")

            def __enter__(self):
                streams.entered.append(self.name)

            def __exit__(self, *_):
                streams.entered.pop()

        def make(device):
            self.made.append(device)
            return Stream(f"stream {len(self.made)}")

        monkeypatch.setattr(torch.cuda, "Stream", make)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(self.entered[-1]))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)

    def note(self, name, function):
        def run(*given, **options):
            self.noted.append(f"{name} on {self.entered[-1]}")
            return function(*given, **options)

        return run


@pytest.mark.parametrize("overlap", [True, False])
def test_the_teachers_stream_is_forked_before_the_student_and_joined_before_the_loss(overlap, monkeypatch):
    """By streams that note what they are told; what runs side by side, only a GPU tells."""

    class Captured(GraphedStep):
        _capture = Repeated._capture

    streams = Streams(monkeypatch)
    network, reference = linear(), teacher_of()
    network.append(torch.nn.Unflatten(1, (1, 10))).append(Transposed())
    network.time_steps = 1
    network.forward = streams.note("student", network.forward)
    reference.forward = streams.note("teacher", reference.forward)
    monkeypatch.setattr(tasks, "seal_loss", streams.note("loss", tasks.seal_loss))
    task = DistillTask(network, reference, method="seal", backend="torch", **WEIGHTS)
    optimizer, scaler = sgd(network.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    step = Captured(task, optimizer, scaler, device=CPU, amp="off", batch_size=6, overlap=overlap)
    for size in [6] * GraphedStep.WARM_UP + [6, 2]:
        step(torch.randn(size, 1, 8, 8), torch.arange(size))

    def launched(main, side):
        if not overlap:
            return [f"teacher on {main}", f"student on {main}", f"loss on {main}"]
        forked = [f"{side} waits for {main}", f"teacher on {side}"]
        return [*forked, f"student on {main}", f"{main} waits for {side}", f"loss on {main}"]

    main, side = ("stream 2", "stream 1") if overlap else ("stream 1", None)
    warm_up = [f"{main} waits for default", *launched(main, side), f"default waits for {main}"]
    # A capture enters its stream by torch.cuda.graph; the last batch is of another size.
    assert streams.noted == [*(warm_up * GraphedStep.WARM_UP), *(launched("default", side) * 2)]
    assert streams.made == [CPU] * (2 if overlap else 1)
