"""The loss against the numbers of the published implementation."""

import numpy as np
import pytest
import torch

import seal_fast
from golden import CASES, DTYPES, arrays, relative_error, tensor

pytestmark = pytest.mark.usefixtures("each_loss_backend")

VALUE = {
    "f32": 1e-5,  # relative; measured 4e-7
    "f64": 1e-10,  # measured 6e-16
}
GRADIENT = {
    "f32": 1e-5,  # relative to the largest; measured 1e-6
    "f64": 1e-10,  # measured 2e-15
}


def loss_and_gradient(case, precision, alpha, beta, objective="seal"):
    j, dtype = case["j"], DTYPES[precision]
    z = tensor("loss", f"{j}_z", dtype).requires_grad_()
    q, y = tensor("loss", f"{j}_q", dtype), tensor("loss", f"{j}_y", torch.int64)
    temperature = case["temperature"]
    parts = seal_fast.seal_loss(z, q, y, alpha=alpha, beta=beta, temperature=temperature, objective=objective)
    parts.loss.backward()
    return parts, z.grad.numpy()


loss_cases = pytest.mark.parametrize("case", CASES["loss"], ids=lambda case: f"case{case['j']}")


@pytest.mark.parametrize("precision", DTYPES)
@loss_cases
def test_seal_loss_gives_the_published_parts(case, precision):
    expected = case["values"][precision]
    parts, _ = loss_and_gradient(case, precision, case["alpha"], case["beta"])
    for name, value in parts._asdict().items():
        assert value.item() == pytest.approx(expected[name], rel=VALUE[precision], abs=VALUE[precision]), name


@pytest.mark.parametrize("precision", DTYPES)
@loss_cases
def test_seal_loss_gives_the_published_gradient_of_each_part(case, precision):
    gradient = {
        name: loss_and_gradient(case, precision, alpha, beta)[1]
        for name, alpha, beta in (("ce", 0.0, 0.0), ("ce+ela", 1.0, 0.0), ("ce+sta", 0.0, 1.0))
    }
    gradient["ela"] = gradient.pop("ce+ela") - gradient["ce"]
    gradient["sta"] = gradient.pop("ce+sta") - gradient["ce"]
    gradient["loss"] = loss_and_gradient(case, precision, case["alpha"], case["beta"])[1]
    # ela and sta are differences of gradients, so their errors are measured against the loss's.
    largest = np.abs(arrays("loss")[f"{case['j']}_g_loss_{precision}"]).max()
    for name, got in gradient.items():
        error = np.abs(got - arrays("loss")[f"{case['j']}_g_{name}_{precision}"]).max()
        assert error <= GRADIENT[precision] * largest, name


@pytest.mark.parametrize("precision", DTYPES)
@loss_cases
def test_kd_and_tdkd_give_the_published_values_and_gradients(case, precision):
    expected, golden, j = case["values"][precision], arrays("loss"), case["j"]
    kd, gradient_with_kd = loss_and_gradient(case, precision, 1.0, 0.0, "kd")
    _, gradient_ce = loss_and_gradient(case, precision, 0.0, 0.0, "kd")
    tdkd, gradient_tdkd = loss_and_gradient(case, precision, 0.2, 0.5, "tdkd")

    assert kd.ela.item() == pytest.approx(expected["kd"], rel=VALUE[precision])
    assert kd.sta.item() == 0
    assert tdkd.loss.item() == pytest.approx(expected["tdkd_loss"], rel=VALUE[precision])
    assert relative_error(gradient_with_kd - gradient_ce, golden[f"{j}_g_kd_{precision}"]) <= GRADIENT[precision]
    assert relative_error(gradient_tdkd, golden[f"{j}_g_tdkd_loss_{precision}"]) <= GRADIENT[precision]
