"""Several processes that train as one: what torchrun started, and how they agree.

Without torchrun there is one rank, and nothing here communicates. Gradients and batch-norm statistics travel through
NCCL between GPUs; what the ranks agree on travels through gloo, so that no decision waits for a device.
"""

from __future__ import annotations

import inspect
import os
import platform
import time
import uuid
from collections.abc import Callable
from pathlib import Path
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


def check_environment() -> None:
    """See whether the variables of torchrun are all there, or none of them.

    Raises:
        UsageError: One is missing, or is no number in its range.
    """
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        _number("TORCHELASTIC_RESTART_COUNT")
    if "WORLD_SIZE" not in os.environ or _number("WORLD_SIZE", least=1) == 1:
        return
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(name):
            raise UsageError(
                f"WORLD_SIZE is {size()}, but {name} is not set: start several processes with torchrun, or unset "
                "WORLD_SIZE for one."
            )
    of = {"RANK": size(), "LOCAL_WORLD_SIZE": size() + 1, "MASTER_PORT": 2**16}
    of["LOCAL_RANK"] = _number("LOCAL_WORLD_SIZE", least=1, below=of["LOCAL_WORLD_SIZE"])
    for name, below in of.items():
        _number(name, below=below)


def _number(name: str, *, least: int = 0, below: int | None = None) -> int:
    text = os.environ[name]
    value = int(text) if text.isdecimal() else -1
    if value < least or (below is not None and value >= below):
        within = f"at least {least}" if below is None else f"from {least} to {below - 1}"
        raise UsageError(f"{name} must be a whole number {within}; got {text!r}: torchrun sets it.")
    return value


def started_by() -> str:
    """Who started the run, torchrun's process or this one, in a word that no other start has.

    It stays the same when torchrun starts its processes again. On several machines that is known by torchrun's
    --rdzv-id; on one by its process, as containers that share a folder may have equal names and numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return _process(os.getpid())
    run, here = os.environ["TORCHELASTIC_RUN_ID"], os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return f"torchrun {run}" if run != "none" and not here else f"torchrun {run}, {_process(os.getppid())}"


def _process(number: int) -> str:
    """A process by its machine and number, and on Linux by the time of its start, in ticks since that of the system."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
        ticks = fields.rpartition(")")[2].split()[19]  # the program's name in brackets may hold anything
    except (OSError, IndexError):
        ticks = "unknown"
    return f"process {number} on {platform.node()}, tick {ticks}"


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
