"""A training run from its options to its folder: what both trainers share."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from seal_fast import __version__, reuse_freed_memory
from seal_fast.train import checkpoint, data, plots
from seal_fast.train.engine import TrainingError, evaluate, train_epoch
from seal_fast.train.feed import Feed
from seal_fast.train.options import FREE_ON_RESUME, UsageError, as_published, kernels_of, resolve
from seal_fast.train.step import GraphedStep, Step
from seal_fast.train.tasks import TERMS, parameter_groups

LOSSES = {"loss", "ce", *(term for terms in TERMS.values() for term in terms)}
PLOT_EVERY = 60.0  # seconds, at the least, between two drawings of the plots


def command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], object], argv: list[str] | None
) -> int:
    """Run a trainer's command line; whatever is wrong with it becomes one sentence on standard error.

    Returns:
        The exit code: 0; 2 for a mistake in the command or the data; 1 for a run that cannot go on; 130 for Ctrl-C.
    """
    try:
        run(parser.parse_args(argv))
    except (UsageError, data.DataError) as error:
        return _fail(parser.prog, getattr(error, "sentence", str(error)), 2)
    except TrainingError as error:
        return _fail(parser.prog, str(error), 1)
    except KeyboardInterrupt:
        return _fail(parser.prog, "interrupted; the epochs that were finished are kept in the run's folder.", 130)
    return 0


def _fail(program: str, sentence: str, code: int) -> int:
    print(f"{program}: error: {sentence}", file=sys.stderr)
    return code


def splits_of(args: argparse.Namespace, role: str) -> data.Splits:
    """The dataset that the options name."""
    try:
        return data.load(
            args.dataset, args.data_path, role=role, time_steps=args.T, auto_aug=args.auto_aug, cutout=args.cutout
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def loaders_of(splits: data.Splits, args: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Loaders of the training and the validation part."""
    if len(splits.train) < 2:
        raise UsageError(f"{splits.name} needs at least 2 training images; {args.data_path} holds {len(splits.train)}.")
    shared = {
        "num_workers": args.num_workers,
        "pin_memory": torch.device(args.device).type == "cuda",
    }
    # Batch norm estimates no variance from one image, so a last batch of one is left out.
    alone = len(splits.train) % args.train_batch_size == 1
    train = DataLoader(splits.train, args.train_batch_size, shuffle=True, drop_last=alone, **shared)
    return train, DataLoader(splits.val, args.val_batch_size, **shared)


class Run:
    """A run's folder: config.json, metrics.csv, TensorBoard events, best.pt, last.pt and plots.

    Args:
        args: Resolved options.
        title: What is trained, in a few words; the folder's name unless --run_name gives one.
    """

    def __init__(self, args: argparse.Namespace, title: str):
        root = Path(args.log_path)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        named = root / args.run_name if args.run_name else None
        self.resumed = _resume_from(args, named, title)
        if self.resumed is not None:
            self.folder = self.resumed.parent
        else:
            self.folder = named or root / f"{title}-{stamp}-{os.getpid()}"
            if args.resume:
                print("There is no run to resume; a new one begins.", flush=True)
            if (self.folder / "last.pt").exists():
                raise UsageError(f"--run_name: {self.folder} already holds a run; go on with --resume {self.folder}.")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--log_path: cannot make the run's folder {self.folder}: {error.strerror}.") from error

    def write_config(self, args: argparse.Namespace) -> None:
        """Write config.json: the resolved options, versions, commit and machine."""
        config = {"options": vars(args), "environment": environment(args.device)}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def forget_after(self, epoch: int) -> None:
        """Drop rows of metrics.csv after `epoch`: an interrupted run may have logged an epoch that it did not save."""
        path = self.folder / "metrics.csv"
        if epoch == 0:
            path.unlink(missing_ok=True)
        else:
            header, *rows = path.read_text(encoding="utf-8").splitlines()
            kept = [row for row in rows if int(row.split(",")[0]) <= epoch]
            path.write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")

    def log(self, row: dict[str, float], writer) -> None:
        """Add an epoch's row to metrics.csv and to TensorBoard."""
        path = self.folder / "metrics.csv"
        fresh = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, fieldnames=list(row))
            if fresh:
                table.writeheader()
            table.writerow({name: f"{value:.6g}" for name, value in row.items()})
        for name, value in row.items():
            writer.add_scalar(name, value, int(row["epoch"]))
        writer.flush()


def _resume_from(args: argparse.Namespace, named: Path | None, title: str) -> Path | None:
    """The last.pt that --resume names; with "auto" that of the named run, or of the newest with the same options."""
    if args.resume is None:
        return None
    if args.resume == "auto":
        folders = [named] if named else Path(args.log_path).glob(f"{title}-*")
        found = [folder / "last.pt" for folder in folders if (folder / "last.pt").is_file()]
        if not named:
            found = [path for path in found if not _difference(_options_of(path.parent), args)]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)
    path = Path(args.resume)
    path = path / "last.pt" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"--resume: there is no checkpoint at {path}.")
    return path


def _options_of(folder: Path) -> dict:
    """The options of a run's config.json; none of them where it cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _difference(saved: dict, args: argparse.Namespace) -> str:
    """The first option in which a saved run computes something else than `args`, in words; empty if there is none."""
    for name, value in vars(args).items():
        if name not in FREE_ON_RESUME and saved.get(name) != value:
            return f"--{name} was {saved.get(name)} and is {value}"
    return ""


def environment(device: str) -> dict:
    """Versions, commit and machine, for config.json."""
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None
    return {
        "seal_fast": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "device": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the checkout that this file belongs to, marked -dirty where it was changed; None outside one."""

    def git(*words: str) -> subprocess.CompletedProcess:
        here = Path(__file__).resolve().parent
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, check=False)

    try:
        if git("ls-files", "--error-unmatch", Path(__file__).name).returncode != 0:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").stdout.strip() or None
    except OSError:  # no git here
        return None


def prepare(args: argparse.Namespace, role: str) -> argparse.Namespace:
    """Resolve the options, seed every random generator, and let memory be reused."""
    args = resolve(args, role=role)
    reuse_freed_memory()
    torch.manual_seed(args.seed)
    return args


def optimizer_of(network: torch.nn.Module, args: argparse.Namespace, *, spiking: bool) -> torch.optim.Optimizer:
    """The optimiser that --optim, --lr and --wd describe."""
    groups = parameter_groups(network, args.wd, spiking=spiking)
    kind = {"SGDM": torch.optim.SGD, "ADAM": torch.optim.Adam, "ADAMW": torch.optim.AdamW}[args.optim]
    settings = {"momentum": 0.9} if args.optim == "SGDM" else {"capturable": args.cuda_graph}
    fused = next(network.parameters()).device.type in ("cpu", "cuda")
    return kind(groups, lr=args.lr, fused=fused, **settings)


def train(args: argparse.Namespace, task, splits: data.Splits, run: Run, *, spiking: bool) -> dict:
    """Train a task for all epochs, and leave the run's folder complete.

    Returns:
        Of the best epoch: accuracy, accuracy_at, firing_rate; and folder.
    """
    from torch.utils.tensorboard import SummaryWriter  # takes two seconds, which --help should not

    device = torch.device(args.device)
    task.network.to(device, memory_format=torch.contiguous_format if as_published(args) else torch.channels_last)
    train_loader, val_loader = loaders_of(splits, args)
    train_feed = Feed(train_loader, device, splits.finish_train)
    val_feed = Feed(val_loader, device, splits.finish_val)
    optimizer = optimizer_of(task.network, args, spiking=spiking)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.num_epoch)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = {"net": task.network, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    first, best = _restore(run, state, args) if run.resumed else (1, None)

    kind = GraphedStep if args.cuda_graph else Step
    packed = getattr(args, "packed_spikes", False)
    step = kind(task, optimizer, scaler, device=device, amp=args.amp, packed=packed)
    run.write_config(args)
    run.forget_after(first - 1)
    _announce(args, splits, run, first)
    drawn = time.monotonic()
    # TensorBoard forgets what an interrupted run logged of the epochs that come now.
    with SummaryWriter(str(run.folder), purge_step=first) as writer:
        for epoch in range(first, args.num_epoch + 1):
            # Each epoch's random numbers follow from its own seed, so that a resumed run draws the same ones.
            torch.manual_seed(args.seed * 100_003 + epoch)
            learning_rate = float(scheduler.get_last_lr()[0])
            title, left = f"epoch {epoch}/{args.num_epoch}", args.num_epoch - epoch
            trained = train_epoch(step, train_feed, title=title, epochs_left=left)
            scheduler.step()
            result = evaluate(task, val_feed, device=device, amp=args.amp)
            run.log(_row(epoch, learning_rate, trained, result), writer)
            print(_line(epoch, args.num_epoch, trained, result), flush=True)

            if best is None or result["accuracy"] >= best["accuracy"]:
                best = {"epoch": epoch, **{name: result[name] for name in ("accuracy", "accuracy_at", "firing_rate")}}
                content = {"best_net": task.network.state_dict(), "options": vars(args), **best}
                checkpoint.save(content, run.folder / "best.pt")
            content = {name: part.state_dict() for name, part in state.items()}
            content |= {"epoch": epoch, "best": best, "options": vars(args)}
            checkpoint.save(content, run.folder / "last.pt")
            if epoch == args.num_epoch or time.monotonic() - drawn > PLOT_EVERY:
                plots.plot_run(run.folder)
                plots.plot_raster(result["raster"], run.folder / "spike_raster.png")
                drawn = time.monotonic()
    print(f"best accuracy {best['accuracy']:.2%} (epoch {best['epoch']}); everything is in {run.folder}", flush=True)
    return {**best, "folder": run.folder}


def _restore(run: Run, state: dict, args: argparse.Namespace) -> tuple[int, dict]:
    """Load last.pt into network, optimiser, scheduler and scaler; return the next epoch and the best result so far."""
    content = checkpoint.load(run.resumed)
    missing = [name for name in (*state, "epoch", "best", "options") if name not in content]
    if missing:
        raise UsageError(f"checkpoint {run.resumed} is not the last.pt of a run: it holds no {missing[0]}.")
    difference = _difference(content["options"], args)
    if difference:
        raise UsageError(f"--resume: {run.resumed} belongs to a run with other options: {difference}.")
    if content["epoch"] >= args.num_epoch:
        raise UsageError(f"--resume: the run in {run.folder} has already finished its {args.num_epoch} epochs.")
    checkpoint.load_into(state["net"], content["net"], run.resumed, "this run's network")
    for name in ("optimizer", "scheduler", "scaler"):
        state[name].load_state_dict(content[name])
    return content["epoch"] + 1, content["best"]


def _announce(args: argparse.Namespace, splits: data.Splits, run: Run, first: int) -> None:
    by_operator = kernels_of(args) if hasattr(args, "backend") else {}
    kernels = ", ".join(f"{operator} on {name}" for operator, name in by_operator.items()) or "none"
    print(
        f"{splits.name}: {len(splits.train)} training and {len(splits.val)} validation samples, "
        f"{splits.num_classes} classes; device {args.device}, amp {args.amp}, kernels: {kernels}; "
        f"epochs {first} to {args.num_epoch}; run folder {run.folder}",
        flush=True,
    )


def _row(epoch: int, learning_rate: float, trained: dict, result: dict) -> dict[str, float]:
    speed = ("seconds", "images_per_second", "data_wait")
    row = {"epoch": epoch, "lr": learning_rate}
    row |= {f"train_{name}": value for name, value in trained.items() if name not in speed}
    row["val_accuracy"] = result["accuracy"]
    if result["firing_rate"]:
        row |= {f"val_accuracy_t{t}": value for t, value in enumerate(result["accuracy_at"], start=1)}
    row |= {f"firing_rate/{name}": value for name, value in result["firing_rate"].items()}
    return row | {name: trained[name] for name in speed}


def _line(epoch: int, epochs: int, trained: dict, result: dict) -> str:
    losses = ", ".join(f"{name} {value:.3f}" for name, value in trained.items() if name in LOSSES)
    return (
        f"epoch {epoch}/{epochs}: {losses}, train {trained['accuracy']:.2%}, val {result['accuracy']:.2%}, "
        f"{trained['images_per_second']:.0f} img/s, data wait {trained['data_wait']:.0%}, {trained['seconds']:.1f} s"
    )
