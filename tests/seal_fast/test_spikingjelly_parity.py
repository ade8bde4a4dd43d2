"""LIFNode against SpikingJelly's: the same spikes, membrane and gradients for the same arguments."""

import pytest
import torch

from seal_fast.nn import LIFNode, Surrogate

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
from spikingjelly.activation_based import neuron, surrogate

GRADIENT = 1e-12  # of the largest entry; measured 1e-15
SURROGATES = {"sigmoid": surrogate.Sigmoid, "atan": surrogate.ATan}


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("detach_reset", [False, True], ids=["attached", "detached"])
@pytest.mark.parametrize("v_reset", [0.0, -0.3, None], ids=["hard", "hard to -0.3", "soft"])
@pytest.mark.parametrize("decay_input", [False, True], ids=["whole input", "decayed input"])
@pytest.mark.parametrize("tau", [2.0, 1.25, 3.7])
def test_lif_node_equals_spikingjelly(tau, decay_input, v_reset, detach_reset, name):
    options = {"tau": tau, "decay_input": decay_input, "v_threshold": 0.6, "v_reset": v_reset}
    options |= {"detach_reset": detach_reset, "step_mode": "m"}
    theirs = neuron.LIFNode(surrogate_function=SURROGATES[name](), **options)
    ours = LIFNode(surrogate=Surrogate(name), backend="torch", **options)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(6, 3, 4, 5, dtype=torch.float64, generator=generator) * 2 + 1).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=generator)

    runs = []
    for node in (ours, theirs):
        spikes = torch.cat([node(x[:4]), node(x[4:])])  # the second call goes on from the state of the first
        runs.append((spikes, node.v, *torch.autograd.grad((spikes * upstream).sum() + node.v.sum(), x)))
    (spikes, v, gradient), (expected_spikes, expected_v, expected_gradient) = runs
    assert 0.1 < expected_spikes.mean() < 0.9
    assert torch.equal(spikes, expected_spikes)
    torch.testing.assert_close(v, expected_v, rtol=0, atol=1e-14)  # measured at most 3e-15
    tolerance = GRADIENT * expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=tolerance)
