"""The GPU kernels on GPU tensors: streams, graphs, syncs, memory, sizes. The shared tests check what they compute."""

import pytest
import torch

from graphs import captured
from seal_fast import lif
from seal_fast.backends import available

BACKENDS = [name for name in ("triton", "cupy") if name in available("lif")]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

OPTIONS = {"tau": 2.0, "decay_input": False}


@pytest.fixture(params=BACKENDS or ["none"])
def gpu_backend(request):
    return request.param


def both(x, upstream, backend, **options):
    leaf = x.detach().requires_grad_()
    spikes, v_last = lif(leaf, backend=backend, **{**OPTIONS, **options})
    return spikes.detach(), v_last.detach(), torch.autograd.grad(spikes, leaf, upstream)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 4, 10, 40])
def test_large_gpu_tensors_equal_the_reference(gpu_backend, steps, dtype):
    x = torch.randn(steps, 3, 7, 12_345, device="cuda").to(dtype)
    upstream = torch.randn_like(x)
    got, expected = (both(x, upstream, backend) for backend in (gpu_backend, "torch"))
    torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=0)  # says how many differ, and by how much
    # One unit in the last place of the result's dtype, relative to the largest entry.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    error = (got[2].float() - expected[2].float()).abs().max() / expected[2].float().abs().max()
    assert error.item() <= tolerance


def test_nothing_waits_for_the_gpu(gpu_backend):
    x = torch.randn(4, 2, 3, 100, device="cuda")
    upstream = torch.randn_like(x)
    tau = torch.full((3,), 2.0, device="cuda", requires_grad=True)
    leaf = x.clone().requires_grad_()

    def step():
        spikes, v_last = lif(leaf, tau=tau, backend=gpu_backend)
        return torch.autograd.grad((spikes * upstream).sum() + v_last.sum(), (leaf, tau))

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        both(x, upstream, gpu_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_graph_replays(gpu_backend):
    x = torch.randn(4, 2, 3, 100, device="cuda")
    upstream = torch.randn_like(x)
    graph, results = captured(lambda: both(x, upstream, gpu_backend))
    x.copy_(torch.randn_like(x) * 2)
    graph.replay()
    for got, expected in zip(results, both(x, upstream, "torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-6)


def test_kernels_run_on_the_current_stream(gpu_backend):
    x = torch.zeros(4, 1 << 22, device="cuda")
    lif(x, backend=gpu_backend, **OPTIONS)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(2.0)
        spikes, _ = lif(x, backend=gpu_backend, **OPTIONS)
    stream.synchronize()
    assert spikes.min() == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_the_device_of_the_tensor(gpu_backend):
    x = torch.randn(4, 1000, device="cuda:1")
    spikes, _ = lif(x, backend=gpu_backend, **OPTIONS)
    assert spikes.device == x.device
    assert torch.equal(spikes, lif(x, backend="torch", **OPTIONS)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_keeps_the_input_and_nothing_else(gpu_backend, dtype):
    x = torch.randn(4, 1 << 20, device="cuda").to(dtype).requires_grad_()
    lif(x, backend=gpu_backend, **OPTIONS)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    spikes, _ = lif(x, backend=gpu_backend, return_v_last=False, **OPTIONS)
    assert torch.cuda.memory_allocated() - before <= spikes.numel() * spikes.element_size() + 4096


def test_a_row_of_more_than_two_billion_neurons(gpu_backend):
    neurons = (1 << 31) + 4097
    # Input, spikes and gradient are on the GPU at once. The spikes are their own upstream, which needs no copy.
    needed = 3 * 2 * neurons * torch.bfloat16.itemsize + (64 << 20)
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip("needs 26 GB of free GPU memory")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.full((2, neurons), 0.75, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    spikes, _ = lif(x, backend=gpu_backend, return_v_last=False, **OPTIONS)
    (gradient,) = torch.autograd.grad(spikes, x, spikes.detach())
    assert torch.cuda.max_memory_allocated() - before <= needed
    assert spikes[0].amax() == 0
    assert spikes[1].amin() == 1
    assert gradient[:, 0].tolist() == gradient[:, -1].tolist()
    assert gradient.amin() > 0
