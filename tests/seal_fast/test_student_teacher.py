"""Students and teachers: static images and events, state, hooks, shapes and stems."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

import seal_fast
from golden import filled_student
from seal_fast.models import STUDENTS, TEACHERS, ann, student, teacher
from seal_fast.nn import LIFNode

TOLERANCE = 1e-10  # measured 7e-12


def images(B=2, C=3, size=8, seed=0):
    return torch.randn(B, C, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=STUDENTS)
def network(request):
    """A student of three time steps whose weights make all layers fire; tests that change it take a copy."""
    return filled_student(request.param, num_classes=5, time_steps=3)


def neurons(network):
    return {name: module for name, module in network.named_modules() if isinstance(module, LIFNode)}


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_a_static_image_equals_events_that_repeat_it(network, train):
    # preact_resnet34 halves the resolution five times, and batch norm needs more than one value.
    x = images(B=3, size=32 if "PreAct" in type(network).__name__ else 8)
    runs = []
    for steps in (x, x.expand(3, *x.shape)):
        own = deepcopy(network).train(train)
        logits = own(steps)
        logits.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in own.named_parameters()}
        runs.append((logits, gradients, own.state_dict()))
    (logits, gradients, state), (expected, expected_gradients, expected_state) = runs
    assert logits.shape == (3, 3, 5)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    for name, value in expected_gradients.items():
        tolerance = TOLERANCE * max(1.0, value.abs().max().item())
        torch.testing.assert_close(gradients[name], value, rtol=0, atol=tolerance, msg=name)
    for name, value in expected_state.items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=TOLERANCE, msg=name)
    tracked = [name for name in state if name.endswith("num_batches_tracked")]
    assert {state[name].item() for name in tracked} == {int(train)}


@torch.no_grad()
def test_no_state_is_kept_between_calls(network):
    own, x = deepcopy(network).eval(), images()
    first = own(x)
    own(images(B=4, seed=1))  # another batch size needs no reset
    assert torch.equal(own(x), first)
    assert all(neuron.v == 0.0 for neuron in neurons(own).values())


@torch.no_grad()
def test_forward_hooks_see_the_spikes_of_every_neuron(network):
    own, seen = deepcopy(network).train(), {}

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, neuron in neurons(own).items():
        neuron.register_forward_hook(keep(name))
    own(images(B=4, size=32))
    assert seen.keys() == neurons(own).keys()
    assert len(seen) >= 7  # resnet8, the smallest, has seven layers of neurons
    for name, spikes in seen.items():
        assert len(spikes) == 3 * 4, name
        assert set(spikes.unique().tolist()) <= {0.0, 1.0}, name
    assert 0.01 < torch.cat([spikes.flatten() for spikes in seen.values()]).mean() < 0.6


@pytest.mark.parametrize("arch", STUDENTS)
@torch.no_grad()
def test_one_channel_and_8x8_images_are_enough(arch):
    network = student(arch, num_classes=2, in_channels=1, time_steps=2).eval()
    x = images(C=1).float()
    assert network(x).shape == (2, 2, 2)
    assert network(x.expand(2, *x.shape)).shape == (2, 2, 2)


@torch.no_grad()
def test_time_steps_differ_in_their_logits_and_see_their_own_events():
    network = filled_student("resnet18", num_classes=5, in_channels=2, time_steps=3).eval()
    events = torch.stack([images(C=2, seed=seed) for seed in range(3)]) * 3
    logits = network(events)
    assert not torch.equal(logits[0], logits[1])
    changed = events.clone()
    changed[2] += 1
    other = network(changed)
    assert torch.equal(other[:2], logits[:2])
    assert not torch.equal(other[2], logits[2])


def test_options_of_the_neuron_reach_every_neuron():
    options = {"tau": 1.25, "v_threshold": 0.5, "v_reset": None, "detach_reset": True, "backend": "torch"}
    with torch.device("meta"):
        network = student("resnet19", num_classes=5, **options)
    nodes = neurons(network).values()
    assert len(nodes) == 18
    for node in nodes:
        assert {name: getattr(node, name) for name in options} == options
        assert (node.decay_input, node.surrogate.name, node.surrogate.alpha) == (False, "sigmoid", 4.0)


@pytest.mark.parametrize(
    ("arch", "classes", "stem", "kernel"),
    [
        ("resnet18", 10, None, 3),
        ("resnet18", 100, None, 3),
        ("resnet18", 101, None, 7),
        ("resnet18", 1000, None, 7),
        ("resnet34", 10, "imagenet", 7),
        ("resnet34", 1000, "cifar", 3),
        ("resnet50", 1000, None, 7),
        ("resnet19", 1000, None, 3),
        ("resnet19", 10, "cifar", 3),
    ],
)
def test_stem_of_a_teacher_is_the_one_asked_for(arch, classes, stem, kernel):
    with torch.device("meta"):
        network = teacher(arch, num_classes=classes, stem=stem)
        logits = network.eval()(torch.empty(2, 3, 64, 64))
        features = network.maxpool(network.conv1(torch.empty(2, 3, 64, 64)))
    assert network.conv1.kernel_size == (kernel, kernel)
    assert features.shape[-1] == (16 if kernel == 7 else 64)
    assert logits.shape == (2, classes)


@pytest.mark.parametrize("arch", TEACHERS)
@torch.no_grad()
def test_teacher_takes_8x8_images_of_one_channel(arch):
    network = teacher(arch, num_classes=4, in_channels=1).eval()
    assert network(images(C=1).float()).shape == (2, 4)


def test_resnet18_dvs_is_a_resnet18_of_two_channels():
    torch.manual_seed(0)
    network = teacher("resnet18_dvs", num_classes=4)
    torch.manual_seed(0)
    expected = teacher("resnet18", num_classes=4, in_channels=2)
    assert network.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in network.state_dict().items())


def test_preact_resnet18_has_the_names_and_shapes_of_preact_resnet34s_first_two_blocks_of_each_stage():
    with torch.device("meta"):
        small, large = (student(f"preact_resnet{depth}", num_classes=4).state_dict() for depth in (18, 34))
    kept = [name for name in large if not name.startswith("layer") or int(name.split(".")[1]) < 2]
    assert list(small) == kept
    assert all(small[name].shape == large[name].shape for name in kept)


def test_every_parameter_of_a_student_learns_from_the_loss():
    torch.manual_seed(0)
    network = student("resnet18", num_classes=5, time_steps=2)
    parts = seal_fast.seal_loss(network(images(B=4).float()), torch.randn(4, 5), torch.arange(4), alpha=0.6, beta=0.15)
    parts.loss.backward()
    silent = [name for name, parameter in network.named_parameters() if not parameter.grad.abs().max() > 0]
    assert silent == []


FOLDED = [
    ("resnet8", "cifar"),
    ("resnet18", "imagenet"),
    ("resnet19", None),
    ("resnet34", "cifar"),
    ("resnet50", "imagenet"),
]


@pytest.mark.parametrize(("arch", "stem"), FOLDED)
def test_a_folded_teacher_computes_the_same_without_batch_norm(arch, stem):
    torch.manual_seed(0)
    teacher = seal_fast.models.teacher(arch, num_classes=10, stem=stem).double()
    images = torch.randn(4, 3, 32, 32).double()
    teacher(images)
    folded = seal_fast.models.folded(teacher.eval())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    expected = teacher(images)
    assert (folded(images) - expected).abs().max() < 1e-9 * expected.abs().max()  # measured 1e-14


@pytest.mark.parametrize(("arch", "stem"), FOLDED)
@torch.no_grad()
def test_a_folded_teacher_asks_cudnn_for_convolutions_with_bias_sum_and_relu(arch, stem, monkeypatch):
    """That it asks for the right ones: without a GPU, torch's convolution stands in for cuDNN's.

    What cuDNN computes is tested in tests/kernels/test_teacher_gpu.py.
    """
    asked = []

    def refused(name, *arguments):
        """By torch, which has parsed the arguments by then: nothing but the device is wrong."""
        with pytest.raises(NotImplementedError, match="'CPU' backend"):
            functions[name](*arguments)
        asked.append(name)

    def convolution_relu(x, weight, bias, stride, padding, dilation, groups):
        refused("cudnn_convolution_relu", x, weight, bias, stride, padding, dilation, groups)
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))

    def convolution_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        refused("cudnn_convolution_add_relu", x, weight, z, alpha, bias, stride, padding, dilation, groups)
        return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)

    functions = {name: getattr(torch, name) for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu")}
    torch.manual_seed(0)
    teacher = seal_fast.models.teacher(arch, num_classes=10, stem=stem).double()
    x = images(B=4, size=32)
    teacher(x)
    folded = seal_fast.models.folded(teacher.eval())
    expected = folded(x)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", convolution_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", convolution_add_relu)
    monkeypatch.setattr(ann, "_fuses", lambda weight, x: True)
    teacher(x)
    assert not asked  # its batch norms are between its convolutions and their ReLU
    assert (folded(x) - expected).abs().max() < 1e-9 * expected.abs().max()  # measured 1e-15
    blocks = sum(isinstance(module, (ann.BasicBlock, ann.Bottleneck)) for module in folded.modules())
    others = 1 + blocks * (2 if arch == "resnet50" else 1)
    assert asked.count("cudnn_convolution_add_relu") == blocks
    assert asked.count("cudnn_convolution_relu") == others
