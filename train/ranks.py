"""Several processes that train as one: what torchrun started, and how they agree.

Without torchrun there is one rank, and nothing here communicates. Gradients and batch-norm statistics travel through
NCCL between GPUs; what the ranks agree on travels through gloo, so that no decision waits for a device.
"""

from __future__ import annotations

import inspect
import os
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from seal_fast.kernels.bn_lif.reference import batch_norm
from seal_fast.models.snn import Student
from seal_fast.train.errors import ToldElsewhereError, TrainingError, UsageError

CPU = torch.device("cpu")
MEETING_SECONDS = 300  # as long as torch lets a rank wait for a key
T = TypeVar("T")


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def started_by() -> int:
    """The process that started the run: torchrun's, which stays the same over restarts, or this one."""
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()


def restarted() -> bool:
    """Whether torchrun started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def rank() -> int:
    """This process's number among the ranks; known before `start`, too."""
    return int(os.environ.get("RANK", "0")) if launched() else 0


def size() -> int:
    """How many ranks train together."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def first() -> bool:
    """Whether this rank is the one that prints and writes."""
    return rank() == 0


def say(line: str) -> None:
    """Print a line, on the first rank."""
    if first():
        print(line, flush=True)


def own_device(name: str) -> str:
    """The device of this rank: "cuda" is the GPU of its local number.

    Raises:
        UsageError: One GPU is named for several ranks, or there are fewer GPUs than ranks on this machine.
    """
    if not (launched() and name.startswith("cuda")):
        return name
    if name != "cuda":
        raise UsageError(f"--device {name!r} names one GPU for all ranks; pass cuda, and each takes its own.")
    started, here = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if started > here:
        raise UsageError(f"torchrun started {started} processes here, where there are {here} GPUs.")
    return f"cuda:{os.environ['LOCAL_RANK']}"


def start(device: torch.device) -> None:
    """Meet the other ranks; nothing to do where there are none, or where they have met."""
    if not launched() or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, number, count = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(_meeting(store), store),
        rank=number,
        world_size=count,
    )


def _meeting(store: dist.Store) -> str:
    """A name that these processes agree on and none before them has used.

    torchrun keeps its store over a restart, and with it the addresses of processes that are gone. So each rank greets
    with a word of its own, and the first answers until the answer to that very word has been read.
    """
    name = uuid.uuid4().hex
    if not first():
        store.set(f"greeting/{rank()}", name)
        name = store.get(f"answer/{name}").decode()
        store.set(f"{name}/{rank()}", "read")
        return name
    end = time.monotonic() + MEETING_SECONDS
    for other in range(1, size()):
        while not store.check([f"{name}/{other}"]):
            if store.check([f"greeting/{other}"]):
                store.set(f"answer/{store.get(f'greeting/{other}').decode()}", name)
            if time.monotonic() > end:
                raise TrainingError(f"rank {other} has not started within {MEETING_SECONDS} s")
            time.sleep(0.01)
    return name


def finish() -> None:
    """Leave the other ranks."""
    if dist.is_initialized():
        # Before torch 2.8, a group that ends waits for its threads without letting go of Python, and a thread that just
        # ended the last exchange may need Python to free a tensor: they would wait for each other for ever.
        time.sleep(0.1)
        dist.destroy_process_group()


def from_first(function: Callable[..., T], *args, **kwargs) -> T:
    """What `function` returns on the first rank, which alone calls it with these arguments.

    Raises:
        ToldElsewhereError: On the other ranks, where the first one raised.
    """
    if size() == 1:
        return function(*args, **kwargs)
    answer: list = [None, None]
    error = None
    if first():
        try:
            answer[0] = function(*args, **kwargs)
        except Exception as raised:
            error = answer[1] = raised
    dist.broadcast_object_list(answer, src=0, device=CPU)
    if error is not None:
        raise error
    if answer[1] is not None:
        raise ToldElsewhereError(answer[1])
    return answer[0]


def gathered(value: T) -> list[T]:
    """The `value` of each rank, on all of them."""
    if size() == 1:
        return [value]
    every: list = [None] * size()
    dist.all_gather_object(every, value)
    return every


def total(values: list[float]) -> list[float]:
    """Sums over the ranks."""
    if size() == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


class SyncBatchNormOnCpu(nn.SyncBatchNorm):
    """nn.SyncBatchNorm that trains where there is no GPU, too.

    For networks that call it; a student never does in training, and fuses torch's own class.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: D102
        return batch_norm(input, self) if self.training else super().forward(input)


def synchronise(network: nn.Module, kind: type[nn.SyncBatchNorm]) -> None:
    """Let the batch norms of a network take their statistics over all ranks; parameters and buffers stay the same."""
    for name, child in network.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            settings = {key: getattr(child, key) for key in ("eps", "momentum", "affine", "track_running_stats")}
            over_ranks = kind(child.num_features, **settings)
            over_ranks._parameters, over_ranks._buffers = child._parameters, child._buffers
            setattr(network, name, over_ranks)
        else:
            synchronise(child, kind)


def parallel(network: nn.Module) -> nn.Module:
    """What averages a network's gradients over the ranks; itself where there is one rank.

    The network's batch norms take their statistics over all ranks from then on, and need not be broadcast.
    """
    if size() == 1:
        return network
    wrapper = nn.parallel.DistributedDataParallel
    device = next(network.parameters()).device
    renamed = "forward_sync_buffers"  # what newer releases call broadcast_buffers
    settings = {renamed if renamed in inspect.signature(wrapper).parameters else "broadcast_buffers": False}
    ids = [device] if device.type == "cuda" else None
    wrapped = wrapper(network, device_ids=ids, gradient_as_bucket_view=True, **settings)
    plain = device.type == "cuda" or isinstance(network, Student)
    # After that, as DistributedDataParallel wants no SyncBatchNorm on the CPU.
    synchronise(network, nn.SyncBatchNorm if plain else SyncBatchNormOnCpu)
    return wrapped
