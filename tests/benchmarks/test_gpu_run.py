"""`make gpu`: no stage waits for another to be right, and what was found is there whatever became of the rest."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gpu import record, smoke, table
from gpu.run import read, run
from gpu.stages import REHEARSAL, Job, Stage, all_stages

ROOT = Path(__file__).parents[2]
FIGURE = "from gpu import record; record.write(stage='{}', ms=1.5)"


def python(name: str, code: str) -> Job:
    return Job(name, ("-c", code))


def ended(folder: Path) -> dict[str, str]:
    return {entry["job"]: entry["ended"] for entry in read(folder) if "job" in entry}


def test_stages_that_raise_hang_or_die_leave_the_others_figures(tmp_path):
    hanging = FIGURE.format("hangs") + "; import subprocess, sys, time; "
    hanging += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "
    hanging += f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(300)"
    dying = FIGURE.format("dies") + "; import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    stages = {
        "raises": Stage(30, (python("raises", FIGURE.format("raises") + "; raise ValueError('of the stage')"),)),
        "hangs": Stage(25, (python("hangs", hanging), python("beside", FIGURE.format("beside"))), workers=2),
        "dies": Stage(30, (python("dies", dying),)),
        "absent": Stage(30, ()),
        "nothing": Stage(30, (Job("nothing", (), wrapper=("/nowhere/compute-sanitizer",)),)),
        "last": Stage(30, (python("last", FIGURE.format("last")),)),
    }
    run(stages, tmp_path, 200, {})
    assert ended(tmp_path) == {
        "raises": "exit 1",
        "hangs": "stopped: its time was over",
        "beside": "ok",
        "dies": "signal SIGSEGV",
        "nothing": "did not start: [Errno 2] No such file or directory: '/nowhere/compute-sanitizer'",
        "last": "ok",
    }
    figures = [entry["stage"] for entry in read(tmp_path) if entry.get("ms") == 1.5]
    assert sorted(figures) == ["beside", "dies", "hangs", "last", "raises"]
    assert "ValueError: of the stage" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    # What the stage that hung had started has ended with it.
    child = Path("/proc") / (tmp_path / "child").read_text(encoding="utf-8") / "stat"
    assert not child.exists() or child.read_text(encoding="utf-8").split()[2] == "Z"


def test_run_ends_when_its_time_is_over(tmp_path):
    slow = python("slow", FIGURE.format("slow") + "; import time; time.sleep(300)")
    begun = time.monotonic()
    run({"slow": Stage(300, (slow,)), "late": Stage(300, (python("late", FIGURE.format("late")),))}, tmp_path, 20, {})
    assert time.monotonic() - begun < 60
    assert ended(tmp_path) == {"slow": "stopped: its time was over"}
    assert [entry["stage"] for entry in read(tmp_path) if "ms" in entry] == ["slow"]
    assert {"stage": "late", "ended": "left out: no time was left"} in read(tmp_path)


def test_long_output_keeps_its_beginning_and_its_end(tmp_path):
    job = python("talks", "print('begin'); print('x' * 3_000_000); print('end')")
    run({"talks": Stage(60, (job,))}, tmp_path, 60, {})
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert len(log) < 300_000
    assert "\nbegin\n" in log
    assert log.endswith("\nend\n")


def test_worker_that_dies_is_a_failed_test_and_the_rest_goes_on(tmp_path):
    (tmp_path / "test_dies.py").write_text(
        "import os\nimport pytest\n\n"
        "@pytest.mark.parametrize('number', range(6))\ndef test_number(number):\n"
        "    if number == 2:\n        os._exit(1)\n    assert number != 4, 'wrong by 0.25'\n",
        encoding="utf-8",
    )
    plugins = ("-p", "gpu.outcomes", "-p", "no:cacheprovider")
    job = Job("tests", ("-m", "pytest", "-n", "2", *plugins, str(tmp_path / "test_dies.py")))
    run({"tests": Stage(100, (job,))}, tmp_path, 100, {})
    failed = {entry["test"].rpartition("::")[2]: entry["failed"] for entry in read(tmp_path) if "test" in entry}
    assert set(failed) == {"test_number[2]", "test_number[4]"}
    assert "crashed" in failed["test_number[2]"]
    assert "wrong by 0.25" in failed["test_number[4]"]
    assert [entry["counts"] for entry in read(tmp_path) if "counts" in entry] == [{"passed": 4, "failed": 2}]


def test_kernel_that_raises_leaves_the_other_cases(tmp_path, monkeypatch):
    """A case that raises is an entry like the others; an error after which CUDA is gone ends the process."""
    monkeypatch.setenv(record.RESULTS, str(tmp_path / "results.jsonl"))
    places, plain = [], smoke._lif

    def broken(x, upstream, device, backend):
        places.append(device)
        if x.shape == (1, 7):
            raise RuntimeError("no kernel for this shape")
        return plain(x, upstream, "cpu", "torch")

    monkeypatch.setattr(smoke, "_lif", broken)
    smoke.lif("triton")
    found = read(tmp_path)
    assert set(places) == {"cuda", "cpu"}
    assert len(found) == 15
    failed = [entry for entry in found if "failed" in entry]
    assert [(tuple(entry["shape"]), entry["failed"]) for entry in failed] == [
        ((1, 7), "RuntimeError: no kernel for this shape")
    ] * 3
    assert all(entry["spikes"] == 0 for entry in found if entry not in failed)

    def gone(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(smoke, "_lif", gone)
    with pytest.raises(SystemExit, match="illegal memory access"):
        smoke.lif("triton")
    assert len(read(tmp_path)) == 16


def test_process_that_hangs_alone_on_the_gpu_costs_its_own_time(tmp_path, monkeypatch):
    monkeypatch.setattr("gpu.run.MIN_SHARE", 1)
    code = "import sys, time\nfrom gpu import record\nwith record.alone():\n    time.sleep({})\nrecord.write(done={!r})"
    jobs = tuple(python(name, code.format(60 if name == "0" else 0, name)) for name in "01234567")
    # Of 12 seconds for eight processes, two at once, each may take six: they would be over for the one that waits.
    run({"times": Stage(12, jobs, 2)}, tmp_path, 100, {})
    assert ended(tmp_path) == {name: "ok" if name != "0" else "stopped: its time was over" for name in "01234567"}
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize(("jobs", "sentence"), [("no such", "no process of these stages"), ("(", "regular expression")])
def test_jobs_that_nothing_is_are_named(jobs, sentence):
    result = command("--rehearse", "--stages", "machine", "--jobs", jobs)
    assert result.returncode == 2
    assert sentence in result.stdout + result.stderr


def test_peer_that_raises_leaves_the_others(tmp_path):
    """On the fake GPU."""
    code = """
from gpu import fake; fake.install()
import torch, peers, training
from gpu import peers as stage
stage.SHAPE = (2, 1, 3, 4, 4)
def broken(x): raise ImportError("libcupy is missing")
peers.lif = lambda device, options: {"broken": broken, "torch loop": lambda x: peers.loop(options, x)}
stage.main("lif")
"""
    run({"peers": Stage(100, (python("peers", code),))}, tmp_path, 100, REHEARSAL)
    found = [entry for entry in read(tmp_path) if "contestant" in entry]
    assert [entry["contestant"] for entry in found] == ["broken", "torch loop"] * 2
    for entry in found:
        assert ("ms" in entry) == (entry["contestant"] != "broken")
        assert entry.get("failed", "") == ("ImportError: libcupy is missing" if entry["contestant"] == "broken" else "")


@pytest.mark.parametrize("operator", ["lif", "bn_lif", "seal_loss"])
def test_launches_for_the_sanitizer_run(tmp_path, operator):
    """In Triton's interpreter."""
    job = Job(operator, ("-m", "gpu.sanitized", operator, "triton"), {"TRITON_INTERPRET": "1"})
    run({"sanitizer": Stage(300, (job,))}, tmp_path, 300, {})
    assert ended(tmp_path) == {operator: "ok"}
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith("every kernel ran\n")


def test_every_stage_runs_its_processes_by_the_names_that_there_are():
    """Each process names a module and arguments that it takes; those of pytest, files that there are."""
    for rehearse in (False, True):
        stages = all_stages(rehearse=rehearse)
        names = ["machine", "smoke", "tests", "times", "steps", "peers", "tuning", "sanitizer", "values", "compiled"]
        assert list(stages) == [name for name in names if not rehearse or name not in ("peers", "compiled")]
        for stage in stages.values():
            for job in stage.jobs:
                if job.command[1] == "pytest":
                    files = [word for word in job.command if word.startswith(str(ROOT)) and not word.endswith(".toml")]
                    assert files
                    assert all(Path(file).exists() for file in files)
                else:
                    name, *arguments = job.command[2 if rehearse else 1 :]
                    module = importlib.import_module(name)
                    assert not arguments or arguments[0] in module.FIRST_ARGUMENTS


def test_table_is_short_and_shows_the_worst():
    entries = [{"stage": "machine", "gpu": "a GPU", "copy_TB_s": 4.25, "versions": {"torch": "2.11.0"}}]
    case = {"stage": "smoke", "operator": "lif", "backend": "triton", "dtype": "torch.float32"}
    entries += [{**case, "spikes": 0, "gradient": 1e-7}, {**case, "spikes": 3, "gradient": 2e-7}]
    entries += [{**case, "failed": "RuntimeError: no kernel"}]
    entries += [{"stage": "values", "test": f"tests/test_a.py::test[{i}]", "failed": "wrong"} for i in range(500)]
    entries += [{"stage": "values", "counts": {"passed": 7, "failed": 500}}]
    entries += [{"stage": "times", "operator": "lif", "backend": "cupy", "forward_ms": 0.5, "forward_TB_s": 3.5}]
    entries += [{"stage": "steps", "contestant": "ours cupy", "precision": "bf16", "graph": True, "ms": 12.5}]
    entries += [{"stage": "smoke", "job": "smoke lif triton", "ended": "exit 1", "seconds": 2.5}]
    entries += [{"stage": "times", "operator": "lif", "backend": "cupy", "forward_ms": 0.25, "candidate": "N=4"}]
    launched = [["void lif_forward<float, 4>(float*)", 1.0, 182.5], ["merge", 2.0, 3.0]]
    entries += [{"stage": "times", "operator": "lif", "backend": "cupy", "profiled": True, "forward_kernels": launched}]
    text = table.short(entries)
    assert len(text) <= table.MOST
    assert "0.250" not in text
    assert "lif cupy N=4" in table.text(entries)
    assert "kernels  lif cupy forward: 182.5 us 1 x lif_forward, 3.0 us 2 x merge" in table.text(entries)
    assert "4.25 TB/s copied" in text
    (line,) = (line for line in text.splitlines() if line.startswith("smoke "))
    assert "lif triton f32" in line
    assert "spikes 3.0e+00" in line
    assert "gradient 2.0e-07" in line
    assert "1 FAILED: RuntimeError: no kernel" in line
    assert "{'passed': 7, 'failed': 500}; 500 failed" in text
    assert text.count("test_a.py::test") == table.FAILURES
    assert "forward 0.500 ms 3.50 TB/s host 0.00" in text
    assert "ours cupy bf16, graph" in text
    assert "ended  smoke: smoke lif triton: exit 1" in text
    assert len(table.short(entries * 300)) <= table.MOST + 50


def test_worst_of_a_smoke_test_is_not_hidden_by_numbers_after_it():
    case = {"stage": "smoke", "operator": "lif", "backend": "triton"}
    assert "gradient nan" in table.text([{**case, "gradient": float("nan")}, {**case, "gradient": 1e-7}])
    assert "gradient nan" in table.text([{**case, "gradient": 1e-7}, {**case, "gradient": float("nan")}])


def command(*arguments: str, **more: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), **more}
    return subprocess.run(
        [sys.executable, "-m", "gpu", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu itself runs where there is a GPU")
def test_command_says_what_it_needs():
    result = command()
    assert result.returncode == 2
    assert "needs an NVIDIA GPU" in result.stdout


def test_command_runs_where_the_library_is_not_installed(tmp_path):
    """As on a machine that has the tree and torch alone: an editable installation is hidden."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if '__editable__' not in str(finder)]\n"
        "sys.path[:] = [path for path in sys.path if '__editable__' not in path]\n"
        "sys.path_hooks[:] = [hook for hook in sys.path_hooks if '__editable__' not in str(hook)]\n",
        encoding="utf-8",
    )
    results = tmp_path / "results"
    paths = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT / "benchmarks")))}
    options = ("--rehearse", "--stages", "machine", "--results", str(results), "--kernels", str(tmp_path / "none"))
    result = command(*options, **paths)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "s  machine: ok" in result.stdout
    (entry,) = (entry for entry in read(results) if "versions" in entry)
    assert entry["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "machine  fake GPU" in (results / "table.txt").read_text(encoding="utf-8")


def test_command_says_which_stages_it_has():
    result = command("--stages", "machine,trainings")
    assert result.returncode == 2
    assert result.stdout == (
        "stages are machine, smoke, tests, times, steps, peers, tuning, sanitizer, values, compiled; got 'trainings'.\n"
    )


def test_entries_of_several_processes_do_not_mix(tmp_path):
    code = "from gpu import record\nfor i in range(200): record.write(stage='many', text='x' * 500)"
    jobs = tuple(python(str(number), code) for number in range(4))
    run({"many": Stage(60, jobs, workers=4)}, tmp_path, 60, {})
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum(json.loads(line).get("text") == "x" * 500 for line in lines) == 800
