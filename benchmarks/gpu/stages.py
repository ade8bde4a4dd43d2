"""The stages of a run on a GPU, in the order of what is wanted first, and the processes that they are made of."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from gpu.outcomes import STAGE
from gpu.record import SECONDS

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = ("lif", "bn_lif", "seal_loss", "packing")
BACKENDS = ("triton", "cupy")
# Other values are drawn from run to run, or need minutes: they are for make test.
UNFIT = ("test_lif_sweep.py",)
# For processes that share the processors: one thread each, of what they compute on the CPU.
SINGLE = {"OMP_NUM_THREADS": "1"}
REHEARSAL = {SECONDS: "0", **SINGLE}
IN_TURN = 2  # workers that share the GPU by record.alone: one times while the next one imports
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has memory of its own, whose ends the sanitizer knows


@dataclass(frozen=True, eq=False)
class Job:
    """A process of a stage.

    Attributes:
        name: What it is called in the results.
        command: What it runs, after the interpreter.
        environment: What is added to the environment.
        wrapper: A program that runs the interpreter, with its options.
    """

    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    wrapper: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The command line."""
        return [*self.wrapper, sys.executable, *self.command]


@dataclass(frozen=True)
class Stage:
    """Processes that run side by side.

    Attributes:
        limit: Seconds for all of them, at most.
        jobs: The processes.
        workers: How many run at once.
    """

    limit: float
    jobs: tuple[Job, ...]
    workers: int = 1


def all_stages(*, rehearse: bool = False) -> dict[str, Stage]:
    """Name -> stage, in their order.

    Args:
        rehearse: Whether the GPU is a fake one (fake.py), to compile kernels or to try the run itself.
    """
    processors = os.cpu_count() or 1
    module = _faked if rehearse else _module
    each = [(operator, backend) for operator in OPERATORS for backend in BACKENDS]
    tuned = [(operator, backend) for operator in OPERATORS[:2] for backend in BACKENDS]
    peers = ("training", "lif", "bn_lif", "seal_loss")
    gpu_tests = sorted(str(path) for path in (ROOT / "tests" / "kernels").glob("*_gpu.py"))
    if not rehearse:  # a fake graph is none
        gpu_tests.append(str(ROOT / "tests" / "train" / "test_step.py"))
    stages = {
        "machine": Stage(40, (module("gpu.machine"),)),
        "smoke": Stage(80, tuple(module("gpu.smoke", *job) for job in each), processors),
        "tests": Stage(120, (_pytest("tests", gpu_tests, processors, rehearse),)),
        "times": Stage(120, tuple(module("gpu.times", *job) for job in each), IN_TURN),
        "steps": Stage(140, tuple(module("gpu.training_steps", name) for name in ("bf16", "packed", "off")), IN_TURN),
        "peers": Stage(110, tuple(module("gpu.peers", name) for name in peers), IN_TURN),
        "tuning": Stage(90, tuple(module("gpu.times", *job, "candidates") for job in tuned), IN_TURN),
        "sanitizer": Stage(120, tuple(_sanitized(module, rehearse)), processors),
        "values": Stage(130, (_pytest("values", _value_tests(), processors, rehearse),)),
        "compiled": Stage(240, tuple(module("gpu.peers", name, "compiled") for name in peers), IN_TURN),
    }
    if rehearse:  # these start no kernel of this library that is not started before
        del stages["peers"], stages["compiled"]
    return stages


def _module(name: str, *arguments: str) -> Job:
    return Job(" ".join((name.removeprefix("gpu."), *arguments)), ("-m", name, *arguments))


def _faked(name: str, *arguments: str) -> Job:
    return Job(_module(name, *arguments).name, ("-m", "gpu.fake", name, *arguments))


def _pytest(stage: str, files: list[str], workers: int, rehearse: bool) -> Job:
    plugins = ["gpu.outcomes", "gpu.sticky", *(["gpu.fake"] if rehearse else [])]
    options = [f"--numprocesses={workers}", "--dist=worksteal", "-c", str(ROOT / "pyproject.toml")]
    options += [text for plugin in plugins for text in ("-p", plugin)]
    return Job(stage, ("-m", "pytest", *options, "-p", "no:cacheprovider", *files), {STAGE: stage, **SINGLE})


def _value_tests() -> list[str]:
    """The shared tests with the GPU's kernels; not what make test does: interpret, compile, run CUDA on the host."""
    unfit = [*UNFIT, "*_gpu.py", "*_triton.py", "*_compile.py", "*_cuda*.py"]
    ignored = [f"--ignore-glob={ROOT}/tests/*/{name}" for name in unfit]
    return [*(str(ROOT / "tests" / name) for name in ("kernels", "seal_fast")), "-k", "triton or cupy", *ignored]


def _sanitized(module, rehearse: bool) -> list[Job]:
    """Each operator of each backend under each tool of compute-sanitizer, where it is installed."""
    jobs = [module("gpu.sanitized", operator, backend) for operator in OPERATORS[:3] for backend in BACKENDS]
    if rehearse:
        return jobs
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        return []
    return [
        Job(f"{tool} {job.name}", job.command, UNCACHED, (sanitizer, f"--tool={tool}", "--error-exitcode=9"))
        for tool in ("memcheck", "racecheck", "synccheck")
        for job in jobs
    ]
