"""All that a GPU is asked, in one command that needs no network: make gpu.

Runs stages: processes with a time limit each, none of which waits for another to be right. Each writes what it finds as
it finds it, errors as numbers: what is right and fast enough is judged afterwards. A table is printed at the end.

    python -m gpu [--seconds 540] [--stages smoke,times] [--jobs 'lif triton'] [--results FOLDER]

The folder, benchmarks/results/<gpu> or $OUT, gets results.jsonl (every figure, a JSON object a line), table.txt and
log.txt. Exits with 1 where a stage did not end well, and with 2 where nothing could begin.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpu import prebuilt, record, table
from gpu.fake import CAPABILITY
from gpu.run import read, run
from gpu.stages import REHEARSAL, ROOT, Stage, all_stages

BEGUN = time.monotonic()


def main(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="make gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=540, help="for all stages together (default: %(default)s)")
    parser.add_argument("--stages", help="only these, separated by commas")
    parser.add_argument("--jobs", type=_pattern, help="only processes in whose names this regular expression is found")
    parser.add_argument("--results", type=Path, help="folder for what is found")
    parser.add_argument(
        "--kernels", type=Path, default=prebuilt.FILE, help="kernels compiled beforehand (default: %(default)s)"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a fake GPU: kernels are compiled, not started")
    options = parser.parse_args(arguments)
    stages = all_stages(rehearse=options.rehearse)
    chosen = options.stages.split(",") if options.stages else list(stages)
    unknown = [name for name in chosen if name not in stages]
    if unknown:
        print(f"stages are {', '.join(stages)}; got {unknown[0]!r}.")
        return 2
    wanted = {name: _of(stages[name], options.jobs) for name in chosen}
    if options.jobs:
        wanted = {name: stage for name, stage in wanted.items() if stage.jobs}
    if not wanted:
        print(f"no process of these stages has a name in which {options.jobs.pattern!r} is found.")
        return 2
    if not options.rehearse and not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU that torch finds; without one, make test checks the kernels.")
        return 2
    folder = options.results or Path(os.environ.get("OUT") or _folder(options.rehearse))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt"):
        (folder / name).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="seal-fast-gpu-") as scratch:
        capability = CAPABILITY if options.rehearse else torch.cuda.get_device_capability()
        caches, said = prebuilt.use(options.kernels, Path(scratch) / "kernels", capability)
        os.environ[record.RESULTS] = str(folder / "results.jsonl")
        if said:
            print(said, flush=True)
            record.write(stage="machine", kernels=said)
        environment = {**caches, **(REHEARSAL if options.rehearse else {})}
        left = options.seconds - (time.monotonic() - BEGUN)
        run(wanted, folder, left, environment, lambda stage: _show(stage, folder))
    entries = read(folder)
    print(table.short(entries))
    return 0 if all(entry.get("ended") == "ok" for entry in entries if "ended" in entry) else 1


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def _of(stage: Stage, jobs: re.Pattern | None) -> Stage:
    kept = [job for job in stage.jobs if jobs is None or jobs.search(job.name)]
    return dataclasses.replace(stage, jobs=tuple(kept))


def _show(stage: str, folder: Path) -> None:
    """What there is so far, in the file, so that it is there whatever happens to this process."""
    entries = read(folder)
    (folder / "table.txt").write_text(table.text(entries) + "\n", encoding="utf-8")
    ended = [entry["ended"] for entry in entries if entry["stage"] == stage and "ended" in entry]
    wrong = [text for text in ended if text != "ok"]
    print(f"{time.monotonic() - BEGUN:4.0f} s  {stage}: {'; '.join(wrong) or 'ok'}", flush=True)


def _folder(rehearse: bool) -> Path:
    name = "rehearsal" if rehearse else re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / ("build" if rehearse else "benchmarks/results") / name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
