"""The table of a machine's figures: what is written is read, and runs are compared."""

import pytest

import tables

ROW = {
    "benchmark": "lif",
    "group": "lif both, T 4",
    "contestant": "a, b",
    "first": "c",
    "quantity": "time",
    "value": 0.25,
    "low": 0.125,
    "high": 0.5,
    "unit": "s",
    "rounds": 3,
    "machine": "m",
    "versions": "torch 2, numpy 2",
    "commit": "c",
    "date": "d",
}


def test_rows_come_back(tmp_path):
    rows = [ROW, {**ROW, "quantity": "kept_bytes", "value": 12.0, "low": None, "high": None, "rounds": None}]
    tables.write(tmp_path / "a" / "b.csv", rows)
    assert tables.read(tmp_path / "a" / "b.csv") == rows
    assert tables.find(rows, "lif", "lif both", "a, b", "time") == (0.25, 0.125, 0.5, 3)
    assert tables.find(rows, "lif", "lif both", "a, b", "kept_bytes") == (12, None, None, None)
    with pytest.raises(LookupError, match="0 rows for lif, lif both, nobody, time"):
        tables.find(rows, "lif", "lif both", "nobody", "time")


@pytest.mark.parametrize(("low", "high", "differs"), [(0.4, 0.6, False), (0.51, 0.6, True), (0.01, 0.1, True)])
def test_runs_differ_where_their_spreads_lie_apart(low, high, differs):
    other = {**ROW, "low": low, "high": high, "value": (low + high) / 2}
    found, compared = tables.differences([ROW], [other, {**other, "group": "alone"}, {**other, "quantity": "new"}], "s")
    assert compared == 1
    assert bool(found) == differs
    assert tables.differences([ROW], [other], "1") == ([], 0)


def test_ratios_to_another_first_are_not_compared():
    ratio = {**ROW, "quantity": "time_of_first", "unit": "1"}
    apart = {**ratio, "low": 5.0, "high": 6.0}
    assert tables.differences([ratio], [apart], "1")[1] == 1
    assert tables.differences([ratio], [{**apart, "first": "d"}], "1") == ([], 0)
    assert tables.differences([ROW], [{**ROW, "first": "d"}], "s") == ([], 1)


def test_command_compares(tmp_path, capsys):
    for name, value in (("a", 0.25), ("b", 2.5)):
        check = {**ROW, "benchmark": "checks", "group": "tests", "value": 30.0, "low": None, "high": None}
        timed = {**ROW, "value": value, "low": value * 0.9, "high": value * 1.1}
        relative = {**ROW, "quantity": "time_of_first", "value": 3.0, "low": 2.0, "high": 4.0, "unit": "1"}
        tables.write(tmp_path / f"{name}.csv", [timed, relative, check])
    assert tables.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "a.csv")]) == 0
    capsys.readouterr()
    assert tables.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 1
    assert capsys.readouterr().out == (
        "0 of 1 relative figures differ by more than their spread\n"
        "1 of 1 times differ by more than their spread\n"
        "lif both, T 4, a, b, time: +900%\n"
    )


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("AMD EPYC, 2 threads", "amd-epyc-2-threads.csv"),
        ("NVIDIA H200, compute capability 9.0", "nvidia-h200.csv"),
        ("Intel(R) Xeon(R) @ 2.00GHz, 4 threads", "intel-r-xeon-r-2-00ghz-4-threads.csv"),
    ],
)
def test_each_machine_has_its_file(machine, name):
    assert tables.file_of(machine).name == name
