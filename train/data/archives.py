"""The zip archives of CIFAR10-DVS: what they hold, and unpacking what is missing."""

from __future__ import annotations

import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .errors import DataError
from .folders import hidden, is_file, is_folder, shortened, unreadable

SUFFIX = ".aedat"
_PLACES = ("download", ".")  # under the dataset's root
_BLOCK = 4096  # bytes of a recording that are compared first: those of another one differ here


class ArchiveError(DataError):
    """Why an archive cannot be used, in one sentence; the recordings may lie elsewhere as well."""


class Archive(NamedTuple):
    """The recordings of one class in a zip file, by file name."""

    path: Path
    members: dict[str, zipfile.ZipInfo]


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    start = b""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            with zipfile.ZipFile(file) as content:
                yield content
    except RuntimeError as error:  # NotImplementedError, or a module of Python that is missing
        raise ArchiveError(
            f"{path} is packed in a way that Python cannot read ({error}); unpack it yourself."
        ) from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ArchiveError(str(unreadable(path, error))) from None
        if start[:2] not in (b"PK", b""):
            raise ArchiveError(f"{path} is no zip archive: it begins with {start!r} instead of b'PK'.") from None
        reason = str(error) or type(error).__name__
        raise ArchiveError(f"{path} is truncated or corrupt ({reason}); delete it and download it again.") from None


def read_archive(path: Path, class_name: str, classes: tuple[str, ...]) -> Archive:
    """The recordings in the archive of one class, whatever the folders inside it are.

    Raises:
        ArchiveError: it cannot be read, reaches outside its folder, or holds no recordings, or some of another class.
    """
    with _opened(path) as content:
        listed = content.infolist()
    members: dict[str, zipfile.ZipInfo] = {}
    for member in listed:
        inner = PurePosixPath(member.filename.replace("\\", "/"))
        if inner.is_absolute() or ".." in inner.parts or ":" in member.filename:
            raise ArchiveError(f"{path} wants to unpack {member.filename!r} outside its folder, so it is not unpacked.")
        if member.flag_bits & 1:
            raise ArchiveError(f"{path} is encrypted; unpack it yourself.")
        if inner.suffix != SUFFIX or any(map(hidden, inner.parts)) or member.filename.endswith(("/", "\\")):
            continue
        folder = next((part for part in reversed(inner.parts[:-1]) if part in classes), class_name)
        if folder != class_name:
            raise ArchiveError(f"{path} holds recordings of {folder} ({member.filename}) instead of {class_name}.")
        twin = members.setdefault(inner.name, member)
        if (twin.CRC, twin.file_size) != (member.CRC, member.file_size):
            raise ArchiveError(
                f"{path} holds two recordings of one name ({twin.filename} and {member.filename}), so it is unclear "
                "which of them belongs to the set."
            )
    if not members:
        present = shortened([member.filename for member in listed]) or "nothing"
        raise ArchiveError(f"{path} holds no {SUFFIX} recordings of {class_name}: it holds {present}.")
    return Archive(path, members)


def read_archives(
    root: Path, classes: tuple[str, ...], without: dict[Path, DataError]
) -> tuple[dict[str, Archive], dict[str, DataError]]:
    """Archives by class, the fullest one of each, and for classes whose archives cannot be used, why.

    Args:
        root: they lie in root/download or in root itself, and are named <class>.zip.
        classes: names of the classes.
        without: archives that are known to be of no use, and why.
    """
    found: dict[str, Archive] = {}
    faults: dict[str, DataError] = {}
    for class_name in classes:
        for place in _PLACES:
            path = root / place / f"{class_name}.zip"
            try:
                if not is_folder(path.parent) or not is_file(path):
                    continue
                if path in without:
                    raise without[path]
                archive = read_archive(path, class_name, classes)
            except DataError as error:
                faults.setdefault(class_name, error)
                continue
            if class_name not in found or len(archive.members) > len(found[class_name].members):
                found[class_name] = archive
    return found, {class_name: error for class_name, error in faults.items() if class_name not in found}


def begun(archive: Archive, folder: Path, names: list[str]) -> list[str]:
    """Those of a folder's files that are the beginning of a recording in the archive.

    An interrupted unpacking leaves one like that.

    Raises:
        ArchiveError: a recording in the archive cannot be read.
        DataError: a file cannot be read.
    """
    found = []
    with _opened(archive.path) as content:
        for name in names:
            try:
                start = (folder / name).read_bytes()
            except OSError as error:
                raise unreadable(folder / name, error) from None
            with content.open(archive.members[name]) as member:
                blocks = start[:_BLOCK], start[_BLOCK:]
                if all(block == member.read(len(block)) for block in blocks):
                    found.append(name)
    return found


def contents(archive: Archive, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Recordings of an archive by name, checked against the archive's checksums.

    Raises:
        ArchiveError: one of them cannot be read.
    """
    with _opened(archive.path) as content:
        for name in names:
            member = archive.members[name]
            recording = content.read(member)
            if len(recording) != member.file_size:
                raise zipfile.BadZipFile(f"{member.filename} has {len(recording)} of its {member.file_size} bytes")
            yield name, recording
