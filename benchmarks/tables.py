"""Figures of a machine as one tidy table: a row for each quantity of each contestant.

python benchmarks/tables.py FIGURES.json ...          pytest-benchmark's JSON -> results/MACHINE.csv, and plots
python benchmarks/tables.py compare A.csv B.csv       whether two runs agree within their spread
"""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

from figures import Figure

FOLDER = Path(__file__).parent / "results"
COLUMNS = (
    *("benchmark", "group", "contestant", "first", "quantity", "value", "low", "high", "unit", "rounds"),
    *("machine", "versions", "commit", "date"),
)
# What a benchmark notes about a contestant, and the unit.
QUANTITIES = {
    "time": "s",
    "best_time": "s",
    "time_of_first": "1",
    "time_of_floor": "1",
    "share_of_copy_bandwidth": "1",
    "peak_bytes": "B",
    "kept_bytes": "B",
    "kept_bytes_per_neuron_step": "B",
    "kernels": "1",
    "torch_operations": "1",
    "turning_rate": "1",
    "firing_rate": "1",
    **{f"{part}_seconds": "s" for part in ("convolutions", "teacher", "loss", "rest", "data_wait")},
}


def rows(content: dict) -> list[dict]:
    """Rows of what pytest-benchmark wrote: numbers, and figures with their low and high."""
    found = []
    facts = content["machine_info"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    commit = content["commit_info"]
    shared = {
        "machine": facts.get("gpu") or facts["cpu"],
        "versions": versions,
        "commit": f"{commit['id'][:12]}{'-changed' if commit['dirty'] else ''}",
        "date": content["datetime"][:10],
    }
    for entry in content["benchmarks"]:
        extra, times = entry["extra_info"], entry["stats"]
        own = {
            **shared,
            "benchmark": Path(entry["fullname"].split("::")[0]).stem.removeprefix("bench_"),
            "group": entry["group"],
            "contestant": extra["contestant"],
            "first": extra["first"],
        }
        noted = {**extra, "best_time": times["min"]}
        for name, unit in QUANTITIES.items():
            if noted.get(name) is not None:
                cells = noted[name] if isinstance(noted[name], list) else [noted[name], None, None, None]
                measured = dict(zip(("value", "low", "high", "rounds"), cells, strict=True))
                found.append({**own, "quantity": name, "unit": unit, **measured})
    return found


def file_of(machine: str) -> Path:
    """Where the figures of a machine are kept."""
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', machine.split(', compute')[0].lower()).strip('-')}.csv"


def write(path: Path, table: list[dict]) -> None:
    """Write rows to a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in table:
            writer.writerow({name: _text(row.get(name)) for name in COLUMNS})


def _text(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)


def read(path: Path) -> list[dict]:
    """Rows of a CSV file, their numbers as such."""
    with open(path, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    for row in table:
        for name in ("value", "low", "high"):
            row[name] = float(row[name]) if row[name] else None
        row["rounds"] = int(row["rounds"]) if row["rounds"] else None
    return table


def figure_of(row: dict) -> Figure:
    """What a row holds; spread and rounds are None where it was measured once."""
    return Figure(row["value"], row["low"], row["high"], row["rounds"])


def find(table: list[dict], benchmark: str, group: str, contestant: str, quantity: str) -> Figure:
    """One figure; `group` is the beginning of its name."""
    found = [
        figure_of(row)
        for row in table
        if (row["benchmark"], row["contestant"], row["quantity"]) == (benchmark, contestant, quantity)
        and row["group"].startswith(group)
    ]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows for {benchmark}, {group}, {contestant}, {quantity} instead of one.")
    return found[0]


def differences(first: list[dict], second: list[dict], unit: str) -> tuple[list[str], int]:
    """Figures in `unit` whose spreads in two tables lie apart, in words; and how many were compared.

    What is relative to the first contestant is compared where that was the same.
    """

    def key(row):
        of = row.get("first") if row["quantity"] == "time_of_first" else None
        return row["benchmark"], row["group"], row["contestant"], row["quantity"], of

    before = {key(row): row for row in first}
    found, compared = [], 0
    for row in second:
        other = before.get(key(row))
        if other is None or row["unit"] != unit or row["low"] is None or other["low"] is None:
            continue
        compared += 1
        if figure_of(row).differs(figure_of(other)):
            change = row["value"] / other["value"] - 1
            found.append(f"{row['group']}, {row['contestant']}, {row['quantity']}: {change:+.0%}")
    return found, compared


def compare(first: list[dict], second: list[dict]) -> bool:
    """Print which figures of two runs differ by more than their spread; return whether any does.

    Times follow the machine, which others may share. What is relative to another contestant of the same rounds is
    compared apart from them.
    """
    differ = False
    for kind, unit in {"relative figures": "1", "times": "s"}.items():
        found, compared = differences(first, second, unit)
        print("\n".join([f"{len(found)} of {compared} {kind} differ by more than their spread", *found]))
        differ = differ or bool(found)
    return differ


def main(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    if arguments[:1] == ["compare"] and len(arguments) == 3:
        return 1 if compare(*(read(Path(name)) for name in arguments[1:])) else 0
    if not arguments or arguments[0] == "compare":
        print(__doc__.strip())
        return 2
    save([json.loads(Path(name).read_text(encoding="utf-8")) for name in arguments])
    return 0


def save(contents: list[dict], checks: list[dict] = (), folder: Path = FOLDER) -> Path:
    """Write figures, and which checks passed before them, to their machine's table, and its plots beside it.

    Returns:
        The table's path.
    """
    import plots

    table = [row for content in contents for row in rows(content)]
    shared = {name: table[0][name] for name in ("machine", "versions", "commit", "date")}
    for step in checks:
        own = {**shared, "benchmark": "checks", "group": step["step"]}
        table.append({**own, "quantity": "passed", "value": float(step["passed"]), "unit": "1"})
        table.append({**own, "quantity": "time", "value": step["seconds"], "unit": "s"})
    path = folder / file_of(shared["machine"]).name
    write(path, table)
    plots.draw(read(path), path.with_suffix(""))
    print(f"\n==> {path}, and plots in {path.with_suffix('')}", flush=True)
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
