"""The distillation loss of many time steps, on every backend that "auto" can choose, against the float64 reference."""

import pytest
import torch

import cuda_host
from cuda_host_seal_loss import OBJECTIVES, PUBLISHED, errors, expected, guarded, inputs
from seal_fast.backends import _MISSING, _resolve_once, resolve
from seal_fast.kernels.launch import cpu
from seal_fast.kernels.seal_loss import MOST_STEPS, reference
from seal_fast.kernels.seal_loss import cpu as cpu_room
from seal_fast.kernels.seal_loss import cupy as cuda_room

TIME_STEPS = [64, 65, 100, 256]
B, K = 2, 12
OF_LOGITS = ("seal_loss", "selective_alignment_weights")
VALUE = 3e-6  # relative, or absolute below 1; measured 5e-7
GRADIENT = 1e-6  # of the largest entry; measured 2.6e-7
WEIGHT = 3e-8  # of weights that are about 1/T; measured 7e-9
CONFIDENCE = 5e-7  # measured 1.5e-7


@pytest.fixture(scope="module")
def cuda_on_the_host():
    """The text of the CUDA kernels on the CPU; all kernels that are needed here, compiled at once."""
    if cuda_host.missing():
        pytest.skip(cuda_host.missing())
    with pytest.MonkeyPatch.context() as patch:
        cuda_host.install(patch, cuda_room)
        with cuda_host.planning():
            for keep in cuda_room.KEPT:
                for objective in OBJECTIVES:
                    cuda_room.forward(*inputs(65, B, K), gradient=True, keep=keep, objective=objective, **PUBLISHED)
                cuda_room.weights(inputs(65, B, K)[0], keep=keep)
        yield


needs_cpu_kernel = pytest.mark.skipif(cpu.library() is None, reason=cpu.missing())
each_length = pytest.mark.parametrize("T", TIME_STEPS)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES)
# 256 steps do not fit into shared memory, where nothing is kept by itself.
each_place = pytest.mark.parametrize(
    ("T", "keep"), [*((T, keep) for T in TIME_STEPS[:-1] for keep in cuda_room.KEPT), (TIME_STEPS[-1], None)], ids=str
)


def check(forward, T, objective):
    tensors, options = inputs(T, B, K, seed=T), {**PUBLISHED, "objective": objective}
    value, gradient = errors(forward(*tensors, gradient=True, **options), expected(*tensors, **options))
    assert value <= VALUE
    assert gradient <= GRADIENT


def check_weights(weights, T):
    logits = inputs(T, B, K, seed=T)[0]
    right = reference.selective_alignment_weights(logits.double())
    for got, wanted, tolerance in zip(weights(logits), right, (WEIGHT, CONFIDENCE), strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().amax() <= tolerance


@each_objective
@each_length
def test_loss_in_torch(T, objective):
    def forward(logits, *others, gradient, **options):
        leaf = logits.clone().requires_grad_()
        parts = reference.seal_loss(leaf, *others, **options)
        return torch.stack([part.detach() for part in parts]), torch.autograd.grad(parts[0], leaf)[0]

    check(forward, T, objective)


@each_length
def test_weights_in_torch(T):
    check_weights(reference.selective_alignment_weights, T)


@needs_cpu_kernel
@each_objective
@each_length
def test_loss_of_the_cpu_kernel(T, objective):
    check(cpu_room.forward, T, objective)


@needs_cpu_kernel
@each_length
def test_weights_of_the_cpu_kernel(T):
    check_weights(cpu_room.weights, T)


@each_objective
@each_place
def test_loss_of_the_cuda_kernel(T, objective, keep, cuda_on_the_host):
    check(lambda *tensors, **options: guarded(cuda_room.forward, *tensors, keep=keep, **options), T, objective)


@each_place
def test_weights_of_the_cuda_kernel(T, keep, cuda_on_the_host):
    check_weights(lambda logits: guarded(cuda_room.weights, logits, keep=keep), T)


def test_each_sample_has_a_workspace_of_its_own(cuda_on_the_host, monkeypatch):
    """Blocks run one after another here, so one that wrote to another's place would still be right."""
    given = []

    class Launch(cuda_room.Launch):
        def __call__(self, *tensors):
            given.append(tensors)
            super().__call__(*tensors)

    monkeypatch.setattr(cuda_room, "Launch", Launch)
    weights, _ = cuda_room.weights(inputs(65, B, K)[0], keep="nothing")
    (workspace,) = (tensor for tensor in given[0] if isinstance(tensor, torch.Tensor) and tensor.dim() == 1)
    tables = workspace.view(B, -1)[:, 65 * 16 :][:, : 65 * 65]
    assert torch.equal(tables.reshape(B, 65, 65), weights)


@pytest.mark.parametrize("installed", [("triton", "cupy"), ("triton",), ("cupy",), ()], ids=str)
@pytest.mark.parametrize("operator", OF_LOGITS)
@pytest.mark.parametrize("T", [1, 4, *TIME_STEPS])
def test_auto_takes_a_backend_that_takes_so_many_steps(T, operator, installed, monkeypatch):
    monkeypatch.delenv("SEAL_FAST_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("triton", "cupy"):
        monkeypatch.setitem(_MISSING, name, "" if name in installed else "it is not installed")
    _resolve_once.cache_clear()
    try:
        chosen = resolve("auto", operator, torch.device("cuda"), torch.float32, T)
    finally:
        _resolve_once.cache_clear()
    able = [name for name in installed if name == "cupy" or T <= MOST_STEPS]
    assert chosen == ("cupy" if "cupy" in able else "triton" if able else "torch")


@pytest.mark.parametrize("operator", OF_LOGITS)
def test_triton_refuses_by_name_what_it_cannot_hold(operator, monkeypatch):
    monkeypatch.setitem(_MISSING, "triton", "")
    assert resolve("triton", operator, torch.device("cuda", 0), torch.float32, MOST_STEPS) == "triton"
    for T in (steps for steps in TIME_STEPS if steps > MOST_STEPS):
        with pytest.raises(ValueError, match=rf"it takes up to {MOST_STEPS} time steps, and these are {T};.* can\."):
            resolve("triton", operator, torch.device("cuda", 0), torch.float32, T)
