"""torch.func and forward-mode AD: the operators give the number that torch's own operations give, or say what can."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from seal_fast import bn_lif, lif, packed_spikes, seal_loss, selective_alignment_weights
from seal_fast.backends import available
from seal_fast.kernels.surrogate.reference import SURROGATES, Surrogate
from seal_fast.nn import IFNode, LIFNode, ParametricLIFNode, reset_net

DOUBLE = torch.float64
LABELS = torch.tensor([0, 1, -100])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def of_lif(backend):
    weights = normal(4, 3, 5, seed=9)

    def loss(x):
        spikes, v = lif(x, tau=3.0, v_reset=None, backend=backend)
        return (spikes * weights).sum() + v.square().sum()

    return loss, normal(4, 3, 5) * 2


def of_bn_lif(backend):
    bn, node = nn.BatchNorm1d(3, dtype=DOUBLE, track_running_stats=False), LIFNode(backend=backend)
    weights = normal(6, 3, 5, seed=9)

    def loss(y):
        return (bn_lif(y, bn, node, time_steps=2, residual=y) * weights).sum()

    return loss, normal(6, 3, 5)


def of_seal_loss(backend):
    teacher = normal(3, 6, seed=9)

    def loss(logits):
        return seal_loss(logits, teacher, LABELS, alpha=0.6, beta=0.15, backend=backend).loss

    return loss, normal(4, 3, 6) * 2


OPERATORS = {"lif": of_lif, "bn_lif": of_bn_lif, "seal_loss": of_seal_loss}
# name -> what it makes of a scalar function at x
TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=DOUBLE))[0],
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (normal(*x.shape, seed=3),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, x + 0.5])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack([x, x + 0.5])),
}


def by_autograd(name, f, x):
    """The same from torch.autograd alone, by the reference."""
    leaf = x.clone().requires_grad_()
    if name.startswith("vmap"):
        each = (lambda x: by_autograd("grad", f, x)) if "grad" in name else f
        return torch.stack([each(x), each(x + 0.5)])
    (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    if name == "hessian":
        rows = [torch.autograd.grad(entry, leaf, retain_graph=True)[0] for entry in gradient.flatten()]
        return torch.stack(rows).reshape(*x.shape, *x.shape)
    return (gradient * normal(*x.shape, seed=3)).sum() if name == "jvp" else gradient


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_transform_gives_autograds_number(operator, transform, backend):
    function, x = OPERATORS[operator](backend)
    expected = by_autograd(transform, OPERATORS[operator]("torch")[0], x)
    assert expected.abs().max() > 0
    found = TRANSFORMS[transform](function, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # measured 4e-15


@pytest.mark.parametrize("name", SURROGATES)
def test_forward_mode_takes_the_derivative_of_the_surrogate(name):
    x, surrogate = torch.linspace(-1, 3, 64, dtype=DOUBLE).unsqueeze(0), Surrogate(name)
    tangent = torch.func.jvp(lambda x: lif(x, surrogate=surrogate)[0], (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, surrogate.derivative(x / 2 - 1) / 2, rtol=1e-15, atol=0)
    assert tangent.abs().sum() > 0


@pytest.mark.parametrize("operator", OPERATORS)
def test_dual_numbers_of_autograd_carry_a_tangent(operator):
    function, x = OPERATORS[operator]("auto")
    tangent = normal(*x.shape, seed=3)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, by_autograd("jvp", OPERATORS[operator]("torch")[0], x), rtol=1e-12, atol=1e-12)


def test_vmap_of_the_weights_and_of_labels():
    logits, teacher = normal(2, 4, 3, 6), normal(2, 3, 6, seed=1)
    labels = torch.stack([LABELS, LABELS.flip(0)])
    found = torch.func.vmap(selective_alignment_weights)(logits)
    expected = [selective_alignment_weights(each, backend="torch") for each in logits]
    for got, right in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(right), rtol=1e-12, atol=1e-15)

    def loss(*given):
        return seal_loss(*given, alpha=0.6, beta=0.15).loss

    right = torch.stack([loss(*given) for given in zip(logits, teacher, labels, strict=True)])
    torch.testing.assert_close(torch.func.vmap(loss)(logits, teacher, labels), right, rtol=1e-12, atol=0)


KERNELS = [name for name in available("lif") if name != "torch"]


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("mode", ["vmap", "jvp", "dual numbers"])
def test_kernels_that_are_named_refuse_in_a_sentence(mode, backend):
    def refused(operator):
        return pytest.raises(
            ValueError, match=rf"backend '{backend}' cannot run {operator} in a transform of torch.func.*'torch' can"
        )

    for operator, (function, x) in ((name, make(backend)) for name, make in OPERATORS.items()):
        with refused(operator):
            if mode == "vmap":
                torch.func.vmap(function)(x.unsqueeze(0))
            elif mode == "jvp":
                torch.func.jvp(function, (x,), (x,))
            else:
                with forward_ad.dual_level():
                    function(forward_ad.make_dual(x, x))
    with refused("selective_alignment_weights"):
        torch.func.vmap(lambda z: selective_alignment_weights(z, backend=backend))(normal(1, 4, 3, 6))


@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_in_a_batch(operator):
    function, x = OPERATORS[operator]("torch")
    leaf = x.requires_grad_()
    upstream = torch.tensor([1.0, -2.0], dtype=DOUBLE)
    (found,) = torch.autograd.grad(function(leaf), leaf, upstream, is_grads_batched=True)
    (expected,) = torch.autograd.grad(function(leaf), leaf)
    torch.testing.assert_close(found, torch.stack([expected, -2 * expected]), rtol=1e-12, atol=1e-15)
    if not KERNELS:
        return
    with pytest.raises(NotImplementedError, match=f"gradients of {operator} are batched only with backend='torch'"):
        torch.autograd.grad(OPERATORS[operator](KERNELS[-1])[0](leaf), leaf, upstream, is_grads_batched=True)


def test_forward_mode_within_a_compiled_function_is_right_or_refused():
    def tangent(x):
        return torch.func.jvp(lambda x: lif(x)[0], (x,), (torch.ones_like(x),))[1]

    x = normal(4, 3, 5) * 2
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(tangent, backend="eager")(x), tangent(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(tangent, fullgraph=True, backend="eager")(x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: lif(x)[0], backend="eager")
    found = torch.func.jvp(compiled, (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(found, tangent(x))


def test_packed_spikes_are_left_to_torch_within_a_transform():
    x = (normal(2, 4, 3) * 3).requires_grad_()
    with packed_spikes():
        found = torch.func.vmap(lambda x: lif(x)[0].square())(x)
    assert torch.equal(found, torch.stack([lif(each)[0] for each in x]))
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("node", [LIFNode, IFNode, ParametricLIFNode])
def test_gradients_of_each_sample_through_a_network(node):
    network = nn.Sequential(nn.Linear(5, 5), node(), nn.Linear(5, 2), node()).double()
    parameters = dict(network.named_parameters())

    def loss(parameters, x):
        reset_net(network)
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    batch = normal(3, 4, 2, 5) * 3
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
    for sample in range(3):
        reset_net(network)
        expected = torch.autograd.grad(network(batch[sample]).square().sum(), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][sample], gradient, rtol=1e-10, atol=1e-12)


def test_a_potential_that_vmap_left_is_named():
    node, x = LIFNode(), normal(4, 3)
    torch.func.vmap(node)(normal(2, 4, 3))
    with pytest.raises(RuntimeError, match=r"v was left by a call within torch\.func\.vmap.*reset_net"):
        node(x)
    node.reset()
    torch.func.vmap(torch.func.grad(lambda x: node(x).sum()))(normal(2, 4, 3))
    with pytest.raises(RuntimeError, match=r"v was left by a call within torch\.func\.vmap.*reset_net"):
        node(x)
    node.reset()
    assert torch.equal(node(x), LIFNode()(x))
    node.reset()
    torch.func.grad(lambda x: node(x).sum())(x)
    kept = node.v
    assert torch.equal(node(x), lif(x, v_init=kept)[0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("operator", ["lif", "seal_loss"])
def test_a_transform_within_a_compiled_function(operator, backend):
    if operator == "lif" and torch.__version__.startswith("2.6."):
        # It takes a Function with setup_context, which transforms need, for one without.
        pytest.skip("torch 2.6 cannot trace an autograd.Function within a transform")
    function, x = OPERATORS[operator]("auto")
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(function), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), torch.func.grad(function)(x), rtol=1e-12, atol=1e-14)


def test_the_choice_of_a_kernel_outlives_no_transform():
    x = normal(4, 3, 5).float().requires_grad_()
    before = type(lif(x)[0].grad_fn)
    torch.func.vmap(lambda x: lif(x)[0])(x.detach().unsqueeze(0))
    assert type(lif(x)[0].grad_fn) is before
