"""What torch does around converted networks: compile, export, checkpoints, autocast, ranks."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import seal_fast
from seal_fast.train import ranks

pytest.importorskip("spikingjelly", reason="spikingjelly is not installed")
from spikingjelly.activation_based import functional, neuron

from spikingjelly_networks import block, frames

X = frames(4, 2, 3, 6, 6)
KINDS = [neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode]


def converted(fuse=True, **options):
    network = block(**options)
    seal_fast.convert(network, fuse=fuse)
    return network


def traceable(fuse, kind):
    """As `converted`, but for batch norms that run by themselves: torch cannot trace those of 0.0.0.0.14."""
    network = converted(fuse, kind=kind)
    if not fuse:
        network.bn1 = network.bn2 = network.down[1] = nn.Identity()
    return network


def gradients(network, output):
    return torch.autograd.grad(output.square().sum(), list(network.parameters()))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_whole_without_compiling_again(kind, fuse, train):
    network = traceable(fuse, kind).train(train)
    twin = copy.deepcopy(network)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        x = frames(4, 2, 3, 6, 6, seed=seed)
        spikes, expected = compiled(x), twin(x)
        assert torch.equal(spikes, expected)
        if train:
            for gradient, before in zip(gradients(network, spikes), gradients(twin, expected), strict=True):
                torch.testing.assert_close(gradient, before, rtol=1e-5, atol=1e-6)  # measured 0
        if not fuse:
            assert torch.equal(network.sn2.v, twin.sn2.v)
        functional.reset_net(network)
        functional.reset_net(twin)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_exports_in_evaluation(kind, fuse, strict):
    network = traceable(fuse, kind).eval()
    program = torch.export.export(network, (X,), strict=strict).module()
    functional.reset_net(network)  # torch 2.6 needs it
    for seed in range(2):
        x = frames(4, 2, 3, 6, 6, seed=seed)
        assert torch.equal(program(x), network(x))
        functional.reset_net(network)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
def test_checkpoints_recompute_from_where_the_call_started(fuse, use_reentrant):
    network = converted(fuse).double()
    twin = copy.deepcopy(network)
    results = []
    for each, call in ((network, lambda x: checkpoint(network, x, use_reentrant=use_reentrant)), (twin, twin)):
        x = X.double().requires_grad_()
        if not fuse:
            each(X.double())  # neurons are not at rest when the checkpointed call starts
            functional.detach_net(each)
        call(x).square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in each.parameters())])
    for gradient, expected in zip(*results, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)  # measured 0
    if not fuse:
        assert torch.equal(network.sn2.v, twin.sn2.v)


@pytest.mark.parametrize("chunks", [1, 2])
def test_spikingjellys_checkpoints_run_without_fusion(chunks):
    memopt = pytest.importorskip("spikingjelly.activation_based.memopt", reason="this SpikingJelly has no memopt")
    if not hasattr(memopt, "checkpoint_module"):
        # 0.0.0.0.14, which is tested with the oldest versions, came before it.
        pytest.skip("this SpikingJelly has no memopt.checkpoint_module")
    results = []
    for fuse in (None, False, True):
        network = block().double()
        if fuse is not None:
            seal_fast.convert(network, fuse=fuse)
        wrapped = memopt.checkpoint_module(network, chunks=chunks)
        if fuse:
            with pytest.raises(RuntimeError, match=r"v was not kept.*convert\(network, fuse=False\)"):
                wrapped(X.double())
            continue
        wrapped(X.double()).square().sum().backward()
        results.append([parameter.grad for parameter in network.parameters()])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert any(gradient.abs().max() > 0 for gradient in results[0])


def test_a_neuron_as_a_function_of_its_memories_is_one_within_a_backward_pass_too():
    node, seen = seal_fast.nn.LIFNode(), []
    x = X.clone().requires_grad_()
    v = torch.full(X.shape[1:], 0.5)
    expected = node.functional_forward((X,), (v,))
    spikes = node(x)
    x.register_hook(lambda _: seen.append(node.functional_forward((X,), (v,))))
    after = node.v
    spikes.sum().backward()
    assert node.v is after
    ((outputs, memories),) = seen
    assert torch.equal(outputs[0], expected[0][0])
    assert torch.equal(memories[0], expected[1][0])
    assert not torch.equal(memories[0], after)


@pytest.mark.parametrize("fuse", [True, False])
def test_autocast(fuse):
    network = converted(fuse)
    with torch.autocast("cpu", torch.bfloat16):
        spikes = network(X)
    assert spikes.dtype == torch.bfloat16
    assert 0.05 < spikes.float().mean() < 0.95
    if not fuse:
        assert network.sn2.v.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(network, spikes.float()))


def test_packed_spikes_change_no_gradient():
    network = converted()
    twin = copy.deepcopy(network)
    with seal_fast.packed_spikes():
        output = network(X)
    for gradient, expected in zip(gradients(network, output), gradients(twin, twin(X)), strict=True):
        assert torch.equal(gradient, expected)


def _train(rank: int, port: int, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    network = converted().double()
    for parameter in network.parameters():
        parameter.data += rank  # DDP starts every rank from the first one's
    parallel = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        parallel(
            frames(4, 4, 3, 6, 6, seed=step, dtype=torch.float64)[:, 2 * rank : 2 * rank + 2]
        ).square().mean().backward()
        optimizer.step()
        functional.reset_net(network)
    torch.save(network.state_dict(), f"{path}/{rank}.pt")
    ranks.finish()


def test_two_ranks_train_as_one_with_the_mean_of_their_gradients(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))

    network = block().double()  # as it is in SpikingJelly
    ranks = [network, copy.deepcopy(network)]
    for step in range(2):
        x = frames(4, 4, 3, 6, 6, seed=step, dtype=torch.float64)
        of_ranks = [
            torch.autograd.grad(each(x[:, 2 * rank : 2 * rank + 2]).square().mean(), list(each.parameters()))
            for rank, each in enumerate(ranks)
        ]
        with torch.no_grad():
            for each in ranks:
                for parameter, *parts in zip(each.parameters(), *of_ranks, strict=True):
                    parameter -= 0.1 * sum(parts) / 2
        functional.reset_net(nn.ModuleList(ranks))
    for name, parameter in network.named_parameters():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], parameter.detach(), rtol=0, atol=1e-14)  # measured 3e-17
