"""Frames of a whole set of recordings, made once and kept beside them."""

from __future__ import annotations

import hashlib
import json
import os
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
from .frames import FRAME_SIZE, recording_to_frames
from .publish import one_at_a_time, publish, scratch_folder
from .transforms import Transform

CACHE = "seal_fast_frames"
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
    would take 26 GB and a resize in each epoch. The folder's name holds a digest of the files' names and sizes: when
    they change, a new one is made, and the old one can be deleted.

    Raises:
        DataError: a recording cannot be read, or the folder cannot be written.
    """
    listing = [[str(path.relative_to(recordings.root)), path.stat().st_size] for path in recordings.files]
    content = {"files": listing, "labels": recordings.labels}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    key = {"shape": [len(listing), T, 2, size, size], "files": digest}
    parent = recordings.root / CACHE
    folder = parent / f"number{T}_{size}x{size}_{digest[:12]}"
    if not folder.is_dir():
        with one_at_a_time(parent):
            if not folder.is_dir():
                with scratch_folder(parent) as scratch:
                    _write(recordings, key, scratch)
                    publish(scratch, folder)
    _check(folder, key)
    return folder


def _write(recordings: Recordings, key: dict, folder: Path) -> None:
    _, T, _, size, _ = key["shape"]
    workers = min(8, max(2, os.cpu_count() or 2))
    # Written through a file, as a memory map on a full disk ends the process with SIGBUS instead of an error.
    with (
        ThreadPoolExecutor(workers) as pool,
        (folder / "frames.npy").open("wb") as file,
        tqdm(total=len(recordings.files), desc=f"frames, T = {T}", unit="file", leave=False, disable=None) as progress,
    ):
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(key["shape"])}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(recordings.files), _CHUNK):
            chunk = recordings.files[start : start + _CHUNK]
            for frames in pool.map(recording_to_frames, chunk, repeat(T), repeat(size)):
                file.write(frames.astype("<f4", copy=False).tobytes())
                progress.update()
    np.save(folder / "labels.npy", np.asarray(recordings.labels, dtype=np.int64))
    (folder / "key.json").write_text(json.dumps(key), encoding="utf-8")


def _open(folder: Path) -> np.ndarray:
    return np.load(folder / "frames.npy", mmap_mode="r", allow_pickle=False)


def _check(folder: Path, key: dict) -> None:
    try:
        found = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        frames = _open(folder)
        labels = np.load(folder / "labels.npy", allow_pickle=False)
        whole = found == key and list(frames.shape) == key["shape"] and labels.shape == frames.shape[:1]
    except (OSError, ValueError, EOFError):
        whole = False
    if not whole:
        raise DataError(f"{folder} is incomplete or was changed; delete it, and it will be made again.")


class CachedFrames(Dataset):
    """A part of a frame cache. Each process opens the memory map for itself when it first reads from it.

    Args:
        folder: what `frame_cache` returned.
        indices: which of the samples.
        transform: float32 [T,2,48,48] → the same shape, or None for none.
    """

    def __init__(self, folder: Path, indices: Sequence[int], transform: Transform | None) -> None:
        self.folder = folder
        self.indices = list(indices)
        self.labels = np.load(folder / "labels.npy", allow_pickle=False)[self.indices].tolist()
        self.transform = transform
        self._frames: np.ndarray | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_frames": None}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self._frames is None:
            try:
                self._frames = _open(self.folder)
            except (OSError, ValueError, EOFError) as error:
                raise DataError(
                    f"{self.folder} cannot be read any more ({type(error).__name__}); is its disk there?"
                ) from None
        frames = torch.from_numpy(np.array(self._frames[self.indices[index]], dtype=np.float32))
        return frames if self.transform is None else self.transform(frames), self.labels[index]
