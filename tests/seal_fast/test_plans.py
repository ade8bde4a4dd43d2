"""Repeated calls go by a plan: whatever changes between two calls, the second is as if it were the first."""

import gc
import importlib
import types
import weakref
from copy import deepcopy

import pytest
import torch
from torch import nn

import other_layouts
from seal_fast import bn_lif, lif, packed_spikes
from seal_fast.nn import LIFNode, ParametricLIFNode, Surrogate
from seal_fast.ops._dispatch import Plans

pytestmark = pytest.mark.usefixtures("each_fused_backend")
operators = {name: importlib.import_module(f"seal_fast.ops.{name}") for name in ("lif", "bn_lif")}

T, B, C = 4, 3, 5


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def parameter(value):
    return nn.Parameter(normal(C, seed=value) + 1)


def without_statistics(bn):
    bn.running_mean = bn.running_var = bn.num_batches_tracked = None


CHANGES_OF_NORM = {
    "nothing": lambda bn: None,
    "eps": lambda bn: setattr(bn, "eps", 0.5),
    "momentum": lambda bn: setattr(bn, "momentum", 0.9),
    "momentum of a mean of all": lambda bn: setattr(bn, "momentum", None),
    "momentum in a tensor": lambda bn: setattr(bn, "momentum", torch.tensor(0.3, dtype=torch.float64)),
    "evaluation": lambda bn: bn.eval(),
    "no tracking": lambda bn: setattr(bn, "track_running_stats", False),
    "no running statistics": without_statistics,
    "no count of batches": lambda bn: setattr(bn, "num_batches_tracked", None),
    "another weight": lambda bn: setattr(bn, "weight", parameter(1)),
    "a weight's other data": lambda bn: setattr(bn.weight, "data", parameter(2).data),
    "a weight with gaps": lambda bn: setattr(bn.weight, "data", normal(2 * C, seed=3)[::2]),
    "no weight": lambda bn: setattr(bn, "weight", None),
    "no bias": lambda bn: setattr(bn, "bias", None),
    "a frozen weight": lambda bn: bn.weight.requires_grad_(False),
    "other running statistics": lambda bn: setattr(bn, "running_var", normal(C, seed=4).abs()),
    "a hook": lambda bn: bn.register_forward_hook(lambda module, arguments, output: output * 2),
    "a forward of its own": lambda bn: setattr(bn, "__class__", Doubled),
}
CHANGES_OF_NEURON = {
    "tau": lambda node: setattr(node, "tau", 3.0),
    "tau by channel": lambda node: setattr(node, "tau", (normal(C, seed=5).abs() + 1.5).requires_grad_()),
    "threshold": lambda node: setattr(node, "v_threshold", 0.3),
    "a threshold that learns": lambda node: setattr(node, "v_threshold", torch.tensor(0.4, requires_grad=True)),
    "soft reset": lambda node: setattr(node, "v_reset", None),
    "reset to another potential": lambda node: setattr(node, "v_reset", 0.2),
    "the other decay": lambda node: setattr(node, "decay_input", not node.decay_input),
    "a detached reset": lambda node: setattr(node, "detach_reset", True),
    "another surrogate": lambda node: setattr(node, "surrogate", "atan"),
    "a steeper surrogate": lambda node: setattr(node, "surrogate", Surrogate("sigmoid", 2.0)),
    "torch's operations": lambda node: setattr(node, "backend", "torch"),
}


class Doubled(nn.BatchNorm2d):
    def forward(self, y):
        return 2 * super().forward(y)


def gradients(out, leaves):
    return torch.autograd.grad(out, leaves, normal(*out.shape, seed=9), allow_unused=True)


def of_layer(y, bn, node, residual, backend):
    """Spikes, gradients and the norm's state of one call, on copies."""
    bn, node = deepcopy(bn), deepcopy(node)
    if backend is not None:
        node.backend = backend
    learned = [value for value in (node.tau, node.v_threshold) if isinstance(value, torch.Tensor)]
    leaves = [y, *([] if residual is None else [residual]), *learned, *(p for p in bn.parameters() if p.requires_grad)]
    spikes = bn_lif(y, bn, node, time_steps=T, residual=residual)
    return [spikes, *gradients(spikes, leaves), *bn.state_dict().values()]


def equal(got, expected):
    assert len(got) == len(expected)
    assert torch.equal(got[0], expected[0])
    for mine, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)  # measured 2e-14


@pytest.fixture(name="layer")
def _layer():
    """A layer that has been called: its plan is there."""
    bn, node = nn.BatchNorm2d(C).double(), LIFNode(decay_input=False)
    y = normal(T * B, C, 2, 3).requires_grad_()
    for _ in range(2):
        bn_lif(y, bn, node, time_steps=T).sum().backward()
    return y, bn, node


@pytest.mark.parametrize("change", CHANGES_OF_NORM)
def test_a_layer_sees_what_changes_in_its_norm(layer, change):
    y, bn, node = layer
    CHANGES_OF_NORM[change](bn)
    equal(of_layer(y, bn, node, None, None), of_layer(y, bn, node, None, "torch"))


@pytest.mark.parametrize("change", CHANGES_OF_NEURON)
def test_a_layer_sees_what_changes_in_its_neuron(layer, change):
    y, bn, node = layer
    CHANGES_OF_NEURON[change](node)
    equal(of_layer(y, bn, node, None, None), of_layer(y, bn, node, None, "torch"))


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.contiguous(memory_format=torch.channels_last),
        lambda y: y.repeat(1, 1, 1, 2)[..., ::2],
        lambda y: y[: 2 * T],
        lambda y: nn.Parameter(y),
        lambda y: y.expand(T * B, C, 2, 3),
    ],
    ids=["channels_last", "gaps", "a smaller batch", "a parameter", "the same"],
)
def test_a_layer_sees_how_its_input_lies(layer, change):
    y, bn, node = layer
    y = change(y.detach()).detach().requires_grad_()
    residual = normal(*y.shape, seed=7).requires_grad_()
    equal(of_layer(y, bn, node, None, None), of_layer(y, bn, node, None, "torch"))
    equal(of_layer(y, bn, node, residual, None), of_layer(y, bn, node, residual, "torch"))


def test_what_is_refused_is_refused_after_calls_as_well(layer):
    y, bn, node = layer
    with pytest.raises(TypeError, match="time_steps must be an integer"):
        bn_lif(y, bn, node, time_steps=float(T))
    node.tau = 0.5
    with pytest.raises(ValueError, match="tau must be a finite number of at least 1"):
        bn_lif(y, bn, node, time_steps=T)
    node.tau, bn.bias.data = 2.0, bn.bias.data.float()
    with pytest.raises(TypeError, match="bn must be of y's dtype"):
        bn_lif(y, bn, node, time_steps=T)
    x = normal(T, B)
    lif(x, tau=1.0)
    with pytest.raises(TypeError, match="tau must be a number"):
        lif(x, tau=True)
    with pytest.raises(TypeError, match="detach_reset must be True or False"):
        lif(x, tau=1.0, detach_reset=0)
    lif(x, surrogate=Surrogate("atan", 2.0))
    with pytest.raises(TypeError, match="surrogate must be a name, a Surrogate"):
        lif(x, surrogate=types.SimpleNamespace(name="atan", alpha=2.0))


def test_the_environment_is_asked_at_each_call(layer, monkeypatch):
    y, bn, node = layer
    assert "Fused" in type(bn_lif(y, bn, node, time_steps=T).grad_fn).__name__
    monkeypatch.setenv("SEAL_FAST_BACKEND", "torch")
    assert "Fused" not in type(bn_lif(y, bn, node, time_steps=T).grad_fn).__name__


def test_a_momentum_in_a_tensor_is_read_at_each_call(layer):
    y, bn, node = layer
    bn.momentum = torch.tensor(0.5, dtype=torch.float64)
    for momentum in (0.5, 1.0):
        bn.momentum.fill_(momentum)
        before = bn.running_mean.clone()
        bn_lif(y, bn, node, time_steps=T)
        torch.testing.assert_close(bn.running_mean, before.lerp(y.detach().mean((0, 2, 3)), momentum))


def test_packed_spikes_and_modes_of_autograd_are_seen(layer):
    y, bn, node = layer
    expected = bn_lif(y, bn, node, time_steps=T)
    with packed_spikes() as context:
        assert torch.equal(bn_lif(y, bn, node, time_steps=T), expected)
        assert len(context._bits) == 1
    with torch.no_grad():
        assert not bn_lif(y, bn, node, time_steps=T).requires_grad
    with torch.inference_mode():
        assert bn_lif(y, bn, node, time_steps=T).is_inference()


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 3.0},
        {"decay_input": False},
        {"v_threshold": 0.3},
        {"v_threshold": torch.full((C,), 0.3, dtype=torch.float64)},
        {"v_reset": None},
        {"surrogate": "erf"},
        {"surrogate": Surrogate("sigmoid", 2.0)},
        {"detach_reset": True},
        {"v_init": normal(B, C, seed=3)},
        {"v_init": normal(C, B, seed=3).t()},
        {"v_init": normal(B, C, seed=3).float()},
        {"return_v_last": False},
        {"return_packed": True},
    ],
    ids=str,
)
def test_the_neuron_sees_every_option(options):
    x = normal(T, B, C).requires_grad_()
    for _ in range(2):
        lif(x)
    outputs, expected = lif(x, **options), lif(x, backend="torch", **options)
    assert len(outputs) == len(expected)
    for got, right in zip(outputs, expected, strict=True):
        assert (got is None) == (right is None)
        assert got is None or torch.equal(got, right)
    equal([outputs[0], *gradients(outputs[0], [x])], [expected[0], *gradients(expected[0], [x])])


def test_a_time_constant_that_is_learned_is_read_at_each_call():
    y, bn = normal(T * B, C, 2, 3), nn.BatchNorm2d(C).double()
    node = ParametricLIFNode(decay_input=False)
    bn_lif(y, bn, node, time_steps=T)
    with torch.no_grad():
        node.w.fill_(3.0)
    expected = deepcopy(node)
    expected.backend = "torch"
    assert torch.equal(bn_lif(y, bn, node, time_steps=T), bn_lif(y, bn, expected, time_steps=T))


LAYOUTS = {
    "channels_last": lambda x: x.transpose(-1, -3).contiguous().transpose(-1, -3),
    "rows with gaps": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "one row for all": lambda x: x[:1].expand_as(x),
}


def hooked(run, leaves):
    """Gradients where saved tensors come back in another layout, and without hooks."""
    return other_layouts.with_and_without(run, lambda out: gradients(out, leaves))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("learned", [False, True])
def test_what_the_neuron_saved_may_come_back_in_another_layout(layout, learned):
    x = LAYOUTS[layout](normal(T, B, C, 2, 3)).detach().requires_grad_()
    tau = (normal(C, seed=5).abs() + 1.5).requires_grad_(learned)
    leaves = [x, *([tau] if learned else [])]
    found, expected = hooked(lambda: lif(x, tau=tau if learned else 2.0)[0], leaves)
    equal([x, *found], [x, *expected])


@pytest.mark.parametrize("layout", [*LAYOUTS][:1])
@pytest.mark.parametrize("kind", ["plain", "residual", "its own norm"])
def test_what_a_layer_saved_may_come_back_in_another_layout(layer, layout, kind):
    _, bn, node = layer
    y, residual = (LAYOUTS[layout](normal(T * B, C, 2, 3, seed=i)).detach().requires_grad_() for i in range(2))
    options = {} if kind == "plain" else {"residual": residual}
    if kind == "its own norm":
        options["residual_bn"] = nn.BatchNorm2d(C).double()
    leaves = [y, *bn.parameters(), *([residual] if options else [])]
    found, expected = hooked(lambda: bn_lif(y, bn, node, time_steps=T, **options), leaves)
    equal([y, *found], [y, *expected])


def test_plans_hold_no_tensor_and_are_not_many():
    for plans in (operator._plans for operator in operators.values()):
        plans.clear()
    y, bn, node = normal(T * B, C, 2, 3).requires_grad_(), nn.BatchNorm2d(C).double(), LIFNode()
    node.tau = torch.full((C,), 3.0, dtype=torch.float64)
    x = normal(T, B, C)
    bn_lif(y, bn, node, time_steps=T), lif(x, v_init=normal(B, C))
    alive = [weakref.ref(tensor) for tensor in (y, x, bn.weight, bn.running_mean, node.tau)]
    del y, x, bn, node
    gc.collect()
    assert not [tensor for tensor in alive if tensor() is not None]
    few = Plans()
    for key in range(2 * Plans.MOST):
        few[(key,)] = None
    assert 0 < len(few) <= Plans.MOST
