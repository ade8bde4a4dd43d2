"""Where the recordings of an event dataset lie, and bringing the fullest of these places to what its archives hold."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .archives import SUFFIX, Archive, ArchiveError, begun, contents, read_archives
from .cache import Recordings
from .errors import DataError
from .folders import hidden, is_folder, unreadable
from .publish import near, one_at_a_time, publish_files, scratch_folder

# Folders under the root, with what their class folders hold; of equal ones the first is read.
_PLACES = (("events_np", ".npz"), ("extract", SUFFIX), (".", SUFFIX), (".", ".npz"))


@dataclass(frozen=True)
class Layout:
    """One of the places.

    Attributes:
        folder: holds the class folders.
        present: for each class, names of the recordings that are there.
        packed: for each class, names of those that an archive holds, and that are missing here or cut.
    """

    folder: Path
    present: tuple[frozenset[str], ...]
    packed: tuple[tuple[str, ...], ...]

    def names(self, label: int) -> list[str]:
        """All recordings of a class in their order, those in its archive included."""
        return sorted(self.present[label].union(self.packed[label]))

    def __len__(self) -> int:
        return sum(len(self.names(label)) for label in range(len(self.present)))

    def missing(self) -> list[int]:
        """Labels of the classes that have no recordings."""
        return [label for label in range(len(self.present)) if not self.names(label)]


def layouts(root: Path, classes: tuple[str, ...], archives: dict[str, Archive]) -> list[Layout]:
    """The places that hold recordings, the fullest first: most classes, then most recordings, then least to unpack.

    Raises:
        DataError: a folder cannot be read.
    """
    found = []
    for inner, suffix in _PLACES:
        folder = root / inner
        sizes = [_sizes(folder / class_name, suffix) if is_folder(folder) else {} for class_name in classes]
        unpacks = suffix == SUFFIX and (inner == "extract" or any(sizes))
        packed = [
            _lacking(archives.get(name) if unpacks else None, folder / name, have)
            for name, have in zip(classes, sizes, strict=True)
        ]
        found.append(Layout(folder, tuple(map(frozenset, sizes)), tuple(packed)))
    found = [layout for layout in found if len(layout)]
    return sorted(found, key=lambda layout: (len(layout.missing()), -len(layout), sum(map(len, layout.packed))))


def _sizes(folder: Path, suffix: str) -> dict[str, int]:
    """Bytes of the recordings in a class folder, by name; 0 where no archive has such files to compare."""
    if not is_folder(folder):
        return {}
    try:
        with os.scandir(folder) as entries:
            return {
                entry.name: entry.stat().st_size if suffix == SUFFIX else 0
                for entry in entries
                if entry.name.endswith(suffix) and not hidden(entry.name) and not entry.is_dir()
            }
    except OSError as error:
        raise unreadable(error.filename or folder, error) from None


def _lacking(archive: Archive | None, folder: Path, sizes: dict[str, int]) -> tuple[str, ...]:
    """Recordings of an archive that a class folder has not, or of which it has the beginning alone.

    A file that is shorter but another one is its owner's.
    """
    if archive is None:
        return ()
    shorter = [name for name, member in archive.members.items() if sizes.get(name, member.file_size) < member.file_size]
    try:
        cut = begun(archive, folder, shorter) if shorter else []
    except ArchiveError:
        cut = []
    return tuple(name for name in archive.members if name not in sizes or name in cut)


def find(root: Path, classes: tuple[str, ...]) -> tuple[Recordings, list[str], list[str]]:
    """The recordings in the fullest place under `root`, after unpacking what only archives hold.

    Places are root/events_np/<class>/*.npz, root/extract/<class>/*.aedat, and class folders in root itself. An archive
    <class>.zip, in root/download or in root, counts as unpacked to root/extract, or to root where recordings lie in
    class folders there; recordings that lack there are unpacked, and so are those that are shorter than in the archive.
    An archive that cannot be used is of no account where recordings of its class are found elsewhere.

    Returns:
        The recordings, the classes that have none, and sentences on what was left out or mended.

    Raises:
        DataError: a folder cannot be read, a class is in an archive alone that cannot be used, or there is no room to
            unpack it.
    """
    broken: dict[Path, DataError] = {}
    mended: list[str] = []
    while True:  # again where an archive was found to be of no use, and the class may have another one
        archives, faults = read_archives(root, classes, broken)
        found = layouts(root, classes, archives)
        if not found or not any(found[0].packed):
            break
        known = len(broken)
        with one_at_a_time(root):
            found = layouts(root, classes, archives)  # another process may have unpacked them meanwhile
            for label, class_name in enumerate(classes):
                if found[0].packed[label]:
                    try:
                        mended += _unpack(archives[class_name], found[0], label, root)
                    except ArchiveError as error:
                        broken[archives[class_name].path] = error
        if len(broken) == known:
            found = layouts(root, classes, archives)
            break
    if not found:
        if faults:
            raise next(iter(faults.values()))
        return Recordings(root, (), ()), list(classes), []
    taken, *left = found
    for label in taken.missing():
        if classes[label] in faults:
            raise faults[classes[label]]
    notes = mended + _on_archives(taken, classes, faults) + _on_others(taken, left)
    return _recordings(root, taken, classes), [classes[label] for label in taken.missing()], notes


def _recordings(root: Path, layout: Layout, classes: tuple[str, ...]) -> Recordings:
    files = [
        [layout.folder / class_name / name for name in layout.names(label)] for label, class_name in enumerate(classes)
    ]
    labels = tuple(label for label, paths in enumerate(files) for _ in paths)
    return Recordings(root, tuple(path for paths in files for path in paths), labels)


def _unpack(archive: Archive, layout: Layout, label: int, root: Path) -> list[str]:
    """Unpack what a class lacks; a sentence on it if the class was there in part."""
    destination = layout.folder / archive.path.stem
    with scratch_folder(near(destination, root)) as scratch:
        for name, content in contents(archive, list(layout.packed[label])):
            (scratch / name).write_bytes(content)
        publish_files(scratch, destination)
    if not layout.present[label]:
        return []
    number = len(layout.packed[label])
    were = (
        "recording, which was missing or incomplete, was"
        if number == 1
        else "recordings, which were missing or incomplete, were"
    )
    return [f"{number} {were} unpacked from {archive.path} into {destination}."]


def _on_archives(taken: Layout, classes: tuple[str, ...], faults: dict[str, DataError]) -> list[str]:
    return [
        # What to do about it matters to those alone who have no recordings of the class.
        f"{error.sentence.partition(';')[0].rstrip('.')}; the {len(taken.present[label])} recordings in "
        f"{taken.folder / class_name} are used."
        for label, class_name in enumerate(classes)
        if (error := faults.get(class_name)) is not None
    ]


def _on_others(taken: Layout, left: list[Layout]) -> list[str]:
    notes = []
    for other in left:
        there = any(other.present)
        # What archives alone hold is left out where it is in the taken place as well, as the whole set is.
        if len(other) > len(taken) or (there and len(other) < len(taken)):
            place, number = (other.folder, sum(map(len, other.present))) if there else ("zip archives", len(other))
            notes.append(f"{len(taken)} recordings are read from {taken.folder}; the {number} in {place} are left out.")
    return notes
