"""What convert replaces, what it leaves and why, and that revert undoes it."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import seal_fast
from seal_fast import convert, revert
from seal_fast.nn import IFNode, LIFNode, ParametricLIFNode

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
from spikingjelly.activation_based import functional, layer, neuron, surrogate

from spikingjelly_networks import block, frames


def current(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("kind", [IFNode, LIFNode, ParametricLIFNode])
def test_a_neuron_stays_the_object_that_it_is(kind):
    theirs = getattr(neuron, kind.__name__)
    node = theirs(
        v_threshold=0.7, v_reset=None, surrogate_function=surrogate.ATan(3.0), step_mode="m", store_v_seq=True
    )
    original, x, seen = copy.deepcopy(node), current(4, 3, 5), []
    handle = node.register_forward_hook(lambda module, *_: seen.append(module))
    network, parameters = nn.Sequential(node.eval()), [*node.parameters()]
    report = convert(network)
    assert [*report] == [("0", kind.__name__, f"seal_fast.nn.{kind.__name__}", "")]
    assert network[0] is node
    assert isinstance(node, kind)
    assert type(node).__mro__[2:] != theirs.__mro__
    assert isinstance(node, theirs)
    assert [*map(id, node.parameters())] == [*map(id, parameters)]
    assert not node.training
    assert (node.v_threshold, node.v_reset, node.step_mode, node.surrogate.alpha) == (0.7, None, "m", 3.0)
    assert torch.equal(network(x), original.eval()(x))
    assert torch.equal(node.v_seq, original.v_seq)
    assert seen == [node]
    handle.remove()
    assert not node._forward_hooks


def test_memories_go_over_and_come_back():
    network, x = nn.Sequential(neuron.LIFNode(step_mode="m"), neuron.IFNode(step_mode="m")), current(6, 3, 5)
    expected = copy.deepcopy(network)(x)
    first = network(x[:2])
    convert(network)
    second = network(x[2:4])
    revert(network)
    assert torch.equal(torch.cat([first, second, network(x[4:])]), expected)
    assert [type(node) for node in network] == [neuron.LIFNode, neuron.IFNode]
    assert "LIFNode(" in repr(network)


def test_a_second_call_converts_what_is_new_and_a_lone_neuron_is_a_model():
    node = neuron.IFNode(step_mode="m")
    assert [entry.name for entry in convert(node)] == [""]
    network = nn.Sequential(node, neuron.LIFNode(step_mode="m"))
    assert [entry.name for entry in convert(network)] == ["1"]
    assert [*convert(network)] == []


def test_the_backend_is_that_of_the_call():
    network = nn.Sequential(neuron.IFNode(step_mode="m"))
    convert(network, backend="torch")
    assert network[0].backend == "torch"


def test_the_report_is_a_table():
    network = nn.Sequential(block(), neuron.QIFNode(), neuron.IFNode())
    assert str(convert(network)) == (
        "0.sn1: LIFNode -> seal_fast.nn.LIFNode with bn1\n"
        "0.sn2: LIFNode -> seal_fast.nn.LIFNode with bn2, a sum, down.1\n"
        "1: QIFNode left: seal-fast has no neuron of this type\n"
        "2: IFNode -> seal_fast.nn.IFNode\n"
        "3 converted, 2 of them fused; 1 left"
    )


class Mine(neuron.LIFNode):
    pass


def patched():
    node = neuron.LIFNode()
    node.forward = lambda x: x
    return node


def with_memory():
    node = neuron.LIFNode()
    node.register_memory("trace", 0.0)
    return node


def with_threshold(value):
    node = neuron.LIFNode()
    node.v_threshold = value
    return node


def with_precision():
    node = neuron.LIFNode()
    node._neuron_precision = ("fp16", "fp32", "fp32")
    return node


def on_lava():
    node = neuron.LIFNode()
    node._backend = "lava"
    return node


LEFT = {
    "another type": (neuron.QIFNode, r"seal-fast has no neuron of this type"),
    "yet another type": (neuron.IzhikevichNode, r"seal-fast has no neuron of this type"),
    "a derived class": (Mine, r"a class derived from LIFNode may compute something else"),
    "a surrogate": (lambda: neuron.IFNode(surrogate_function=surrogate.S2NN()), r"surrogate must be .*; got S2NN"),
    "a smooth surrogate": (
        lambda: neuron.IFNode(surrogate_function=surrogate.Sigmoid(spiking=False)),
        r"surrogate must fire spikes; got Sigmoid with spiking=False, which is smooth",
    ),
    "a replaced method": (patched, r"its method 'forward' was replaced"),
    "a memory": (with_memory, r"it has a memory of its own, 'trace'"),
    "a threshold": (lambda: with_threshold("1"), r"v_threshold must be a number; got str"),
    "a precision": (with_precision, r"it computes in a precision of its own"),
    "a backend": (on_lava, r"it runs on 'lava'"),
}


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_replaced_is_left_untouched_and_says_why(make, reason):
    node = make()
    if reason.endswith("'lava'") and not hasattr(neuron.LIFNode, "backend"):
        pytest.skip("neurons of spikingjelly 2.0.0 have no backend")
    before, kind = dict(vars(node)), type(node)
    (entry,) = report = convert(nn.Sequential(node))
    assert report.left == [entry]
    assert (entry.name, entry.was, entry.became) == ("0", kind.__name__, "")
    assert re.fullmatch(reason, entry.reason)
    assert type(node) is kind
    assert vars(node) == before


def test_snntorchs_neurons_are_left():
    snntorch = pytest.importorskip("snntorch", reason="snntorch is not installed")
    (entry,) = convert(nn.Sequential(snntorch.Leaky(beta=0.9)))
    assert (entry.was, entry.became) == ("Leaky", "")
    assert entry.reason.startswith("snnTorch's neurons are called once for each time step by the network's own loop")


def test_a_module_used_twice_is_replaced_once():
    node = neuron.IFNode(step_mode="m")
    network = nn.Sequential(node, nn.Linear(5, 5), node)
    original, x = copy.deepcopy(network), current(4, 3, 5)
    assert [entry.name for entry in convert(network)] == ["0"]
    assert network[0] is network[2]
    assert torch.equal(network(x), original(x))


def test_pickles_and_copies_of_a_converted_network_are_converted():
    network = block()
    convert(network)
    x = frames(4, 2, 3, 6, 6)
    network.eval()
    expected = network(x)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        functional.reset_net(twin)
        assert type(twin) is type(network)
        assert [str(chain) for chain in twin._plan.chains] == ["bn1", "bn2, a sum, down.1"]
        assert torch.equal(twin(x), expected)
        revert(twin)
        assert type(twin.sn1) is neuron.LIFNode
        functional.reset_net(twin)
        assert torch.equal(twin(x), expected)


def test_nothing_but_neurons_is_touched():
    network = nn.Sequential(layer.Linear(3, 4), nn.ReLU(), layer.Dropout(), LIFNode())
    assert [*convert(network)] == []
    assert [type(module) for module in network][:3] == [layer.Linear, nn.ReLU, layer.Dropout]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("network",), TypeError, r"model must be a torch\.nn\.Module; got str\."),
        ((nn.ReLU(), 1), TypeError, r"fuse must be True or False; got 1\."),
        ((nn.ReLU(), True, "cuda"), ValueError, r"backend must be one of auto, .*; got 'cuda'\."),
    ],
)
def test_a_wrong_argument_raises_a_sentence(arguments, error, message):
    names = ("model", "fuse", "backend")
    with pytest.raises(error, match=message):
        seal_fast.convert(**dict(zip(names, arguments, strict=False)))
