"""Kernels compiled without a GPU, for a machine with one where time is short: `make gpu-kernels`.

    python -m gpu.prebuilt [--output FILE] [--stages NAME,...]

Runs the stages of `make gpu` on a fake GPU (fake.py), so that every kernel that they start is compiled, and packs
the caches of Triton and of kernels/launch/cupy.py into one file, which `make gpu` uses where its keys are those of the
compilers there: it must be made with the versions of torch, Triton and CuPy that the GPU's machine has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from pathlib import Path

from gpu import fake
from gpu.run import run
from gpu.stages import REHEARSAL, ROOT, Stage, all_stages

FILE = ROOT / "build" / "gpu-kernels.tar.xz"
CACHES = {"triton": "TRITON_CACHE_DIR", "cupy": "CUPY_CACHE_DIR"}
NEEDED = (".cubin", ".json", ".so")  # of what Triton keeps: the rest are steps on the way to the cubin
GROUP = "__grp__"  # begins the names of Triton's files that hold the paths of a kernel's other files
SOURCES = (".py", ".cu", ".cuh", ".h")
UNKNOWN = "unknown: "
LIMIT = 3600  # seconds for all stages, a bound against hanging


def commit() -> str:
    """The commit of the tree, with "-changed" where files were, or an empty string where git does not tell."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("-changed" if changed.stdout.strip() else "")


def keys(capability: tuple[int, int] = fake.CAPABILITY) -> dict[str, str]:
    """What the compiled kernels of each backend depend on beside their source: equal keys, equal kernels.

    Where a compiler cannot be asked, its key says why.
    """
    found = {}
    for name, ask in (("triton", _triton_key), ("cupy", _nvrtc_key)):
        try:
            found[name] = ask(10 * capability[0] + capability[1])
        except Exception as error:
            found[name] = f"{UNKNOWN}{error}"
    return found


def sources() -> str:
    """A checksum of the kernels' sources."""
    checksum = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "kernels").rglob("*") if path.suffix in SOURCES):
        checksum.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return checksum.hexdigest()[:12]


def _triton_key(architecture: int) -> str:
    from triton import __version__
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # before Triton 3.5
        from triton.compiler.compiler import triton_key
    text = f"{triton_key()} {make_backend(GPUTarget('cuda', architecture, 32)).hash()}"
    return f"{__version__} {hashlib.sha256(text.encode()).hexdigest()[:12]} {sysconfig.get_config_var('EXT_SUFFIX')}"


def _nvrtc_key(architecture: int) -> str:
    from cupy.cuda import nvrtc

    return f"NVRTC {'.'.join(map(str, nvrtc.getVersion()))} sm_{architecture}"


def environment(folder: Path) -> dict[str, str]:
    """What makes a process keep its kernels in `folder`."""
    return {variable: str(folder / name) for name, variable in CACHES.items()}


def pack(folder: Path, file: Path, facts: dict) -> dict:
    """Write the caches in `folder` to `file`, with paths that do not depend on where they are; return the manifest."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for path in sorted(folder.rglob("*")):
            place = root / path.relative_to(folder)
            if path.is_dir() or (path.is_relative_to(folder / "triton") and path.suffix not in NEEDED):
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.name.startswith(GROUP):
                names = json.loads(path.read_text(encoding="utf-8"))["child_paths"]
                kept = {name: name for name in names if name.endswith(NEEDED)}
                place.write_text(json.dumps({"child_paths": kept}), encoding="utf-8")
            else:
                shutil.copyfile(path, place)
        manifest = {**facts, "kernels": counted(root)}
        (root / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        with tarfile.open(partial, "w:xz", preset=6) as archive:
            archive.add(root, ".")
        os.replace(partial, file)
    return manifest


def unpack(file: Path, folder: Path) -> dict:
    """Lay the caches out in `folder`, as Triton wants them there, and return the manifest."""
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data")
    for group in (folder / "triton").glob(f"*/{GROUP}*"):
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        paths = {name: str(group.parent / name) for name in names}
        group.write_text(json.dumps({"child_paths": paths}), encoding="utf-8")
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def counted(folder: Path) -> dict[str, int]:
    """How many kernels the caches in `folder` hold, by backend."""
    patterns = {"triton": "triton/*/*.cubin", "cupy": "cupy/*.kernel"}
    return {name: len(list(folder.glob(pattern))) for name, pattern in patterns.items()}


def use(file: Path, folder: Path, capability: tuple[int, int]) -> tuple[dict[str, str], str]:
    """Lay out what fits this machine.

    Args:
        file: What `pack` wrote; it need not exist.
        folder: For the caches.
        capability: Of the GPU.

    Returns:
        Variables of the environment with which the kernels are found, and a sentence a backend that says whether its
        kernels are used; both are empty where there is no file.
    """
    if not file.exists():
        return {}, ""
    try:
        manifest = unpack(file, folder)
    except Exception as error:  # whatever is wrong with it, the run goes on
        return {}, f"{file} cannot be used: {error}"
    own, places = keys(capability), environment(folder)
    used, said = {}, [f"Compiled beforehand, of commit {manifest['commit']}:"]
    for name, variable in CACHES.items():
        count, key = manifest["kernels"][name], manifest["keys"][name]
        if key == own[name] and not key.startswith(UNKNOWN):
            used[variable] = places[variable]
            said.append(f"{count} kernels of {name} are used.")
        else:
            said.append(f"{count} kernels of {name} are not: they are of {key}, and here is {own[name]}.")
    if manifest["sources"] != sources():
        said.append("Sources of kernels have changed since; what they make is compiled here.")
    return used, " ".join(said)


def build(file: Path, stages: dict[str, Stage], results: Path) -> dict:
    """Compile the kernels of stages that rehearse, as many at once as there are processors; pack them into `file`.

    Returns:
        The manifest. `results` gets what the stages found and printed.
    """
    begun = time.monotonic()
    jobs = tuple(job for stage in stages.values() for job in stage.jobs)
    alone = tuple(job for job in jobs if any("numprocesses" in word for word in job.command))
    beside = tuple(job for job in jobs if job not in alone)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ordered = {"beside": Stage(LIMIT, beside, os.cpu_count() or 1), "alone": Stage(LIMIT, alone)}
        run(ordered, results, 2 * LIMIT, {**environment(folder), **REHEARSAL})
        facts = {"commit": commit(), "keys": keys(), "sources": sources()}
        return pack(folder, file, {**facts, "seconds": round(time.monotonic() - begun)})


def main(arguments: list[str]) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE, help="the file to write (default: %(default)s)")
    parser.add_argument("--stages", help="of these stages only, separated by commas")
    options = parser.parse_args(arguments)
    stages = all_stages(rehearse=True)
    chosen = options.stages.split(",") if options.stages else list(stages)
    results = options.output.parent / "gpu-kernels"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    manifest = build(options.output, {name: stages[name] for name in chosen}, results)
    size = options.output.stat().st_size / 2**20
    print(f"{manifest['kernels']} in {manifest['seconds']} s; {options.output} has {size:.1f} MiB")
    return 0 if any(manifest["kernels"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
