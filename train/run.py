"""A training run from its options to its folder: what both trainers share."""

from __future__ import annotations

import argparse
import contextlib
import functools
import shlex
import warnings
from collections import Counter

import torch
from torch.utils.data import DataLoader

from seal_fast import reuse_freed_memory
from seal_fast.ops import spike_conv
from seal_fast.train import checkpoint, data, ranks
from seal_fast.train.batches import Batches, Seeded
from seal_fast.train.checks import kernels_of, memory_format, require_packages, resolve, saving, smallest_part
from seal_fast.train.engine import SKIPS, evaluate, train_epoch
from seal_fast.train.errors import NonFiniteError, TrainingError, UsageError
from seal_fast.train.feed import Feed
from seal_fast.train.folder import Run, check_place
from seal_fast.train.keeper import Keeper
from seal_fast.train.log import Log, line_of, row_of
from seal_fast.train.meters import Meters
from seal_fast.train.networks import load_start
from seal_fast.train.state import State, require_finite
from seal_fast.train.step import GraphedStep, Step
from seal_fast.train.stopping import Signals, leave_to_trainer
from seal_fast.train.tasks import parameter_groups
from seal_fast.train.threads import Watch, too_many_threads


def splits_of(args: argparse.Namespace, role: str) -> data.Splits:
    """The dataset that the options name; the first rank finds its faults, and makes what it keeps on disk."""
    options = {"time_steps": args.T, "auto_aug": args.auto_aug, "cutout": args.cutout, "frame_size": args.frame_size}

    def load() -> data.Splits:
        try:
            return data.load(args.dataset, args.data_path, role=role, **options)
        except ValueError as error:
            raise UsageError(str(error)) from error

    found: list[data.Splits] = []
    ranks.from_first(lambda: found.append(load()))
    splits = found[0] if found else load()
    for note in splits.notes:
        ranks.say(note)
    return splits


def loaders_of(
    splits: data.Splits, args: argparse.Namespace, signals: Signals | None = None
) -> tuple[DataLoader, DataLoader]:
    """Loaders of the training and the validation part, whose processes leave signals to `signals`."""
    if len(splits.train) < smallest_part():
        raise UsageError(
            f"{splits.name} needs at least {smallest_part()} training images; "
            f"{args.data_path} holds {len(splits.train)}."
        )
    train = Batches(
        len(splits.train),
        args.train_batch_size,
        seed=args.seed,
        parts=args.accumulate,
        smallest=smallest_part(),
        rank=ranks.rank(),
        ranks=ranks.size(),
    )
    # Its processes stay over the epochs: each sample brings its own seed.
    shared = {**_loading(args, signals), "persistent_workers": args.num_workers > 0}
    return DataLoader(Seeded(splits.train), batch_sampler=train, **shared), val_loader_of(splits, args, signals)


def val_loader_of(splits: data.Splits, args: argparse.Namespace, signals: Signals | None = None) -> DataLoader:
    """The loader of the validation part."""
    val = Batches(len(splits.val), args.val_batch_size, rank=ranks.rank(), ranks=ranks.size())
    return DataLoader(Seeded(splits.val), batch_sampler=val, **_loading(args, signals))


def _loading(args: argparse.Namespace, signals: Signals | None) -> dict:
    return {
        "num_workers": args.num_workers,
        "pin_memory": torch.device(args.device).type == "cuda",
        "worker_init_fn": functools.partial(leave_to_trainer, (signals or Signals()).training),
        "generator": torch.Generator(),  # else each epoch's loader would draw from the global one
    }


def require(args: argparse.Namespace, *, trains: bool) -> None:
    """See whether what a run needs is there: torchrun's variables, packages, and a place for its folder.

    Args:
        args: Parsed options.
        trains: Whether it leaves a run's folder.

    Raises:
        UsageError: Something is missing.
    """
    ranks.check_environment()
    require_packages(args.dataset, logs=trains)
    if trains and args.resume in (None, "auto") and ranks.first():
        check_place(args)


def prepare(args: argparse.Namespace, role: str, *, trains: bool = True) -> argparse.Namespace:
    """Check what the run needs, resolve its options, meet the other ranks, seed, and let memory be reused.

    Args:
        args: Parsed options.
        role: "teacher" or "student".
        trains: Whether it leaves a run's folder.

    Raises:
        UsageError: Something is missing or wrong.
    """
    require(args, trains=trains)
    args = resolve(args, role=role)
    ranks.start(torch.device(args.device))
    reuse_freed_memory()
    torch.manual_seed(args.seed)
    return args


def optimizer_of(network: torch.nn.Module, args: argparse.Namespace, *, spiking: bool) -> torch.optim.Optimizer:
    """The optimiser that --optim, --lr and --wd describe."""
    groups = parameter_groups(network, args.wd, spiking=spiking)
    kind = {"SGDM": torch.optim.SGD, "ADAM": torch.optim.Adam, "ADAMW": torch.optim.AdamW}[args.optim]
    settings = {"momentum": 0.9} if args.optim == "SGDM" else {}
    fused = next(network.parameters()).device.type in ("cpu", "cuda")
    return kind(groups, lr=args.lr, fused=fused, **settings)


def scheduler_of(optimizer: torch.optim.Optimizer, args: argparse.Namespace) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate of each epoch: a cosine to 0 over all of them, or a constant."""
    if args.scheduler == "NONE":
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.num_epoch)


def train(args: argparse.Namespace, task, splits: data.Splits, run: Run, *, spiking: bool) -> dict:
    """Train a task for all epochs, and leave the run's folder complete.

    Returns:
        Of the best epoch: accuracy, accuracy_at, firing_rate; and folder.
    """
    with run:
        return _train(args, task, splits, run, spiking=spiking)


def _train(args: argparse.Namespace, task, splits: data.Splits, run: Run, *, spiking: bool) -> dict:
    device = torch.device(args.device)
    layout = memory_format(args)
    task.network.to(device, memory_format=layout)
    if args.init_from is not None and run.resumed is None:
        load_start(task.network, args)
    task.parallel = ranks.parallel(task.network)
    signals = Signals()
    train_loader, val_loader = loaders_of(splits, args, signals)
    batches: Batches = train_loader.batch_sampler
    train_feed = Feed(train_loader, device, splits.finish_train, layout)
    val_feed = Feed(val_loader, device, splits.finish_val, layout)
    optimizer = optimizer_of(task.network, args, spiking=spiking)
    scheduler = scheduler_of(optimizer, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    state = State(task.network, optimizer, scheduler, scaler)
    if run.resumed:
        ranks.from_first(run.claim)
        content = ranks.from_first(run.load, functools.partial(state.check, args=args))
        state.load(content)
        _keep_start(args, content["options"].get("init_from"), run)
        _go_on(args, content["options"]["num_epoch"], state, run)
    packed = getattr(args, "packed_spikes", False)
    kind = functools.partial(GraphedStep, batch_size=args.train_batch_size) if args.cuda_graph else Step
    step = kind(task, optimizer, scaler, device=device, amp=args.amp, packed=packed)

    def save(done: int, meters: Meters | None) -> None:
        require_finite(task.network, done)
        state.step = done
        content = state.content(args, batches, meters)
        ranks.from_first(run.save, content)

    run.folder = ranks.from_first(run.begin, args)
    calls_before = Counter(spike_conv.calls)
    steps, seconds = saving(args.save_every)
    with contextlib.ExitStack() as open_until_the_end:
        open_until_the_end.enter_context(signals)
        # Signals are handled by now: one may come in answer to this.
        _announce(args, splits, run, state, batches)
        program = "seal-fast-distill" if spiking else "seal-fast-teacher"
        goes_on = f"{program} --resume {shlex.quote(str(run.folder))}"
        keeper = Keeper(save, signals, goes_on=goes_on, steps=steps, seconds=seconds)
        log = open_until_the_end.enter_context(Log(run.folder, state.epoch + 1))
        watch = open_until_the_end.enter_context(Watch())
        while state.epoch < args.num_epoch:
            epoch = state.begin(batches, args.seed)
            meters = Meters(device, patience=SKIPS if scaler.is_enabled() else 0)
            if state.meters:
                meters.load(state.meters)
            learning_rate = float(scheduler.get_last_lr()[0])
            title, left = f"epoch {epoch}/{args.num_epoch}", args.num_epoch - epoch
            try:
                keeping = {"meters": meters, "keeper": keeper, "watch": watch}
                trained = train_epoch(step, train_feed, batches, title=title, epochs_left=left, **keeping)
                require_finite(task.network, batches.steps)
            except NonFiniteError as error:
                ranks.from_first(_keep_batch, error, run, train_loader, epoch)
            at_end = functools.partial(keeper.between, batches.steps, meters)
            result = evaluate(task, val_feed, device=device, amp=args.amp, pause=at_end)
            with warnings.catch_warnings():
                # Where the last step was before a resume, torch warns that none came before the scheduler's.
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                scheduler.step()
            state.epoch, state.meters = epoch, None
            ranks.from_first(log.epoch, row_of(epoch, learning_rate, trained, result))
            ranks.say(line_of(epoch, args.num_epoch, trained, result))
            # Of equal epochs the first, as published.
            if state.best is None or result["accuracy"] > state.best["accuracy"]:
                measured = {name: result[name] for name in ("accuracy", "accuracy_at", "firing_rate")}
                state.best = {"epoch": epoch, **measured}
                sizes = {"num_classes": splits.num_classes, "in_channels": splits.in_channels}
                content = {"best_net": task.network.state_dict(), "options": vars(args), **sizes, **state.best}
                ranks.from_first(checkpoint.save, content, run.folder / checkpoint.BEST)
            save(0, None)
            ranks.from_first(log.plot, result["raster"], state.best["epoch"], at_once=epoch == args.num_epoch)
            if epoch < args.num_epoch:  # else the run has ended, and cannot go on
                keeper.after_epoch()
    best = state.best
    ranks.say(f"best accuracy {best['accuracy']:.2%} (epoch {best['epoch']}); everything is in {run.folder}")
    if calls := spike_conv.calls - calls_before:
        ranks.say(_skipped(calls))
    return {**best, "folder": run.folder}


def _skipped(calls: Counter) -> str:
    """What ran the convolutions of spikes; of other layers nothing is counted."""
    by_kernel = Counter()
    for (_, kernel), count in calls.items():
        by_kernel[kernel] += count
    return (
        f"convolutions of spikes, and their weights' gradients: {by_kernel['cpu']} calls skipped what did not fire, "
        f"{by_kernel['torch']} were dense"
    )


def _go_on(args: argparse.Namespace, epochs: int, state: State, run: Run) -> None:
    """Let a resumed run have more epochs than the `epochs` that it was to have.

    Raises:
        UsageError: It has had all of them.
    """
    if args.num_epoch > epochs:
        rate = state.lengthen(args.num_epoch)
        rates = f"from epoch {state.epoch + 1} on with its learning rates ({rate:.4g} at first)"
        ranks.say(f"--num_epoch grows from {epochs}: the run becomes one of {args.num_epoch} epochs, {rates}.")
    if state.epoch >= args.num_epoch:
        raise UsageError(
            f"--resume: the run in {run.folder} has finished (epoch {state.epoch} of {args.num_epoch}); a larger "
            "--num_epoch goes on with it."
        )


def _keep_start(args: argparse.Namespace, began_from: str | None, run: Run) -> None:
    """Let a resumed run's options say where it began, whatever --init_from says when it is resumed."""
    if args.init_from not in (None, began_from):
        ranks.say(f"--init_from is not read: the run in {run.folder} began from {began_from or 'fresh weights'}.")
    args.init_from = began_from


def _keep_batch(error: NonFiniteError, run: Run, loader: DataLoader, epoch: int) -> None:
    """Keep the batch of a step that went wrong; it is loaded again, as the same keys give the same batch.

    Raises:
        TrainingError: What went wrong, and where the batch is.
    """
    keys = loader.batch_sampler.keys(error.step)
    path = run.folder / "nonfinite.pt"
    try:
        inputs, labels, draws = loader.dataset.batch(keys)
        content = {"epoch": epoch, "step": error.step, "parts": error.parts, "samples": [index for index, _ in keys]}
        checkpoint.save({**content, "inputs": inputs, "labels": labels, "draws": draws}, path)
        where = f"its batch is in {path}"
    except (OSError, data.DataError) as reason:
        where = f"its batch could not be kept ({reason})"
    raise TrainingError(f"epoch {epoch}: {error}; {where}, and the checkpoints are from before it.") from error


def _announce(args: argparse.Namespace, splits: data.Splits, run: Run, state: State, batches: Batches) -> None:
    if note := too_many_threads():
        ranks.say(note)
    by_operator = kernels_of(args) if hasattr(args, "backend") else {}
    kernels = ", ".join(f"{operator} on {name}" for operator, name in by_operator.items()) or "none"
    left_out = batches.samples - batches.steps * batches.batch_size
    ranks.say(
        f"{splits.name}: {len(splits.train)} training and {len(splits.val)} validation samples, "
        f"{splits.num_classes} classes; device {args.device}, amp {args.amp}, kernels: {kernels}; "
        f"{'steps as CUDA graphs; ' if args.cuda_graph else ''}"
        f"{f'{ranks.size()} ranks; ' if ranks.size() > 1 else ''}"
        f"{f'the last {left_out} of each epoch are too few for a batch; ' if left_out > 0 else ''}"
        f"epochs {state.epoch + 1} to {args.num_epoch}"
        f"{f', after step {state.step}' if state.step else ''}; run folder {run.folder}"
    )
