"""What lies in a folder, and sentences for what cannot be read there or is not what was expected."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from .errors import DataError

# Folders and files that systems and programs put beside data, in lower case; other such names begin with a dot.
_BESIDE_DATA = {
    "thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information",
}  # fmt: skip
_SHOWN = 5  # entries of a folder in a sentence
_PROBED = 100  # subfolders that are looked into for what the user may have meant


def hidden(name: str) -> bool:
    """Whether a file or folder of that name is no data: neither a sample nor a class."""
    return name.startswith(".") or name.lower() in _BESIDE_DATA


def unreadable(path: str | Path, error: OSError | MemoryError) -> DataError:
    """The sentence for a file or folder that the system does not give, or gives no memory for."""
    reason = "not enough memory"
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
    return DataError(f"{path} cannot be read: {reason[:1].lower()}{reason[1:]}.")


def is_folder(path: Path) -> bool:
    """Whether there is a folder.

    Raises:
        DataError: the system does not say.
    """
    return stat.S_ISDIR(_mode(path))


def is_file(path: Path) -> bool:
    """Whether there is a file.

    Raises:
        DataError: the system does not say.
    """
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise unreadable(path, error) from None


def names(folder: Path) -> list[str]:
    """The names in a folder in their order, without hidden ones.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        return sorted(name for name in os.listdir(folder) if not hidden(name))
    except OSError as error:
        raise unreadable(folder, error) from None


def check_root(root: Path, how_to_get: str) -> None:
    """Refuse a data folder that is missing or no folder.

    Raises:
        DataError: it is, or it cannot be read.
    """
    if is_folder(root):
        return
    if _mode(root):
        raise DataError(f"{root} is no folder; name the folder that holds the data.")
    if os.path.islink(root):
        raise DataError(f"{root} is a link to {os.readlink(root)}, which is missing; name another folder.")
    raise DataError(f"{root} is missing; {how_to_get}.")


def shortened(entries: list[str]) -> str:
    """The first of some names, and how many there are besides."""
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return ", ".join(entries[:_SHOWN]) + more


def meant(folder: Path, fits: Callable[[Path], bool]) -> Path | None:
    """The folder one level above or below that fits, where `folder` does not."""
    for other in (Path(os.path.normpath(folder / "..")), *(folder / name for name in names(folder)[:_PROBED])):
        try:
            if is_folder(other) and fits(other):
                return other
        except DataError:
            continue
    return None


def held(folder: Path) -> str:
    """What a folder holds, in words that follow its name."""
    present = names(folder)
    return f"it holds {shortened(present)}" if present else "it is empty"


def not_found(folder: Path, fault: str, advice: str, fits: Callable[[Path], bool] = lambda folder: False) -> DataError:
    """The sentence for a folder that does not hold what it should: it names what is there.

    Args:
        folder: where something was looked for.
        fault: what is wrong, after the folder's name.
        advice: what to do, unless another folder was meant.
        fits: whether a folder is what was expected; those one level above and below are asked about.
    """
    other = meant(folder, fits)
    if other is not None:
        return DataError(f"{folder} {fault}: {held(folder)}; did you mean --data_path {other}?")
    return DataError(f"{folder} {fault}: {held(folder)}; {advice}.")
