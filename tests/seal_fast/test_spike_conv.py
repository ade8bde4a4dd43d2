"""Convolutions and linear layers of spikes: which kernel runs them, and that networks do not notice."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seal_fast
from seal_fast import SpikeTensor, dense_convolutions, lif, models, spike_conv2d, spike_linear
from seal_fast.kernels.launch import cpu
from seal_fast.kernels.spike_conv import rule
from seal_fast.nn import LIFNode, ParametricLIFNode
from seal_fast.ops import spike_conv

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=cpu.missing())


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    """Let neurons of few elements give bits, and small convolutions skip."""
    monkeypatch.setattr(spike_conv, "LEAST", 8)
    for name, value in {"LEAST": 0, "REARRANGED": 0, "COLUMNS": 1}.items():
        monkeypatch.setattr(rule, name, value)
    monkeypatch.setattr(rule, "turn", lambda dtype: rule.Turn(0.6, 0.4))
    spike_conv.calls.clear()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fired(*size, rate=0.2):
    x = torch.where(torch.rand(size, generator=torch.Generator().manual_seed(1)) < rate, 3.0, -3.0)
    steps = x.contiguous(memory_format=torch.channels_last).unsqueeze(0) if len(size) == 4 else x.unsqueeze(0)
    spikes = lif(steps, tau=1.0)[0].squeeze(0)
    assert type(spikes) is SpikeTensor
    return spikes, spikes.clone()


def chosen(kind):
    """What ran the calls of this kind."""
    return {by for (what, by), count in spike_conv.calls.items() if what == kind and count}


def assert_near(got, expected, tolerance=2e-6):
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", ["bits", "numbers"])
def test_the_operators_are_torchs(kind):
    spikes, numbers = fired(4, 24, 9, 7)
    given = spikes if kind == "bits" else numbers
    weight, bias = normal(10, 24, 3, 3), normal(10, seed=2)
    out = spike_conv2d(given, weight, bias, 2, (1, 0), dilation=1, backend="cpu")
    assert_near(out, F.conv2d(numbers, weight, bias, 2, (1, 0)))
    assert chosen("spike_conv2d") == {"cpu"}
    rows, row_numbers = fired(6, 40)
    given = rows if kind == "bits" else row_numbers
    matrix = normal(12, 40)
    assert_near(spike_linear(given, matrix, normal(12), backend="cpu"), F.linear(row_numbers, matrix, normal(12)))
    assert chosen("spike_linear") == {"cpu"}


@pytest.mark.parametrize("kind", ["bits", "numbers"])
def test_gradients_are_those_of_dense_operators(kind):
    spikes, numbers = fired(4, 24, 9, 7)
    weight, bias = normal(10, 24, 3, 3).requires_grad_(), normal(10, seed=2).requires_grad_()
    given = (spikes if kind == "bits" else numbers.clone()).detach().requires_grad_()
    twin = numbers.clone().requires_grad_()
    got = torch.autograd.grad(
        spike_conv2d(given, weight, bias, padding=1, backend="cpu").square().sum(), (given, weight, bias)
    )
    expected = torch.autograd.grad(F.conv2d(twin, weight, bias, padding=1).square().sum(), (twin, weight, bias))
    for left, right in zip(got, expected, strict=True):
        assert_near(left, right, 1e-5)
    assert chosen("weight gradient") == {"cpu"}


@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)])
def test_gradients_of_linear_layers(shape):
    x = normal(*shape, seed=3)[None] * 3
    layer = nn.Linear(48, 9)
    results = []
    for dense in (False, True):
        leaf = x.clone().requires_grad_()
        with dense_convolutions() if dense else torch.enable_grad():
            out = layer(lif(leaf)[0])
        results.append((out, *torch.autograd.grad(out.square().sum(), (leaf, *layer.parameters()))))
    for got, expected in zip(*results, strict=True):
        assert_near(got, expected, 1e-5)
    assert chosen("weight gradient") == {"cpu"}
    assert chosen("spike_linear") == {"cpu"}


def test_autocast_casts_bits_for_nothing():
    spikes, numbers = fired(4, 32, 8, 8)
    convolution = nn.Conv2d(32, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = convolution(spikes), convolution(numbers)
    assert got.dtype == torch.bfloat16
    assert_near(got.float(), expected.float(), 8e-3)  # measured 0; a unit in the last place is 4e-3
    assert chosen("spike_conv2d") == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rate", "forward", "weight_gradient"), [(0.2, "cpu", "cpu"), (0.5, "cpu", "torch"), (0.8, "torch", "torch")]
)
def test_the_firing_rate_decides_call_by_call(rate, forward, weight_gradient, dtype):
    spikes, _ = fired(4, 32, 8, 8, rate=rate)
    weight = normal(8, 32, 3, 3).to(dtype).requires_grad_()
    F.conv2d(spikes.to(dtype), weight).sum().backward()
    assert chosen("spike_conv2d") == {forward}
    assert chosen("weight gradient") == {weight_gradient}


def test_few_pixels_and_few_outputs_are_dense_sooner(monkeypatch):
    monkeypatch.undo()  # the rule itself
    large, most = (64, 64, 3, 3), rule.FLOAT32.forward

    def limit(pixels=10**5, weight=large, stride=(1, 1)):
        return rule.limit(torch.float32, pixels, weight, stride, of_weight=False)

    assert limit() == pytest.approx(most, rel=0.01)
    assert limit(weight=(16, 64, 3, 3)) == pytest.approx(most / 4, rel=0.01)
    assert limit(weight=(65, 64, 3, 3)) == pytest.approx(most * 65 / 128, rel=0.01)
    assert limit(pixels=2 * rule.REARRANGED, weight=(512, 512, 3, 3)) == pytest.approx(most / 2)
    assert limit(pixels=rule.REARRANGED, weight=(512, 512, 3, 3)) == 0
    assert limit(weight=(64, 64, 1, 1), stride=(4, 4)) == 0
    assert limit(pixels=1000, weight=(8, 8, 3, 3)) == 0
    for outputs, skips in ((64, True), (48, True), (32, False)):
        weight = (outputs, 64, 3, 3)
        monkeypatch.setattr(rule, "turn", lambda dtype: rule.BFLOAT16)
        assert (rule.limit(torch.bfloat16, 10**5, weight, (1, 1), of_weight=False) > 0) == skips


AMX, BF16 = "_is_amx_tile_supported", "_is_avx512_bf16_supported"


@pytest.mark.parametrize(
    ("supported", "expected"),
    [((), rule.SLOW_BFLOAT16), ((BF16,), rule.BFLOAT16), ((BF16, AMX), rule.Turn(0.0, 0.0))],
)
def test_what_the_processor_multiplies_decides_in_bfloat16(supported, expected, monkeypatch):
    monkeypatch.undo()  # the rule itself
    for check in (AMX, BF16):
        monkeypatch.setattr(torch.cpu, check, lambda check=check: check in supported, raising=False)
    assert rule.turn.__wrapped__(torch.bfloat16) == expected
    assert rule.turn.__wrapped__(torch.float32) == rule.FLOAT32


def test_calls_too_small_to_be_worth_it_are_dense(monkeypatch):
    monkeypatch.setattr(rule, "LEAST", 10**9)
    spikes, numbers = fired(4, 32, 8, 8)
    weight = normal(8, 32, 3, 3)
    assert torch.equal(F.conv2d(spikes, weight), F.conv2d(numbers, weight))
    assert chosen("spike_conv2d") == {"torch"}
    assert_near(spike_conv2d(spikes, weight, backend="cpu"), F.conv2d(numbers, weight))


DENSE = {
    "groups": lambda s: F.conv2d(s, normal(8, 16, 3, 3), groups=2),
    "transposed": lambda s: F.conv_transpose2d(s, normal(32, 4, 3, 3)),
    "other dtype of weights": lambda s: F.conv2d(s.double(), normal(8, 32, 3, 3).double()),
    "another layout": lambda s: F.conv2d(s.transpose(2, 3), normal(8, 32, 3, 3)),
    "one frame": lambda s: F.conv2d(s[0], normal(8, 32, 3, 3)),
    "three axes": lambda s: F.conv1d(s.flatten(2), normal(8, 32, 3)),
    "reflected": lambda s: nn.Conv2d(32, 4, 3, padding=1, padding_mode="reflect")(s) * 0,
}


@pytest.mark.parametrize("name", DENSE)
def test_what_kernels_do_not_take_is_dense(name):
    spikes, numbers = fired(4, 32, 8, 8)
    assert torch.equal(DENSE[name](spikes), DENSE[name](numbers))
    assert chosen("spike_conv2d") <= {"torch"}


def test_it_can_be_forbidden(monkeypatch):
    x = normal(2, 4, 8, 6, 6)
    neuron = LIFNode(backend="torch")
    assert type(neuron(x)) is torch.Tensor
    with dense_convolutions():
        assert type(lif(x)[0]) is torch.Tensor
        spikes = lif(x, backend="cpu")[0]
        assert type(spikes) is torch.Tensor
    spikes = lif(x)[0].flatten(0, 1)
    with dense_convolutions():
        F.conv2d(spikes, normal(3, 8, 3, 3))
    spike_conv2d(spikes, normal(3, 8, 3, 3), backend="torch")
    assert chosen("spike_conv2d") <= {"torch"}
    for name in ("torch", "cupy"):
        monkeypatch.setenv("SEAL_FAST_BACKEND", name)
        assert type(lif(x, backend="cpu")[0]) is torch.Tensor
    student = models.student("resnet8", num_classes=2, backend="torch")
    assert type(student.lif0(normal(4, 32, 6, 6), None, time_steps=4)) is torch.Tensor


def test_backends_tell_who_can():
    table = seal_fast.backends()
    assert table["spike_conv2d"]["cpu"].available
    assert table["spike_linear"]["torch"].available
    with pytest.raises(ValueError, match="float32 and bfloat16"):
        spike_conv2d(normal(1, 2, 3, 3).double(), normal(1, 2, 3, 3).double(), backend="cpu")


REFUSED = {  # what torch refuses, or reads in another way, goes to torch
    "channels": lambda s, _: F.conv2d(s, normal(8, 16, 3, 3)),
    "bias": lambda s, _: F.conv2d(s, normal(8, 32, 3, 3), normal(1)),
    "kernel": lambda s, _: F.conv2d(s, normal(8, 32, 9, 9)),
    "padding": lambda s, _: F.conv2d(s, normal(8, 32, 3, 3), padding=-1),
    "dilation": lambda s, _: F.conv2d(s, normal(8, 32, 3, 3), dilation=0),
    "stride": lambda s, _: F.conv2d(s, normal(8, 32, 3, 3), stride=0),
    "inner axes": lambda _, rows: rows @ normal(20, 8),
    "inner axes reversed": lambda _, rows: normal(8, 20) @ rows,
    "linear bias": lambda _, rows: F.linear(rows, normal(8, 40), normal(7)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses_stays_refused(name):
    spikes, rows = fired(4, 32, 8, 8)[0], fired(6, 40)[0]
    with pytest.raises(RuntimeError):
        REFUSED[name](spikes, rows)
    with pytest.raises(RuntimeError):
        REFUSED[name](spikes.clone(), rows.clone())


EQUAL = {
    "valid": lambda s, _: nn.Conv2d(32, 4, 3, padding="valid")(s),
    "same": lambda s, _: nn.Conv2d(32, 4, 3, padding="same")(s),
    "lists of one": lambda s, _: torch.convolution(s, normal(4, 32, 3, 3), None, [2], [1], [1], False, [0], 1),
    "broadcast bias": lambda _, rows: F.linear(rows, normal(8, 40), normal(1)),
    "no outputs": lambda _, rows: rows @ normal(40, 0),
    "contiguous": lambda s, _: F.conv2d(s.contiguous().to(torch.float32), normal(4, 32, 3, 3)).view(4, -1),
}


@pytest.mark.parametrize("name", EQUAL)
def test_what_torch_takes_is_taken(name):
    (spikes, numbers), (rows, row_numbers) = fired(4, 32, 8, 8), fired(6, 40)
    results = []
    for arguments in ((spikes, rows), (numbers, row_numbers)):
        torch.manual_seed(0)
        results.append(EQUAL[name](*arguments))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_contiguous_spikes_give_contiguous_outputs():
    current = 2 * normal(2, 3, 16, 8, 8)
    spikes = lif(current)[0].flatten(0, 1)
    assert type(spikes) is SpikeTensor
    out = F.conv2d(spikes, normal(8, 16, 3, 3))
    assert chosen("spike_conv2d") == {"cpu"}
    assert out.is_contiguous()
    assert F.conv2d(spikes, normal(8, 16, 3, 3).contiguous(memory_format=torch.channels_last)).stride()[1] == 1


def test_the_gradient_of_a_bias_costs_no_dense_gradient_of_weights(monkeypatch):
    asked = []
    spikes, _ = fired(4, 32, 8, 8)
    convolution = nn.Conv2d(32, 8, 3)
    out = convolution(spikes)
    kernel = spike_conv._kernel().weight_gradient
    monkeypatch.setattr(spike_conv._kernel(), "weight_gradient", lambda *args: asked.append(1) or kernel(*args))
    with torch.profiler.profile() as profile:
        out.square().sum().backward()
    assert asked == [1]
    assert "aten::mkldnn_convolution_backward" not in {event.key for event in profile.key_averages()}
    assert_near(convolution.bias.grad, 2 * out.sum((0, 2, 3)).detach(), 1e-5)


ERRORS = {
    "numbers": (lambda: spike_conv2d(normal(1, 2, 3, 3), normal(1, 2, 3, 3), backend="cpu"), "zeros and ones"),
    "channels": (lambda: spike_conv2d(normal(1, 3, 3, 3), normal(1, 2, 3, 3)), r"\[P, C, H, W\].*got \[1, 3, 3, 3\]"),
    "axes": (lambda: spike_linear(normal(3, 3), normal(2, 2)), r"\[\.\.\., C\].*got \[3, 3\]"),
    "backend": (lambda: spike_linear(normal(3, 2), normal(2, 2), backend="tpu"), "backend must be one of"),
    "dtype": (lambda: spike_linear(normal(3, 2), normal(2, 2).double()), "weight must be of the spikes' dtype"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_arguments_get_a_sentence(name):
    call, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def gradients_of(network, x, amp, dense):
    network.zero_grad()
    with dense_convolutions() if dense else torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = network(x)
    logits.float().square().sum().backward()
    return logits.detach().float(), [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("amp", [False, True])
def test_students_give_what_dense_ones_give(amp):
    """Of so few neurons, rounding moves none over the threshold. Measured: equal logits, gradients 1e-6 apart."""
    torch.manual_seed(0)
    network = models.student("resnet8", num_classes=10, time_steps=2).to(memory_format=torch.channels_last)
    x = normal(2, 3, 8, 8)
    logits, grads = gradients_of(network, x, amp, dense=False)
    skipped = dict(spike_conv.calls)
    expected_logits, expected = gradients_of(network, x, amp, dense=True)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    for got, dense in zip(grads, expected, strict=True):
        assert (got - dense).norm() <= 1e-4 * dense.norm()
    convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules()) - 1  # the first sees images
    assert skipped["spike_conv2d", "cpu"] == convolutions
    network.eval()
    with torch.inference_mode():
        evaluated = network(x)
        with dense_convolutions():
            torch.testing.assert_close(evaluated, network(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("options", [{}, {"return_membrane_input": True}, {"train": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [8, 65])
def test_a_residual_of_bits_is_one_of_numbers(C, dtype, options, learned):
    """Bit for bit: bn_lif reads the bits in the place of zeros and ones."""
    options = dict(options)
    T, rows = 2, 8
    bn = nn.BatchNorm2d(C).train(options.pop("train", False))
    neuron = ParametricLIFNode() if learned else LIFNode()
    shape = rows, C, 8, 9
    y, current = (normal(*shape, seed=seed).to(dtype).contiguous(memory_format=torch.channels_last) for seed in (4, 5))
    results = []
    for dense in (False, True):
        bn.reset_running_stats()
        leaves = [y.clone().requires_grad_(), current.clone().requires_grad_()]
        with dense_convolutions() if dense else torch.enable_grad():
            residual = lif(2 * leaves[1].unflatten(0, (T, -1)))[0].flatten(0, 1)
            assert (type(residual) is SpikeTensor) is not dense
            out = seal_fast.bn_lif(leaves[0], bn, neuron, time_steps=T, residual=residual, **options)
        outputs = out if isinstance(out, tuple) else (out,)
        total = sum(each.float().square().sum() for each in outputs)
        results.append((*outputs, *torch.autograd.grad(total, [*leaves, *bn.parameters(), *neuron.parameters()])))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert results[0][0].sum() > 0


@pytest.mark.parametrize("static", [False, True])
def test_a_residual_packed_in_other_rows_is_read_as_numbers(static):
    """Rows of so many neurons end within a byte where they are T = 8, and do not where they are one."""
    current = normal(8, 8 if static else 9, 1, seed=5)
    bn, neuron = nn.BatchNorm1d(current.shape[1]).eval(), LIFNode()
    residual = lif(2 * current.unsqueeze(0))[0].squeeze(0)
    assert type(residual) is SpikeTensor
    y = normal(*current.shape, seed=6)
    results = [
        seal_fast.bn_lif(y, bn, neuron, time_steps=8, residual=each, static=static, return_membrane_input=True)
        for each in (residual, residual.clone())
    ]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][0], results[1][0])


def test_spikingjelly_networks_use_bits_after_convert():
    from spikingjelly.activation_based import functional, layer, neuron

    torch.manual_seed(0)
    network = nn.Sequential(
        layer.Conv2d(2, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode(),
        layer.Conv2d(16, 16, 3, padding=1), layer.BatchNorm2d(16), neuron.LIFNode(),
        layer.Flatten(), layer.Linear(16 * 36, 5),
    )  # fmt: skip
    functional.set_step_mode(network, "m")
    seal_fast.convert(network)
    x = 3 * normal(3, 2, 2, 6, 6)
    out = network(x)
    assert chosen("spike_conv2d") == {"cpu"}
    assert chosen("spike_linear") == {"cpu"}
    functional.reset_net(network)
    with dense_convolutions():
        assert_near(out, network(x))
