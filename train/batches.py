"""Which samples make each batch, on which rank, and with which random numbers: all of it follows from seed and epoch.

So a run can go on inside an epoch without loading what it has done, and neither the number of worker processes nor
that of ranks changes what is trained.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from seal_fast.train.data.draws import draw

Key = tuple[int, int]  # a sample's index, and the seed of its augmentation


class Batches(Sampler[list[Key]]):
    """The batches of an epoch as the keys of `Seeded`: a DataLoader's batch sampler.

    A step trains on one global batch. Where gradients are accumulated it comes in several parts, and each rank has an
    even share of each part, of which the sizes differ by one at most.

    Args:
        samples: How many there are.
        batch_size: Global batch: images a step, on all ranks and in all parts together.
        seed: Of order and augmentation; None keeps the samples in their order.
        parts: Into how many a batch is cut.
        rank: Whose share it is.
        ranks: Among how many.
        smallest: Fewest images on all ranks together that make a part; a shorter last batch is left out.
    """

    def __init__(
        self,
        samples: int,
        batch_size: int,
        *,
        seed: int | None = None,
        parts: int = 1,
        rank: int = 0,
        ranks: int = 1,
        smallest: int = 1,
    ):
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.most_parts, self.rank, self.ranks, self.smallest = parts, rank, ranks, smallest
        full, rest = divmod(samples, batch_size)
        self.steps = full + (rest >= smallest and rest > 0)
        self.start(1)

    def start(self, epoch: int, done: int = 0) -> None:
        """Begin an epoch after the steps of it that are done."""
        self.epoch, self.done = epoch, done
        self.order, self.seeds = torch.arange(self.samples), torch.zeros(self.samples, dtype=torch.int64)
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            self.order = torch.randperm(self.samples, generator=generator)
            self.seeds = torch.randint(2**32, (self.samples,), generator=generator)

    def digest(self) -> int:
        """A checksum of the epoch's order and seeds: equal where a checkpoint's steps are this epoch's."""
        return zlib.crc32(torch.stack((self.order, self.seeds)).numpy().tobytes())

    def images(self, step: int) -> int:
        """Images of a step, counted from 1, on all ranks together."""
        return min(step * self.batch_size, self.samples) - (step - 1) * self.batch_size

    def parts(self, step: int) -> int:
        """In how many parts a step comes: a short last batch may have fewer."""
        return max(1, min(self.most_parts, self.images(step) // self.smallest))

    def keys(self, step: int, part: int | None = None) -> list[Key]:
        """Samples of a step: of all ranks, or of this rank's share of one part."""
        begin, end = (step - 1) * self.batch_size, (step - 1) * self.batch_size + self.images(step)
        if part is not None:
            begin, end = _piece(begin, end, part, self.parts(step))
            begin, end = _piece(begin, end, self.rank, self.ranks)
        return list(zip(self.order[begin:end].tolist(), self.seeds[begin:end].tolist(), strict=True))

    def __len__(self) -> int:
        return sum(self.parts(step) for step in range(self.done + 1, self.steps + 1))

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.done + 1, self.steps + 1):
            for part in range(self.parts(step)):
                keys = self.keys(step, part)
                if keys:  # the last batch of an evaluation may be shorter than the ranks are many
                    yield keys


def _piece(begin: int, end: int, number: int, of: int) -> tuple[int, int]:
    """The piece of that number of a range that is cut evenly."""
    length = end - begin
    return begin + length * number // of, begin + length * (number + 1) // of


class Seeded(Dataset):
    """A dataset whose random numbers belong to the sample, whichever process loads it and whatever it did before.

    Each sample comes with random numbers for what is left to do to it on the device. Seeding takes a microsecond.

    Args:
        samples: The dataset; its augmentation draws from torch's global generator.
    """

    def __init__(self, samples: Dataset):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, keys: list[Key]) -> list:
        """Samples of a batch; the generator is left as it was."""
        generator = torch.default_generator
        before = generator.get_state()
        try:
            return [self._sample(index, generator.manual_seed(seed)) for index, seed in keys]
        finally:
            generator.set_state(before)

    def _sample(self, index: int, _seeded: torch.Generator) -> tuple:
        return *self.samples[index], draw(1)[0]

    def batch(self, keys: list[Key]) -> tuple[torch.Tensor, ...]:
        """Inputs, labels and draws of a batch, as a DataLoader gives them."""
        return tuple(default_collate(self.__getitems__(keys)))
