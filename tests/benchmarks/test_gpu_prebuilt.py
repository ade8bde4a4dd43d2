"""Kernels that were compiled without a GPU are found where they are unpacked, and nothing is compiled there."""

import json
import shutil
import sys

import pytest
import torch

from gpu import fake, prebuilt
from gpu.run import read, run
from gpu.stages import REHEARSAL, Stage, all_stages
from nvrtc import needs_cupy

pytestmark = [
    needs_cupy,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton's launchers need a C compiler"),
]


def files(folder):
    """What the caches hold, and when it was written."""
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def rehearse(stages: dict[str, Stage], caches: dict[str, str], results) -> None:
    results.mkdir()
    run(stages, results, 3000, {**caches, **REHEARSAL})
    assert all(entry["ended"] in ("ok", "exit 1") for entry in read(results) if "ended" in entry)


def built_and_used(stages: dict[str, Stage], tmp_path) -> dict:
    """Compile the kernels of stages, and run these with them in another folder: no file of the caches changes."""
    file = tmp_path / "kernels.tar.xz"
    (tmp_path / "building").mkdir()
    manifest = prebuilt.build(file, stages, tmp_path / "building")
    folder = tmp_path / "elsewhere"
    caches, said = prebuilt.use(file, folder, fake.CAPABILITY)
    assert set(caches) == {"TRITON_CACHE_DIR", "CUPY_CACHE_DIR"}
    for name, count in manifest["kernels"].items():
        assert f"{count} kernels of {name} are used." in said
    assert "have changed" not in said
    before = files(folder)
    rehearse(stages, caches, tmp_path / "using")
    assert files(folder) == before
    assert prebuilt.counted(folder) == manifest["kernels"]
    return manifest


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The kernels of two small processes: the file, and its manifest."""
    tmp_path = tmp_path_factory.mktemp("packed")
    jobs = [job for job in all_stages(rehearse=True)["smoke"].jobs if job.name.startswith("smoke packing")]
    assert len(jobs) == 2
    return tmp_path / "kernels.tar.xz", built_and_used({"smoke": Stage(600, tuple(jobs), workers=2)}, tmp_path)


def test_no_kernel_is_compiled_twice(packed):
    _, manifest = packed
    # Forward, with and without bits, and unpack, in two dtypes.
    assert manifest["kernels"] == {"triton": 6, "cupy": 6}


@pytest.mark.long
def test_no_stage_compiles_what_was_compiled_beforehand(tmp_path):
    """Every kernel of every stage, which travels in less than 40 MiB; a quarter of an hour on two cores."""
    manifest = built_and_used(all_stages(rehearse=True), tmp_path)
    assert min(manifest["kernels"].values()) > 300
    assert (tmp_path / "kernels.tar.xz").stat().st_size < 40 << 20


def test_batch_of_a_rehearsal_needs_the_kernels_of_the_whole_batch(tmp_path):
    """Stages rehearse with small batches: no kernel may depend on theirs."""
    code = """
import sys
from gpu import fake; fake.install()
import torch
from gpu import times
times.SHAPE = (4, int(sys.argv[1]), 64, 32, 32)
for operator in (times.lif, times.packing):
    for backend in ("triton", "cupy"):
        operator(backend, torch.bfloat16)
"""
    found = {}
    for batch in ("2", "32"):
        caches = prebuilt.environment(tmp_path / batch)
        job = all_stages(rehearse=True)["times"].jobs[0]
        job = type(job)("times", ("-c", code, batch))
        run({"times": Stage(300, (job,))}, tmp_path, 300, {**caches, **REHEARSAL})
        found[batch] = {path for path in files(tmp_path / batch) if path.suffix in (".cubin", ".kernel")}
    assert found["2"] == found["32"]
    assert len(found["2"]) == 6


LAYER = """
import torch
from gpu import fake; fake.install()
import seal_fast
from torch import nn

def results(backend):
    torch.manual_seed(0)
    y, residual = (torch.randn(8, 8, 4, 4, requires_grad=True) for _ in range(2))
    bn, residual_bn, node = nn.BatchNorm2d(8), nn.BatchNorm2d(8), seal_fast.nn.LIFNode(backend=backend)
    found = []
    for training in (True, True, False, False):  # with a plan, and again
        layer = {"residual": residual, "residual_bn": residual_bn.train(training), "time_steps": 4}
        spikes = seal_fast.bn_lif(y, bn.train(training), node, **layer)
        found += [spikes, *torch.autograd.grad(spikes.sum(), (y, residual, bn.weight, residual_bn.bias))]
        with torch.no_grad():
            found.append(seal_fast.bn_lif(y, bn, node, **layer))
    return [*found, bn.running_mean, residual_bn.running_var]

expected = results("cpu")
for backend in ("triton", "cupy"):
    for left, right in zip(results(backend), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
"""


def test_a_rehearsal_goes_through_a_layer_in_training_and_in_evaluation(tmp_path):
    job = all_stages(rehearse=True)["smoke"].jobs[0]
    job = type(job)("layer", ("-c", LAYER))
    run({"smoke": Stage(300, (job,))}, tmp_path, 300, {**prebuilt.environment(tmp_path), **REHEARSAL})
    assert [entry["ended"] for entry in read(tmp_path)] == ["ok"], (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_kernels_of_another_compiler_are_not_used(packed, tmp_path, monkeypatch):
    file, _ = packed
    own = prebuilt.keys()
    monkeypatch.setattr(prebuilt, "keys", lambda _capability: {**own, "triton": "3.1.0 abc .so"})
    caches, said = prebuilt.use(file, tmp_path, fake.CAPABILITY)
    assert set(caches) == {"CUPY_CACHE_DIR"}
    assert f"kernels of triton are not: they are of {own['triton']}, and here is 3.1.0 abc .so." in said


def test_kernels_of_another_gpu_are_not_used(packed, tmp_path):
    caches, said = prebuilt.use(packed[0], tmp_path, (8, 0))
    assert caches == {}
    assert said.count(" are not: ") == 2


def test_sources_that_changed_are_announced(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, "sources", lambda: "others")
    caches, said = prebuilt.use(packed[0], tmp_path, fake.CAPABILITY)
    assert len(caches) == 2
    assert said.endswith("Sources of kernels have changed since; what they make is compiled here.")


def test_a_compiler_that_cannot_be_asked_ends_nothing(packed, tmp_path, monkeypatch):
    def broken(_architecture):
        raise OSError("libnvrtc.so.13 is missing")

    monkeypatch.setattr(prebuilt, "_nvrtc_key", broken)
    caches, said = prebuilt.use(packed[0], tmp_path, fake.CAPABILITY)
    assert set(caches) == {"TRITON_CACHE_DIR"}
    assert "here is unknown: libnvrtc.so.13 is missing." in said


def test_a_damaged_file_ends_nothing(packed, tmp_path):
    damaged = tmp_path / "damaged.tar.xz"
    damaged.write_bytes(packed[0].read_bytes()[:5000])
    caches, said = prebuilt.use(damaged, tmp_path / "folder", fake.CAPABILITY)
    assert caches == {}
    assert said.startswith(f"{damaged} cannot be used: ")


def test_without_a_file_nothing_is_used(tmp_path):
    assert prebuilt.use(tmp_path / "none", tmp_path / "folder", fake.CAPABILITY) == ({}, "")


def test_manifest_says_where_the_kernels_come_from(packed):
    _, manifest = packed
    assert manifest["keys"] == prebuilt.keys()
    assert manifest["commit"] == prebuilt.commit()


def test_fake_gpu_gives_what_the_cpu_computes(tmp_path):
    """And compiles what was asked for: forward and backward of one neuron, on both backends."""
    code = """
import json
from gpu import fake; fake.install()
import torch, seal_fast
assert torch.cuda.is_available()
torch.manual_seed(0)
x = torch.randn(4, 1000, device="cuda").requires_grad_()
found = []
for backend in ("triton", "cupy", "cpu"):
    spikes, v = seal_fast.lif(x, backend=backend)
    found.append([spikes.detach(), v.detach(), *torch.autograd.grad(spikes.sum() + v.sum(), x)])
assert found[0][0].sum() > 0
print(json.dumps([[torch.equal(*pair) for pair in zip(found[i], found[2])] for i in (0, 1)]))
"""
    job = type(all_stages(rehearse=True)["times"].jobs[0])("fake", ("-c", code))
    run({"fake": Stage(200, (job,))}, tmp_path, 200, prebuilt.environment(tmp_path))
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert json.loads(log.splitlines()[-1]) == [[True] * 3] * 2
    assert prebuilt.counted(tmp_path) == {"triton": 2, "cupy": 2}
    assert not torch.cuda.is_available()
