"""The table of a machine's figures: what is written is read, fits are right, and runs are compared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tables

ROW = {
    "benchmark": "lif",
    "group": "lif both, T 4",
    "contestant": "a, b",
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
    rows = [ROW, {**ROW, "quantity": "kept_bytes", "value": 12.0, "low": None, "high": None}]
    tables.write(tmp_path / "a" / "b.csv", rows)
    assert tables.read(tmp_path / "a" / "b.csv") == [{**row, "rounds": "3"} for row in rows]
    assert tables.value(rows, "lif", "lif both", "a, b", "kept_bytes") == 12
    with pytest.raises(LookupError, match="0 rows for lif, lif both, nobody, time"):
        tables.value(rows, "lif", "lif both", "nobody", "time")


@given(st.floats(-1, 3), st.floats(1e-6, 1e3), st.integers(2, 9))
def test_exponent_of_a_power(power, factor, count):
    times = {2.0**size: factor * 2.0 ** (size * power) for size in range(count)}
    assert tables.exponent(times) == pytest.approx(power, abs=1e-9)  # measured 1e-13


def test_exponent_is_that_of_the_larger_half():
    times = {1: 1.0, 2: 1.0, 4: 1.0, 8: 4.0, 16: 16.0, 32: 64.0, 64: 256.0}
    assert tables.exponent(times) == pytest.approx(2)


@pytest.mark.parametrize(("low", "high", "differs"), [(0.4, 0.6, False), (0.51, 0.6, True), (0.01, 0.1, True)])
def test_runs_differ_where_their_spreads_lie_apart(low, high, differs):
    other = {**ROW, "low": low, "high": high, "value": (low + high) / 2}
    found, compared = tables.differences([ROW], [other, {**other, "group": "alone"}])
    assert compared == 1
    assert bool(found) == differs


def test_command_compares(tmp_path, capsys):
    for name, value in (("a", 0.25), ("b", 2.5)):
        check = {**ROW, "benchmark": "checks", "group": "tests", "value": 30.0, "low": None, "high": None}
        timed = {**ROW, "value": value, "low": value * 0.9, "high": value * 1.1}
        tables.write(tmp_path / f"{name}.csv", [timed, check])
    assert tables.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "a.csv")]) == 0
    assert tables.main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]) == 1
    assert "1 of 1 times differ by more than their spread\nlif both, T 4, a, b: +900%" in capsys.readouterr().out


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
