import re

import pytest

from seal_fast.train import demo


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT must be a whole number"),
    ],
)
def test_what_is_missing_is_said_before_anything_else(variables, expected, monkeypatch, tmp_path, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert demo.main(["--log_path", str(tmp_path / "logs")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert f"seal-fast-demo: error: {expected}" in output.err


def test_table_shows_accuracy_at_each_step_and_the_firing_rate():
    shown = demo.table([("teacher", [0.99, 0.99], None), ("SNN, seal", [0.5, 0.975], 0.125)], 2)
    header, teacher, student = shown.splitlines()
    assert header.split()[-8:] == ["t", "=", "1", "t", "=", "2", "firing", "rate"]
    assert teacher.split() == ["teacher", "99.00%", "99.00%", "-"]
    assert student.split() == ["SNN,", "seal", "50.00%", "97.50%", "12.5%"]


def test_demo_runs_from_teacher_to_table(tmp_path, capsys):
    assert demo.main(["--log_path", str(tmp_path), "--num_epoch", "1", "--T", "2"]) == 0
    shown = capsys.readouterr().out
    for name in ("teacher", "SNN, labels only", "SNN, uniform kd", "SNN, seal"):
        assert re.search(rf"^{name} +[\d.]+% +[\d.]+% +(-|[\d.]+%)$", shown, re.MULTILINE), shown


def test_demo_finds_mistakes_before_it_trains(tmp_path, capsys):
    assert demo.main(["--log_path", str(tmp_path), "--T", "0"]) == 2
    assert "--T must be at least 1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_demo_reaches_its_accuracies(tmp_path, capsys):
    assert demo.main(["--log_path", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    last = {
        name: float(re.search(rf"^{name} .* ([\d.]+)% +(?:-|[\d.]+%)$", table, re.MULTILINE)[1])
        for name in ("teacher", "SNN, labels only", "SNN, uniform kd", "SNN, seal")
    }
    assert last["teacher"] >= 97
    assert last["SNN, seal"] >= 95
    assert len(list(tmp_path.glob("*/spike_raster.png"))) == 3
