"""A run's options, completed and checked before anything starts, and what follows from them."""

from __future__ import annotations

import argparse
import importlib
import math
import os

import torch

from seal_fast.backends import available, skips_zeros
from seal_fast.backends import resolve as resolve_backend
from seal_fast.train import checkpoint, ranks
from seal_fast.train.defaults import fill_in
from seal_fast.train.errors import UsageError
from seal_fast.train.options import MACHINE
from seal_fast.train.tasks import tau_of
from seal_fast.train.threads import processors


def resolve(args: argparse.Namespace, *, role: str) -> argparse.Namespace:
    """Fill in the defaults of the dataset's family and check every value.

    Args:
        args: Parsed options.
        role: "teacher" or "student".

    Raises:
        UsageError: A value is out of range, or something that it names does not exist.
    """
    args.asked = {name: getattr(args, name) for name in (*MACHINE, "num_epoch")}
    for flag in vars(args).pop("without_effect", ()):
        ranks.say(f"{flag} has no effect, as in the published scripts.")
    fill_in(args, role=role)
    if args.num_workers is None:
        args.num_workers = 0 if args.dataset == "DIGITS" else min(8, processors())
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = ranks.own_device(args.device)
    _check_shared(args)
    if args.amp == "auto":
        args.amp = _default_amp(torch.device(args.device))
    if args.cuda_graph is None:
        args.cuda_graph = graph_by_default(args)
    elif args.cuda_graph and (reason := _no_graph(args)):
        raise UsageError(reason)
    if role == "student":
        _check_student(args)
    return args


def potential(text: str | float | None) -> float | None:
    """What --v_reset says: the potential after a spike, or None for soft reset.

    Raises:
        UsageError: It says something else.
    """
    if str(text).lower() == "none":
        return None
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise UsageError(f"--v_reset must be a number, or none for soft reset; got {text!r}.") from None
    _require("--v_reset", value)
    return value


# package -> module that shows whether it works
_DATA = {"numpy": "numpy", "torchvision": "torchvision", "tqdm": "tqdm"}
_DIGITS = {"scikit-learn": "sklearn.datasets"}
_LOG = {"tensorboard": "torch.utils.tensorboard", "matplotlib": "matplotlib.figure"}


def require_packages(dataset: str | None, *, logs: bool) -> None:
    """See whether the packages that a run needs are there, before it starts.

    Args:
        dataset: The data set.
        logs: Whether it writes TensorBoard's events and plots, which the first rank does.

    Raises:
        UsageError: One is not, or does not fit the others.
    """
    needed = {**_DATA, **(_DIGITS if "DIGITS" in str(dataset) else {}), **(_LOG if logs and ranks.first() else {})}
    for package, module in needed.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # one that does not fit torch raises RuntimeError, and others what they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UsageError(f"{package} is needed: pip install 'seal-fast[train]' ({reason}).") from error


def _check_shared(args: argparse.Namespace) -> None:
    _require("--T", args.T, at_least=1)
    _require("--num_epoch", args.num_epoch, at_least=1)
    _require("--val_batch_size", args.val_batch_size, at_least=1)
    _require("--num_workers", args.num_workers, at_least=0)
    _require("--lr", args.lr, above=0)
    _require("--wd", args.wd, at_least=0)
    if not 0 <= args.seed < 2**32:
        raise UsageError(f"--seed must be at least 0 and below 2^32; got {args.seed}.")
    if args.train_batch_size < 2:
        raise UsageError(
            "--train_batch_size must be at least 2, because batch norm estimates a variance over the batch; "
            f"got {args.train_batch_size}."
        )
    _require("--accumulate", args.accumulate, at_least=1)
    if args.train_batch_size < args.accumulate * smallest_part():
        raise UsageError(
            f"--train_batch_size must be at least {smallest_part()} for each of the {args.accumulate} parts of a step; "
            f"got {args.train_batch_size}."
        )
    saving(args.save_every)
    for name in ("data_path", "tea_path", "init_from"):  # the same in whatever folder the run is resumed
        if getattr(args, name, None) is not None:
            setattr(args, name, os.path.abspath(getattr(args, name)))
    try:
        torch.zeros(1, device=args.device).cpu()
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError here
        reason = str(error).strip().splitlines()[0][:120]
        raise UsageError(f"--device {args.device!r} cannot be used: {reason}") from error


def graph_by_default(args: argparse.Namespace) -> bool:
    """Whether steps are captured in a CUDA graph if nothing is said: where they can be, in bfloat16, but not torch's.

    In float32 a step is by default what was published, launched as it was; `--cuda_graph` captures it, too.
    """
    return not _no_graph(args) and args.amp == "bf16" and getattr(args, "backend", None) != "torch"


def _no_graph(args: argparse.Namespace) -> str:
    """Why a step cannot be captured in a CUDA graph, or nothing."""
    if torch.device(args.device).type != "cuda":
        return f"--cuda_graph needs a CUDA GPU; --device is {args.device}."
    if args.amp == "fp16":
        return "--cuda_graph cannot skip the steps that --amp fp16 must skip; use --amp bf16."
    if args.accumulate > 1 or ranks.size() > 1:
        return "--cuda_graph captures a step of one process in one part; leave it out, or --accumulate."
    return ""


def smallest_part() -> int:
    """Images that a part of a step needs: two, of which batch norm can estimate a variance, and one on each rank."""
    return max(2, ranks.size())


def saving(text: str) -> tuple[int, float]:
    """What --save_every says: every so many steps, or seconds; 0 for never.

    Raises:
        UsageError: It says something else.
    """
    try:
        steps, seconds = (0, 60 * float(text[:-1])) if str(text).endswith("m") else (int(text), 0.0)
    except ValueError:
        steps, seconds = -1, 0.0
    if steps < 0 or not 0 <= seconds < math.inf:
        raise UsageError(f"--save_every must be a number of steps, or of minutes as in 10m; got {text!r}.")
    return steps, seconds


def _check_student(args: argparse.Namespace) -> None:
    if vars(args).pop("loss_method", args.method) != args.method:
        raise UsageError(f"--loss_method seal contradicts --method {args.method}; leave one of them out.")
    try:
        tau_of(args.decay)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    args.v_reset = potential(args.v_reset)
    _require("--thresh", args.thresh)
    _require("--alpha", args.alpha, at_least=0)
    _require("--beta", args.beta, at_least=0)
    _require("--temperature", args.temperature, above=0)
    try:
        kernels_of(args)
    except ValueError as error:
        raise UsageError(f"--backend: {error}") from error
    if args.method == "ce":
        return
    if args.tea_path is None:
        raise UsageError(
            f"--tea_path is needed: --method {args.method} learns from a teacher (train one with teacher.py)."
        )
    path = checkpoint.best_of(args.tea_path)
    if not os.path.isfile(path):
        raise UsageError(f"--tea_path: there is no teacher checkpoint at {path}.")
    args.tea_path = str(path)


def _default_amp(device: torch.device) -> str:
    """What `--amp auto` stands for: "bf16" where the hardware multiplies it faster than float32, else "off"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "off"
    if device.type == "cpu":
        checks = "_is_avx512_bf16_supported", "_is_amx_tile_supported"
        return "bf16" if any(getattr(torch.cpu, check, bool)() for check in checks) else "off"
    return "off"


def as_published(args: argparse.Namespace) -> bool:
    """Whether the run computes as the published code does, up to rounding: in torch, float32 and its default layout."""
    return args.amp == "off" and getattr(args, "backend", None) == "torch"


def memory_format(args: argparse.Namespace) -> torch.memory_format:
    """Of networks and images."""
    return torch.contiguous_format if as_published(args) else torch.channels_last


def kernels_of(args: argparse.Namespace) -> dict[str, str]:
    """Operator -> backend of the kernels that a student's run uses; the loss has fewer backends than the neurons.

    On the CPU that includes convolutions of spikes, which kernels run where few neurons fire.

    Raises:
        ValueError: The backend that the options name cannot run one of them.
    """
    device = torch.device(args.device)
    chosen = {operator: resolve_backend(args.backend, operator, device) for operator in ("lif", "bn_lif")}
    loss = args.backend if args.backend in ("auto", *available("seal_loss")) else "auto"
    if device.type == "cpu":
        skips = chosen["bn_lif"] == "cpu" and skips_zeros(device, torch.float32)
        chosen["spike_conv2d"] = "cpu" if skips else "torch"
    return {**chosen, "seal_loss": resolve_backend(loss, "seal_loss", device, time_steps=args.T)}


def _require(flag: str, value: float, *, at_least: float | None = None, above: float | None = None) -> None:
    if at_least is not None and not value >= at_least:
        raise UsageError(f"{flag} must be at least {at_least}; got {value}.")
    if above is not None and not value > above:
        raise UsageError(f"{flag} must be above {above}; got {value}.")
    if not math.isfinite(value):
        raise UsageError(f"{flag} must be a finite number; got {value}.")
