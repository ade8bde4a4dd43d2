"""Which samples make each batch: every sample once, wherever and in how many parts it is trained on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from seal_fast.train.batches import Batches, Seeded

cuts = st.fixed_dictionaries(
    {
        "samples": st.integers(1, 200),
        "batch_size": st.integers(8, 64),
        "seed": st.integers(0, 2**32 - 1),
        "parts": st.integers(1, 4),
        "ranks": st.integers(1, 4),
    }
)


def made(cut: dict, rank: int = 0, **changes) -> Batches:
    cut = {**cut, **changes}
    return Batches(**cut, rank=rank, smallest=max(2, cut["ranks"]))


@given(cut=cuts, epoch=st.integers(1, 300))
def test_ranks_and_parts_share_what_one_process_trains_on(cut, epoch):
    one = made(cut, ranks=1, parts=1)
    several = [made(cut, rank) for rank in range(cut["ranks"])]
    for batches in (one, *several):
        batches.start(epoch)
    steps = several[0].steps
    assert one.steps - steps == (1 < cut["samples"] % cut["batch_size"] < cut["ranks"])
    for step in range(1, steps + 1):
        parts = several[0].parts(step)
        shares = [[batches.keys(step, part) for batches in several] for part in range(parts)]
        assert [key for part in shares for share in part for key in share] == one.keys(step)
        assert all(share for part in shares for share in part)  # no rank stands idle
        sizes = [len(share) for part in shares for share in part]
        assert max(sizes) - min(sizes) <= 2  # one by the parts, one by the ranks
        assert sum(sizes) == one.images(step)


@given(cut=cuts, epoch=st.integers(1, 300), done=st.integers(0, 30))
def test_an_epoch_goes_on_where_it_was(cut, epoch, done):
    batches = made(cut)
    batches.start(epoch)
    whole, digest = list(batches), batches.digest()
    assert len(whole) == len(batches)
    done = min(done, batches.steps)
    first = sum(batches.parts(step) for step in range(1, done + 1))
    batches.start(epoch, done)
    assert list(batches) == whole[first:]
    assert len(batches) == len(whole) - first
    assert batches.digest() == digest


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = []
    for seed, epoch in ((1, 1), (1, 2), (2, 1)):
        batches = Batches(50, 8, seed=seed)
        batches.start(epoch)
        assert sorted(batches.order.tolist()) == list(range(50))
        orders.append((batches.digest(), tuple(batches.order.tolist())))
    assert len(set(orders)) == 3


def test_an_evaluation_sees_each_sample_once_in_order():
    ranks = [Batches(10, 4, rank=rank, ranks=3) for rank in range(3)]
    seen = [sample for step in range(1, 4) for batches in ranks for sample, _ in batches.keys(step, 0)]
    assert seen == list(range(10))
    assert sum(len(keys) for batches in ranks for keys in batches) == 10  # the last batch has two for three ranks


class Noise(Dataset):
    """Samples that are nothing but their augmentation."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.rand(2), index


@pytest.mark.parametrize("workers", [0, 1])
def test_random_numbers_belong_to_the_sample(workers):
    batches = Batches(12, 5, seed=3)
    torch.manual_seed(9)
    state = torch.get_rng_state()
    data = Seeded(Noise())
    loader = DataLoader(data, batch_sampler=batches, num_workers=workers, generator=torch.Generator())
    brought = list(loader)
    assert torch.equal(torch.get_rng_state(), state)
    for step, batch in enumerate(brought, 1):
        for got, again in zip(batch, data.batch(batches.keys(step)), strict=True):
            assert torch.equal(got, again)
    every = torch.cat([torch.cat((noise, draws), 1) for noise, _, draws in brought])
    assert len(every.unique(dim=0)) == 12
