"""Command-line options of the trainers: the published names, and some more."""

from __future__ import annotations

import argparse
import difflib
import os
from pathlib import Path

from seal_fast.backends import BACKENDS
from seal_fast.models import STUDENTS, TEACHERS
from seal_fast.train import data
from seal_fast.train.defaults import dataset_of, table
from seal_fast.train.errors import UsageError
from seal_fast.train.resume import difference, options_to_resume, place_to_resume

METHODS = ("seal", "ela", "sta", "kd", "tdkd", "ce")
OPTIMISERS = ("SGDM", "ADAM", "ADAMW")
SCHEDULERS = ("COSINE", "NONE")
AMP = ("auto", "off", "bf16", "fp16")
MACHINE = ("device", "num_workers", "cuda_graph")  # what they are by default follows from the machine


class _WithoutEffect(argparse.Action):
    """Notes that a flag was given which the published scripts have, and which changes nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        namespace.without_effect = [*getattr(namespace, "without_effect", ()), option_string]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, which names what was meant where that is close."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:  # noqa: D102
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(unknown[0], flags)}")
        return found

    def error(self, message: str):
        """Raise the one sentence; argparse would print the usage of forty options above it."""
        raise UsageError(message)

    def _check_value(self, action: argparse.Action, value) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += _meant(str(value), [str(choice) for choice in action.choices])
            raise


def _meant(word: str, known: list[str]) -> str:
    """A hint at the known word that is closest; empty where none is close."""
    by_lower_case = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.partition("=")[0].lower(), by_lower_case, n=1)
    return f"; did you mean {by_lower_case[close[0]]}?" if close else ""


class TrainerParser(Parser):
    """A trainer's parser: the run that --resume names has the values of what the command leaves out.

    Args:
        program: Name of the command.
        role: "teacher" or "student".
    """

    def __init__(self, program: str, role: str, description: str):
        super().__init__(
            program,
            description=description,
            epilog=table(role),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.role = role

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:  # noqa: D102
        looked = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        looked.add_argument("--resume")
        try:
            named = looked.parse_known_args(args)[0].resume
        except argparse.ArgumentError:  # without a value: the whole parser says so
            named = None
        if named in (None, "auto"):
            return super().parse_args(args, namespace)
        if not named:
            self.error("--resume must be a folder, a checkpoint or 'auto'; got ''.")
        named = os.path.expanduser(named)
        folder, _ = place_to_resume(named)
        saved = self._options_of(named)
        self.set_defaults(**saved)
        found = super().parse_args(args, namespace)
        self._check_given(found, saved, folder)
        return found

    def _check_given(self, found: argparse.Namespace, saved: dict, folder: Path) -> None:
        """See whether what was given beside --resume can hold; the rest is compared when all options are resolved."""
        place = Path(found.log_path, found.run_name or folder.name)
        asked = any(getattr(found, name) != saved.get(name) for name in ("log_path", "run_name"))
        if asked and os.path.realpath(place) != os.path.realpath(folder):
            flag = "--log_path" if found.run_name == saved.get("run_name") else "--run_name"
            self.error(f"{flag} is for new runs; --resume {found.resume} goes on in that folder.")
        # What else is said about data and teachers that these do not need would mislead.
        known = {name: getattr(found, name) for name in ("method", "arch", "stu_arch") if name in saved}
        other = difference(saved, argparse.Namespace(dataset=dataset_of(found.dataset), **known))
        if other:
            self.error(f"--resume: {found.resume} belongs to a run with other options: {other}.")

    def _options_of(self, named: str) -> dict:
        saved = options_to_resume(named)
        role = "student" if "stu_arch" in saved else "teacher"
        if role != self.role:
            program = {"student": "seal-fast-distill", "teacher": "seal-fast-teacher"}[role]
            raise UsageError(f"--resume: {named} is the run of a {role}; {program} goes on with it.")
        # What was not asked for then follows from the machine, which may be another now.
        asked = saved.get("asked")
        saved |= {name: asked.get(name) if isinstance(asked, dict) else None for name in MACHINE}
        known = {action.dest for action in self._actions} - {"resume", "help"}
        return {name: value for name, value in saved.items() if name in known}


def teacher_parser() -> argparse.ArgumentParser:
    """Options of `train/teacher.py`."""
    parser = TrainerParser("seal-fast-teacher", "teacher", "Train an ANN teacher.")
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
    parser = TrainerParser("seal-fast-distill", "student", "Distil a spiking student.")
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
    loss.add_argument("--tea_path", type=os.path.expanduser, help="teacher checkpoint, or the folder of its run")
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
    parser.add_argument("--dataset", help=", ".join(data.DATASETS))
    parser.add_argument("--data_path", type=os.path.expanduser, help="folder of the dataset; DIGITS needs none")
    parser.add_argument(
        "--log_path",
        type=os.path.expanduser,
        default="runs",
        help="folder that gets the run's own folder (default: %(default)s)",
    )
    parser.add_argument("--run_name", help="name of the run's folder (default: what is trained, and the time)")
    parser.add_argument(
        "--resume",
        type=os.path.expanduser,
        help="run folder or checkpoint to go on from, which needs no other option; or 'auto' for the newest run with "
        "these options",
    )
    parser.add_argument(
        "--init_from",
        type=os.path.expanduser,
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
    optimisation.add_argument("--num_epoch", type=int, help="may grow when a run is resumed (default: per dataset)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--num_workers", type=int, help="processes that load data (default: up to 8; DIGITS 0)")
    machine.add_argument("--device", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    machine.add_argument(
        "--amp",
        choices=AMP,
        default="auto",
        help="autocast; auto is bf16 where the hardware multiplies it faster than float32 (default: %(default)s)",
    )
    _add_switch(
        machine,
        "--cuda_graph",
        None,
        "replay each step as one CUDA graph: faster, as the host has less to do, but it keeps a step's memory "
        "(default: on a GPU with --amp bf16, for one process and whole batches, unless --backend is torch)",
    )


def _add_switch(parser, flag: str, default: bool | None, text: str) -> None:
    parser.add_argument(
        flag, type=_boolean, nargs="?", const=True, default=default, help=f"{text}; '{flag} false' turns it off"
    )


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() in ("true", "1", "yes")
