"""The benchmarks run, in their smallest sizes, and say what they should."""

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import cpu
import tables
from training import CONTESTANTS, FLOORS

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """All that make bench does after its tests, in the smallest sizes: its output, and the table that it wrote."""
    folder = tmp_path_factory.mktemp("results")
    result = run("benchmarks/cpu.py", "--tiny", "--results", str(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.csv")
    return result.stdout, path, tables.read(path)


def of(table, benchmark, quantity="time"):
    """Group -> contestant -> value."""
    found = {}
    for row in table:
        if (row["benchmark"], row["quantity"]) == (benchmark, quantity):
            found.setdefault(row["group"], {})[row["contestant"]] = row["value"]
    return found


def test_every_row_says_where_it_comes_from(tiny):
    _, _, table = tiny
    operators, networks = {"lif", "seal_loss", "spike_conv", "scaling"}, {"train", "inference", "parts", "host"}
    assert {row["benchmark"] for row in table} == {*operators, *networks, "checks"}
    for row in table:
        assert row["machine"]
        assert f"torch {version('torch')}" in row["versions"]
        assert row["date"]
    spread = [row for row in table if row["low"] is not None]
    assert {row["quantity"] for row in spread} >= {"time", "time_of_first", "time_of_floor", "share_of_copy_bandwidth"}
    assert all(row["low"] <= row["value"] <= row["high"] for row in spread)
    assert all(row["value"] > 0 for row in spread if row["quantity"] != "rest_seconds")  # which is a difference


def test_kernels_are_raced(tiny):
    output, _, table = tiny
    groups = of(table, "lif")
    assert len(groups) == 12
    assert "lif both, resnet18.layer1, T 16, bf16, contiguous" in groups
    for group, contestants in groups.items():
        assert {"seal-fast cpu", "torch loop"} <= set(contestants)
        assert f"\n{group}\n" in output
    assert all({"published, eager"} < set(contestants) for contestants in of(table, "seal_loss").values())
    shares = of(table, "lif", "share_of_copy_bandwidth")
    assert {group: set(contestants) for group, contestants in shares.items()} == {
        group: set(contestants) for group, contestants in groups.items()
    }


def test_training_step_is_raced(tiny):
    output, _, table = tiny
    ((group, times),) = of(table, "train").items()
    assert group == "training step, resnet18-cifar: resnet18 <- resnet34, T 2, 2 x [3, 16, 16]"
    assert f"\n{group}\n" in output
    floors = {f"convolutions alone, {dtype}" for dtype in ("float32", "bfloat16")}
    assert set(times) >= {"published, eager", "ours, float32", "ours, bfloat16", *floors}
    assert set(of(table, "train", "time_of_first")[group]) == set(times) - {"published, eager"}
    assert set(of(table, "train", "time_of_floor")[group]) == set(times) - floors
    assert set(of(table, "train", "kept_bytes_per_neuron_step")[group]) == set(times) - floors
    for contestant in times:
        relative = {"time_of_first": "published, eager", "time_of_floor": FLOORS[CONTESTANTS[contestant][1]]}
        for quantity, other in relative.items():
            if contestant != other:
                own, reference = (tables.find(table, "train", group, name, "time") for name in (contestant, other))
                found = tables.find(table, "train", group, contestant, quantity)
                # Of fewer than ten rounds all lie in the spread, so that the ratio of each is within these bounds.
                assert own.rounds < 10
                assert found.low >= own.low / reference.high * (1 - 1e-4)
                assert found.high <= own.high / reference.low * (1 + 1e-4)


def test_convolutions_of_spikes_are_raced_over_the_firing_rate(tiny):
    output, _, table = tiny
    groups = of(table, "spike_conv")
    assert len(groups) == 2 * 2  # operations and dtypes
    assert "weight gradient of spikes, layer1, bf16: [2, 64, 4, 4] x [64, 64, 3, 3]" in groups
    rates = {f"seal-fast, {percent} %" for percent in (2, 5, 10, 20, 30, 50, 80)}
    for group, contestants in groups.items():
        assert set(contestants) == {"torch, dense", *rates}
        assert set(of(table, "spike_conv", "time_of_first")[group]) == rates
        (line,) = re.findall(rf"^{re.escape(group)}\n  torch, dense (.+)$", output, re.MULTILINE)
        turning = of(table, "spike_conv", "turning_rate").get(group)
        turns = re.search(r" x   turns at ([<>]? ?\d+) %", line)[1]
        if turning is None:  # it, or a bound of its spread, is beyond the rates that are timed
            assert re.search("[<>]", line)
        else:
            assert turns == f"{100 * turning['torch, dense']:.0f}"


def test_inference_is_raced(tiny):
    output, _, table = tiny
    ((group, times),) = of(table, "inference").items()
    assert group == "inference, resnet18-cifar: resnet18, T 2, 2 x [3, 16, 16]"
    assert f"\n{group}\n" in output
    ours = {f"ours, {dtype}{dense}" for dtype in ("float32", "bfloat16") for dense in ("", ", dense")}
    assert set(times) == {"published, eager", *ours, *FLOORS.values()}
    assert set(of(table, "inference", "time_of_first")[group]) == set(times) - {"published, eager"}
    assert set(of(table, "inference", "time_of_floor")[group]) == {"published, eager", *ours}
    ((contestant, rate),) = of(table, "inference", "firing_rate")[group].items()
    assert contestant == "published, eager"
    assert f"{100 * rate:.1f} %\n" in output


def test_the_hosts_time_and_what_it_starts_are_measured(tiny):
    output, _, table = tiny
    groups = of(table, "host")
    launchers = {name: groups.pop(name) for name in list(groups) if "without the launches" in name}
    assert len(groups) == 1 + 3 + 3
    assert all("seal-fast" in contestants and len(contestants) > 1 for contestants in groups.values())
    assert len(launchers) == (3 if importlib.util.find_spec("triton") else 0)
    for contestants in launchers.values():
        assert set(contestants) == {"batch norm, ReLU", "seal-fast cpu", "seal-fast triton", "seal-fast cupy"}
    for mode, kernels in {"forward": 1, "both": 2, "evaluation": 1}.items():  # of native code, on the CPU
        group = f"host, batch norm and neurons, {mode}, [8, 8, 2, 2]"
        assert of(table, "host", "kernels")[group] == {name: kernels * (name == "seal-fast") for name in groups[group]}
        operations = of(table, "host", "torch_operations")[group]
        assert operations["seal-fast"] == 0 < operations["batch norm, ReLU"]
    assert "kernels 2, torch operations 0" in output


def test_parts_of_a_step_are_timed(tiny):
    _, _, table = tiny
    ((group, times),) = of(table, "parts").items()
    assert set(times) == {"published, eager", "ours, float32", "ours, bfloat16"}
    for contestant in times:
        names = ("time", "convolutions_seconds", "teacher_seconds", "loss_seconds", "rest_seconds")
        step, *parts, rest = (tables.find(table, "parts", group, contestant, name) for name in names)
        # The rest is what is left of each round, and all of them lie in the spread.
        assert step.rounds < 10
        assert rest.low >= step.low - sum(part.high for part in parts) - 1e-4 * step.high
        assert rest.high <= step.high - sum(part.low for part in parts) + 1e-4 * step.high
    assert set(of(table, "parts", "data_wait_seconds")[group]) == set(times)


def test_plots_are_drawn(tiny):
    _, path, _ = tiny
    drawn = {file.stem for file in path.with_suffix("").glob("*.png")}
    # Memory is measured in its full size only.
    assert drawn == {"speed-over-T", "kept-over-T", "step", "spike-conv-over-rate", "weight-gradient-over-rate"}


def test_nothing_is_timed_after_a_failed_test(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "test_broken.py"
    broken.write_text("def test_broken():\n    raise AssertionError\n", encoding="utf-8")
    monkeypatch.setattr(cpu, "GATE", (str(broken), "-c", str(ROOT / "pyproject.toml")))
    assert cpu.main(["--results", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "nothing is timed, because a test failed" in output
    assert "FAILED  tests" in output
    assert not list(tmp_path.glob("*.csv"))
