"""Calls that a backward pass repeats or comes to twice: right, or refused in a sentence that names the remedy."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from seal_fast.nn import IFNode, LIFNode, ParametricLIFNode, detach_net, reset_net

pytestmark = pytest.mark.usefixtures("each_backend")
AMBIGUOUS = "gradient checkpointing needs neurons that are called once between resets"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


X = [normal(4, 3, 5, seed=seed) for seed in range(3)]


class Layer(nn.Module):
    """A linear layer and neurons; called with or without a checkpoint."""

    def __init__(self, kind=LIFNode, reentrant=None):
        super().__init__()
        self.linear, self.node = nn.Linear(5, 5, bias=False), kind()
        with torch.no_grad():
            self.linear.weight.copy_(normal(5, 5, seed=7))
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.node(self.linear(x))
        return checkpoint(lambda x: self.node(self.linear(x)), x, use_reentrant=self.reentrant)


def weighted(spikes):
    return (spikes * torch.arange(1.0, 6.0)).sum()


def backward(layer, *spikes):
    layer.zero_grad()
    sum(map(weighted, spikes)).backward()
    return [parameter.grad.clone() for parameter in layer.parameters()]


def leaf(x):
    return x.clone().requires_grad_()  # without one, torch's reentrant checkpoint gives no gradient


def backward_after(end):
    def run(layer):
        found = []
        for x in X:
            spikes = layer(leaf(x))
            end(layer)
            found += backward(layer, spikes)
        return found

    return run


def backward_before(end):
    def run(layer):
        found = []
        for x in X:
            found += backward(layer, layer(leaf(x)))
            end(layer)
        return found

    return run


def assign(layer):
    layer.node.v = 0.25


def not_at_rest(layer):
    layer.node(layer.linear(X[0]))
    detach_net(layer)
    return backward(layer, layer(leaf(X[1])))


def two_that_start_at_rest(layer):
    first = layer(leaf(X[0]))
    reset_net(layer)
    return backward(layer, first, layer(leaf(X[1])))


# Each is right under checkpoints as well as without.
RIGHT = {
    "detach, then backward": backward_after(detach_net),
    "reset, then backward": backward_after(reset_net),
    "a potential set by hand, then backward": backward_after(assign),
    "backward, then detach": backward_before(detach_net),
    "backward, then reset": backward_before(reset_net),
    "a call that is not at rest": not_at_rest,
    "two calls at rest, one backward": two_that_start_at_rest,
}


@pytest.mark.parametrize("kind", [LIFNode, IFNode, ParametricLIFNode])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("run", RIGHT.values(), ids=RIGHT)
def test_a_checkpoint_gives_the_gradient_of_no_checkpoint(run, reentrant, kind):
    expected, found = run(Layer(kind)), run(Layer(kind, reentrant))
    assert any(gradient.abs().max() > 0 for gradient in expected)
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got, right)


def carried_on(layer):
    first = layer(leaf(X[0]))
    detach_net(layer)
    return backward(layer, first, layer(leaf(X[1])))


def the_former_alone(layer):
    first = layer(leaf(X[0]))
    detach_net(layer)
    second = layer(leaf(X[1]))
    return backward(layer, first), second


def reset_after_two(layer):
    spikes = [layer(leaf(X[0]))]
    detach_net(layer)
    spikes.append(layer(leaf(X[1])))
    reset_net(layer)
    return backward(layer, *spikes)


@pytest.mark.parametrize("run", [carried_on, the_former_alone, reset_after_two])
def test_a_call_whose_start_is_not_known_is_refused(run):
    run(Layer())
    with pytest.raises(RuntimeError, match=f"{AMBIGUOUS}.*detach"):
        run(Layer(reentrant=False))


def test_several_calls_within_a_reentrant_checkpoint_are_refused():
    layer, x = Layer(), leaf(X[0])
    spikes = checkpoint(lambda x: layer(x) + layer(x), x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=AMBIGUOUS):
        weighted(spikes).backward()


def test_steps_without_a_graph_before_a_checkpoint():
    def run(layer):
        with torch.no_grad():
            for x in X:
                layer.node(layer.linear(x))
        return backward(layer, layer(leaf(X[0])))

    for got, right in zip(run(Layer(reentrant=False)), run(Layer()), strict=True):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("kind", [LIFNode, IFNode, ParametricLIFNode])
def test_a_second_backward_names_reset_net(kind):
    layer = Layer(kind)
    weighted(layer(X[0])).backward()
    loss = weighted(layer(X[1]))
    with pytest.raises(RuntimeError, match=r"second time.*reset_net\(network\) before each batch.*detach_net"):
        loss.backward()
    detach_net(layer)
    weighted(layer(X[1])).backward()
    reset_net(layer)
    weighted(layer(X[1])).backward()


def test_a_second_backward_through_a_graph_that_was_retained():
    layer = Layer()
    first = weighted(layer(X[0]))
    first.backward(retain_graph=True)
    weighted(layer(X[1])).backward()
    assert layer.linear.weight.grad.abs().sum() > 0


def test_a_gradient_that_stops_before_the_former_call_needs_no_reset():
    layer = Layer()
    weighted(layer(X[0])).backward()
    x = leaf(X[1])
    (gradient,) = torch.autograd.grad(weighted(layer(x)), x)
    assert gradient.abs().sum() > 0


def test_the_record_of_calls_keeps_no_graph_alive():
    layer = Layer(reentrant=False)
    spikes = layer(leaf(X[0]))
    detach_net(layer)
    marked = weakref.ref(spikes.grad_fn.metadata.setdefault("test", type("Mark", (), {})()))
    del spikes
    gc.collect()
    assert marked() is None
    for _ in range(50):
        layer(leaf(X[0]))
        detach_net(layer)
    assert len(layer.node._calls._graphs) <= 1
