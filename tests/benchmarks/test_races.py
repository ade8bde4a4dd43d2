"""A race of benchmarks goes on without a contestant that raises: its own test fails, and nothing is invented for it."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import measure
import peers
import tables

ROOT = Path(__file__).parents[2]
OURS, PEER = "seal-fast cpu", "torch loop"

# A plugin of pytest. {body} breaks contestants before the benchmarks are collected.
PLUGIN = """
import itertools

def raising(step, calls, error):
    count = itertools.count()

    def run(*arguments, **options):
        if next(count) >= calls:
            raise error
        return step(*arguments, **options)

    return run

def broken(found):
    {change}
    return found

def pytest_configure(config):
    {body}
"""
LIF = "import peers; lif = peers.lif; peers.lif = lambda *arguments: broken(lif(*arguments))"
TRAINING = "import training, published_loss; broken(training.CONTESTANTS); published_loss.seal_loss = no_loss"


class Result(NamedTuple):
    """What a run of pytest left, by test function and contestant where there are two keys."""

    output: str
    failures: dict[tuple[str, str], str]  # message of a failed test
    passed: set[tuple[str, str]]
    known: dict[tuple[str, str], set[str]]  # quantities that are in the CSV
    rows: list[dict]


@pytest.fixture
def race(tmp_path):
    """Runs tiny benchmarks whose contestants a plugin breaks."""

    def run(body: str, change: str, files: list[str], chosen: str, *options: str) -> Result:
        (tmp_path / "breaks.py").write_text(PLUGIN.format(body=body, change=change), encoding="utf-8")
        figures, report = tmp_path / "figures.json", tmp_path / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "breaks", *files, "--tiny"]
        command += ["-k", chosen, f"--benchmark-json={figures}", f"--junitxml={report}", *options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), environment.get("PYTHONPATH")]))
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        failures, passed = {}, set()
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            key = re.fullmatch(r"(\w+)\[(?:.*?-)??(seal-fast .*|[^-]*)\]", case.get("name")).groups()
            failure = case.find("failure")
            if failure is not None:
                failures[key] = " ".join(failure.get("message").removeprefix("Failed: ").split())
            else:
                passed.add(key)
        assert result.returncode == (1 if failures else 0), result.stdout + result.stderr
        rows = tables.rows(json.loads(figures.read_text(encoding="utf-8")))
        known = {}
        for row in rows:
            known.setdefault((TESTS[row["benchmark"]], row["contestant"]), set()).add(row["quantity"])
        return Result(result.stdout, failures, passed, known, rows)

    return run


TESTS = {"lif": "test_lif", "train": "test_step", "parts": "test_parts", "scaling": "test_scaling"}
FILES = {name: f"benchmarks/bench_{name}.py" for name in TESTS}
CHOSEN = "resnet18.layer1-4-f32-contiguous-both and not compile"


def test_contestants_that_raise_leave_the_others_their_times(race):
    pytest.importorskip("spikingjelly", reason="spikingjelly, the contestant that is left, is not installed")
    change = f"""
    found[{OURS!r}] = raising(None, 0, ValueError("cannot\\n run"))
    found[{PEER!r}] = raising(found[{PEER!r}], 4, RuntimeError("CUDA error"))  # while it is timed
    """
    result = race(LIF, change, [FILES["lif"]], CHOSEN)
    assert set(result.failures) == {("test_lif", OURS), ("test_lif", PEER)}
    for name, reason in {OURS: "ValueError: cannot run", PEER: "RuntimeError: CUDA error"}.items():
        assert result.failures["test_lif", name].startswith(reason)
        assert f"  {name:28s} failed: {reason}\n" in result.output
    ((_, left),) = result.passed
    assert left.startswith("SpikingJelly")
    # All comparisons are with the first one, which has no times.
    assert result.known == {("test_lif", left): {"time", "best_time", "share_of_copy_bandwidth"}}
    assert {row["first"] for row in result.rows} == {OURS}


def test_what_raised_in_one_run_of_a_pool_has_no_figures_in_the_others(race, tmp_path):
    pool = f"--pool={tmp_path / 'pool.json'}"
    wrong = f"right = found[{PEER!r}]; found[{PEER!r}] = lambda x: 1 - right(x)"
    for change, rounds in ((wrong, 3), ("pass", 6)):
        result = race(LIF, change, [FILES["lif"]], CHOSEN, pool)
        assert set(result.failures) == {("test_lif", PEER)}
        assert result.failures["test_lif", PEER].startswith("AssertionError: assert ")
        assert ("test_lif", OURS) in result.passed == set(result.known)
        times = [row["rounds"] for row in result.rows if row["quantity"] == "time"]
        assert times == [rounds] * len(result.passed)
        others = result.passed - {("test_lif", OURS)}
        assert all("time_of_first" in result.known[other] for other in others)


def test_steps_parts_and_studies_go_on_as_well(race):
    body = f"global no_loss; no_loss = raising(None, 0, ValueError('no loss')); {TRAINING}"
    change = """
    build, dtype = found["ours, bfloat16"]

    def wrong(problem):
        step = build(problem)
        forward = step.forward
        step.forward = lambda: 2 * forward()
        return step

    found["ours, bfloat16"] = wrong, dtype
    """
    steps = "resnet18-cifar and not compile and not control and not packed and not dense"
    chosen = f"({steps}) or bench_parts or seal_loss-over-B-16"
    result = race(body, change, [FILES[name] for name in ("train", "parts", "scaling")], chosen)
    published = "published, eager"
    failed = {("test_step", published), ("test_parts", published), ("test_scaling", "peer")}
    assert set(result.failures) == {*failed, ("test_step", "ours, bfloat16")}
    for key in failed:
        assert result.failures[key].startswith("ValueError: no loss")
    assert result.failures["test_step", "ours, bfloat16"].startswith("AssertionError: first loss")
    assert f"  {published:28s} failed: ValueError: no loss\n" in result.output
    floors = {("test_step", f"convolutions alone, {dtype}") for dtype in ("float32", "bfloat16")}
    ours = {("test_step", "ours, float32"), ("test_parts", "ours, float32"), ("test_parts", "ours, bfloat16")}
    assert set(result.known) == {*floors, *ours, ("test_scaling", "seal-fast")}
    assert result.passed == {*floors, *ours, ("test_scaling", "ours")}
    assert "time_of_floor" in result.known["test_step", "ours, float32"]
    assert not any("time_of_first" in result.known[key] for key in floors)


def test_a_peer_that_cannot_be_imported_is_a_contestant_that_raises(monkeypatch):
    if not peers.has_spikingjelly():
        # A peer that is absent is no contestant at all, so none could raise.
        pytest.skip("spikingjelly is not installed")
    monkeypatch.setitem(sys.modules, "spikingjelly.activation_based", None)
    contestants = peers.lif(torch.device("cpu"), {"tau": 2.0, "decay_input": False, "surrogate": "sigmoid"})
    (peer,) = (run for name, run in contestants.items() if name.startswith("SpikingJelly"))
    with pytest.raises(ImportError, match="spikingjelly"):
        peer(torch.zeros(1, 2))


def test_a_step_that_raises_leaves_the_race():
    calls = dict.fromkeys("abc", 0)

    def step(name):
        calls[name] += 1
        if name == "b" and calls[name] == 3:
            raise torch.cuda.OutOfMemoryError("too large")

    steps = {name: lambda name=name: step(name) for name in calls}
    failed = {}
    times = measure.race(steps, 0.0, 5, failed=failed)
    assert {name: len(of_step) for name, of_step in times.items()} == {"a": 5, "c": 5}
    assert calls == {"a": 5, "b": 3, "c": 5}
    assert failed["b"].out_of_memory
    assert failed["b"].reason == "OutOfMemoryError: too large"
    assert "in step" in failed["b"].trace
    calls["b"] = 0
    with pytest.raises(torch.cuda.OutOfMemoryError, match="too large"):
        measure.race(steps, 0.0, 5)


def test_a_reason_is_one_short_line():
    failure = measure.Failure.of(ValueError("first\n  second " + "x" * 200))
    assert failure.line(40) == "ValueError: first second " + "x" * 12 + "..."
    assert not failure.out_of_memory
