"""The figures of README and of docs/cost.md are those of the committed table."""

import re
from pathlib import Path
from statistics import mean, stdev

import pytest

import quality
import tables
from figures import exponent
from gpu import report

ROOT = Path(__file__).parents[2]
WHOLE, COST = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/cost.md"))
GPU = WHOLE.split("### On a GPU")[1].split("### On a processor")[0]
README = WHOLE.replace(GPU, "")
TABLE = tables.read(tables.FOLDER / re.search(r"benchmarks/results/(\S+\.csv)", README)[1])
STEP = "training step, resnet18-cifar: resnet18 <- resnet34, T 4, 32 x [3, 32, 32]"
STEPS = {
    "published formulation, eager float32": "published, eager",
    "SpikingJelly 2.0.0, tuned: bfloat16, channels_last": "tuned control",
    "seal-fast, float32": "ours, float32",
    "seal-fast, bfloat16": "ours, bfloat16",
    "seal-fast, bfloat16, packed spikes": "ours, bfloat16, packed",
}
INFERENCE = "inference, resnet18-cifar: resnet18, T 4, 32 x [3, 32, 32]"
EVALUATIONS = {
    "published evaluation, eager float32": "published, eager",
    "seal-fast evaluation, float32": "ours, float32",
    "seal-fast evaluation, bfloat16": "ours, bfloat16",
    "seal-fast evaluation, float32, dense convolutions": "ours, float32, dense",
    "seal-fast evaluation, bfloat16, dense convolutions": "ours, bfloat16, dense",
}
KERNELS = {
    "LIF, float32 [4, 32, 64, 32, 32]": (
        "lif",
        "lif both, resnet18.layer1, T 4, f32, contiguous",
        "SpikingJelly 2.0.0",
    ),
    "loss [4, 128, 100]": ("seal_loss", "seal_loss both, cifar100", "published, eager"),
    "loss [4, 512, 1000]": ("seal_loss", "seal_loss both, imagenet", "published, eager"),
}


def cells(name):
    """The cells of README's row that begins with this name."""
    (row,) = re.findall(rf"^\| {re.escape(name)} \|(.+)\|$", README, re.MULTILINE)
    return [cell.strip() for cell in row.split("|")]


@pytest.mark.parametrize("name", STEPS)
def test_training_step(name):
    def found(quantity):
        return tables.find(TABLE, "train", STEP, STEPS[name], quantity)

    expected = [
        found("time").inverse().shown(".1f", 32),
        "" if STEPS[name] == "published, eager" else found("time_of_first").inverse().shown(".2f"),
        found("time_of_floor").shown(".2f"),
        f"{found('peak_bytes').median / 2**20:,.0f} MiB",
        f"{found('kept_bytes_per_neuron_step').median:.1f}",
    ]
    assert cells(name) == expected


@pytest.mark.parametrize("name", EVALUATIONS)
def test_inference(name):
    def found(quantity):
        return tables.find(TABLE, "inference", INFERENCE, EVALUATIONS[name], quantity)

    assert cells(name) == [
        found("time").inverse().shown(".1f", 32),
        "" if EVALUATIONS[name] == "published, eager" else found("time_of_first").inverse().shown(".2f"),
        found("time_of_floor").shown(".2f"),
    ]


def test_firing_rates():
    shown = re.findall(r"([\d.]+) % of the neurons fire", README)
    groups = [("train", STEP), ("inference", INFERENCE)]
    rates = [tables.find(TABLE, *group, "published, eager", "firing_rate").median for group in groups]
    assert shown == [f"{100 * rate:.1f}" for rate in rates]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name):
    benchmark, group, peer = KERNELS[name]
    ours, theirs = (tables.find(TABLE, benchmark, group, contestant, "time") for contestant in ("seal-fast cpu", peer))
    faster = tables.find(TABLE, benchmark, group, peer, "time_of_first")
    assert cells(name) == [f"{1e3 * ours.median:.2f} ms", f"{1e3 * theirs.median:.2f} ms", faster.shown(".1f")]


def test_figures_of_a_gpu():
    """README and docs/cost.md have the tables that gpu.report makes of the committed runs."""
    found = report.entries(*(ROOT / path for path in re.findall(r"benchmarks/results/\S+?\.jsonl", GPU)))
    for place, shown in ((GPU, (report.steps, report.operators)), (COST, (report.kernels,))):
        for table in shown:
            assert "\n".join(table(found)) in place
    assert {entry["gpu"].partition(",")[0] for entry in found if "gpu" in entry} == {"NVIDIA H200"}
    (versions,) = (entry["versions"] for entry in found if "versions" in entry)
    for package, name in (("torch", "PyTorch"), ("triton", "Triton"), ("spikingjelly", "SpikingJelly")):
        assert f"{name} {versions[package].removesuffix('.0')}" in GPU


def test_every_row_is_compared():
    rows = re.findall(r"^\| ([^|]+?) \| [\d.]+ ", README, re.MULTILINE)
    assert set(rows) == {*STEPS, *EVALUATIONS, *KERNELS}


def test_conditions_are_those_of_the_table():
    speed = README.split("## Speed")[1].split("\n## ")[0]
    (versions,) = {row["versions"] for row in TABLE}
    torch = re.search(r"torch ([\d.]+)", versions)[1]
    assert f"PyTorch {torch}" in speed
    assert {row["machine"] for row in TABLE} == {"AMD EPYC, 2 threads"}
    assert "two cores of an AMD EPYC" in speed


def test_growth():
    """docs/cost.md names the exponents that make bench prints."""
    text = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (.+ over \S+) \| .+? to .+? \| ([\d.]+) \| ([\d.]+)[ ,|]", text, re.MULTILINE)
    times = {}
    for row in TABLE:
        if (row["benchmark"], row["quantity"]) == ("scaling", "time"):
            study, size = row["group"].split(": ")
            times.setdefault(study, {}).setdefault(row["contestant"], {})[float(size)] = tables.figure_of(row)
    names = {"LIF": "lif", "loss": "seal_loss", "batch": "B", "channels": "C"}
    assert len(shown) == len(times)
    (one_step,) = [row for row in TABLE if (row["group"], row["quantity"]) == ("blocks over T: 1", "time_of_first")]
    assert f"({one_step['value']:.2f} times the published speed)" in text
    for study, *exponents in shown:
        contestants = times[" ".join(names.get(word, word) for word in study.split())]
        assert exponents == [f"{exponent(points).median:.2f}" for points in contestants.values()], study


@pytest.mark.parametrize("objective", quality.OBJECTIVES)
def test_accuracy(objective):
    """docs/cost.md has the means and deviations of all seeds, and none falls by more than a deviation."""
    text = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {objective} \| (.+) \|$", text, re.MULTILINE)
    expected = []
    for dataset in quality.SETTINGS:
        found = {name: [] for name in quality.ARITHMETIC}
        for run in quality.read(tables.FOLDER / f"quality-{dataset}.csv"):
            if run["objective"] == objective:
                found[run["arithmetic"]].append(100 * float(run["accuracy"]))
        means, spreads = ([function(values) for values in found.values()] for function in (mean, stdev))
        assert all(len(values) >= 5 for values in found.values())
        assert means[0] > means[1] - max(spreads)
        expected += [f"{value:.2f} ± {spread:.2f}" for value, spread in zip(means, spreads, strict=True)]
    assert row.split(" | ") == expected
