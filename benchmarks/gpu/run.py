"""Runs stages: processes with a time limit, none of which waits for another to be right."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu import record
from gpu.stages import ROOT, SINGLE, Job, Stage

GRACE = 5  # seconds that a process has to end by itself after its limit, and again after it was killed
LOG_BYTES = 1 << 18  # of a job's output that are kept, of its beginning and of its end together
MIN_SECONDS = 5  # with fewer left, a stage is left out
POLL = 0.2  # seconds between two looks at who has the GPU
MIN_SHARE = 15  # seconds that a job has at the least, if its stage has
ROOMS = ("kernels", "train")  # of the library, that lie beside it in the tree
_SITE = "SEAL_FAST_GPU_SITE"  # where processes start: Python looks for modules there first


def run(
    stages: dict[str, Stage],
    folder: Path,
    seconds: float,
    environment: dict[str, str],
    ended: Callable[[str], None] = lambda stage: None,
) -> None:
    """Run all stages within so many seconds, whatever becomes of each.

    Args:
        stages: Name -> stage, in their order.
        folder: Gets results.jsonl, to which the stages add what they find, and log.txt, what they print.
        seconds: For all of them together.
        environment: Added to that of every process.
        ended: Called with the name of each stage when it has ended.
    """
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="seal-fast-gpu-") as site:
        environment = {**environment, **_paths(Path(site)), record.RESULTS: str((folder / "results.jsonl").resolve())}
        for name, stage in stages.items():
            _run_stage(name, stage, folder, end - time.monotonic(), environment)
            ended(name)
        Path(environment[record.RESULTS] + record.LOCK).unlink(missing_ok=True)


def _paths(site: Path) -> dict[str, str]:
    """Make `import seal_fast` find the tree, which need not be installed; and what benchmarks and tests share."""
    package = site / "seal_fast"
    package.mkdir()
    for path in (ROOT / "seal_fast").iterdir():
        if path.name not in ROOMS:
            (package / path.name).symlink_to(path)
    for name in ROOMS:
        (package / name).symlink_to(ROOT / name)
    paths = [site, ROOT / "benchmarks", ROOT / "tests" / "support", *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(map(str, paths)), _SITE: str(site)}


def _run_stage(name: str, stage: Stage, folder: Path, left: float, environment: dict[str, str]) -> None:
    """Run the jobs of a stage; one that hangs leaves time to the others, if these are no slower than twice the mean."""
    if left < MIN_SECONDS:
        return _write(folder, stage=name, ended="left out: no time was left")
    if not stage.jobs:
        return _write(folder, stage=name, ended="left out: what it needs is not installed")
    limit = min(stage.limit, left)
    share = max(2 * limit * stage.workers / len(stage.jobs), MIN_SHARE)
    deadline = time.monotonic() + limit
    if stage.workers > 1:
        environment = {**environment, **SINGLE}
    with ThreadPoolExecutor(stage.workers) as pool:
        futures = {job: pool.submit(_run_one, name, job, folder, deadline, share, environment) for job in stage.jobs}
    for job, future in futures.items():
        if future.exception() is not None:
            _write(folder, stage=name, job=job.name, ended=f"not run: {future.exception()}")


def _run_one(stage: str, job: Job, folder: Path, deadline: float, share: float, environment: dict[str, str]) -> None:
    """Run a process until it ends or its time is over; its processes end with it."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as output:
        try:
            ended = _ended(job, output, deadline, share, environment)
        except OSError as error:
            ended = f"did not start: {error}"
        output.seek(0)
        text = output.read()
    if len(text) > LOG_BYTES:
        text = text[: LOG_BYTES // 2] + b"\n[...]\n" + text[-LOG_BYTES // 2 :]
    with open(folder / "log.txt", "ab") as log:
        log.write(f"\n==> {stage}: {job.name}: {ended}\n".encode() + text)
    _write(folder, stage=stage, job=job.name, ended=ended, seconds=round(time.monotonic() - begun, 1))


def _ended(job: Job, output, deadline: float, share: float, environment: dict[str, str]) -> str:
    """How the process ended: ok, exit status or signal, or that its time was over."""
    if deadline <= time.monotonic():
        return "left out: no time was left"
    # A worker of pytest-xdist may have started this; the pytest of a stage would take itself for one.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    process = subprocess.Popen(
        job.arguments(),
        cwd=environment[_SITE],
        env={**inherited, **environment, **job.environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that its workers end with it
    )
    try:
        code = _wait(process, deadline, share, Path(environment[record.RESULTS] + record.LOCK))
        return "ok" if code == 0 else f"exit {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)  # pytest then says what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return "stopped: its time was over"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)  # one that waits in the driver cannot be killed


def _wait(process: subprocess.Popen, deadline: float, share: float, lock: Path) -> int:
    """The exit status of the process, which may take `share` seconds, beside those in which another one has the GPU.

    Raises:
        TimeoutExpired: Its time is over.
    """
    used, last = 0.0, time.monotonic()
    while True:
        try:
            return process.wait(max(min(POLL, deadline - last), 0))
        except subprocess.TimeoutExpired:
            now = time.monotonic()
            holder = lock.read_text(encoding="utf-8") if lock.exists() else ""
            if holder in ("", str(process.pid)):
                used += now - last
            last = now
            if now >= deadline or used >= share:
                raise


def _write(folder: Path, **entry) -> None:
    with open(folder / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def read(folder: Path) -> list[dict]:
    """The entries of a run, in the order in which they were written."""
    path = folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
