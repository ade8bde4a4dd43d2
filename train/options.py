"""Command-line options: the published names, the published defaults of each dataset's family, and their checks."""

from __future__ import annotations

import argparse
import math
import os

import torch

from seal_fast.backends import BACKENDS, available
from seal_fast.backends import resolve as resolve_backend
from seal_fast.models import STUDENTS, TEACHERS
from seal_fast.train import checkpoint, data, ranks
from seal_fast.train.errors import UsageError
from seal_fast.train.tasks import tau_of

METHODS = ("seal", "ela", "sta", "kd", "tdkd", "ce")
OPTIMISERS = ("SGDM", "ADAM", "ADAMW")
SCHEDULERS = ("COSINE", "NONE")
AMP = ("auto", "off", "bf16", "fp16")

_SHARED = {"alpha": 0.6, "beta": 0.15, "wd": 5e-4, "lr": 0.1}
_CIFAR = {
    **_SHARED,
    "num_epoch": 300,
    "batch_size": 128,
    "T": 4,
    "decay": 0.5,
    "student": "resnet18",
    "teacher": "resnet34",
}
_DVS = {**_CIFAR, "batch_size": 32, "T": 10, "teacher": "resnet19"}
_IMAGENET = {**_CIFAR, "num_epoch": 100, "batch_size": 512, "decay": 0.2, "student": "preact_resnet34"}
_DIGITS = {**_CIFAR, "num_epoch": 10, "batch_size": 64, "student": "resnet8", "teacher": "resnet8"}

# dataset -> (defaults of a teacher's run, defaults of a student's run). Those of CIFAR, CIFAR10-DVS and ImageNet are
# what the six published commands of SeAl-KD (arXiv 2605.14252) say; batches of 128 for the teacher of CIFAR10-DVS are
# its script's. MNIST's are CIFAR's, as in the published scripts; those of the digits are this project's own.
DEFAULTS: dict[str, tuple[dict, dict]] = {
    "CIFAR10": (_CIFAR, _CIFAR),
    "CIFAR100": (_CIFAR, _CIFAR),
    "MNIST": (_CIFAR, _CIFAR),
    "CIFAR10_DVS_SJ": ({**_DVS, "batch_size": 128, "lr": 0.2}, _DVS),
    "imagenet": ({**_IMAGENET, "wd": 1e-4}, {**_IMAGENET, "lr": 0.2, "wd": 2e-5}),
    "DIGITS": (_DIGITS, _DIGITS),
    "DIGITS_DVS": (_DIGITS, _DIGITS),
}


# Options that may differ when a run is resumed: they say where and how fast it runs, not what it computes. A teacher's
# file may have been moved, and --init_from is not read again.
FREE_ON_RESUME = frozenset(
    [
        "data_path",
        "log_path",
        "run_name",
        "resume",
        "num_workers",
        "val_batch_size",
        "device",
        "tea_path",
        "init_from",
        "step_mode",
        "backend",
        "packed_spikes",
        "cuda_graph",
        "save_every",
    ]
)


def _table(role: str) -> str:
    """The defaults of each dataset's family, for --help."""
    lines = ["defaults per dataset:"]
    for name, both in DEFAULTS.items():
        own = both[role == "student"]
        keys = ("student", "teacher", "T", "batch_size", "num_epoch", "lr", "wd", "decay")
        shown = [f"{key} {own[key]}" for key in keys if role == "student" or key not in ("student", "decay")]
        lines.append(f"  {name:<15} {', '.join(shown)}")
    return "\n".join(lines)


class _WithoutEffect(argparse.Action):
    """Notes that a flag was given which the published scripts have, and which changes nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.without_effect = [*getattr(namespace, "without_effect", ()), option_string]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str):
        """Raise the one sentence; argparse would print the usage of forty options above it."""
        raise UsageError(message)


def teacher_parser() -> argparse.ArgumentParser:
    """Options of `train/teacher.py`."""
    parser = Parser(
        "seal-fast-teacher",
        description="Train an ANN teacher.",
        epilog=_table("teacher"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_shared(parser)
    parser.add_argument("--arch", choices=TEACHERS, help="teacher network (default: per dataset)")
    parser.add_argument(
        "--T", type=int, help="time steps of event data; the teacher sees their mean (default: per dataset)"
    )
    ignored = _without_effect(parser)
    ignored.add_argument("--stu_arch", metavar="NAME", action=_WithoutEffect)
    ignored.add_argument("--save_features", nargs=0, action=_WithoutEffect)
    return parser


def distill_parser() -> argparse.ArgumentParser:
    """Options of `train/distill.py`."""
    parser = Parser(
        "seal-fast-distill",
        description="Distil a spiking student.",
        epilog=_table("student"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_shared(parser)
    student = parser.add_argument_group("student")
    student.add_argument("--stu_arch", choices=STUDENTS, help="student network (default: per dataset)")
    student.add_argument("--T", type=int, help="time steps (default: per dataset)")
    student.add_argument("--decay", type=float, help="membrane decay 1 - 1/tau, in [0, 1) (default: per dataset)")
    student.add_argument("--thresh", type=float, default=1.0, help="firing threshold (default: %(default)s)")
    student.add_argument(
        "--v_reset", default="0", help="potential after a spike, or 'none' for soft reset (default: 0)"
    )
    _add_switch(student, "--detach_reset", False, "let no gradient pass through the reset")
    student.add_argument(
        "--step_mode",
        choices=("m", "s"),
        default="m",
        help="accepted; both run all time steps at once, with equal numbers",
    )
    student.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="kernels of the neurons, and of the loss where it has them; with --amp off, torch computes as published, "
        "in the published memory layout (default: %(default)s)",
    )
    _add_switch(
        student, "--packed_spikes", False, "keep spikes as bits for the backward pass: less memory, equal numbers"
    )
    loss = parser.add_argument_group("distillation")
    loss.add_argument(
        "--method", choices=METHODS, default="seal", help="objective; ce uses no teacher (default: %(default)s)"
    )
    loss.add_argument("--tea_arch", choices=TEACHERS, help="teacher network (default: per dataset)")
    loss.add_argument("--tea_path", help="teacher checkpoint, or the folder of its run")
    loss.add_argument("--alpha", type=float, help="weight of the teacher's term (default: 0.6)")
    loss.add_argument("--beta", type=float, help="weight of the temporal term (default: 0.15)")
    loss.add_argument(
        "--temperature", type=float, default=3.0, help="of both softened distributions (default: %(default)s)"
    )
    loss.add_argument(
        "--loss_method",
        choices=("seal",),
        default=argparse.SUPPRESS,
        help="the published name of --method, and its value",
    )
    ignored = _without_effect(parser)
    ignored.add_argument("--align_method", choices=("ela",), action=_WithoutEffect, help="what seal's first term is")
    ignored.add_argument("--time_kd_method", choices=("sta",), action=_WithoutEffect, help="what seal's second term is")
    ignored.add_argument("--margin", type=float, action=_WithoutEffect)
    ignored.add_argument("--baseline", nargs=0, action=_WithoutEffect)
    ignored.add_argument("--save_features", nargs=0, action=_WithoutEffect)
    return parser


def _without_effect(parser: argparse.ArgumentParser):
    group = parser.add_argument_group(
        "without effect", "flags of the published scripts that change nothing there, nor here"
    )
    return group


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=60, help="of all random numbers (default: %(default)s)")
    parser.add_argument("--dataset", required=True, help=", ".join(data.DATASETS))
    parser.add_argument("--data_path", help="folder of the dataset; DIGITS needs none")
    parser.add_argument(
        "--log_path", default="runs", help="folder that gets the run's own folder (default: %(default)s)"
    )
    parser.add_argument("--run_name", help="name of the run's folder (default: what is trained, and the time)")
    parser.add_argument(
        "--resume", help="run folder or checkpoint to go on from, or 'auto' for the newest run of this kind"
    )
    parser.add_argument(
        "--init_from",
        help="start from the weights of this run folder, checkpoint, or published model_weights.pth; a readout of "
        "another number of classes starts anew",
    )
    parser.add_argument(
        "--save_every",
        default="10m",
        help="save inside an epoch, too: each so many steps, or minutes as in 10m; 0 for never (default: %(default)s)",
    )
    parser.add_argument(
        "--frame_size", type=int, help="side of the frames of event data, in pixels (default: 48, as published)"
    )
    _add_switch(parser, "--auto_aug", None, "AutoAugment (default: as published for the dataset)")
    _add_switch(parser, "--cutout", None, "cutout (default: as published for the dataset)")
    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument(
        "--optim", type=str.upper, choices=OPTIMISERS, default="SGDM", help="(default: %(default)s)"
    )
    optimisation.add_argument(
        "--scheduler",
        type=str.upper,
        choices=SCHEDULERS,
        default="COSINE",
        help="of the learning rate: a cosine to 0 over the epochs, or none (default: %(default)s)",
    )
    optimisation.add_argument(
        "--train_batch_size", type=int, help="images a step, on all processes together (default: per dataset)"
    )
    optimisation.add_argument(
        "--accumulate", type=int, default=1, help="parts that a step's images pass in (default: %(default)s)"
    )
    optimisation.add_argument("--val_batch_size", type=int, help="(default: per dataset)")
    optimisation.add_argument("--lr", type=float, help="learning rate (default: per dataset)")
    optimisation.add_argument("--wd", type=float, help="weight decay (default: per dataset)")
    optimisation.add_argument("--num_epoch", type=int, help="(default: per dataset)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--num_workers", type=int, help="processes that load data (default: up to 8; DIGITS 0)")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    machine.add_argument(
        "--amp",
        choices=AMP,
        default="auto",
        help="autocast; auto is bf16 where the hardware multiplies it faster than float32 (default: %(default)s)",
    )
    _add_switch(machine, "--cuda_graph", False, "replay each step as one CUDA graph: faster where batches are small")


def _add_switch(parser, flag: str, default: bool | None, text: str) -> None:
    parser.add_argument(
        flag, type=_boolean, nargs="?", const=True, default=default, help=f"{text}; '{flag} false' turns it off"
    )


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1", "yes")


def resolve(args: argparse.Namespace, *, role: str) -> argparse.Namespace:
    """Fill in the defaults of the dataset's family and check every value.

    Args:
        args: Parsed options.
        role: "teacher" or "student".

    Raises:
        UsageError: A value is out of range, or something that it names does not exist.
    """
    for flag in vars(args).pop("without_effect", ()):
        ranks.say(f"{flag} has no effect, as in the published scripts.")
    fill_in(args, role=role)
    if args.num_workers is None:
        args.num_workers = 0 if args.dataset == "DIGITS" else min(8, _processors())
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.device = ranks.own_device(args.device)
    _check_shared(args)
    if args.amp == "auto":
        args.amp = _default_amp(torch.device(args.device))
    if args.cuda_graph:
        _check_graph(args)
    if role == "student":
        _check_student(args)
    return args


def fill_in(args: argparse.Namespace, *, role: str) -> None:
    """Give what was left open the defaults of the dataset's family.

    Raises:
        UsageError: There is no such data set.
    """
    args.dataset = dataset_of(args.dataset)
    defaults = DEFAULTS[args.dataset][role == "student"]
    renamed = {"student": ("stu_arch",), "batch_size": ("train_batch_size", "val_batch_size")}
    renamed["teacher"] = ("tea_arch",) if role == "student" else ("arch",)
    for key, value in defaults.items():
        for name in renamed.get(key, (key,)):
            if getattr(args, name, value) is None:
                setattr(args, name, value)


def dataset_of(name: str) -> str:
    """The data set that --dataset names.

    Raises:
        UsageError: There is no such data set.
    """
    try:
        return data.canonical(name)
    except ValueError as error:
        sentence = f"--dataset {error}"
        raise UsageError(sentence if sentence.endswith("?") else f"{sentence}.") from None


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


def _processors() -> int:
    """Processors that this process may use; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    if args.init_from is not None:  # the same in whatever folder the run is resumed
        args.init_from = os.path.abspath(args.init_from)
    try:
        torch.zeros(1, device=args.device).cpu()
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError here
        reason = str(error).strip().splitlines()[0][:120]
        raise UsageError(f"--device {args.device!r} cannot be used: {reason}") from error


def _check_graph(args: argparse.Namespace) -> None:
    if torch.device(args.device).type != "cuda":
        raise UsageError(f"--cuda_graph needs a CUDA GPU; --device is {args.device}.")
    if args.amp == "fp16":
        raise UsageError("--cuda_graph cannot skip the steps that --amp fp16 must skip; use --amp bf16.")
    if args.accumulate > 1 or ranks.size() > 1:
        raise UsageError("--cuda_graph captures a step of one process in one part; leave it out, or --accumulate.")


def smallest_part() -> int:
    """Images that a part of a step needs: two, of which batch norm can estimate a variance, and one on each rank."""
    return max(2, ranks.size())


def saving(text: str) -> tuple[int, float]:
    """What --save_every says: every so many steps, or seconds; 0 for never.

    Raises:
        UsageError: It says something else.
    """
    try:
        steps, seconds = (0, 60 * float(text[:-1])) if text.endswith("m") else (int(text), 0.0)
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
    if not path.is_file():
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


def kernels_of(args: argparse.Namespace) -> dict[str, str]:
    """Operator -> backend of the kernels that a student's run uses; the loss has fewer backends than the neurons.

    Raises:
        ValueError: The backend that the options name cannot run one of them.
    """
    device = torch.device(args.device)
    chosen = {operator: resolve_backend(args.backend, operator, device) for operator in ("lif", "bn_lif")}
    loss = args.backend if args.backend in ("auto", *available("seal_loss")) else "auto"
    return {**chosen, "seal_loss": resolve_backend(loss, "seal_loss", device, time_steps=args.T)}


def _require(flag: str, value: float, *, at_least: float | None = None, above: float | None = None) -> None:
    if at_least is not None and not value >= at_least:
        raise UsageError(f"{flag} must be at least {at_least}; got {value}.")
    if above is not None and not value > above:
        raise UsageError(f"{flag} must be above {above}; got {value}.")
    if not math.isfinite(value):
        raise UsageError(f"{flag} must be a finite number; got {value}.")
