"""Frames of a whole set of recordings, made once and kept beside them."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from .errors import DataError
from .folders import is_folder, unreadable
from .frames import FRAME_SIZE, recording_to_frames
from .publish import CACHE, clean, one_at_a_time, publish, scratch_folder
from .transforms import Transform

_FORMAT = 2  # of the cache; 1 had no checksums
_CHUNK = 64  # recordings decoded ahead of writing: 12 MB of frames at T = 10


@dataclass(frozen=True)
class Recordings:
    """The event files of a dataset.

    Attributes:
        root: the dataset's folder, where the cache is kept.
        files: paths, sorted by class and name.
        labels: label of each file.
    """

    root: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...]


def frame_cache(recordings: Recordings, T: int, size: int = FRAME_SIZE) -> Path:
    """The folder that holds frames.npy, float32 [N,T,2,size,size], and labels.npy, int64 [N], in the files' order.

    Made now if it is missing. As published, CIFAR10-DVS takes 1.8 GB, where SpikingJelly's full-size float64 frames
    would take 26 GB and a resize in each epoch. The folder's name holds a digest of the files' names, sizes and times
    of modification, of the labels and of the format: when they change, a new one is made, and the old one can be
    deleted. The checksums of all frames are compared at each call.

    Raises:
        DataError: a recording cannot be read, the folder cannot be written, or its frames are not what was written.
    """
    listing = [[str(path.relative_to(recordings.root)), *_state(path)] for path in recordings.files]
    content = {"format": _FORMAT, "files": listing, "labels": recordings.labels}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    key = {"shape": [len(listing), T, 2, size, size], "files": digest}
    parent = recordings.root / CACHE
    folder = parent / f"number{T}_{size}x{size}_{digest[:12]}"
    if not is_folder(folder):
        with one_at_a_time(recordings.root):
            if not is_folder(folder):
                with scratch_folder(parent) as scratch:
                    _write(recordings, key, scratch)
                    publish(scratch, folder)
    clean(recordings.root)
    _check(folder, key, recordings)
    return folder


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise unreadable(path, error) from None
    return found.st_size, found.st_mtime_ns


def _threads() -> int:
    return min(8, max(2, os.cpu_count() or 2))


def _write(recordings: Recordings, key: dict, folder: Path) -> None:
    _, T, _, size, _ = key["shape"]
    checksums = []
    # Written through a file, as a memory map on a full disk ends the process with SIGBUS instead of an error.
    with (
        ThreadPoolExecutor(_threads()) as pool,
        (folder / "frames.npy").open("wb") as file,
        tqdm(total=len(recordings.files), desc=f"frames, T = {T}", unit="file", leave=False, disable=None) as progress,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(key["shape"])}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(recordings.files), _CHUNK):
            chunk = recordings.files[start : start + _CHUNK]
            for frames in pool.map(recording_to_frames, chunk, repeat(T), repeat(size)):
                content = frames.astype("<f4", copy=False).tobytes()
                checksums.append(zlib.crc32(content))
                file.write(content)
                progress.update()
    np.save(folder / "labels.npy", np.asarray(recordings.labels, dtype=np.int64))
    (folder / "key.json").write_text(json.dumps({**key, "crc32": checksums}), encoding="utf-8")


def _check(folder: Path, key: dict, recordings: Recordings) -> None:
    """Refuse a cache that is not what `_write` left.

    Raises:
        DataError: it is so, or the cache cannot be read.
    """
    mend = f"delete {folder}, and it will be made again"
    try:
        found = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        checksums = found.pop("crc32")
        frames = _Frames(folder / "frames.npy")
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        whole = found == key and list(frames.shape) == key["shape"] and labels.tolist() == list(recordings.labels)
        whole = whole and frames.fill_their_file() and len(checksums) == len(frames)
    except OSError as error:
        if error.errno not in (None, errno.ENOENT):
            raise unreadable(error.filename or folder, error) from None
        whole = False
    except (ValueError, TypeError, AttributeError, KeyError, EOFError):
        whole = False
    if not whole:
        raise DataError(f"{folder} is incomplete or was changed; {mend}.")
    with ThreadPoolExecutor(_threads()) as pool:
        for number, checksum in enumerate(pool.map(frames.checksum, range(len(frames)))):
            if checksum != checksums[number]:
                name = recordings.files[number].relative_to(recordings.root)
                raise DataError(f"The frames of {name} in {folder} do not have their checksum; {mend}.")


class _Frames:
    """The array in frames.npy, read sample by sample.

    Not through a memory map: where a disk fails or the file was cut, it ends the process with SIGBUS.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no array of frames.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            self.shape, in_columns, dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        if in_columns or dtype != np.dtype("<f4") or len(self.shape) != 5:
            raise ValueError(f"{path} holds no frames")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def _bytes(self) -> int:
        return 4 * math.prod(self.shape[1:])

    def fill_their_file(self) -> bool:
        """Whether the file is as long as its header says."""
        return self.path.stat().st_size == self._start + len(self) * self._bytes

    def __getitem__(self, number: int) -> np.ndarray:
        """One sample, float32 [T,2,H,W], which is the caller's own.

        Raises:
            DataError: it cannot be read.
        """
        sample = np.empty(self.shape[1:], "<f4")
        try:
            with self.path.open("rb") as file:
                file.seek(self._start + number * self._bytes)
                length = file.readinto(sample.data.cast("B"))
        except OSError as error:
            raise unreadable(self.path, error) from None
        if length != self._bytes:
            folder = self.path.parent
            raise DataError(f"{self.path} was cut during this run; delete {folder}, and it will be made again.")
        return sample

    def checksum(self, number: int) -> int:
        return zlib.crc32(self[number])


class CachedFrames(Dataset):
    """A part of a frame cache.

    Args:
        folder: what `frame_cache` returned.
        labels: of all samples in it.
        indices: which of the samples.
        transform: float32 [T,2,H,W] → the same shape, or None for none.

    Raises:
        DataError: the cache cannot be read any more.
    """

    def __init__(
        self, folder: Path, labels: Sequence[int], indices: Sequence[int], transform: Transform | None
    ) -> None:
        try:
            self.frames = _Frames(folder / "frames.npy")
        except OSError as error:
            raise unreadable(folder / "frames.npy", error) from None
        self.indices = list(indices)
        self.labels = [labels[index] for index in self.indices]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames = torch.from_numpy(self.frames[self.indices[index]].astype(np.float32, copy=False))
        return frames if self.transform is None else self.transform(frames), self.labels[index]
