"""Numbers of the published implementation, and what it takes to reproduce them: shared by all tests.

`cases.json` says what each array is; `fill` gives a network the weights that the numbers were computed with.
"""

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch

import seal_fast

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "cases.json").read_text(encoding="utf-8"))
STATE_DICTS = json.loads((DATA / "state_dicts.json").read_text(encoding="utf-8"))
INIT = json.loads((DATA / "init.json").read_text(encoding="utf-8"))
DTYPES = {"f32": torch.float32, "f64": torch.float64}


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """All arrays of tests/data/{name}.npz."""
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def tensor(archive: str, key: str, dtype: torch.dtype) -> torch.Tensor:
    """One golden array as a tensor of `dtype`."""
    return torch.tensor(arrays(archive)[key]).to(dtype)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values of the parameter or buffer `name`, drawn from the name itself."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    tenth = np.float32(0.1)
    if name.endswith("running_mean"):
        return tenth * r
    if name.endswith("running_var"):
        return 1 + tenth * np.abs(r)
    if len(shape) == 1:
        return 1 + tenth * r if name.endswith("weight") else tenth * r
    return r * np.float32(np.sqrt(2 / np.prod(shape[1:])))


def fill(module: torch.nn.Module, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    """Give a network, also one on the meta device, the golden weights in `dtype`; the network itself is returned."""
    state = {}
    for name, value in module.state_dict().items():
        filled = torch.from_numpy(np.asarray(weight(name, tuple(value.shape))))
        state[name] = filled.to(dtype) if filled.is_floating_point() else filled
    module.load_state_dict(state, assign=True)
    return module


def filled_student(arch: str, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    """A student with the golden weights, in training mode."""
    with torch.device("meta"):
        network = seal_fast.models.student(arch, **options)
    return fill(network, dtype)


def filled_teacher(arch: str, dtype: torch.dtype = torch.float64, **options) -> torch.nn.Module:
    """A teacher with the golden weights, in evaluation mode."""
    with torch.device("meta"):
        network = seal_fast.models.teacher(arch, **options)
    return fill(network, dtype).eval()


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a share of the largest number expected."""
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-12)
