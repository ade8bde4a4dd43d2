"""Which batch norms run in one operator with their neuron, and when they run one after the other."""

import copy
import random
import re

import pytest
import torch
from torch import nn

from seal_fast import convert, revert
from seal_fast.nn import LIFNode
from seal_fast.ops import bn_lif

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
from spikingjelly.activation_based import functional, layer, monitor, neuron

from spikingjelly_networks import Conv, block, frames

GRADIENT = 1e-12  # of the largest entry, in float64; measured 9e-15
ZERO = 1e-12  # of a convolution's bias before batch norm; measured 4e-14
T, B, C = 4, 2, 3


class Parts(nn.Module):
    """What the forwards below are made of."""

    def __init__(self, rows=False):
        super().__init__()
        norm = nn.BatchNorm2d if rows else layer.BatchNorm2d
        self.conv, self.bn, self.sn = Conv(C, C, 3, padding=1), norm(C), neuron.LIFNode()
        self.conv2, self.bn2, self.sn2 = Conv(C, C, 3, padding=1), norm(C), neuron.LIFNode()
        self.scale, self.flag, self.seen = 2.0, True, []


def parts(forward, rows=False, double=True):
    torch.manual_seed(0)
    cls = type("Parts", (Parts,), {"forward": forward, "__module__": __name__})
    network = cls(rows)
    functional.set_step_mode(network, "m")
    for module in (network.bn, network.bn2):
        nn.init.uniform_(module.weight, 1.0, 3.0)
    return network.double() if double else network


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the fused operator runs."""
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return bn_lif(*arguments, **options)

    monkeypatch.setattr("seal_fast.ops.bn_lif", counted)
    return calls


def run(network, x):
    functional.reset_net(network)
    x = x.clone().requires_grad_()
    spikes = network(x)
    torch.manual_seed(1)
    gradients = torch.autograd.grad(
        (spikes * torch.randn_like(spikes)).sum(), [x, *network.parameters()], allow_unused=True
    )
    return spikes.detach(), gradients


def equal(network, original, x):
    spikes, gradients = run(network, x)
    expected, gradients_before = run(original, x)
    assert expected.any()
    assert torch.equal(spikes, expected)
    for gradient, before in zip(gradients, gradients_before, strict=True):
        if before is not None:
            torch.testing.assert_close(gradient, before, rtol=0, atol=ZERO + GRADIENT * before.abs().max().item())


def images(dtype=torch.float64, seed=0):
    return frames(T, B, C, 6, 5, dtype=dtype, seed=seed)


FUSED = {
    "plain": (lambda self, x: self.sn(self.bn(self.conv(x))), ["bn"]),
    "sum": (lambda self, x: self.sn(self.bn(self.conv(x)) + x), ["bn, a sum"]),
    "sum, other order": (lambda self, x: self.sn(x + self.bn(self.conv(x))), ["bn, a sum"]),
    "torch.add": (lambda self, x: self.sn(torch.add(self.bn(self.conv(x)), x)), ["bn, a sum"]),
    "method": (lambda self, x: self.sn(self.bn(self.conv(x)).add(x)), ["bn, a sum"]),
    "method in place": (lambda self, x: self.sn(self.bn(self.conv(x)).add_(x)), ["bn, a sum"]),
    "two batch norms": (lambda self, x: self.sn(self.bn(self.conv(x)) + self.bn2(self.conv2(x))), ["bn, a sum, bn2"]),
    "one after the other": (
        lambda self, x: self.sn2(self.bn2(self.conv2(self.sn(self.bn(self.conv(x)))))),
        ["bn", "bn2"],
    ),
    "spikes used twice": (
        lambda self, x: self.sn2(self.bn2(self.conv2(s := self.sn(self.bn(x)))) + s),
        ["bn", "bn2, a sum"],
    ),
    "options": (lambda self, x, scale=2.0, *, flag=None: self.sn(self.bn(self.conv(x) * scale)), ["bn"]),
    "dictionary": (lambda self, x: {"s": self.sn(self.bn(self.conv(x)))}["s"], ["bn"]),
}
ROWS = {
    "reshape": lambda self, x: self.sn(self.bn(self.conv(x).flatten(0, 1)).reshape(T, B, C, x.shape[3], x.shape[4])),
    "view, contiguous": lambda self, x: self.sn(self.bn(self.conv(x).flatten(0, 1)).view(T, -1, C, 6, 5).contiguous()),
    "unflatten": lambda self, x: self.sn(self.bn(self.conv(x).flatten(0, 1)).unflatten(0, (T, B))),
    "shape of the input": lambda self, x: self.sn(self.bn(self.conv(x).flatten(0, 1)).reshape(x.shape)),
}


@pytest.mark.parametrize(("forward", "chains"), FUSED.values(), ids=FUSED)
def test_chains_run_as_one_operator_with_equal_spikes_and_gradients(forward, chains, fused_calls):
    network = parts(forward)
    original = copy.deepcopy(network)
    report = convert(network)
    assert [entry.became.partition(" with ")[2] for entry in report.fused] == chains
    equal(network, original, images())
    assert len(fused_calls) == len(chains)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, original.get_buffer(name), rtol=1e-13, atol=1e-14)  # measured 2e-16


def test_what_is_written_in_place_is_so_in_the_traced_code():
    def forward(self, x):
        y = self.conv(x)
        alias = y
        y *= 2.0
        return self.sn(self.bn(self.conv2(y))) + alias

    network = parts(forward)
    original = copy.deepcopy(network)
    assert len(convert(network).fused) == 1
    assert torch.equal(network(images()), original(images()))


@pytest.mark.parametrize("forward", ROWS.values(), ids=ROWS)
def test_batch_norms_of_rows_are_fused_through_the_reshape_behind_them(forward, fused_calls):
    network = parts(forward, rows=True)
    original = copy.deepcopy(network)
    assert [entry.became for entry in convert(network).fused] == ["seal_fast.nn.LIFNode with bn"]
    equal(network, original, images())
    assert len(fused_calls) == 1


def test_a_reshape_that_mixes_rows_and_channels_is_not_fused(fused_calls):
    network = parts(lambda self, x: self.sn(self.bn(self.conv(x).flatten(0, 1)).reshape(T, -1)), rows=True)
    original = copy.deepcopy(network)
    convert(network)
    equal(network, original, images())
    assert fused_calls == []


def random_way(self, x):
    return self.sn(self.bn(self.conv(x))) if random.random() < 2 and x.sum() > -1e9 else x


def counting(self, x):
    self.seen.append(1)
    return self.sn(self.bn(self.conv(x)))


def assigning(self, x):
    self.scale = 3.0
    return self.sn(self.bn(self.conv(x)))


def two_modes(self, x):
    return self.sn(self.bn(self.conv(x) * (2.0 if self.training else 1.0)))


def written_between(self, x):
    y = self.conv(x)
    m = self.bn(y)
    y += 1.0
    return self.sn(m) + 0.0 * y


def residual_written_later(self, x):
    r = self.conv2(x)
    out = self.sn(self.bn(self.conv(x)) + r)
    r += 1.0
    return out


NO_CHAIN = "no batch norm in it is used by one neuron alone; its neurons run unfused"
UNFUSED = {
    "data-dependent": (random_way, r"its forward cannot be traced: TraceError: .*; its neurons run unfused"),
    "changes a list": (counting, r"its forward changes its attribute 'seen'; its neurons run unfused"),
    "changes an attribute": (assigning, r"its forward changes its attribute 'scale'; its neurons run unfused"),
    "two modes": (two_modes, r"its forward is another one in training than in evaluation; its neurons run unfused"),
    "batch norm used twice": (lambda self, x: self.sn(m := self.bn(self.conv(x))) + m, NO_CHAIN),
    "batch norm called twice": (lambda self, x: self.sn(self.bn(self.bn(x))), NO_CHAIN),
    "neuron called twice": (lambda self, x: self.sn(self.bn(self.sn(x))), NO_CHAIN),
    "something between": (lambda self, x: self.sn(self.bn(self.conv(x)) * 2.0), NO_CHAIN),
    "a number is added": (lambda self, x: self.sn(self.bn(self.conv(x)) + 0.5), NO_CHAIN),
    "a scaled sum": (lambda self, x: self.sn(torch.add(self.bn(self.conv(x)), x, alpha=0.5)), NO_CHAIN),
    "residual written in place": (lambda self, x: self.sn(self.conv2(x).add_(self.bn(self.conv(x)))), NO_CHAIN),
    "input written between": (written_between, NO_CHAIN),
    "residual written later": (residual_written_later, NO_CHAIN),
}


@pytest.mark.parametrize(("forward", "reason"), UNFUSED.values(), ids=UNFUSED)
def test_what_is_not_proved_is_not_fused_and_says_why(forward, reason, fused_calls):
    network = parts(forward)
    original = copy.deepcopy(network)
    report = convert(network)
    (entry,) = report.left
    assert (entry.name, entry.was) == ("", "Parts")
    assert re.fullmatch(reason, entry.reason)
    assert type(network).forward is forward
    assert (network.scale, network.seen, network.training) == (2.0, [], True)
    assert isinstance(network.sn, LIFNode)
    if forward is not written_between:  # batch norm keeps what that one writes to, and has no gradient then
        equal(network, original, images())
    assert fused_calls == []


def test_a_module_whose_forward_was_replaced_is_not_fused():
    network = parts(FUSED["plain"][0])
    network.forward = lambda x: network.sn(network.bn(x))
    (entry,) = convert(network).left
    assert entry.reason == "its forward was replaced; its neurons run unfused"


def test_a_neuron_that_is_called_from_elsewhere_is_not_fused(fused_calls):
    network = nn.Sequential(parts(FUSED["plain"][0]), Conv(C, C, 1).double())
    nn.init.uniform_(network[1].weight, 0.0, 3.0)
    network.append(network[0].sn)
    original = copy.deepcopy(network)
    assert convert(network).fused == []
    equal(network, original, images())
    twin = copy.deepcopy(network)
    equal(twin, original, images())
    assert fused_calls == []


def add_hook(name, register="register_forward_hook"):
    return lambda network: getattr(network.get_submodule(name), register)(lambda *_: None)


def put_another_module(network):
    network.down = nn.Sequential(*network.down, nn.Identity())


CHANGES = {
    "hook on the batch norm": add_hook("bn2"),
    "hook on a sequence": add_hook("down"),
    "hook on the neuron": add_hook("sn2", "register_forward_pre_hook"),
    "backward hook on the neuron": add_hook("sn2", "register_full_backward_hook"),
    "recorded potentials": lambda network: setattr(network.sn2, "store_v_seq", True),
    "another module": put_another_module,
    "a residual that is broadcast": lambda network: network.down.__setitem__(1, nn.AdaptiveAvgPool3d((None, 1, 1))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_after_the_conversion_is_followed(change, fused_calls):
    network = block().double()
    original, x = copy.deepcopy(network), frames(4, 2, 3, 6, 6, dtype=torch.float64)
    convert(network)
    equal(network, original, x)
    before = len(fused_calls)
    assert before == 2
    for each in (network, original):
        change(each)
    equal(network, original, x)
    assert len(fused_calls) <= before + 1


def test_another_step_mode_after_the_conversion_is_followed(fused_calls):
    network = nn.Sequential(layer.BatchNorm2d(C), neuron.LIFNode())
    functional.set_step_mode(network, "m")
    original, x = copy.deepcopy(network), images(torch.float32)
    assert len(convert(network).fused) == 1
    for each in (network, original):
        functional.set_step_mode(each, "s")
    assert torch.equal(torch.stack([network(x_t) for x_t in x]), torch.stack([original(x_t) for x_t in x]))
    assert fused_calls == []


def test_potentials_carried_on_are_not_lost(fused_calls):
    network = block()
    convert(network)
    network.sn1.v = torch.zeros(2, 6, 6, 6)
    network(frames(4, 2, 3, 6, 6))
    assert len(fused_calls) == 1
    assert network.sn1.v.any()
    sentence = (
        r"v was not kept, .*: call reset_net\(network\) before .* convert\(network, fuse=False\) where potentials"
    )
    with pytest.raises(RuntimeError, match=sentence):
        _ = network.sn2.v
    with pytest.raises(RuntimeError, match=sentence):
        network(frames(4, 2, 3, 6, 6))
    functional.reset_net(network)
    assert network.sn2.v == 0.0
    network(frames(4, 2, 3, 6, 6))
    revert(network)
    assert network.sn2.v == 0.0


def test_without_fusion_potentials_go_on_from_call_to_call():
    network = block().double()
    original, x = copy.deepcopy(network), frames(6, 2, 3, 6, 6, dtype=torch.float64)
    assert convert(network, fuse=False).fused == []
    for part in x.split(2):
        assert torch.equal(network(part), original(part))
        assert torch.equal(network.sn2.v, original.sn2.v)


def test_monitors_see_all_that_they_saw_before():
    network = block().double()
    original, x = copy.deepcopy(network), frames(4, 2, 3, 6, 6, dtype=torch.float64)
    convert(network)
    seen = []
    for each in (network, original):
        monitors = [
            monitor.OutputMonitor(each, neuron.LIFNode),
            monitor.InputMonitor(each, neuron.LIFNode),
            monitor.AttributeMonitor("v", False, each, neuron.LIFNode),
        ]
        each(x)
        seen.append([record for each in monitors for record in each.records])
        for each_monitor in monitors:
            each_monitor.remove_hooks()
    assert len(seen[0]) == 6
    for record, expected in zip(*seen, strict=True):
        assert torch.equal(record, expected)


def test_slices_and_additions_of_a_fused_sequence_run():
    torch.manual_seed(0)
    network = nn.Sequential(Conv(C, C, 1), layer.BatchNorm2d(C), neuron.LIFNode(), Conv(C, C, 1))
    functional.set_step_mode(network, "m")
    convert(network)
    x = images(torch.float32)
    whole = network(x)
    functional.reset_net(network)
    assert torch.equal(network[3:](network[:3](x)), whole)
    functional.reset_net(network)
    network.append(nn.Identity())
    assert torch.equal(network(x), whole)


def test_sequences_of_everything_in_between():
    torch.manual_seed(0)
    network = nn.Sequential(Conv(C, C, 1), layer.BatchNorm2d(C), neuron.IFNode(), Conv(C, C, 1), layer.BatchNorm2d(C))
    network.append(neuron.ParametricLIFNode())
    functional.set_step_mode(network.double(), "m")
    original = copy.deepcopy(network)
    assert [entry.was for entry in convert(network).fused] == ["IFNode", "ParametricLIFNode"]
    equal(network, original, images())
