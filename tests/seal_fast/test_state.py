"""Memories of modules, and SpikingJelly's functions and monitors on the library's neurons."""

import copy
import json
import logging
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from seal_fast.nn import IFNode, LIFNode, ParametricLIFNode, detach_net, reset_net

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
from spikingjelly.activation_based import base, functional, layer, monitor, neuron, surrogate

KINDS = [IFNode, LIFNode, ParametricLIFNode]


def current(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), IFNode(), nn.Linear(6, 6), LIFNode(), ParametricLIFNode())


@pytest.fixture
def silent(caplog):
    """SpikingJelly warns of modules that it does not know; nothing may be logged."""
    with caplog.at_level(logging.WARNING):
        yield
    assert caplog.records == []


def test_a_memory_is_an_attribute_that_reset_restores():
    node = LIFNode()
    node.register_memory("trace", 1.5)
    node.register_memory("ring", [0])
    node.trace = torch.ones(3)
    node.ring.append(1)
    assert dict(node.named_memories()) == {"v": 0.0, "trace": node.trace, "ring": [0, 1]}
    assert [*node.memories()] == [node.v, node.trace, node.ring]
    assert "trace" in dir(node)
    twin = copy.deepcopy(node)
    node.reset()
    assert (node.trace, node.ring) == (1.5, [0])
    assert twin.ring == [0, 1]
    node.set_reset_value("trace", 2.5)
    node.reset()
    assert node.trace == node.get_reset_value("trace") == 2.5
    del node.trace
    assert not hasattr(node, "trace")
    with pytest.raises(ValueError, match="name must be that of no attribute of the module; got 'tau'"):
        node.register_memory("tau", 0.0)


def test_moves_and_casts_take_memories_along_and_replicas_have_their_own():
    node, x = LIFNode(), current(4, 3, 5)
    node(x)
    replica = node._replicate_for_data_parallel()
    assert torch.equal(replica(x), copy.deepcopy(node)(x))
    v = node.v
    replica.reset()
    assert node.v is v
    assert node.double().v.dtype == torch.float64


@pytest.mark.usefixtures("silent")
def test_spikingjellys_functions_work_on_the_neurons(network):
    x = current(4, 3, 5)
    functional.set_step_mode(network, "s")
    assert all(node.step_mode == "s" for node in network if hasattr(node, "step_mode"))
    steps = torch.stack([network(x_t) for x_t in x])
    functional.detach_net(network)
    assert not network[3].v.requires_grad
    functional.reset_net(network)
    assert network[3].v == 0.0
    functional.set_step_mode(network, "m")
    assert torch.equal(network(x), steps)
    if hasattr(functional, "set_backend"):  # not in 2.0.0
        functional.reset_net(network)
        functional.set_backend(network, "torch")
        assert network[1].backend == "torch"
        assert torch.equal(network(x), steps)


@pytest.mark.usefixtures("silent")
def test_the_librarys_functions_work_on_spikingjellys_neurons():
    network = nn.Sequential(LIFNode(), neuron.LIFNode(step_mode="m"))
    network(current(4, 3).requires_grad_())
    detach_net(network)
    assert not network[1].v.requires_grad
    reset_net(network)
    assert [node.v for node in network] == [0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_neurons_are_of_spikingjellys_classes_too(kind):
    theirs = getattr(neuron, kind.__name__)
    assert isinstance(kind(), (kind, theirs))
    assert isinstance(kind(), base.MemoryModule)
    assert type(kind()).__name__ == kind.__name__
    for twin in (copy.deepcopy(kind()), pickle.loads(pickle.dumps(kind()))):
        assert type(twin) is type(kind())


def test_subclasses_of_the_neurons_are_related_as_well():
    class Leaky(LIFNode):
        def extra(self):
            return super().forward(current(2, 3)).shape

    assert isinstance(Leaky(), neuron.LIFNode)
    assert Leaky().extra() == (2, 3)


def test_monitors_see_spikes_potentials_inputs_and_gradients(network):
    x = current(4, 3, 5).requires_grad_()
    instance = (IFNode, LIFNode)
    # 0.0.0.0.14 has no context managers
    outputs = monitor.OutputMonitor(network, instance)
    inputs = monitor.InputMonitor(network, instance)
    potentials = monitor.AttributeMonitor("v", False, network, instance)
    network(x).sum().backward()
    assert [name for name, _ in network.named_modules() if isinstance(_, instance)] == outputs.monitored_layers
    assert torch.equal(outputs["1"][0], IFNode()(inputs["1"][0]))
    assert torch.equal(potentials["3"][0], network[3].v)
    for each in (outputs, inputs, potentials):
        each.remove_hooks()


def test_a_network_is_a_function_of_its_memories(network):
    if not hasattr(base, "to_functional_forward"):
        # The oldest supported version came before it; there is nothing to be compatible with.
        pytest.skip("spikingjelly 0.0.0.0.14 has no to_functional_forward")
    x = current(4, 3, 5)
    states = tuple(base.extract_memories(network))
    outputs, after = base.to_functional_forward(network)((x,), states)
    assert tuple(base.extract_memories(network)) == states
    assert torch.equal(network(x), outputs[0])
    assert all(torch.equal(*pair) for pair in zip(base.extract_memories(network), after, strict=True))


def test_single_steps_of_a_spikingjelly_container():
    node, x = LIFNode(step_mode="s"), current(4, 3, 5)
    assert torch.equal(layer.MultiStepContainer(node)(x), LIFNode()(x))


def test_surrogate_functions_of_spikingjelly_are_followed():
    node = LIFNode(surrogate_function=surrogate.ATan(alpha=3.0))
    assert (node.surrogate.name, node.surrogate.alpha) == ("atan", 3.0)
    node.surrogate_function.alpha = 1.0
    assert node.surrogate.alpha == 1.0
    node.surrogate = "erf"
    assert node.surrogate_function == node.surrogate
    with pytest.raises(TypeError, match=r"surrogate must be a name, .*; got S2NN\."):
        LIFNode(surrogate_function=surrogate.S2NN())
    with pytest.raises(ValueError, match=r"surrogate must fire spikes; got Erf with spiking=False, which is smooth\."):
        LIFNode(surrogate_function=surrogate.Erf(spiking=False))
    with pytest.raises(TypeError, match="two names of one argument; got both"):
        LIFNode(surrogate_function="erf", surrogate="erf")


def test_16_bit_inputs_keep_a_float32_potential():
    node = IFNode()
    node(current(3, 4).bfloat16())
    assert node.v.dtype == torch.float32
    with pytest.raises(ValueError, match=r"x must have time steps of shape \[4\], .*; got \[5\]"):
        node(current(3, 5))


PROBE = """
import json, pickle, sys
from seal_fast.nn import LIFNode
plain = type(LIFNode()) is LIFNode
node = pickle.loads(pickle.dumps(LIFNode()))
print(json.dumps([plain, type(node) is LIFNode, "spikingjelly" in sys.modules]))
"""


def test_without_spikingjelly_a_neuron_is_of_its_own_class_alone():
    output = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True).stdout
    assert json.loads(output) == [True, True, False]
