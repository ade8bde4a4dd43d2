"""What torch does around the operator `lif`: compile, autocast, checkpoints, second derivatives, other devices."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import seal_fast
from seal_fast import lif, models
from seal_fast.nn import LIFNode, Surrogate

GPU = torch.cuda.is_available()
CASES = [
    (name, "cuda" if GPU and name in ("triton", "cupy") else "cpu")
    for name, can in seal_fast.backends()["lif"].items()
    if can.available and name != "torch"
]


@pytest.fixture(autouse=True)
def compiles_anew():
    """Each test counts its own compilations towards Dynamo's limit."""
    torch._dynamo.reset()


@pytest.fixture(params=CASES, ids=lambda case: case[0])
def backend(request):
    """A fused backend that runs here; tensors are made on its device."""
    name, device = request.param
    with torch.device(device):
        yield name


@pytest.mark.parametrize("per_channel", [False, True])
def test_opcheck(backend, per_channel):
    x = torch.randn(3, 2, 4, 5, requires_grad=True)
    tau = torch.full((4,) if per_channel else (), 2.0, requires_grad=True)
    v_init = torch.zeros(2, 4, 5, requires_grad=True)
    options = (0.0, 1.0, True, 0.0, "sigmoid", 4.0, False, backend, True, True)
    torch.library.opcheck(torch.ops.seal_fast.lif.default, (x, v_init, tau, None, *options))
    channels_last = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last).unflatten(0, (3, 2))
    torch.library.opcheck(torch.ops.seal_fast.lif.default, (channels_last, None, None, None, 2.0, *options[1:]))


# Without the fixture: torch 2.6 compiles no `unflatten` where a default device is set.
@pytest.mark.parametrize(("backend", "device"), CASES, ids=lambda value: value)
@pytest.mark.parametrize("arch", ["resnet8", "resnet19"])
def test_students_compile_whole(backend, device, arch):
    torch.manual_seed(0)
    network = models.student(arch, num_classes=3, in_channels=1, time_steps=2, backend=backend).to(device)
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="aot_eager")
    images = torch.rand(2, 1, 8, 8, device=device)
    for training in (True, False):
        network.train(training)
        compiled.train(training)
        torch.testing.assert_close(compiled(images), network(images))
    compiled(images).sum().backward()


@pytest.mark.parametrize(("backend", "device"), [*CASES, ("torch", "cpu")], ids=lambda value: value)
@pytest.mark.parametrize("step_mode", ["m", "s"])
def test_compiled_neurons_keep_their_potential(backend, device, step_mode):
    x = torch.full((4, 3), 0.4, device=device, requires_grad=True)
    node = LIFNode(backend=backend, step_mode=step_mode)
    compiled = torch.compile(copy.deepcopy(node), fullgraph=True, backend="aot_eager")
    weights, losses = x.detach().cumsum(0), [0.0, 0.0]
    for _ in range(3):  # the second call starts from the potential that the first one left, with its graph
        spikes = compiled(x), node(x)
        assert torch.equal(*spikes)
        losses = [loss + (each * weights).sum() for loss, each in zip(losses, spikes, strict=True)]
        assert torch.equal(compiled.v, node.v)
        assert node.v.min() > 0
    found, right = (torch.autograd.grad(loss, x)[0] for loss in losses)
    assert right.abs().min() > 0
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_between_compiled_calls_leaves_the_potential(strict):
    x = torch.full((4, 3), 0.4)
    node, twin = LIFNode(), LIFNode()
    compiled = torch.compile(node, fullgraph=True, backend="aot_eager")
    compiled(x), twin(x)
    program = torch.export.export(LIFNode(), (x,), strict=strict).module()
    assert torch.equal(program(x), program(x))
    compiled(x), twin(x)
    assert torch.equal(node.v, twin.v)
    if strict and not hasattr(torch.compiler, "is_exporting"):
        pytest.skip("torch 2.6 cannot be asked whether its strict mode is exporting: it needs a reset afterwards")
    kept = node.v
    torch.export.export(node, (x,), strict=strict)
    assert node.v is kept


@pytest.mark.parametrize(("backend", "device"), CASES, ids=lambda value: value)
def test_numbers_and_sizes_may_be_symbols(backend, device):
    def run(x, tau, threshold, reset, alpha):
        surrogate = Surrogate("atan", alpha)
        return lif(x, tau=tau, v_threshold=threshold, v_reset=reset, surrogate=surrogate, backend=backend)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 4, 5):
        numbers = 1.0 + size / 7, 0.5 + size / 9, -size / 10, size / 2
        x = torch.randn(4, size, device=device, requires_grad=True)
        found, expected = compiled(x, *numbers), run(x, *numbers)
        for got, right in zip(found, expected, strict=True):
            assert torch.equal(got, right)
        gradients = [torch.autograd.grad(sum(map(torch.sum, outputs)), x)[0] for outputs in (found, expected)]
        assert torch.equal(*gradients)


def test_autocast_keeps_the_dtype_of_the_input(backend):
    x = torch.randn(2, 5)
    with torch.autocast(x.device.type, torch.bfloat16):
        assert lif(x, backend=backend)[0].dtype == torch.float32
        assert lif(x.bfloat16(), backend=backend)[0].dtype == torch.bfloat16


def test_gradient_checkpointing_gives_the_same_gradient(backend):
    x = torch.randn(4, 3, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(lif(x, backend=backend)[0].sum(), x)
    spikes = checkpoint(lambda current: lif(current, backend=backend)[0], x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(spikes.sum(), x)[0], expected)


def test_second_derivative_is_refused_in_a_sentence(backend):
    x = torch.randn(4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(lif(x, backend=backend)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice only with backend='torch'"):
        gradient.sum().backward()


def test_outputs_that_nobody_asked_for_are_not_written(backend):
    x = torch.randn(3, 2, 5)
    spikes, v_last = lif(x, return_v_last=False, backend=backend)
    assert v_last is None
    assert torch.equal(spikes, lif(x, backend=backend)[0])
    options = (2.0, 1.0, True, 0.0, "sigmoid", 4.0, False, backend)
    _, *rest = torch.ops.seal_fast.lif(x, None, None, None, *options, False, False)
    assert [output.numel() for output in rest] == [0, 0]


def test_backward_keeps_the_input_alone(backend):
    saved = []
    x = torch.randn(3, 2, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        lif(x * 1.0, backend=backend)
    assert [tensor.shape for tensor in saved if tensor.numel() > 1] == [x.shape]
