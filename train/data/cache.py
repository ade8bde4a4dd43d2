"""Frames of a whole set of recordings, made once and kept beside them."""

from __future__ import annotations

import errno
import hashlib
import io
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
        file.write(_header(key["shape"]))
        for start in range(0, len(recordings.files), _CHUNK):
            chunk = recordings.files[start : start + _CHUNK]
            for frames in pool.map(recording_to_frames, chunk, repeat(T), repeat(size)):
                content = frames.astype("<f4", copy=False).tobytes()
                checksums.append(zlib.crc32(content))
                file.write(content)
                progress.update()
    (folder / "labels.npy").write_bytes(_labels_file(recordings))
    (folder / "key.json").write_text(json.dumps({**key, "crc32": checksums}), encoding="utf-8")


def _check(folder: Path, key: dict, recordings: Recordings) -> None:
    """Refuse a cache that is not what `_write` left.

    Raises:
        DataError: it is so, or the cache cannot be read.
    """
    mend = f"delete {folder}, and it will be made again"
    frames = _Frames(folder / "frames.npy", key["shape"])
    try:
        found = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        checksums = found.pop("crc32")
        whole = found == key and frames.fill_their_file() and len(checksums) == len(frames)
        whole = whole and (folder / "labels.npy").read_bytes() == _labels_file(recordings)
    except MemoryError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.ENOENT):
            raise unreadable(error.filename or folder, error) from None
        whole = False
    except Exception:  # damaged JSON gives anything
        whole = False
    if not whole:
        raise DataError(f"{folder} is incomplete or was changed; {mend}.")
    pool = ThreadPoolExecutor(_threads())
    try:
        for number, checksum in enumerate(pool.map(frames.checksum, range(len(frames)))):
            if checksum != checksums[number]:
                name = recordings.files[number].relative_to(recordings.root)
                raise DataError(f"The frames of {name} in {folder} do not have their checksum; {mend}.")
    finally:
        pool.shutdown(cancel_futures=True)


def _header(shape: Sequence[int]) -> bytes:
    """What the file of an array of this shape, float32, begins with."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)})
    return file.getvalue()


def _labels_file(recordings: Recordings) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(recordings.labels, dtype=np.int64))
    return file.getvalue()


class _Frames:
    """The array in frames.npy, read sample by sample.

    Not through a memory map: where a disk fails or the file was cut, it ends the process with SIGBUS. Nor is the file's
    header parsed, as a damaged one may lead to anything.

    Args:
        path: the file.
        shape: of the array, [N,T,2,H,W].
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self.path, self.shape = path, tuple(shape)
        self._start, self._bytes = len(_header(shape)), 4 * math.prod(shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def fill_their_file(self) -> bool:
        """Whether the file has the header and the length of this array.

        Raises:
            OSError: it cannot be read.
        """
        with self.path.open("rb") as file:
            begins = file.read(self._start) == _header(self.shape)
        return begins and self.path.stat().st_size == self._start + len(self) * self._bytes

    def __getitem__(self, number: int) -> np.ndarray:
        """One sample, float32 [T,2,H,W], which is the caller's own.

        Raises:
            DataError: it cannot be read.
        """
        sample = np.empty(self.shape[1:], "<f4")
        rest = memoryview(sample).cast("B")
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + number * self._bytes)
                while rest and (length := file.readinto(rest)):
                    rest = rest[length:]
        except OSError as error:
            raise unreadable(self.path, error) from None
        if rest:
            folder = self.path.parent
            raise DataError(f"{self.path} was cut during this run; delete {folder}, and it will be made again.")
        return sample

    def checksum(self, number: int) -> int:
        return zlib.crc32(self[number])


class CachedFrames(Dataset):
    """A part of a frame cache.

    Args:
        folder: what `frame_cache` returned.
        shape: of all its frames, [N,T,2,H,W].
        labels: of all samples in it.
        indices: which of the samples.
        transform: float32 [T,2,H,W] → the same shape, or None for none.
    """

    def __init__(
        self,
        folder: Path,
        shape: Sequence[int],
        labels: Sequence[int],
        indices: Sequence[int],
        transform: Transform | None,
    ) -> None:
        self.frames = _Frames(folder / "frames.npy", shape)
        self.indices = list(indices)
        self.labels = [labels[index] for index in self.indices]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        frames = torch.from_numpy(self.frames[self.indices[index]].astype(np.float32, copy=False))
        return frames if self.transform is None else self.transform(frames), self.labels[index]
