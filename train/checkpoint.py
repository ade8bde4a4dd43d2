"""Checkpoints: written whole or not at all, and opened without executing anything in them."""

from __future__ import annotations

import functools
import io
import os
import pickle
import re
import warnings
from pathlib import Path

import torch
from torch import nn

from seal_fast.models import STUDENTS, TEACHERS, student, teacher
from seal_fast.models.ann import WITHOUT_STEMS
from seal_fast.train import disk
from seal_fast.train.errors import UsageError
from seal_fast.train.harmless import harmless

BEST = "best.pt"  # of a run's folder: the weights of the best epoch


def save(content: dict, path: Path) -> None:
    """Write `content` to `path`; what was there before stays until the new file is complete, and then is gone."""
    disk.write(_packed(content), path)


def save_keeping_previous(content: dict, path: Path, previous: Path) -> None:
    """Write `content` to `path`, and let what was there before be found at `previous`.

    At each moment one of the two is a whole checkpoint.
    """

    def keep() -> None:
        if path.exists():
            link = previous.with_name(f"{previous.name}.partial")
            try:
                link.unlink(missing_ok=True)
                os.link(path, link)
                os.replace(link, previous)
            except OSError:  # a file system without links: for a moment there is no `path`
                os.replace(path, previous)

    disk.write(_packed(content), path, before_rename=keep)


def _packed(content: dict) -> memoryview:
    """The file's bytes.

    In memory, as torch's own writer tells of a full disk in words that name neither the disk nor the file.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def load(path: Path) -> dict:
    """Read a checkpoint onto the CPU.

    Raises:
        UsageError: The file is missing, truncated, or holds what could execute something: anything but tensors, plain
            values, and arrays, numbers and options that are as harmless.
    """
    try:
        with torch.serialization.safe_globals(harmless()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read is told below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no checkpoint at {path}.") from None
    except pickle.UnpicklingError as error:
        raise UsageError(f"checkpoint {path} is refused: {_refused(error)}.") from error
    except OSError as error:
        raise UsageError(f"checkpoint {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # torch.load raises whatever the bytes that it meets lead to
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0].rstrip(".")
        raise UsageError(f"checkpoint {path} is truncated or no checkpoint ({reason}).") from error
    if not isinstance(content, dict):
        raise UsageError(f"checkpoint {path} must hold a dictionary; it holds {type(content).__name__}.")
    return content


def _refused(error: pickle.UnpicklingError) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found:
        told = f"it holds {found[1]}, which could run code when it is read"
    elif "Unsupported operand" in str(error):
        told = "it is pickled in another way than torch.save does it"
    else:
        return "it holds something other than tensors and plain values, or is no checkpoint"
    # What runs code is for those to load who made it.
    how = 'torch.save(old["model"], NEW) after old = torch.load(OLD, weights_only=False)'
    return f"{told}; if you trust it, save its weights alone: {how}, or old.state_dict() where it is a whole module"


def best_of(path: str | Path) -> Path:
    """The checkpoint that a path names: a run's folder names its best one."""
    path = Path(path)
    return path / BEST if os.path.isdir(path) else path


# Where checkpoints have their weights: of these trainers and the published code first.
_KEYS = ("best_net", "net", "state_dict", "model_state_dict", "model", "network")
_KEYS_IN_WORDS = f"{', '.join(_KEYS[:-1])} or {_KEYS[-1]}"
# What torch.compile and FSDP put into the names of a module's parameters, wherever the module is.
_INNER = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def weights_of(content: dict) -> object:
    """The network's weights in a checkpoint: under one of the keys that are in use, or the checkpoint itself.

    Names come without what wrappers add to them: DataParallel, DistributedDataParallel and AveragedModel put every
    module under the name "module".
    """
    found = [content[key] for key in _KEYS if key in content]
    state = next((value for value in found if _is_state_dict(value)), found[0] if found else content)
    if not _is_state_dict(state):
        return state
    while True:
        before = list(state)
        state = {name: value for name, value in state.items() if name != "n_averaged"}  # AveragedModel's count
        for inner in _INNER:
            state = {name.replace(inner, ""): value for name, value in state.items()}
        if state and all(name.startswith("module.") for name in state):
            state = {name.removeprefix("module."): value for name, value in state.items()}
        if list(state) == before:
            return state


def start_from(network: nn.Module, state: object, path: Path, what: str, **asked: str) -> list[str]:
    """Give a fresh network the weights of a checkpoint; the arguments are those of `load_into`.

    A readout, the last linear layer, of another number of classes stays as it is.

    Returns:
        Names of the parameters that stay as they are.

    Raises:
        UsageError: The state dict is of another network.
    """
    own, kept = network.state_dict(), []
    readout = list(own)[-2:]  # weight [K, C] and bias [K]
    if _is_state_dict(state) and all(name in state for name in readout):
        weight, bias = (state[name].shape for name in readout)
        if weight[1:] == own[readout[0]].shape[1:] and bias == weight[:1] != own[readout[1]].shape:
            kept = readout
            state = {**state, **{name: own[name] for name in kept}}
    load_into(network, state, path, what, **asked)
    return kept


def load_into(network: nn.Module, state: object, path: Path, what: str, **asked: str) -> None:
    """Load a state dict if its names and shapes are those of the network.

    Args:
        network: The network.
        state: The state dict.
        path: Where it comes from.
        what: The network in words.
        **asked: The `role` and `arch` that were asked for, and the `flag` that did: if they are given, a state dict of
            another known network is recognised.

    Raises:
        UsageError: They are not.
    """
    require_match(network, state, path, what, **asked)
    network.load_state_dict(state)


def require_match(network: nn.Module, state: object, path: Path, what: str, **asked: str) -> None:
    """See whether names and shapes of a state dict are those of the network; the arguments are those of `load_into`.

    Raises:
        UsageError: They are not.
    """
    forms = f"it is no state dict, and has none under {_KEYS_IN_WORDS}"
    mismatch = _mismatch(network.state_dict(), state) if _is_state_dict(state) else forms
    if mismatch:
        found = _instead(state, **asked) if asked else ""
        raise UsageError(f"checkpoint {path} does not hold {what}{found}: {mismatch}.")


def load_teacher(path: Path, arch: str, *, num_classes: int, in_channels: int, stem: str | None) -> nn.Module:
    """A teacher in evaluation mode from {"best_net": state_dict}, or from a bare state dict.

    Raises:
        UsageError: The file cannot be read, or holds another network.
    """
    state = weights_of(load(path))
    if not _is_state_dict(state):
        raise UsageError(f"checkpoint {path} holds no teacher: no state dict is there, nor under {_KEYS_IN_WORDS}.")
    network = teacher(arch, num_classes=num_classes, in_channels=in_channels, stem=stem)
    what = f"a {arch} with {num_classes} classes and {in_channels} input channels"
    load_into(network, state, path, what, role="teacher", arch=arch, flag="--tea_arch")
    return network.eval().requires_grad_(False)


def matrices_of(state: object) -> list[torch.Tensor]:
    """The weights of two dimensions or more in a state dict; none in what is no state dict."""
    return [value for value in state.values() if value.dim() > 1] if _is_state_dict(state) else []


def _is_state_dict(state: object) -> bool:
    if not isinstance(state, dict):
        return False
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())


def _instead(state: object, role: str, arch: str, flag: str) -> str:
    """Names the known network that the weights belong to; empty if there is none, or if it is the one asked for."""
    matrices = matrices_of(state)
    if not matrices or matrices[-1].shape[0] < 2 or matrices[0].shape[1] < 1:
        return ""
    sizes = {"num_classes": matrices[-1].shape[0], "in_channels": matrices[0].shape[1]}
    known = [("student", name, functools.partial(student, **sizes)) for name in STUDENTS]
    for stem in (None, "cifar", "imagenet"):
        stemmed = [name for name in TEACHERS if stem is None or name not in WITHOUT_STEMS]
        known += [("teacher", name, functools.partial(teacher, **sizes, stem=stem)) for name in stemmed]
    for found_role, found, make in known:
        with torch.device("meta"):
            fits = not _mismatch(make(found).state_dict(), state)
        if fits and found_role != role:
            return f" but a {found_role}, a {found}"
        if fits:
            return "" if found == arch.removesuffix("_dvs") else f" but a {found} (pass {flag} {found})"
    return ""


def _mismatch(expected: dict, state: dict) -> str:
    """The first difference of names or shapes in words, and how many more there are; empty where there is none."""
    found = [f"{name} is missing" for name in expected if name not in state]
    found += [f"{name} is unexpected" for name in state if name not in expected]
    for name, value in expected.items():
        if name in state and state[name].shape != value.shape:
            found.append(f"{name} is {list(state[name].shape)} instead of {list(value.shape)}")
    if len(found) < 2:
        return "".join(found)
    return f"{found[0]}, and {len(found) - 1} more such differences"
