import importlib
import sys
from unittest.mock import MagicMock, patch

import pytest


def _spikingjelly(name):
    """A module of SpikingJelly's data sets.

    Their package also imports torchaudio, for speech; it is absent or refuses to load beside some versions of torch,
    and nothing compared here uses it.
    """
    pytest.importorskip("spikingjelly")
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        stand_in = {part: MagicMock() for part in ("torchaudio", "torchaudio.transforms", "torchaudio.functional")}
        with patch.dict(sys.modules, stand_in):
            return importlib.import_module(name)
    return importlib.import_module(name)


@pytest.fixture(scope="session")
def spikingjelly_aedat():
    """SpikingJelly's reader of CIFAR10-DVS recordings: path → dict of t, x, y, p."""
    module = _spikingjelly("spikingjelly.datasets.cifar10_dvs")
    return getattr(module, "_load_origin_data", None) or module.CIFAR10DVS.load_origin_data  # as 0.0.0.0.14 has it


@pytest.fixture(scope="session")
def spikingjelly_frames():
    """SpikingJelly's split by number: (events, T, H, W) → frames float64 [T,2,H,W]."""
    module = _spikingjelly("spikingjelly.datasets")
    if not hasattr(module, "integrate_events_by_fixed_frames_number"):
        module = _spikingjelly("spikingjelly.datasets.utils")
    integrate = module.integrate_events_by_fixed_frames_number
    return lambda events, T, H, W: integrate(events._asdict(), "number", T, H, W)
