"""The benchmarks run, in their smallest sizes, and say what they should."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_lif_benchmark(tmp_path):
    path = tmp_path / "figures.json"
    # Without torch.compile, which takes seconds for each case.
    chosen = "resnet18.layer1-4 and contiguous and not compile"
    result = run("-m", "pytest", "benchmarks/bench_lif.py", "--tiny", f"--benchmark-json={path}", "-k", chosen)
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert figures["machine_info"]["versions"]["torch"] == version("torch")
    assert {entry["extra_info"]["contestant"] for entry in figures["benchmarks"]} >= {"torch loop"}
    assert all(entry["extra_info"]["share_of_copy_bandwidth"] > 0 for entry in figures["benchmarks"])
    groups = {entry["group"] for entry in figures["benchmarks"]}
    modes = ("forward", "backward", "both")
    assert groups == {f"lif {m}, resnet18.layer1, T 4, {d}, contiguous" for m in modes for d in ("f32", "bf16")}
    for group in groups:
        assert f"\n{group}\n" in result.stdout


def test_training_benchmark(tmp_path):
    path = tmp_path / "figures.json"
    chosen = "resnet18-cifar and not compile"
    result = run("-m", "pytest", "benchmarks/bench_train.py", "--tiny", f"--benchmark-json={path}", "-k", chosen)
    assert result.returncode == 0, result.stdout + result.stderr
    entries = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    figures = {entry["extra_info"]["contestant"]: entry["extra_info"] for entry in entries}
    floors = {f"convolutions alone, {dtype}" for dtype in ("float32", "bfloat16")}
    assert set(figures) >= {"published, eager", "ours, float32", "ours, bfloat16", *floors}
    for entry in entries:
        extra = entry["extra_info"]
        assert extra["images_per_second"] == pytest.approx(2 / entry["stats"]["min"])
        assert 0 < extra["images_per_second_median"] <= extra["images_per_second"]
        assert (extra["time_of_floor"] == 1) == (extra["contestant"] in floors)
        assert (extra["kept_bytes_per_neuron_step"] is None) == (extra["contestant"] in floors)
    assert figures["published, eager"]["speed_of_first"] == 1
    assert entries[0]["group"] == "training step, resnet18-cifar: resnet18 <- resnet34, T 2, 2 x [3, 16, 16]"
    assert f"\n{entries[0]['group']}\n" in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu itself runs where there is a GPU")
def test_gpu_command_says_what_it_needs():
    result = run("benchmarks/gpu.py")
    assert result.returncode == 2
    assert "needs an NVIDIA GPU" in result.stdout


def test_gpu_command_says_which_steps_it_has():
    result = run("benchmarks/gpu.py", "trainings")
    assert result.returncode == 2
    assert result.stdout == "steps are tests, sanitizer, benchmarks, training; got 'trainings'.\n"
