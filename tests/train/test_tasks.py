import pytest
import torch

from golden import INIT
from seal_fast import models
from seal_fast.train.tasks import DistillTask, TeacherTask, as_image, parameter_groups, tau_of


@pytest.mark.parametrize(("decay", "tau"), INIT["tau"].items())
def test_tau_is_that_of_the_published_neuron(decay, tau):
    assert tau_of(float(decay)) == tau


def test_a_neuron_without_memory_has_a_tau_of_one():
    assert tau_of(0.0) == tau_of(1e-300) == 1.0


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1 - 1e-9, float("nan"), float("inf")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"^decay must be at least 0 and below 1, in float32 too; got "):
        tau_of(decay)


def test_weight_decay_acts_on_convolution_and_linear_weights_of_a_student_only():
    student = models.student("resnet19", num_classes=10)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed, free = parameter_groups(student, 5e-4, spiking=True)
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-4, 0.0)
    weights = {
        f"{name}.weight"
        for name, module in student.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    }
    assert {names[id(parameter)] for parameter in decayed["params"]} == weights
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    (everything,) = parameter_groups(models.teacher("resnet18", num_classes=10), 5e-4, spiking=False)
    assert len(everything["params"]) == len(list(models.teacher("resnet18", num_classes=10).parameters()))


def test_teacher_sees_the_mean_over_time():
    events = torch.arange(3 * 2 * 4.0).reshape(3, 2, 1, 2, 2)  # [T, B, C, H, W]
    assert torch.equal(as_image(events), (events[0] + events[1] + events[2]) / 3)
    images = torch.zeros(2, 1, 2, 2)
    assert as_image(images) is images


def test_distillation_trains_the_student_alone():
    torch.manual_seed(0)
    student = models.student("resnet18", num_classes=5, in_channels=2, time_steps=3)
    teacher = models.teacher("resnet18", num_classes=5, in_channels=2).eval()
    task = DistillTask(student, teacher, method="seal", alpha=0.6, beta=0.15, temperature=3.0, backend="auto")
    outcome = task(torch.rand(3, 4, 2, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert outcome.logits.shape == (3, 4, 5)
    total = outcome.parts["ce"] + 0.6 * outcome.parts["ela"] + 0.15 * outcome.parts["sta"]
    torch.testing.assert_close(outcome.loss.detach(), total)
    outcome.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_the_teacher_runs_before_the_student_keeps_anything():
    """Its activations are transient: after the student's forward pass they would lie on top of all that it keeps."""
    student = models.student("resnet8", num_classes=5, time_steps=2)
    teacher = models.teacher("resnet8", num_classes=5).eval()
    order = []
    for network in (student, teacher):
        network.register_forward_pre_hook(lambda module, _: order.append(f"{type(module).__name__} begins"))
        network.register_forward_hook(lambda module, *_: order.append(f"{type(module).__name__} ends"))
    task = DistillTask(student, teacher, method="seal", alpha=0.6, beta=0.15, temperature=3.0, backend="auto")
    task(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert order == ["Teacher begins", "Teacher ends", "ResNet begins", "ResNet ends"]


def test_teacher_task_is_cross_entropy():
    torch.manual_seed(0)
    network = models.teacher("resnet18", num_classes=5, in_channels=1).eval()
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([4, 0, 1])
    outcome = TeacherTask(network)(images, labels)
    expected = -torch.log_softmax(network(images), -1)[torch.arange(3), labels].mean()
    torch.testing.assert_close(outcome.loss, expected)
    assert outcome.logits.shape == (1, 3, 5)
