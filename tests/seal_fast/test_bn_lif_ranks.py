"""SyncBatchNorm over two processes equals one process that has the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from seal_fast import bn_lif, models
from seal_fast.backends import available
from seal_fast.nn import LIFNode
from seal_fast.train import ranks

T = 2
SIZES = (3, 2)  # images of each rank: the last batch of an epoch need not divide evenly


def networks():
    """A layer with residual and its batch norm, and a student with a static stem."""
    torch.manual_seed(0)
    student = models.student("resnet8", num_classes=3, in_channels=2, time_steps=T)
    return nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4), student]).double()


def run(modules, images, y, residual, backend):
    """Gradients of all parameters and inputs, and the state afterwards."""
    bn, residual_bn, student = modules
    for module in student.modules():
        if isinstance(module, LIFNode):
            module.backend = backend
    y, residual = (rows.flatten(0, 1).clone().requires_grad_() for rows in (y, residual))
    node = LIFNode(decay_input=False, backend=backend)
    spikes = bn_lif(y, bn, node, time_steps=T, residual=residual, residual_bn=residual_bn)
    loss = (spikes * torch.arange(5.0).double()).sum() + student(images).square().sum()
    loss.backward()
    gradients = [parameter.grad for parameter in modules.parameters()]
    return gradients, [rows.grad.unflatten(0, (T, -1)) for rows in (y, residual)], modules.state_dict()


def inputs():
    generator = torch.Generator().manual_seed(1)
    shape = {"generator": generator, "dtype": torch.float64}
    total = sum(SIZES)
    return torch.randn(total, 2, 8, 8, **shape), *(torch.randn(T, total, 4, 3, 5, **shape) for _ in range(2))


def rank_main(rank: int, file: str, results: str, backend: str):
    """One process of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    modules = nn.SyncBatchNorm.convert_sync_batchnorm(networks())
    images, y, residual = inputs()
    own = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
    gradients, of_inputs, state = run(modules, images[own], y[:, own], residual[:, own], backend)
    for gradient in gradients:
        dist.all_reduce(gradient)
    torch.save((gradients, of_inputs, state), f"{results}.{rank}")
    ranks.finish()


@pytest.mark.parametrize("backend", [name for name in ("cpu", "torch") if name in available("bn_lif")])
def test_two_ranks_equal_one_process(backend, tmp_path):
    modules = copy.deepcopy(networks())
    expected, of_inputs, state = run(modules, *inputs(), backend)
    context = torch.multiprocessing.start_processes(
        rank_main,
        args=(str(tmp_path / "store"), str(tmp_path / "out"), backend),
        nprocs=2,
        join=False,
        start_method="spawn",
    )
    while not context.join(120):  # returns as each process ends, and raises what it raised
        pass
    ranks = [torch.load(f"{tmp_path}/out.{rank}", weights_only=True) for rank in range(2)]
    for gradients, _, own_state in ranks:
        for got, right in zip(gradients, expected, strict=True):
            assert (got - right).abs().max() <= 1e-11 * max(1.0, right.abs().max())  # measured 1e-14
        for name, value in state.items():
            torch.testing.assert_close(own_state[name], value, rtol=0, atol=1e-12, msg=name)
    for i, right in enumerate(of_inputs):
        got = torch.cat([ranks[0][1][i], ranks[1][1][i]], 1)
        assert (got - right).abs().max() <= 1e-11 * right.abs().max()
