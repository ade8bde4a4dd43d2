"""The short table at the end of a run: one line a thing, the worst of what was found; the rest is in the files."""

from __future__ import annotations

import collections
import re

MOST = 11_000  # characters
FAILURES = 12  # failed tests that are named, of a stage
EXACT = {"spikes", "evaluated", "bits", "differing"}  # how many entries differ, or which share of them


SHORTER = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "contiguous_format": "nchw", "channels_last": "nhwc"}


def text(entries: list[dict]) -> str:
    """The table of a run's entries."""
    parts = [_machine, _smoke, _tests, _times, _steps, _peers, _jobs, _kernels]
    whole = "\n".join(line[:240] for part in parts for line in part(entries))
    for name, shorter in SHORTER.items():
        whole = whole.replace(name, shorter)
    return whole


def short(entries: list[dict]) -> str:
    """The table in at most MOST characters: without candidates and profiles, and cut in the middle if it must be."""
    whole = text([entry for entry in entries if "candidate" not in entry and "profiled" not in entry])
    whole = re.sub(" {3,}", "  ", whole)
    return whole if len(whole) <= MOST else whole[: MOST // 2] + "\n[... see table.txt]\n" + whole[-MOST // 2 :]


def _of(entries, stage):
    return [entry for entry in entries if entry["stage"] == stage and "ended" not in entry]


def _machine(entries):
    known = {name: value for entry in _of(entries, "machine") for name, value in entry.items()}
    if not known:
        return
    names = ("gpu", "nvidia_smi", "commit", "copy_TB_s", "failed")
    yield "machine  " + "; ".join(_shown(known[name]) for name in names if known.get(name))
    yield "         " + ", ".join(f"{name} {number}" for name, number in known.get("versions", {}).items())


def _smoke(entries):
    groups = collections.defaultdict(list)
    for entry in _of(entries, "smoke"):
        groups[entry["operator"], entry["backend"], str(entry.get("dtype", "")).removeprefix("torch.")].append(entry)
    for group, found in sorted(groups.items()):
        worst: dict[str, float] = {}
        for entry in found:
            for name, value in entry.items():
                if isinstance(value, float) or name in EXACT:
                    # NaN is the worst of all.
                    worst[name] = value if value != value else max(worst.get(name, 0), value)
        failed = [entry["failed"] for entry in found if "failed" in entry]
        numbers = "  ".join(f"{name} {value:.1e}" for name, value in worst.items())
        yield f"smoke    {' '.join(group):28s} {len(found)} cases  {numbers}" + _failed(failed)


def _tests(entries):
    for stage in ("tests", "values"):
        found = _of(entries, stage)
        counts = [entry["counts"] for entry in found if "counts" in entry]
        failed = [entry for entry in found if "test" in entry]
        if found:
            yield f"{stage:8s} {counts[-1] if counts else 'did not end'}; {len(failed)} failed"
        for entry in failed[:FAILURES]:
            yield f"         {entry['test'].rpartition('/')[2]}: {entry['failed'][:110]}"


def _case(entry):
    facts = ("operator", "backend", "contestant", "precision", "dtype", "layout", "shape", "candidate")
    return " ".join(_shown(entry[fact]) for fact in facts if fact in entry) + (
        " + residual" if entry.get("residual") else ""
    )


def _times(entries):
    for entry in _of(entries, "times"):
        if "profiled" in entry:
            continue
        name = _case(entry)
        figures = [f"{entry['copy_TB_s']:.2f} TB/s"] if "copy_TB_s" in entry else []
        for key, value in entry.items():
            if key.endswith("_ms") and not key.endswith(("best_ms", "host_ms", "wall_ms")):
                call = key.removesuffix("_ms")
                rate, host = entry.get(f"{call}_TB_s"), entry.get(f"{call}_host_ms", 0)
                speed = f" {rate:.2f} TB/s" if rate else ""
                figures.append(f"{call} {value:.3f} ms{speed} host {host:.2f}")
        yield f"times    {name:50s} {'  '.join(figures)}{_failed(_reasons(entry))}"


def _steps(entries):
    for entry in _of(entries, "steps"):
        name = f"{entry['contestant']} {entry['precision']}"
        name += "".join(f", {flag}" for flag in ("graph", "packed", "overlap") if entry.get(flag))
        losses = " ".join(f"{loss:.4f}" for loss in entry.get("losses", ()))
        yield f"step     {name:40s} {_step(entry)}  {losses}".rstrip()


def _peers(entries):
    for entry in _of(entries, "peers"):
        yield f"peers    {_case(entry) + (', graph' if entry.get('graph') else ''):66s} {_step(entry)}"


def _kernels(entries):
    for entry in entries:
        for key in [key for key in entry if key.endswith("_kernels")]:
            shown = [f"{time:.1f} us {count:g} x {_kernel(name)}" for name, count, time in entry[key][:8]]
            yield f"kernels  {_case(entry)} {key.removesuffix('_kernels')}: {', '.join(shown)}"
        if "profiled" in entry and "failed" in entry:
            yield f"kernels  {_case(entry)} {_failed(_reasons(entry))}"


def _kernel(name):
    return re.sub(r"^void |[<(].*", "", name)[:40]


def _step(entry):
    units = {
        "ms": "ms",
        "host_ms": "ms host",
        "wall_ms": "ms wall",
        "images_s": "images/s",
        "peak_MiB": "MiB",
    }
    figures = [f"{entry[name]:.4g} {unit}" for name, unit in units.items() if name in entry]
    return "  ".join(figures) + _failed(_reasons(entry))


def _jobs(entries):
    for entry in entries:
        if "ended" in entry:
            took = f"{entry['seconds']:.0f} s" if "seconds" in entry else ""
            if entry["ended"] != "ok" or entry["stage"] not in ("smoke", "times"):
                yield f"ended    {entry['stage']}: {entry.get('job', '')}: {entry['ended']} {took}".rstrip()


def _reasons(entry):
    return [entry["failed"]] if "failed" in entry else []


def _failed(reasons):
    return f"  {len(reasons)} FAILED: {reasons[0][:120]}" if reasons else ""


def _shown(value):
    return f"{value:.2f} TB/s copied" if isinstance(value, float) else str(value).removeprefix("torch.")
