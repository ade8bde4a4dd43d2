"""Calls that a backward pass repeats or comes to twice: right, or refused in a sentence that names the remedy."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import seal_fast
from seal_fast.nn import IFNode, LIFNode, ParametricLIFNode, calls, detach_net, reset_net

pytestmark = pytest.mark.usefixtures("each_backend")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


X = [normal(4, 3, 5, seed=seed) for seed in range(3)]


class Layer(nn.Module):
    """A linear layer and neurons."""

    def __init__(self, kind=LIFNode, **options):
        super().__init__()
        self.linear, self.node = nn.Linear(5, 5, bias=False), kind(**options)
        with torch.no_grad():
            self.linear.weight.copy_(normal(5, 5, seed=7))

    def forward(self, x):
        return self.node(self.linear(x))


def weighted(output):
    return (output * torch.arange(1.0, 6.0)).sum()


def leaf(x):
    return x.clone().requires_grad_()  # without one, torch's reentrant checkpoint gives no gradient


def in_turn(end, before_backward):
    """Calls that are each followed by their backward pass, and by `end` before or after it."""

    def run(layer, call):
        for x in X:
            loss = weighted(call(layer, leaf(x)))
            end(layer) if before_backward else loss.backward()
            loss.backward() if before_backward else end(layer)

    return run


def together(end, last=None, first=None):
    """Two calls with `end` between, and one backward pass of both."""

    def run(layer, call):
        if first is not None:
            weighted(layer(first)).backward()
            detach_net(layer)
        losses = [weighted(call(layer, leaf(X[0])))]
        end(layer)
        losses.append(weighted(call(layer, leaf(X[1]))))
        if last is not None:
            last(layer)
        sum(losses).backward()

    return run


def the_former_alone(layer, call):
    loss = weighted(call(layer, leaf(X[0])))
    detach_net(layer)
    later = weighted(call(layer, leaf(X[1])))
    loss.backward()
    later.backward()


def not_at_rest(layer, call):
    with torch.no_grad():
        layer(X[2])
    layer(X[0])
    detach_net(layer)
    weighted(call(layer, leaf(X[1]))).backward()


def carried_on_with_its_graph(layer, call):
    weighted(layer(X[0])).backward(retain_graph=True)
    weighted(call(layer, leaf(X[1]))).backward()


def several_calls(layer, call):
    weighted(call(lambda x: layer(x) + layer(2 * x), leaf(X[0]))).backward()


def single_steps(layer, call):
    layer.node.step_mode = "s"
    weighted(call(lambda x: torch.stack([layer(x_t) for x_t in x]), leaf(X[0]))).backward()


def reset_within(layer, call):
    def function(x):
        reset_net(layer)
        first = layer(x)
        layer.node.v = 0.5
        return first + layer(x)

    layer(X[1])
    weighted(call(function, leaf(X[0]))).backward()


def detach_within(layer, call):
    def function(x):
        first = layer(x)
        detach_net(layer)
        return first + layer(2 * x)

    weighted(call(function, leaf(X[0]))).backward()


def potential_as_output(layer, call):
    weighted(call(lambda x: layer(x) + layer.node.v.square(), leaf(X[0]))).backward()
    detach_net(layer)
    losses = [weighted(call(lambda x: [layer(x), layer.node.v][1], leaf(x))) for x in X[:2]]
    detach_net(layer)
    sum(losses[1:]).backward()


def no_gradient_before_the_neuron(layer, call):
    layer.node.v = torch.full((3, 5), 0.25)
    weighted(call(lambda x: layer.linear(layer.node(x)), leaf(X[0]).detach())).backward()


def assign(layer):
    layer.node.v = 0.25


ENDS = {"detach": detach_net, "reset": reset_net, "a potential set by hand": assign}
# Each is right under checkpoints as well as without.
RIGHT = {
    **{f"{name}, then backward": in_turn(end, True) for name, end in ENDS.items()},
    **{f"backward, then {name}": in_turn(end, False) for name, end in ENDS.items()},
    **{f"{name} between two calls, one backward": together(end) for name, end in ENDS.items()},
    "a detach between two calls, and a reset": together(detach_net, last=reset_net),
    "a reset between two calls, the first not at rest": together(reset_net, first=X[2]),
    "the former of two calls alone": the_former_alone,
    "a call that is not at rest": not_at_rest,
    "a potential with its graph": carried_on_with_its_graph,
    "several calls": several_calls,
    "single steps": single_steps,
    "a reset and a potential by hand within": reset_within,
    "a detach within": detach_within,
    "a potential as an output": potential_as_output,
    "no gradient before the neuron": no_gradient_before_the_neuron,
}
# torch 2.6 has no way to ask for the hooks of a checkpoint, which tell those that are not reentrant apart.
needs_hooks = pytest.mark.skipif(calls._top_hooks is None, reason="this torch does not tell which checkpoint repeats")
NEEDS_HOOKS = {
    *("several calls", "single steps", "a detach within", "a potential with its graph", "a potential as an output"),
    *("the former of two calls alone", "a reset and a potential by hand within"),
    *(name for name in RIGHT if "two calls" in name),
}
# Without an input that needs a gradient, torch's reentrant checkpoint gives none.
CASES = [
    pytest.param(name, way, marks=[needs_hooks] * (way == "not reentrant" and name in NEEDS_HOOKS), id=f"{name}, {way}")
    for name in RIGHT
    for way in ("not reentrant", "reentrant")
    if (name, way) != ("no gradient before the neuron", "reentrant")
]


def reentrant(f, x):
    return checkpoint(f, x, use_reentrant=True)


def not_reentrant(f, x):
    return checkpoint(f, x, use_reentrant=False)


CHECKPOINTS = {"not reentrant": not_reentrant, "reentrant": reentrant}


@pytest.mark.parametrize("kind", [LIFNode, IFNode, ParametricLIFNode])
@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_checkpoint_gives_the_gradient_of_no_checkpoint(name, way, kind):
    results = []
    for call in (lambda f, x: f(x), CHECKPOINTS[way]):
        layer = Layer(kind)
        RIGHT[name](layer, call)
        results.append([*(parameter.grad for parameter in layer.parameters()), torch.as_tensor(layer.node.v)])
    assert results[0][0].abs().max() > 0
    for got, right in zip(*results, strict=True):
        torch.testing.assert_close(got, right)


NESTED = {
    "not reentrant within not reentrant": lambda f, x: not_reentrant(lambda x: not_reentrant(f, x).sin() * x, x),
    "reentrant within not reentrant": lambda f, x: not_reentrant(lambda x: reentrant(f, x).sin() * x, x),
    "not reentrant within reentrant": lambda f, x: reentrant(lambda x: not_reentrant(f, x).sin() * x, x),
    "reentrant within reentrant": lambda f, x: reentrant(lambda x: reentrant(f, x).sin() * x, x),
}
OFTEN = ["detach, then backward", "backward, then reset", "a call that is not at rest", "the former of two calls alone"]


@needs_hooks
@pytest.mark.parametrize("way", NESTED)
@pytest.mark.parametrize("name", [*OFTEN, "detach between two calls, one backward", "several calls", "single steps"])
def test_a_checkpoint_within_another_one(name, way):
    results = []
    for call in (lambda f, x: f(x).sin() * x, NESTED[way]):
        layer = Layer()
        RIGHT[name](layer, call)
        results.append(layer.linear.weight.grad)
    torch.testing.assert_close(*results)


@needs_hooks
@pytest.mark.parametrize("hooks", [seal_fast.packed_spikes, torch.autograd.graph.save_on_cpu])
@pytest.mark.parametrize("name", OFTEN)
def test_hooks_for_saved_tensors_within_a_checkpoint(name, hooks):
    def within(f, x):
        def function(x):
            with hooks():
                spikes = f(x)
            return spikes.sin() * x

        return not_reentrant(function, x)

    results = []
    for call in (lambda f, x: f(x).sin() * x, within):
        layer = Layer()
        RIGHT[name](layer, call)
        results.append(layer.linear.weight.grad)
    torch.testing.assert_close(*results)


def test_a_hook_with_an_empty_cell_is_no_checkpoints():
    def run():
        def pack(tensor):
            try:
                return later or tensor
            except NameError:
                return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            spikes = Layer()(leaf(X[0]))
        later = None
        return spikes

    assert run().requires_grad


@pytest.mark.parametrize("second", [reentrant, lambda f, x: f(x)], ids=["reentrant", "none"])
def test_a_potential_that_a_reentrant_checkpoint_cut_is_refused(second):
    layer = Layer()
    loss = weighted(reentrant(layer, leaf(X[0]))) + weighted(second(layer, leaf(X[1])))
    with pytest.raises(RuntimeError, match=r"cuts the graph of the potential .* use use_reentrant=False"):
        loss.backward()
    with torch.no_grad():
        reset_net(layer)
        layer(X[2])
    reset_net(layer)
    loss = weighted(reentrant(layer, leaf(X[0])))
    with torch.no_grad():
        layer(X[2])
    loss.backward()


@needs_hooks
def test_recorded_potentials_are_those_of_the_first_calls():
    layer = Layer(step_mode="s", store_v_seq=True)
    spikes = not_reentrant(lambda x: torch.stack([layer(x_t) for x_t in x]), leaf(X[0]))
    before = layer.node.v_seq
    weighted(spikes).backward()
    assert layer.node.v_seq is before
    assert len(before) == len(X[0])


def test_what_repeats_calls_and_is_not_known_is_refused_where_it_is_ambiguous():
    class Again(torch.autograd.Function):
        """A checkpoint of another kind, as libraries for large models have."""

        @staticmethod
        def forward(ctx, layer, x):
            ctx.layer, ctx.x = layer, x
            return layer(x)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                x = leaf(ctx.x.detach())
                ctx.layer(x).backward(grad)
            return None, x.grad

    gradients = []
    for call in (lambda layer, x: layer(x), Again.apply):
        layer, x = Layer(), leaf(X[0])
        loss = weighted(call(layer, x))
        detach_net(layer)
        loss.backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    layer = Layer()
    loss = weighted(Again.apply(layer, leaf(X[0])))
    loss = loss + weighted(Again.apply(layer, leaf(X[1])))
    with pytest.raises(RuntimeError, match="cannot tell which of several calls"):
        loss.backward()


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("way", CHECKPOINTS)
def test_a_checkpoint_that_repeats_a_compiled_call_is_refused(way, fullgraph):
    torch._dynamo.reset()
    compiled = torch.compile(Layer(), fullgraph=fullgraph, backend="aot_eager")
    loss = weighted(CHECKPOINTS[way](compiled, leaf(X[0])))
    with pytest.raises(RuntimeError, match="a checkpoint cannot repeat a compiled one"):
        loss.backward()


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_an_end_of_calls_may_be_compiled(end, before):
    def run(layer, x):
        end(layer)
        first = layer(x)
        end(layer)
        return first + layer(2 * x)

    torch._dynamo.reset()
    layer, twin = Layer(), Layer()
    compiled = torch.compile(lambda x: run(layer, x), fullgraph=True, backend="aot_eager")
    for _ in range(before):  # in eager mode; the second call starts from a potential with its graph
        layer(X[0]), twin(X[0])
    found, right = compiled(X[1]), run(twin, X[1])
    assert torch.equal(found, right)
    for spikes in (found, right):
        weighted(spikes).backward()
    assert right.any()
    torch.testing.assert_close(layer.linear.weight.grad, twin.linear.weight.grad)


def test_calls_within_a_backward_pass_that_repeat_nothing_carry_the_potential():
    node, spikes = LIFNode(step_mode="s"), []
    x = leaf(torch.ones(3))
    x.register_hook(lambda _: spikes.extend(node(torch.full((3,), 1.5)) for _ in range(4)))
    (x * 2).sum().backward()
    assert torch.stack(spikes)[:, 0].tolist() == [0.0, 1.0, 0.0, 1.0]


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


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("way", [None, "not reentrant", "reentrant"])
def test_the_record_of_calls_keeps_no_graph_alive(way, step_mode):
    class Mark:
        pass

    layer, alive = Layer(step_mode=step_mode), []
    for _ in range(10):
        x = leaf(X[0])
        spikes = layer(x) if way is None else CHECKPOINTS[way](layer, x)
        alive.append(weakref.ref(spikes.grad_fn.metadata.setdefault("test", Mark())))
    del spikes, x
    reset_net(layer)
    gc.collect()
    assert [mark() for mark in alive] == [None] * 10
    assert len(calls.Calls.of(layer.node)._records) == 0
