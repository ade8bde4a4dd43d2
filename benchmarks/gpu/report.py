"""The tables of README.md and docs/cost.md, from what a run on a GPU found.

python -m gpu.report benchmarks/results/nvidia-h200/figures.jsonl [FILE ...]

Of several files the findings are taken together.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

DTYPES = {"torch.float32": "float32", "torch.bfloat16": "bfloat16"}
LAYOUTS = {"torch.channels_last": "channels_last", "torch.contiguous_format": "contiguous"}
NEURON_STEPS = 4 * 256 * 64 * 32 * 32  # of the tensors whose kernels are timed
# operator, call and what the kernel's name contains -> what it is, and how many tensors of x's size it reads and writes
KERNELS = {
    ("lif", "forward", "forward"): ("LIF forward", 2),
    ("lif", "backward", "backward"): ("LIF backward", 3),
    ("bn_lif", "forward", "_statistics|moments"): ("batch norm statistics", 1),
    ("bn_lif", "forward", "_forward"): ("batch norm + LIF forward", 2),
    ("bn_lif", "backward", "_backward"): ("batch norm + LIF backward", 3),
    ("bn_lif", "backward", "normalised_gradient"): ("batch norm gradient", 3),
}
# What waits for the GPU in its middle: the time between two events is the host's, then.
WAITING = ("published, eager",)


def entries(*paths: str | Path) -> list[dict]:
    """What the runs found."""
    lines = [line for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def steps(found: list[dict]) -> Iterator[str]:
    """Training steps: rows of a table of what the run had, beside the published step if that was among it."""
    peers = {entry["contestant"]: entry for entry in found if entry.get("operator") == "training" and "ms" in entry}
    own = {
        (entry["contestant"], entry["graph"], entry.get("packed", False)): entry
        for entry in found
        if entry["stage"] == "steps"
        and entry.get("precision") == "bf16"
        and entry.get("overlap", entry["graph"]) == entry["graph"]  # the default
    }
    published, compiled = peers.get("published, eager"), peers.get("published, torch.compile")
    control = peers.get("tuned control", {"note": ""})
    floor = own["convolutions alone", True, False]
    rows = {
        "published formulation, eager float32": published,
        "published formulation, torch.compile": compiled,
        f"{control['note']}, the rest in bfloat16, channels_last": control if "ms" in control else None,
        "seal-fast, bfloat16, launched one by one": own["ours auto", False, False],
        "seal-fast, bfloat16, as one CUDA graph (default)": own["ours auto", True, False],
        "seal-fast, the same with packed spikes": own["ours auto", True, True],
        "convolutions and linear layers alone, launched one by one": own["convolutions alone", False, False],
        "convolutions and linear layers alone, as one CUDA graph": floor,
    }
    # The others find what earlier ones in their process left behind, as the packed steps of the first runs do.
    clean = [name for name in rows if name.startswith("published") or "(default)" in name]
    clean += [name for name in rows if "packed" in name and "before_MiB" in rows[name]]
    heads = ["step", "time", "images/s", "speed, published = 1", "time, last row = 1", "peak memory"]
    if published is None:
        del heads[3]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name, entry in rows.items():
        if entry is None:  # not in this run
            continue
        cells = [name, f"{entry['ms']:.2f} ms", f"{entry['images_s']:,.0f}"]
        cells += [f"{published['ms'] / entry['ms']:.2f}"] if published is not None else []
        cells += [f"{entry['ms'] / floor['ms']:.2f}", f"{entry['peak_MiB']:,.0f} MiB" if name in clean else ""]
        yield f"| {' | '.join(cells)} |"


def operators(found: list[dict]) -> Iterator[str]:
    """Forward with backward of each operator beside its fastest peer: rows of a table."""
    cases: dict[tuple, list[dict]] = {}
    for entry in found:
        if entry["stage"] == "peers" and entry.get("operator") in ("lif", "bn_lif", "seal_loss") and "ms" in entry:
            dtype, layout = DTYPES.get(entry.get("dtype"), ""), LAYOUTS.get(entry.get("layout"), "")
            shape = str(entry.get("shape", "")) if entry["operator"] == "seal_loss" else ""
            cases.setdefault((entry["operator"], dtype, layout, shape), []).append(entry)
    yield "| forward and backward | GPU, seal-fast | GPU, fastest peer | times faster | one call, both | times faster |"
    yield "|---|---|---|---|---|---|"
    names = {"lif": "LIF", "bn_lif": "batch norm + LIF", "seal_loss": "loss"}
    for (operator, *case), group in cases.items():
        ours, theirs = (
            min((entry for entry in group if _own(entry) == own), key=lambda entry: entry["ms"])
            for own in (True, False)
        )
        name = ", ".join(filter(None, (names[operator], *case)))
        waits = theirs["contestant"] in WAITING
        cells = [
            name,
            f"{_time(ours['ms'])}, {ours['contestant'].split()[-1]}",
            theirs["contestant"] if waits else f"{_time(theirs['ms'])}, {theirs['contestant']}",
            "" if waits else f"{theirs['ms'] / ours['ms']:.1f}",
            f"{_time(ours['wall_ms'])}, {_time(theirs['wall_ms'])}",
            f"{theirs['wall_ms'] / ours['wall_ms']:.1f}",
        ]
        yield f"| {' | '.join(cells)} |"


def _own(entry: dict) -> bool:
    return entry["contestant"].startswith("seal-fast")


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.3f} ms" if milliseconds < 1 else f"{milliseconds:.2f} ms"


def kernels(found: list[dict]) -> Iterator[str]:
    """Each kernel, by the profiler, beside the time of a copy of as many bytes: rows of a table."""
    copied = max(entry["copy_TB_s"] for entry in found if "copy_TB_s" in entry)
    rows: dict[tuple, dict[str, str]] = {}
    for entry in found:
        if entry["stage"] != "times" or not entry.get("profiled") or entry.get("residual") or "candidate" in entry:
            continue
        dtype, layout = DTYPES[entry["dtype"]], LAYOUTS.get(entry.get("layout"), "any")
        for (operator, call, pattern), (name, tensors) in KERNELS.items():
            for kernel, _, time in entry.get(f"{call}_kernels", ()) if operator == entry["operator"] else ():
                if "at::" not in kernel and re.search(pattern, _name(kernel)):
                    predicted = tensors * NEURON_STEPS * (4 if dtype == "float32" else 2) / copied / 1e6
                    row = rows.setdefault((name, dtype, layout, f"{predicted:.1f} us"), {})
                    row[entry["backend"]] = f"{time:.1f} us, {predicted / time:.0%}"
    yield "| kernel | dtype | layout | predicted | Triton | CuPy |"
    yield "|---|---|---|---|---|---|"
    for facts, times in rows.items():
        yield f"| {' | '.join(facts)} | {times.get('triton', '')} | {times.get('cupy', '')} |"


def _name(kernel: str) -> str:
    """Of a kernel, without its result, template arguments and parameters."""
    return re.sub(r"^void |[<(].*", "", kernel)


TABLES: tuple[Callable[[list[dict]], Iterator[str]], ...] = (steps, operators, kernels)

if __name__ == "__main__":
    for table in TABLES:
        rows = list(table(entries(*sys.argv[1:])))
        if len(rows) > 2:  # the run had some of what it shows
            print("\n".join(rows), end="\n\n")
