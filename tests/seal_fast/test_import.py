"""What `import seal_fast` costs."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torchvision", "spikingjelly", "triton", "cupy", "matplotlib", "sklearn")
SECONDS = 0.2  # measured 0.02
PROBE = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import seal_fast
seconds = time.perf_counter() - start
new = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
train = "seal_fast.train" in sys.modules
print(json.dumps({"seconds": seconds, "new": new, "train": train, "lif": callable(seal_fast.lif)}))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory):
    """Three imports, each in a process of its own, away from the sources."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", PROBE]
    return [
        json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]


def test_import_loads_no_optional_dependency_and_no_trainer(imports):
    for probe in imports:
        assert probe["lif"]
        assert "seal_fast" in probe["new"]
        assert [name for name in HEAVY if name in probe["new"]] == []
        assert not probe["train"]


def test_import_takes_less_than_a_fifth_of_a_second_after_torch(imports):
    assert min(probe["seconds"] for probe in imports) < SECONDS
