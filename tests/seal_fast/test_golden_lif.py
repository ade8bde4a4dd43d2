"""The neuron against the numbers of the published implementation."""

import numpy as np
import pytest

import seal_fast
from golden import CASES, DTYPES, arrays, relative_error, tensor

pytestmark = pytest.mark.usefixtures("each_backend")

GRADIENT = {
    "f32": 2e-6,  # relative to the largest; measured 1e-7
    "f64": 1e-12,  # measured 2e-16
}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("case", CASES["lif"], ids=lambda case: f"case{case['i']}")
def test_lif_gives_the_published_spikes_membrane_and_gradient(case, precision):
    i, dtype, golden = case["i"], DTYPES[precision], arrays("lif")
    x = tensor("lif", f"{i}_x", dtype).requires_grad_()
    spikes, v_last = seal_fast.lif(
        x, tau=case["tau"], decay_input=False, v_reset=case["v_reset"], detach_reset=case["detach_reset"]
    )
    spikes.backward(tensor("lif", f"{i}_gs", dtype))

    expected = golden[f"{i}_spikes_{precision}"]
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(spikes.detach().numpy(), expected)
    np.testing.assert_array_equal(v_last.detach().numpy(), golden[f"{i}_v_{precision}"])
    assert relative_error(x.grad.numpy(), golden[f"{i}_gx_{precision}"]) <= GRADIENT[precision]
