"""Imports run one way: train → seal_fast (models → nn → ops) → kernels; kernel rooms share `reference` alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = {"seal_fast": ROOT / "seal_fast", "seal_fast.kernels": ROOT / "kernels"}
SHARED_ROOMS = ("surrogate", "neuron", "launch", "packing")
FORBIDDEN = {  # who -> what it must not import
    "seal_fast.kernels": ("seal_fast.ops", "seal_fast.nn", "seal_fast.models", "seal_fast.train", "seal_fast.backends"),
    "seal_fast.ops": ("seal_fast.nn", "seal_fast.models"),
    "seal_fast.nn": ("seal_fast.models",),
    "seal_fast": ("seal_fast.train", "train", "kernels", "tests", "benchmarks"),
}


def modules() -> dict[str, Path]:
    """Installed name of each module of the library -> its file."""
    found = {}
    for package, folder in FLOORS.items():
        for path in sorted(folder.rglob("*.py")):
            found[".".join((package, *path.relative_to(folder).with_suffix("").parts))] = path
    return found


def imported(source: str, module: str) -> set[str]:
    """Absolute names of everything that the source of `module` imports, wherever in it the import stands."""
    package, names = module.split(".")[:-1], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(source: str, module: str) -> list[str]:
    """The imports in the source of `module` that run against the arrows."""
    names = imported(source, module)
    wrong = {
        name
        for who, targets in FORBIDDEN.items()
        if within(module, who)
        for name in names
        if any(within(name, target) for target in targets)
    }
    path = module.split(".")
    if within(module, "seal_fast.kernels") and len(path) > 3:
        for name in names:
            target = name.split(".")
            if within(name, "seal_fast.kernels") and target[2:3] != path[2:3] and len(target) > 2:
                wrong |= {name} if target[2] not in SHARED_ROOMS and target[3:4] != ["reference"] else set()
    return sorted(wrong)


@pytest.mark.parametrize("module", modules())
def test_imports_run_one_way(module):
    assert violations(modules()[module].read_text(encoding="utf-8"), module) == []


def test_every_floor_is_walked():
    found = modules()
    for name in ("seal_fast.ops.lif", "seal_fast.nn.neuron", "seal_fast.models.snn", "seal_fast.kernels.lif.reference"):
        assert name in found
    assert imported(
        found["seal_fast.kernels.bn_lif.reference"].read_text(encoding="utf-8"), "seal_fast.kernels.bn_lif.x"
    )


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        ("seal_fast.kernels.lif.triton", "from ...ops import lif", "seal_fast.ops.lif"),
        ("seal_fast.kernels.lif.triton", "def f():\n    from ... import nn", "seal_fast.nn"),
        ("seal_fast.kernels.lif.triton", "import seal_fast.backends", "seal_fast.backends"),
        ("seal_fast.kernels.bn_lif.triton", "from ..lif import triton", "seal_fast.kernels.lif.triton"),
        ("seal_fast.kernels.bn_lif.triton", "from ..lif.triton import run", "seal_fast.kernels.lif.triton.run"),
        ("seal_fast.kernels.bn_lif.triton", "from ..lif.reference import lif", None),
        ("seal_fast.kernels.bn_lif.triton", "from ..surrogate.triton import derivative", None),
        ("seal_fast.kernels.bn_lif.triton", "from . import cupy", None),
        ("seal_fast.ops.lif", "from ..nn import LIFNode", "seal_fast.nn.LIFNode"),
        ("seal_fast.ops.lif", "from ..kernels.lif import reference", None),
        ("seal_fast.nn.neuron", "from ..models import student", "seal_fast.models.student"),
        ("seal_fast.nn.neuron", "from .. import ops", None),
        ("seal_fast.models.snn", "from seal_fast.train import tasks", "seal_fast.train.tasks"),
        ("seal_fast.__init__", "from . import train", "seal_fast.train"),
        ("seal_fast.backends", "import tests.golden", "tests.golden"),
    ],
)
def test_an_import_against_the_arrows_is_seen(module, source, wrong):
    assert violations(source, module) == ([] if wrong is None else [wrong])
