"""What a run lacks is said before it starts, and what its loaders fail at is said with its cause."""

import subprocess
import sys
from pathlib import Path

import pytest

import processes
from seal_fast.train import checks, command, distill
from seal_fast.train.errors import UsageError

OPTIONS = "--dataset DIGITS --method ce --device cpu --num_epoch 1 --train_batch_size 32"


def test_a_package_that_is_missing_is_named_before_anything_starts(tmp_path):
    """Of what is imported with the trainers, in a process that never had it."""
    words = f"{OPTIONS} --log_path {tmp_path}/logs".split()
    text = (
        "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'tqdm', 'PIL']))\n"
        "from seal_fast.train import distill\n"
        f"sys.exit(distill.main({words}))"
    )
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    told = "seal-fast-distill: error: torchvision is needed: pip install 'seal-fast[train]' ("
    assert line.startswith(told)
    assert result.stdout == ""
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("numpy", "numpy"),
        ("tqdm", "tqdm"),
        ("scikit-learn", "sklearn.datasets"),
        ("tensorboard", "torch.utils.tensorboard"),
        ("matplotlib", "matplotlib.figure"),
    ],
)
def test_each_package_is_looked_for(package, module, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    assert distill.main(f"{OPTIONS} --log_path {tmp_path}/logs".split()) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"seal-fast-distill: error: {package} is needed: pip install 'seal-fast[train]' (")
    assert not (tmp_path / "logs").exists()


def test_a_package_that_does_not_fit_is_named(monkeypatch):
    def fail(_name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(checks.importlib, "import_module", fail)
    with pytest.raises(UsageError, match=r"numpy is needed: .*operator torchvision::nms does not exist"):
        checks.require_packages("CIFAR10", logs=False)


def test_an_evaluation_needs_no_plots(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    checks.require_packages("DIGITS", logs=False)


CAUGHT = """Caught RuntimeError in DataLoader worker process 0.
Original Traceback (most recent call last):
  File "worker.py", line 349, in _worker_loop
    data = fetcher.fetch(index)
           ^^^^^^^^^^^^^^^^^^^^
RuntimeError: {message}
"""
SMALL = "unable to write to file </torch_12_34_0>: No space left on device (28)"
BUS = (
    "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit."
)
FILES = "unable to open shared memory object </torch_12> in read-write mode: Too many open files (24)"


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (RuntimeError(CAUGHT.format(message="a tensor is odd.\nAnd more.")), ["data failed (a tensor is odd); what"]),
        (OSError(CAUGHT.format(message="the disk is gone")), ["data failed (the disk is gone); what"]),
        (RuntimeError(CAUGHT.format(message=SMALL)), ["No space left on device (28)); /dev/shm of", "--shm-size"]),
        (RuntimeError(BUS), ["data died (DataLoader worker (pid 12) is killed by signal: Bus error. ", "/dev/shm of"]),
        (RuntimeError(FILES), ["Too many open files (24)); this process may open too few files", "ulimit -n"]),
        (RuntimeError("received 0 items of ancdata"), ["ulimit -n", "--num_workers 0"]),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), ["data died (DataLoader worker (pid(s) 7)"]),
    ],
    ids=lambda value: str(value)[-40:] if isinstance(value, Exception) else "",
)
def test_the_cause_of_a_loader_s_error_is_told(error, parts):
    sentence, code, _ = command._explained(error, command.WHOLE)
    assert code == 1
    assert "\n" not in sentence
    assert all(part in sentence for part in parts), sentence


def test_another_full_disk_is_not_taken_for_shared_memory():
    """TensorBoard's errors, for one, name no file."""
    sentence, code, _ = command._explained(OSError(28, "No space left on device"), command.WHOLE)
    assert (sentence, code) == (f"No space left on device; {command.WHOLE}.", 1)


@pytest.mark.parametrize(("size", "shown"), [("64k", "0.0625"), ("300k", "0.293")])
def test_shared_memory_that_is_too_small_is_named(size, shown, tmp_path):
    """In a namespace with a small /dev/shm, as containers have: the first one has no room for the semaphores even."""
    words = f"{OPTIONS} --num_workers 1 --log_path {tmp_path}/logs --run_name run --train_batch_size 512".split()
    trainer = [sys.executable, processes.__file__, "distill", "1797", *words]
    mounted = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mounted], capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root only, in a namespace of its own")
    script = ["unshare", "-m", "sh", "-c", f'{mounted} && exec "$@"', "sh"]
    result = subprocess.run([*script, *trainer], capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result.stderr
    line = result.stderr.splitlines()[-1]  # the cause in it differs between versions of torch
    assert f"; /dev/shm of {shown} MiB, through which processes hand data over, may be full: enlarge it (docker" in line


def test_help_needs_torch_alone(tmp_path):
    blocked = ("torchvision", "sklearn", "tensorboard", "matplotlib", "tqdm", "PIL")
    text = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "from seal_fast.train import demo, distill, evaluate, teacher\n"
        "print(len([distill.distill_parser(), teacher.teacher_parser(), evaluate.parser()]))"
    )
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "3\n"), result.stderr


def test_the_repository_has_the_name_that_the_advice_has():
    setup = (Path(processes.__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    assert 'name="seal-fast"' in setup
    assert '"train": TRAIN' in setup
