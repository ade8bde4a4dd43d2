"""Initial weights against those of the published constructors: ends of each parameter exactly, and its spread.

The ends of every parameter are equal only where parameters are drawn in the published order, with as many numbers each.
"""

import pytest
import torch

from golden import INIT
from seal_fast import models

CASES = [(role, arch) for role in ("student", "teacher") for arch in INIT[f"{role}s"]]
DEVIATION = 1e-6  # relative; measured 0, but a sum of millions of squares depends on its order


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def initial(request):
    """Each parameter of a network by name, and the published [standard deviation, first value, last value]."""
    role, arch = request.param
    torch.manual_seed(INIT["seed"])
    make = {"student": models.student, "teacher": models.teacher}[role]
    network = make(arch, num_classes=INIT["num_classes"], in_channels=INIT["in_channels"])
    return dict(network.named_parameters()), INIT[f"{role}s"][arch]


def test_a_seed_gives_the_published_first_and_last_values_bit_for_bit(initial):
    parameters, published = initial
    assert list(parameters) == list(published)
    ends = {
        name: [parameter.flatten()[0].item(), parameter.flatten()[-1].item()] for name, parameter in parameters.items()
    }
    assert ends == {name: values[1:] for name, values in published.items()}


def test_all_values_between_have_the_published_spread(initial):
    parameters, published = initial
    for name, parameter in parameters.items():
        spread = parameter.detach().std(correction=0).item()
        assert spread == pytest.approx(published[name][0], rel=DEVIATION, abs=0), name
