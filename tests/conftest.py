import os

import pytest

import seal_fast

BACKENDS = [name for name, can in seal_fast.backends()["lif"].items() if can.available]


@pytest.fixture(scope="module", params=BACKENDS)
def each_backend(request):
    """Let "auto" mean each backend that runs here in turn. Of module scope, as hypothesis needs."""
    before = os.environ.get("SEAL_FAST_BACKEND")
    os.environ["SEAL_FAST_BACKEND"] = request.param
    yield request.param
    if before is None:
        del os.environ["SEAL_FAST_BACKEND"]
    else:
        os.environ["SEAL_FAST_BACKEND"] = before
