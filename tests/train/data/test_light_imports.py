"""Names of data sets and batches are there with torch alone; what a data set needs besides is imported with it."""

import subprocess
import sys

import pytest

REFUSING = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torchvision", "PIL", "sklearn", "numpy", "tqdm"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refusing())
"""


@pytest.mark.parametrize(
    "code",
    [
        "from seal_fast.train import data; assert data.canonical('CIFAR10_DVS') == 'CIFAR10_DVS_SJ'",
        "from seal_fast.train.data.errors import DataError; from seal_fast.train.data.splits import Splits",
        "from seal_fast.train.batches import Batches; assert len(Batches(10, 4)) == 3",
        "import torch; from seal_fast.train.batches import Seeded\n"
        "assert Seeded([(torch.zeros(1), 3)]).batch([(0, 7)])[2].shape == (1, 2)",
    ],
)
def test_torch_is_enough(code):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REFUSING + code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
