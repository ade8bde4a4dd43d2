"""What `import seal_fast` loads."""

import json
import subprocess
import sys

import pytest

PROBE = """
import json, sys
import torch
before = set(sys.modules)
import seal_fast
print(json.dumps({"new": sorted(set(sys.modules) - before), "lif": callable(seal_fast.lif)}))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """The names of the modules that an import adds to torch's, in a process of its own, away from the sources."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", PROBE]
    probe = json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)
    assert probe["lif"]
    return probe["new"]


def test_import_loads_nothing_but_its_own_modules_after_torch(loaded):
    """Other packages are loaded where they are used; with torch 2.6 its checkpoints alone took 0.2 s, for SymPy."""
    own = [name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names]
    assert "seal_fast" in own
    assert [name for name in own if name.partition(".")[0] != "seal_fast"] == []


def test_import_loads_no_trainer(loaded):
    assert [name for name in loaded if name.startswith("seal_fast.train")] == []
