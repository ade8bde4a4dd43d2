"""What torch does around the operator `bn_lif`: registration, autocast, checkpoints, second derivatives, errors."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from seal_fast import bn_lif, lif
from seal_fast.backends import available
from seal_fast.nn import LIFNode

if "cpu" not in available("bn_lif"):
    # Installing without a compiler is allowed: the torch reference serves, and is compared with nothing here.
    pytest.skip("the native library was not built: no compiler was found", allow_module_level=True)

T, B, C = 2, 3, 4
NUMBERS = (2.0, 1.0, False, 0.0, "sigmoid", 4.0, False, "cpu")


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_opcheck(normalised, trains):
    table = torch.rand(8 if normalised else 4, C) + 0.5
    per_channel = [leaf(C), leaf(C), *((leaf(C), leaf(C)) if normalised else (None, None))]
    tensors = [leaf(T * B, C, 5), leaf(T * B, C, 5), torch.tensor(2.0, requires_grad=True), None]
    counts = [T * B * 5 * trains, T * B * 5 * trains * normalised]
    arguments = (*tensors, *per_channel, table, *counts, *NUMBERS)
    torch.library.opcheck(torch.ops.seal_fast.bn_lif.default, (*arguments, T, False, True, True))
    torch.library.opcheck(torch.ops.seal_fast.batch_statistics.default, (torch.randn(6, C, 5), "cpu"))


def test_a_static_frame_passes_opcheck():
    y = torch.randn(B, C, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    arguments = (y, None, None, None, leaf(C), leaf(C), None, None, torch.rand(4, C) + 0.5, B * 25, 0, *NUMBERS)
    torch.library.opcheck(torch.ops.seal_fast.bn_lif.default, (*arguments, T, True, False, False))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_whole_with_equal_results(training):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.residual_bn, self.lif = nn.BatchNorm1d(C), nn.BatchNorm1d(C), LIFNode(backend="cpu")

        def forward(self, y, residual):
            return bn_lif(y, self.bn, self.lif, time_steps=T, residual=residual, residual_bn=self.residual_bn)

    results = []
    for compiles in (False, True):
        torch.manual_seed(0)
        layer = Layer().train(training)
        run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiles else layer
        y, residual = leaf(T * B, C, 5), leaf(T * B, C, 5)
        spikes = run(y, residual)
        (spikes * torch.arange(5.0)).sum().backward()
        results.append([spikes, y.grad, residual.grad, *layer.state_dict().values()])
        results[-1] += [parameter.grad for parameter in layer.parameters()]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_an_exported_layer_takes_any_batch(static, training):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.lif = nn.BatchNorm1d(C), LIFNode(backend="cpu")

        def forward(self, y):
            return bn_lif(y if static else y.repeat(T, 1, 1), self.bn, self.lif, time_steps=T, static=static)

    layer = Layer().train(training)
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(copy.deepcopy(layer), (torch.randn(4, C, 5),), dynamic_shapes=shapes)
    exported = program.module()
    for batch in (2, 7):
        y = torch.randn(batch, C, 5)
        assert torch.equal(exported(y), layer(y))
    assert torch.equal(exported.bn.running_var, layer.bn.running_var)


def test_parameters_of_the_norm_may_change_before_the_backward_pass():
    """Torch's batch norm needs its weight and not its bias; here, both are in a table."""
    gradients = []
    for changes in (False, True):
        torch.manual_seed(0)
        bn, y = nn.BatchNorm1d(C), leaf(T * B, C, 5)
        spikes = bn_lif(y, bn, LIFNode(backend="cpu"), time_steps=T)
        if changes:
            with torch.no_grad():
                bn.bias.add_(1)
                bn.weight.mul_(2)
        spikes.square().sum().backward()
        gradients.append([y.grad, bn.weight.grad, bn.bias.grad])
    for got, right in zip(*gradients, strict=True):
        assert torch.equal(got, right)


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_in_bfloat16_computes_in_float32(training):
    """In evaluation its scale and shift would be off by 0.06 in bfloat16, as torch's own output is by 0.016."""
    torch.manual_seed(0)
    bn = nn.BatchNorm1d(64).bfloat16().train(training)
    for tensor, low, high in ((bn.running_mean, -2, 2), (bn.running_var, 0.5, 2), (bn.weight, -2, 2), (bn.bias, -2, 2)):
        nn.init.uniform_(tensor, low, high)
    y = torch.randn(80, 64, 5).bfloat16()
    wide = copy.deepcopy(bn).double()
    _, m = bn_lif(y, bn, LIFNode(backend="cpu"), time_steps=T, return_membrane_input=True)
    expected = wide(y.double())
    bound = expected.abs() * torch.finfo(torch.bfloat16).eps / 2 + 1e-6  # one rounding
    assert ((m.double() - expected).abs() <= bound).all()


def test_checkpointing_gives_the_same_gradient():
    bn, node, y = nn.BatchNorm1d(C), LIFNode(backend="cpu"), leaf(T * B, C, 5)

    def layer(y):
        return bn_lif(y, bn, node, time_steps=T)

    (expected,) = torch.autograd.grad(layer(y).square().sum(), y)
    (got,) = torch.autograd.grad(checkpoint(layer, y, use_reentrant=False).square().sum(), y)
    assert torch.equal(got, expected)


def test_autocast_keeps_the_dtype_of_the_convolution():
    bn, node = nn.BatchNorm1d(C), LIFNode(backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert bn_lif(torch.randn(T * B, C, 5).bfloat16(), bn, node, time_steps=T).dtype == torch.bfloat16
        assert bn_lif(torch.randn(T * B, C, 5), bn, node, time_steps=T).dtype == torch.float32


def test_a_residual_of_another_dtype_is_promoted_as_torch_does():
    bn, node, y = nn.BatchNorm1d(C), LIFNode(backend="cpu"), torch.randn(T * B, C, 5).bfloat16()
    assert bn_lif(y, bn, node, time_steps=T, residual=torch.zeros(T * B, C, 5)).dtype == torch.float32


def test_second_derivatives_are_refused_in_a_sentence():
    y = leaf(T * B, C, 5)
    spikes = bn_lif(y, nn.BatchNorm1d(C), LIFNode(backend="cpu"), time_steps=T)
    (grad,) = torch.autograd.grad(spikes.square().sum(), y, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated twice only with backend='torch'"):
        grad.sum().backward()


@pytest.mark.parametrize("operator", ["lif", "bn_lif"])
def test_second_derivatives_of_parameters_are_refused_where_the_input_has_none(operator):
    """Else a penalty on such a gradient would add nothing in silence."""
    tau, bn = torch.tensor(2.0, requires_grad=True), nn.BatchNorm1d(C)
    if operator == "lif":
        spikes = lif(torch.randn(T, B, C), tau=tau, backend="cpu")[0]
        leaves = [tau]
    else:
        node = LIFNode(backend="cpu")
        node.tau = tau
        spikes = bn_lif(torch.randn(T * B, C, 5), bn, node, time_steps=T)
        leaves = [tau, bn.weight, bn.bias]
    for grad in torch.autograd.grad(spikes.square().sum(), leaves, create_graph=True):
        with pytest.raises(NotImplementedError, match=f"^{operator} can be differentiated twice only with"):
            torch.autograd.grad(grad.sum(), tau)
        with pytest.raises(NotImplementedError, match="twice only"):
            grad.sum().backward()


def test_only_wanted_gradients_are_made():
    bn = nn.BatchNorm1d(C).requires_grad_(False)
    residual = leaf(T * B, C, 5)
    spikes = bn_lif(torch.randn(T * B, C, 5), bn, LIFNode(backend="cpu"), time_steps=T, residual=residual)
    spikes.sum().backward()
    assert residual.grad.abs().sum() > 0
    assert bn.weight.grad is None


def test_one_number_for_each_channel_cannot_train():
    with pytest.raises(ValueError, match="more than one number for each channel"):
        bn_lif(torch.randn(1, C), nn.BatchNorm1d(C), LIFNode(backend="cpu"), time_steps=1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"residual_bn": nn.BatchNorm1d(C)}, ValueError, "residual_bn needs a residual"),
        (
            {"residual_bn": nn.ReLU(), "residual": torch.zeros(T * B, C, 5)},
            TypeError,
            "residual_bn must be a BatchNorm",
        ),
        ({"residual_bn": nn.BatchNorm1d(9), "residual": torch.zeros(T * B, C, 5)}, ValueError, "must have 4 channels"),
    ],
)
def test_errors_are_sentences(options, error, message):
    with pytest.raises(error, match=message):
        bn_lif(torch.randn(T * B, C, 5), nn.BatchNorm1d(C), LIFNode(), time_steps=T, **options)
