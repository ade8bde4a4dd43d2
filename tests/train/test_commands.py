"""The command lines of the README, run as they stand on small data of the real on-disk formats."""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import makers
from seal_fast.backends import available
from seal_fast.train import distill, teacher
from seal_fast.train.checks import resolve
from seal_fast.train.options import distill_parser, teacher_parser

REPOSITORY = Path(__file__).resolve().parents[2]

# name -> (command with the user's paths D, P and L; options that make it small; what writes the data; the teacher)
COMMANDS = {
    "teacher CIFAR100": (
        "train/teacher.py --arch resnet19 --dataset CIFAR100 --train_batch_size 128 --val_batch_size 128 --data_path D "
        "--wd 5e-4 --num_epoch 300",
        "--num_epoch 2 --train_batch_size 8",
        lambda root: makers.cifar100(root, train=16),
        None,
    ),
    "distill CIFAR10": (
        "train/distill.py --stu_arch resnet18 --tea_arch resnet34 --dataset CIFAR10 --train_batch_size 128 "
        "--val_batch_size 128 --data_path D --tea_path P --wd 5e-4 --decay 0.5 --T 4 --num_epoch 300 --alpha 0.6 "
        "--beta 0.15 --lr 0.1",
        "--num_epoch 2 --train_batch_size 8",
        lambda root: makers.cifar10(root, per_batch=4),
        {"arch": "resnet34"},
    ),
    "teacher CIFAR10-DVS": (
        "train/teacher.py --dataset CIFAR10_DVS_SJ --data_path D --log_path L --arch resnet19 --num_epoch 300 --lr 0.2 "
        "--wd 5e-4 --T 10",
        "--num_epoch 1 --train_batch_size 8",
        makers.cifar10_dvs,
        None,
    ),
    "distill CIFAR10-DVS": (
        "train/distill.py --stu_arch resnet18 --tea_arch resnet19 --dataset CIFAR10_DVS_SJ --data_path D --tea_path P "
        "--train_batch_size 32 --val_batch_size 32 --wd 5e-4 --decay 0.5 --T 10 --num_epoch 300 --alpha 0.6 "
        "--beta 0.15 --lr 0.1",
        "--num_epoch 1 --train_batch_size 4",
        lambda root: makers.cifar10_dvs(root, per_class=1),
        {"arch": "resnet19", "in_channels": 2},
    ),
    "teacher ImageNet": (
        "train/teacher.py --arch resnet34 --dataset imagenet --data_path D --train_batch_size 512 --val_batch_size 512 "
        "--lr 0.1 --wd 1e-4 --num_epoch 100",
        "--num_epoch 1 --train_batch_size 2 --num_workers 1",
        makers.image_folder,
        None,
    ),
    "distill ImageNet": (
        "train/distill.py --stu_arch preact_resnet34 --tea_arch resnet34 --dataset imagenet --train_batch_size 512 "
        "--val_batch_size 512 --data_path D --tea_path P --wd 2e-5 --decay 0.2 --T 4 --num_epoch 100 --alpha 0.6 "
        "--beta 0.15 --lr 0.2",
        "--num_epoch 1 --train_batch_size 2 --num_workers 1",
        lambda root: makers.image_folder(root, per_class=1),
        {"arch": "resnet34", "num_classes": 2, "stem": "imagenet"},
    ),
}


# All other flags that the published scripts take: switches on, the rest with their defaults there; but data comes from
# one process, and a processor computes.
FLAGS = {
    "teacher": "--seed 60 --num_workers 1 --device cpu --optim sgdm --stu_arch none --cutout --auto_aug "
    "--save_features",
    "distill": "--seed 60 --num_workers 1 --device cpu --optim sgdm --scheduler cosine --auto_aug --cutout "
    "--thresh 1.0 --step_mode m --v_reset 0.0 --detach_reset --margin 0.05 --loss_method seal --baseline "
    "--align_method ela --time_kd_method sta",
}
SILENT = {
    "teacher": ["--stu_arch", "--save_features"],
    "distill": ["--margin", "--baseline", "--align_method", "--time_kd_method"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_defaults_are_what_the_published_commands_say(name):
    kind, (command, *_) = name.split()[0], COMMANDS[name]
    make = {"teacher": teacher_parser, "distill": distill_parser}[kind]
    role = {"teacher": "teacher", "distill": "student"}[kind]

    def resolved(words: list[str]) -> dict:
        method = ["--method", "ce"] if kind == "distill" else []  # no teacher is there
        return vars(resolve(make().parse_args([*words, *method]), role=role))

    words = shlex.split(command)[1:]
    places = [words.index(flag) for flag in ("--dataset", "--data_path", "--log_path", "--tea_path") if flag in words]
    short = [word for place in places for word in words[place : place + 2]]
    said, silent = resolved(words), resolved(short)
    assert (said.pop("asked")["num_epoch"] is not None, silent.pop("asked")["num_epoch"]) == (True, None)
    if name == "teacher CIFAR100":  # the one that names another network than the CIFAR student's teacher
        assert (said.pop("arch"), silent.pop("arch")) == ("resnet19", "resnet34")
    assert said == silent


@pytest.mark.parametrize("name", COMMANDS)
def test_published_command_runs_with_every_published_flag(name, tmp_path, save_teacher, capsys):
    command, smaller, make_data, taught = COMMANDS[name]
    kind = name.split()[0]
    make_data(tmp_path / "D")
    program, *words = shlex.split(f"{command} {FLAGS[kind]} {smaller} --num_epoch 1")
    paths = {
        "D": str(tmp_path / "D"),
        "L": str(tmp_path / "logs"),
        "P": str(save_teacher(**taught)) if taught else None,
    }
    words = [paths.get(word, word) for word in words]
    main = {"train/teacher.py": teacher.main, "train/distill.py": distill.main}[program]
    assert main([*words, "--log_path", str(tmp_path / "logs")]) == 0
    output = capsys.readouterr().out
    for flag in SILENT[kind]:
        assert f"{flag} has no effect, as in the published scripts.\n" in output
    (folder,) = (tmp_path / "logs").iterdir()
    assert_complete(folder, spiking=kind == "distill")


@pytest.mark.parametrize("name", COMMANDS)
def test_published_command_leaves_a_complete_run_folder(name, tmp_path, save_teacher):
    command, smaller, make_data, taught = COMMANDS[name]
    data = tmp_path / "data"
    make_data(data)
    logs = tmp_path / "logs"
    paths = {"D": str(data), "L": str(logs), "P": str(save_teacher(**taught)) if taught else None}
    words = [paths.get(word, word) for word in shlex.split(f"{command} {smaller}")]
    if "--log_path" not in words:
        words += ["--log_path", str(logs)]
    result = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    kernel = f"lif on {available('lif')[0]}, "
    assert (kernel if "distill" in name else "kernels: none") in result.stdout
    (folder,) = logs.iterdir()
    assert_complete(folder, spiking="distill" in name)


def test_page_on_reproducing_has_these_commands():
    text = (REPOSITORY / "docs" / "reproduce.md").read_text(encoding="utf-8")
    page = " ".join(text.replace("\\\n", " ").split())
    assert [name for name, (command, *_) in COMMANDS.items() if f"python {command}" not in page] == []


def assert_complete(folder: Path, *, spiking: bool):
    config = json.loads((folder / "config.json").read_text())
    options, versions = config["options"], config["environment"]
    assert versions["torch"] == torch.__version__
    assert options["alpha" if spiking else "lr"] > 0
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, options["num_epoch"] + 1))
    columns = {"lr", "train_loss", "train_ce", "train_accuracy", "val_accuracy", "images_per_second", "data_wait"}
    plots = {"curves.png"}
    if spiking:
        columns |= {"train_ela", "train_sta", *(f"val_accuracy_t{t}" for t in range(1, options["T"] + 1))}
        plots |= {"accuracy_at_t.png", "spike_raster.png"}
        rates = [float(value) for name, value in rows[-1].items() if name.startswith("firing_rate/")]
        assert len(rates) >= 7  # resnet8, the smallest, has seven layers of neurons
        assert all(0 <= rate < 1 for rate in rates)
        assert rows[-1]["val_accuracy"] == rows[-1][f"val_accuracy_t{options['T']}"]
    assert columns <= set(rows[0])
    for plot in plots:
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    assert next(folder.glob("events.out.tfevents.*")).stat().st_size > 0
    best = torch.load(folder / "best.pt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in best["best_net"].values())
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == options["num_epoch"]


def test_digits_dvs_from_nothing_to_a_student(tmp_path):
    from seal_fast.train import evaluate
    from seal_fast.train.data import camera

    camera.write_digits(tmp_path / "data", per_class=2)
    shared = (
        f"--dataset DIGITS_DVS --data_path {tmp_path}/data --log_path {tmp_path}/logs --num_epoch 1 --num_workers 0"
    )
    assert teacher.main(f"{shared} --run_name teacher --train_batch_size 6".split()) == 0
    student = f"{shared} --run_name student --train_batch_size 6 --T 3 --tea_path {tmp_path}/logs/teacher"
    assert distill.main(student.split()) == 0
    assert_complete(tmp_path / "logs" / "student", spiking=True)
    assert evaluate.main(f"{tmp_path}/logs/student --T 4".split()) == 0


@pytest.mark.parametrize("program", ["seal-fast-teacher", "seal-fast-distill", "seal-fast-evaluate", "seal-fast-demo"])
def test_console_scripts_explain_themselves(program):
    script = Path(sys.executable).with_name(program)
    result = subprocess.run([script, "--help"], capture_output=True, encoding="utf-8", timeout=60)
    assert result.returncode == 0
    assert ("--json" if "evaluate" in program else "--log_path") in result.stdout
