"""What a new user gets wrong: one sentence on standard error, exit code 2, no traceback."""

import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import makers
from seal_fast.train import distill, teacher

REPOSITORY = Path(__file__).resolve().parents[2]


def error_of(main, options: str, capsys) -> str:
    """The error's sentence, after checking that it is all there is on standard error."""
    assert main(options.split()) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    program, kind, sentence = lines[0].split(": ", 2)
    assert program.startswith("seal-fast-")
    assert kind == "error"
    return sentence


DIGITS = "--dataset DIGITS --log_path {tmp}/logs"
DISTILL_DIGITS = DIGITS + " --method ce"


@pytest.mark.parametrize(
    ("main", "options", "expected"),
    [
        (teacher.main, "--dataset CIFAR11 --data_path D", "--dataset must be one of CIFAR10, .*got 'CIFAR11'"),
        (teacher.main, "--dataset CIFAR-10 --data_path D", r"got 'CIFAR-10'; did you mean CIFAR10\?$"),
        (teacher.main, DIGITS + " --arch resnet-18", r"invalid choice: 'resnet-18' .*; did you mean resnet18\?$"),
        (teacher.main, DIGITS + " --data-path D", r"unrecognized arguments: --data-path D; did you mean --data_path"),
        (distill.main, DISTILL_DIGITS + " --xyzzy", "unrecognized arguments: --xyzzy$"),
        (distill.main, DISTILL_DIGITS + " --resume", "--resume: expected one argument"),
        (distill.main, DISTILL_DIGITS + " --run_name " + 300 * "n", "--run_name: no run can be in .*name too long"),
        (teacher.main, "--dataset CIFAR10 --data_path {tmp}/nowhere", "nowhere"),
        (teacher.main, "--dataset CIFAR10", "--data_path"),
        (teacher.main, "--dataset CIFAR10_DVS_SJ --data_path {tmp}/nowhere", "nowhere"),
        (teacher.main, "--dataset imagenet --data_path {tmp}/nowhere", "nowhere"),
        (teacher.main, DIGITS + " --arch resnet20", "--arch.*resnet18.*resnet50"),
        (teacher.main, DIGITS + " --frame_size 24", "frame_size is for event data, which DIGITS is not"),
        (teacher.main, DIGITS + " --T 0", "--T must be at least 1; got 0"),
        (teacher.main, DIGITS + " --train_batch_size 1", "--train_batch_size must be at least 2"),
        (teacher.main, DIGITS + " --val_batch_size 0", "--val_batch_size must be at least 1"),
        (teacher.main, DIGITS + " --accumulate 0", "--accumulate must be at least 1"),
        (teacher.main, DIGITS + " --accumulate 40", "--train_batch_size must be at least 2 for each of the 40 parts"),
        (
            teacher.main,
            DIGITS + " --save_every often",
            "--save_every must be a number of steps, or of minutes.*'often'",
        ),
        (teacher.main, DIGITS + " --save_every -3", "--save_every must be a number of steps"),
        (teacher.main, DIGITS + " --num_epoch 0", "--num_epoch must be at least 1"),
        (teacher.main, DIGITS + " --num_epoch ten", "--num_epoch.*'ten'"),
        (teacher.main, DIGITS + " --lr -1", "--lr must be above 0"),
        (teacher.main, DIGITS + " --lr nan", "--lr must be above 0"),
        (teacher.main, DIGITS + " --wd -1", "--wd must be at least 0"),
        (teacher.main, DIGITS + " --device warp:9", "--device 'warp:9' cannot be used"),
        (teacher.main, DIGITS + " --device cpu --cuda_graph", "--cuda_graph needs a CUDA GPU; --device is cpu"),
        (teacher.main, DIGITS + " --learning_rate 1", "unrecognized arguments: --learning_rate"),
        (teacher.main, DIGITS + " --auto_aug maybe", "--auto_aug.*'maybe'"),
        (teacher.main, DIGITS + " --auto_aug", "auto_aug"),
        (teacher.main, DIGITS + " --resume {tmp}/nothing", "--resume: there is no checkpoint at .*nothing"),
        (distill.main, DISTILL_DIGITS + " --T 0", "--T must be at least 1; got 0"),
        (distill.main, DISTILL_DIGITS + " --decay 1", "--decay must be at least 0 and below 1"),
        (distill.main, DISTILL_DIGITS + " --v_reset soft", "--v_reset must be a number, or none"),
        (distill.main, DISTILL_DIGITS + " --decay 0.99999999", "--decay must be at least 0 and below 1, in float32"),
        (distill.main, DISTILL_DIGITS + " --loss_method seal", "--loss_method seal contradicts --method ce"),
        (distill.main, DISTILL_DIGITS + " --align_method ELA", "--align_method.*'ELA'.*ela"),
        (distill.main, DISTILL_DIGITS + " --optim sgd", "--optim.*'SGD'.*SGDM"),
        (distill.main, DISTILL_DIGITS + " --scheduler step", "--scheduler.*'STEP'.*COSINE"),
        (distill.main, DISTILL_DIGITS + " --alpha -1", "--alpha must be at least 0"),
        (distill.main, DISTILL_DIGITS + " --temperature 0", "--temperature must be above 0"),
        (distill.main, DISTILL_DIGITS + " --train_batch_size 1", "--train_batch_size must be at least 2"),
        (distill.main, DISTILL_DIGITS + " --backend cupy", "backend 'cupy' cannot run"),
        (distill.main, DISTILL_DIGITS + " --thresh nan", "--thresh must be a finite number; got nan"),
        (distill.main, DISTILL_DIGITS + " --v_reset inf", "--v_reset must be a finite number; got inf"),
        (distill.main, DISTILL_DIGITS + " --alpha inf", "--alpha must be a finite number; got inf"),
        (teacher.main, DIGITS + " --seed 99999999999999999999999", "--seed must be at least 0 and below 2"),
        (teacher.main, DIGITS + " --device meta", "--device 'meta' cannot be used"),
        (distill.main, DIGITS, "--tea_path is needed"),
        (
            distill.main,
            DIGITS + " --tea_path {tmp}/none.pth",
            "--tea_path: there is no teacher checkpoint at",
        ),
    ],
)
def test_a_mistake_gives_one_sentence(main, options, expected, tmp_path, capsys):
    sentence = error_of(main, options.format(tmp=tmp_path), capsys)
    assert re.search(expected, sentence), sentence
    assert not (tmp_path / "logs").exists()  # nothing has started


def test_teacher_of_another_architecture(tmp_path, save_teacher, cifar10_root, capsys):
    path = save_teacher("resnet18")
    options = f"--dataset CIFAR10 --data_path {cifar10_root} --tea_arch resnet34 --tea_path {path}"
    sentence = error_of(distill.main, options, capsys)
    assert "does not hold a resnet34 with 10 classes" in sentence
    assert "but a resnet18 (pass --tea_arch resnet18)" in sentence


def test_teacher_of_another_number_of_classes(tmp_path, save_teacher, cifar10_root, capsys):
    path = save_teacher("resnet18", num_classes=100)
    options = f"--dataset CIFAR10 --data_path {cifar10_root} --tea_arch resnet18 --tea_path {path}"
    assert "fc.weight is [100, 512] instead of [10, 512]" in error_of(distill.main, options, capsys)


def test_corrupt_image_in_a_worker_process(tmp_path):
    data = makers.image_folder(tmp_path / "data")
    broken = next((data / "train").glob("*/*.JPEG"))
    broken.write_bytes(broken.read_bytes()[:100])
    command = [sys.executable, "train/teacher.py", "--arch", "resnet18", "--dataset", "imagenet", "--data_path", data]
    command += ["--log_path", tmp_path / "logs", "--train_batch_size", "2", "--num_workers", "1"]
    result = subprocess.run(map(str, command), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("seal-fast-teacher: error: ")
    assert str(broken) in line


def test_labels_out_of_range(tmp_path, capsys):
    data = makers.cifar10(tmp_path / "data")
    batch = data / "cifar-10-batches-py" / "data_batch_3"
    content = pickle.loads(batch.read_bytes(), encoding="bytes")
    content[b"labels"][2] = 10
    batch.write_bytes(pickle.dumps(content, protocol=2))
    sentence = error_of(teacher.main, f"--dataset CIFAR10 --data_path {data}", capsys)
    assert "data_batch_3" in sentence
    assert "label" in sentence


def test_a_run_whose_loss_is_not_finite_says_so(tmp_path, cifar10_root, capsys):
    options = f"--arch resnet18 --dataset CIFAR10 --data_path {cifar10_root} --log_path {tmp_path} --num_workers 0"
    assert teacher.main(f"{options} --lr 1e30 --train_batch_size 8 --num_epoch 3".split()) == 1
    assert "the loss is not finite" in capsys.readouterr().err


def test_malicious_teacher_is_refused(tmp_path, cifar10_root, capsys):
    mark = tmp_path / "mark"

    class Payload:
        def __reduce__(self):
            return (Path.touch, (mark,))

    path = tmp_path / "teacher.pth"
    torch.save({"best_net": Payload()}, path)
    options = f"--dataset CIFAR10 --data_path {cifar10_root} --tea_path {path}"
    assert "is refused" in error_of(distill.main, options, capsys)
    assert not mark.exists()


def test_truncated_teacher(tmp_path, save_teacher, cifar10_root, capsys):
    path = save_teacher("resnet34")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    options = f"--dataset CIFAR10 --data_path {cifar10_root} --tea_path {path}"
    assert str(path) in error_of(distill.main, options, capsys)


@pytest.mark.parametrize("content", [{1: torch.zeros(1)}, {"best_net": None}, {"best_net": torch.zeros(2)}, [1]])
def test_checkpoint_of_another_form(content, tmp_path, cifar10_root, capsys):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    sentence = error_of(distill.main, f"--dataset CIFAR10 --data_path {cifar10_root} --tea_path {path}", capsys)
    assert str(path) in sentence
    assert "best_net" in sentence or "must hold a dictionary" in sentence


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_file_that_is_no_checkpoint(content, tmp_path, cifar10_root, capsys):
    path = tmp_path / "other.pth"
    path.write_bytes(content)
    sentence = error_of(distill.main, f"--dataset CIFAR10 --data_path {cifar10_root} --tea_path {path}", capsys)
    assert re.search(r"other\.pth is (refused|truncated or no checkpoint)", sentence), sentence


def test_something_else_than_a_teacher(tmp_path, cifar10_root, capsys):
    path = tmp_path / "array.pth"
    np.save(path.open("wb"), np.zeros(3))
    options = f"--dataset CIFAR10 --data_path {cifar10_root} --tea_path {path}"
    assert str(path) in error_of(distill.main, options, capsys)
