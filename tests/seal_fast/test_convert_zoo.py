"""SpikingJelly's own networks, converted and not: equal spikes at every layer, gradients and running statistics."""

import copy

import pytest
import torch

import seal_fast

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
from spikingjelly.activation_based import functional, layer, neuron

from spikingjelly_networks import ZOO, frames, zoo_network

GRADIENT = 1e-10  # of the largest entry, in float64; measured 5e-13, with a learned tau, else 2e-14
ZERO = 1e-13  # of a convolution's bias before batch norm; measured 9e-16
STATISTIC = 1e-13  # measured 4e-15


def watched(network, x, at):
    """The output, what each of the modules `at` gets or gives, the gradients, and the buffers afterwards."""
    seen = []
    handles = [at(module, seen) for module in network.modules()]
    functional.reset_net(network)
    network.zero_grad()
    torch.manual_seed(0)
    output = network(x)
    if network.training:
        output.square().mean().backward()
    for handle in handles:
        if handle is not None:
            handle.remove()
    gradients = [parameter.grad for parameter in network.parameters()]
    return output.detach(), seen, gradients, [buffer.clone() for buffer in network.buffers()]


def inputs_of_layers(module, seen):
    """Hooks on the layers between the neurons: these see spikes, and let neurons run with their batch norms."""
    if isinstance(module, (layer.Conv2d, layer.Linear, layer.MaxPool2d, layer.AdaptiveAvgPool2d)):
        return module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    return None


def spikes_of_neurons(module, seen):
    """Hooks on the neurons themselves."""
    if isinstance(module, neuron.BaseNode):
        return module.register_forward_hook(lambda *call: seen.append(call[-1].detach()))
    return None


@pytest.mark.parametrize(
    ("train", "at"),
    [(True, inputs_of_layers), (True, spikes_of_neurons), (False, inputs_of_layers)],
    ids=["training", "training, neurons hooked", "evaluation"],
)
@pytest.mark.parametrize("name", ZOO)
def test_spikes_are_equal_at_every_layer_and_so_are_gradients(name, train, at):
    original, x = zoo_network(name).double(), frames(4, 2, 3, 32, 32, dtype=torch.float64)
    if not train:
        original(x)
        functional.reset_net(original)
    network, names = copy.deepcopy(original.train(train)), list(original.state_dict())
    _, neurons, fused = ZOO[name]
    report = seal_fast.convert(network)
    assert (len(report.converted), len(report.fused), report.left) == (neurons, fused, [])
    assert list(network.state_dict()) == names

    output, seen, gradients, buffers = watched(network, x, at)
    expected, seen_before, gradients_before, buffers_before = watched(original, x, at)
    assert len(seen) == len(seen_before) >= neurons
    for spikes, before in zip(seen, seen_before, strict=True):
        assert torch.equal(spikes, before)
        assert before.any()
    assert torch.equal(output, expected)
    for gradient, before in zip(gradients, gradients_before, strict=True):
        if train:
            torch.testing.assert_close(gradient, before, rtol=0, atol=ZERO + GRADIENT * before.abs().max().item())
    for buffer, before in zip(buffers, buffers_before, strict=True):
        torch.testing.assert_close(buffer, before, rtol=0, atol=STATISTIC * (1 + before.abs().max().item()))

    seal_fast.revert(network)
    network.load_state_dict(original.state_dict())
    assert torch.equal(watched(network, x, at)[0], watched(original, x, at)[0])
    assert [type(module) for module in network.modules()] == [type(module) for module in original.modules()]


@pytest.mark.parametrize("name", ZOO)
def test_float32_is_within_the_rounding_of_batch_norm(name):
    original = zoo_network(name)
    network = copy.deepcopy(original)
    seal_fast.convert(network)
    x = frames(4, 2, 3, 32, 32)
    _, seen, _, _ = watched(network, x, inputs_of_layers)
    _, before, _, _ = watched(original, x, inputs_of_layers)
    # All are equal until a potential meets the threshold by less than the rounding; then spikes differ, a few at first.
    different = [(spikes != expected).float().mean().item() for spikes, expected in zip(seen, before, strict=True)]
    assert different[0] == 0.0
    assert max(different[: len(different) // 2]) < 1e-3  # measured 0


@pytest.mark.parametrize("kind", [neuron.IFNode, neuron.ParametricLIFNode], ids=lambda kind: kind.__name__)
def test_other_neurons_of_the_zoo(kind):
    time_constant = {} if kind is neuron.IFNode else {"init_tau": 2.0}
    torch.manual_seed(0)
    original = zoo_network("spiking_resnet18", lambda tau, **options: kind(**time_constant, **options)).double()
    network = copy.deepcopy(original)
    assert len(seal_fast.convert(network).fused) == 17
    x = frames(4, 1, 3, 32, 32, dtype=torch.float64)
    output, seen, gradients, _ = watched(network, x, inputs_of_layers)
    expected, seen_before, gradients_before, _ = watched(original, x, inputs_of_layers)
    assert all(torch.equal(*pair) for pair in zip(seen, seen_before, strict=True))
    assert torch.equal(output, expected)
    for gradient, before in zip(gradients, gradients_before, strict=True):
        torch.testing.assert_close(gradient, before, rtol=0, atol=ZERO + GRADIENT * before.abs().max().item())
