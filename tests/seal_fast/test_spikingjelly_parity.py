"""Neurons against SpikingJelly's: the same spikes, potentials and gradients for the same arguments."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seal_fast import nn as ours
from seal_fast.ops._arguments import SPIKINGJELLY_SURROGATES

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
from spikingjelly.activation_based import neuron, surrogate

GRADIENT = 1e-12  # of the largest entry; measured 1e-14 for w, else 2e-15
POTENTIAL = 1e-13  # of the largest; measured 8e-16
# 0.0.0.0.14 has no SuperSpike and no Rect
SURROGATES = [name for name in SPIKINGJELLY_SURROGATES if hasattr(surrogate, name)]
NEURONS = {
    "IF": ("IFNode", {}),
    "LIF, decayed input": ("LIFNode", {"tau": 3.7, "decay_input": True}),
    "LIF, whole input": ("LIFNode", {"tau": 1.25, "decay_input": False}),
    "PLIF, decayed input": ("ParametricLIFNode", {"init_tau": 3.7, "decay_input": True}),
    "PLIF, whole input": ("ParametricLIFNode", {"init_tau": 1.25, "decay_input": False}),
}


def normal(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(node, x, upstream):
    """Spikes, last potential, and gradients of x and the parameters; the second half goes on from the first."""
    parts = x.split(2) if node.step_mode == "m" else x
    spikes = torch.cat([node(part).reshape(-1, *x.shape[1:]) for part in parts])
    gradients = torch.autograd.grad((spikes * upstream).sum() + node.v.sum(), [x, *node.parameters()])
    return spikes, node.v, *gradients


def compare(kind, seed=0, shape=(5, 3, 4, 5), **options):
    name = options.pop("surrogate", "Sigmoid")
    theirs = getattr(neuron, kind)(surrogate_function=getattr(surrogate, name)(), **options).double()
    node = getattr(ours, kind)(surrogate_function=getattr(surrogate, name)(), **options).double()
    assert {key: value.item() for key, value in node.state_dict().items()} == {
        key: value.item() for key, value in theirs.state_dict().items()
    }
    x = (normal(*shape, seed=seed) * 2 + 1).requires_grad_()
    upstream = normal(*shape, seed=seed + 1)
    results, expected = (run(module, x, upstream) for module in (node, theirs))
    assert torch.equal(results[0], expected[0])
    torch.testing.assert_close(results[1], expected[1], rtol=0, atol=POTENTIAL * (1 + expected[1].abs().max().item()))
    for result, wanted in zip(results[2:], expected[2:], strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=GRADIENT * (1e-3 + wanted.abs().max().item()))
    return expected[0]


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("detach_reset", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None], ids=["hard", "hard to -0.3", "soft"])
@pytest.mark.parametrize("kind", NEURONS)
def test_neurons_equal_spikingjellys(kind, v_reset, detach_reset, name, step_mode):
    cls, options = NEURONS[kind]
    options = options | {"v_reset": v_reset, "detach_reset": detach_reset, "step_mode": step_mode}
    spikes = compare(cls, surrogate=name, v_threshold=0.6, **options)
    assert 0.1 < spikes.mean() < 0.99


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["IFNode", "LIFNode", "ParametricLIFNode"]),
    tau=st.floats(1.01, 50.0),
    decay_input=st.booleans(),
    v_threshold=st.floats(0.1, 3.0),
    v_reset=st.none() | st.floats(-1.0, 0.05),
    detach_reset=st.booleans(),
    name=st.sampled_from(SURROGATES),
    step_mode=st.sampled_from(["s", "m"]),
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 4), min_size=0, max_size=3),
)
def test_any_options_equal_spikingjellys(kind, tau, decay_input, seed, name, shape, **options):
    if kind != "IFNode":
        options |= {"tau" if kind == "LIFNode" else "init_tau": tau, "decay_input": decay_input}
    compare(kind, seed=seed, surrogate=name, shape=(4, 2, *shape), **options)


@pytest.mark.parametrize("kind", ["IFNode", "LIFNode", "ParametricLIFNode"])
def test_constructors_take_the_same_arguments_in_the_same_places(kind):
    time_constant = () if kind == "IFNode" else (3.0, False)
    arguments = (*time_constant, 0.7, None, surrogate.ATan(alpha=3.0), True, "m")
    node, theirs = getattr(ours, kind)(*arguments), getattr(neuron, kind)(*arguments)
    for name in ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq", "v"):
        if hasattr(theirs, name):
            assert getattr(node, name) == getattr(theirs, name), name
    assert node.surrogate == ours.Surrogate("atan", 3.0)
    assert f"step_mode={theirs.step_mode}" in repr(node)


@pytest.mark.parametrize("kind", ["IFNode", "LIFNode", "ParametricLIFNode"])
def test_store_v_seq_may_stand_where_spikingjelly_2_has_it(kind):
    time_constant = () if kind == "IFNode" else (3.0, False)
    node = getattr(ours, kind)(*time_constant, 0.7, None, None, True, "m", True)
    assert node.store_v_seq
    assert node.backend == "auto"
    node = getattr(ours, kind)(*time_constant, 0.7, None, None, True, "m", "torch", True)
    assert node.store_v_seq
    assert node.backend == "torch"


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("kind", ["IFNode", "LIFNode", "ParametricLIFNode"])
def test_a_functional_forward_leaves_nothing_on_the_module(kind, step_mode):
    node = getattr(ours, kind)(store_v_seq=True, step_mode=step_mode)
    x = normal(3, 4, seed=5)
    (spikes,), (v,) = node.functional_forward((x,), (0.0,))
    assert node.v == 0.0
    assert node.v_seq is None
    assert torch.equal(node(x), spikes)
    assert torch.equal(node.v, v)


def test_neurons_on_meta_have_a_text():
    with torch.device("meta"):
        nodes = [ours.IFNode(), ours.LIFNode(), ours.ParametricLIFNode()]
    assert "tau=unknown" in repr(nodes[2])
    assert [node(torch.empty(4, 3, device="meta")).device.type for node in nodes] == ["meta"] * 3


@pytest.mark.parametrize("v_reset", [0.0, 0.25, None])
@pytest.mark.parametrize("kind", ["IFNode", "LIFNode", "ParametricLIFNode"])
def test_recorded_potentials_equal_spikingjellys(kind, v_reset):
    x = normal(5, 3, 4, seed=2) * 2
    options = {"v_reset": v_reset, "step_mode": "m", "store_v_seq": True}
    node, theirs = getattr(ours, kind)(**options).double(), getattr(neuron, kind)(**options).double()
    assert torch.equal(node(x), theirs(x))
    assert torch.equal(node.v_seq, theirs.v_seq)
    assert torch.equal(node.v_seq[-1], node.v)
    node.reset()
    assert node.v_seq is None
    node.step_mode = "s"
    steps = torch.stack([node(x_t) for x_t in x])
    theirs.reset()
    assert torch.equal(steps, theirs(x))
    assert torch.equal(node.v_seq, theirs.v_seq)


def test_a_potential_that_was_set_by_hand_is_where_the_next_call_starts():
    x = normal(3, 4, seed=3)
    node, theirs = (kind(tau=4.0, step_mode="m") for kind in (ours.LIFNode, neuron.LIFNode))
    node.v = theirs.v = 0.4
    assert torch.equal(node(x), theirs(x))
    assert torch.equal(node.v, theirs.v)
