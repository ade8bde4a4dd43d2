"""LIFNode: the state between calls, and what users do with modules."""

import copy
import math
import pickle

import pytest
import torch

from seal_fast import lif
from seal_fast.nn import LIFNode, Surrogate, detach_net, reset_net

pytestmark = pytest.mark.usefixtures("each_backend")

OPTIONS = {
    "default": {},
    "published": {"decay_input": False},
    "no leak": {"decay_input": False, "tau": math.inf, "v_reset": 0.3, "v_threshold": 2.0},
    "soft": {"v_reset": None, "tau": 1.25},
    "hard to -0.2, detached": {"v_reset": -0.2, "detach_reset": True, "surrogate": "atan", "v_threshold": 0.7},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def current(T=6, seed=0):
    return torch.randn(T, 3, 4, 5, generator=torch.Generator().manual_seed(seed)) * 2


@options
def test_spikes_and_state_are_the_operators(options):
    node, x = LIFNode(**options), current()
    spikes, v_last = lif(x, **options)
    assert 0.05 < spikes.mean() < 0.95
    assert torch.equal(node(x), spikes)
    assert torch.equal(node.v, v_last)


@options
def test_single_steps_equal_one_multi_step_call(options):
    single, multi = LIFNode(**options, step_mode="s"), LIFNode(**options)
    x, upstream = current().requires_grad_(), current(seed=1)
    expected = multi(x)
    spikes = torch.stack([single(x_t) for x_t in x])
    assert torch.equal(spikes, expected)
    assert torch.equal(single.v, multi.v)
    (gradient,) = torch.autograd.grad(spikes, x, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, x, upstream)
    assert torch.equal(gradient, expected_gradient)


def test_state_goes_on_where_the_last_call_ended_until_reset():
    node, x = LIFNode(), current(8)
    whole, _ = lif(x)
    first = node(x[:4])
    assert torch.equal(torch.cat([first, node(x[4:])]), whole)
    node.reset()
    assert node.v == 0.0
    assert torch.equal(node(x[:4]), first)


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_another_batch_size_without_reset_is_refused(step_mode):
    node, x = LIFNode(step_mode=step_mode), current()
    node(x[0] if step_mode == "s" else x)
    smaller = x[:, :2]
    with pytest.raises(ValueError, match=r"x must have time steps of shape \[3, 4, 5\], .*; got \[2, 4, 5\]\."):
        node(smaller[0] if step_mode == "s" else smaller)
    node.reset()
    node(smaller[0] if step_mode == "s" else smaller)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))])
@options
def test_copies_go_on_from_the_state_on_their_own(options, duplicate):
    node, x = LIFNode(**options), current(8)
    node(x[:4])
    twin = duplicate(node)
    assert repr(twin) == repr(node)
    assert torch.equal(twin.v, node.v)
    assert torch.equal(twin(x[4:]), node(x[4:]))
    node.reset()
    assert isinstance(twin.v, torch.Tensor)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda node: pickle.loads(pickle.dumps(node))])
def test_copies_leave_the_graph_behind(duplicate):
    node = LIFNode()
    node(current().requires_grad_())
    twin = duplicate(node)
    assert node.v.requires_grad
    assert not twin.v.requires_grad
    assert torch.equal(twin.v, node.v)


def test_state_is_not_in_the_state_dict():
    node = LIFNode()
    node(current())
    assert node.state_dict() == {}
    assert list(node.parameters()) == []


def test_float32_state_of_16_bit_input_is_kept():
    node, x = LIFNode(), current(8).bfloat16()
    spikes = torch.cat([node(x[:4]), node(x[4:])])
    assert node.v.dtype == torch.float32
    assert torch.equal(spikes, lif(x)[0])


def test_a_network_is_reset_and_detached_as_a_whole():
    network = torch.nn.Sequential(LIFNode(), torch.nn.Sequential(torch.nn.Flatten(), LIFNode()))
    nodes = [module for module in network.modules() if isinstance(module, LIFNode)]
    network(torch.full((3, 2), 0.4, requires_grad=True))
    potentials = [node.v for node in nodes]
    assert all(v.requires_grad for v in potentials)
    detach_net(network)
    assert not any(node.v.requires_grad for node in nodes)
    assert all(torch.equal(node.v, v) for node, v in zip(nodes, potentials, strict=True))
    reset_net(network)
    assert [node.v for node in nodes] == [0.0, 0.0]


def test_text_says_what_auto_stands_for(each_backend):
    if each_backend in ("torch", "cpu"):
        assert f"backend=auto ({each_backend} on cpu" in repr(LIFNode())
        assert f"spikes={'bits on cpu' if each_backend == 'cpu' else 'numbers'}, " in repr(LIFNode())
    assert repr(LIFNode(backend="torch")).endswith("spikes=numbers, backend=torch)")


def test_extra_repr_names_every_option():
    shown = repr(LIFNode(tau=1.25, decay_input=False, v_reset=None, surrogate=Surrogate("atan", 3.0), backend="torch"))
    for option in ("tau=1.25", "decay_input=False", "v_threshold=1.0", "v_reset=None", "surrogate=atan(alpha=3)"):
        assert option in shown
    for option in ("detach_reset=False", "step_mode=m", "backend=torch"):
        assert option in shown
