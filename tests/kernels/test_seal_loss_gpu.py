"""The loss's GPU kernels on GPU tensors: values, streams, graphs and syncs."""

import pytest
import torch

import other_layouts
import small_gradients
from graphs import captured
from seal_fast import seal_loss, selective_alignment_weights
from seal_fast.backends import available
from seal_fast.kernels.seal_loss import MOST_STEPS

BACKENDS = [name for name in ("triton", "cupy") if name in available("seal_loss")]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(params=BACKENDS or ["none"])
def gpu_backend(request):
    return request.param


def inputs(T, B, K, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(T * 1000 + K)
    logits = (torch.randn(T, B, K, generator=generator, device="cuda") * 3).to(dtype)
    teacher_logits = (torch.randn(B, K, generator=generator, device="cuda") * 3).to(dtype)
    labels = torch.randint(0, K, (B,), generator=generator, device="cuda")
    labels[B // 2 :: 7] = -100
    labels[0] = 0
    return logits, teacher_logits, labels


def run(logits, teacher_logits, labels, backend, **options):
    leaf = logits.detach().requires_grad_()
    parts = seal_loss(leaf, teacher_logits, labels, alpha=0.6, beta=0.15, backend=backend, **options)
    return [part.detach() for part in parts], torch.autograd.grad(parts.loss, leaf)[0]


@pytest.mark.parametrize("objective", ["seal", "kd", "tdkd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("T", "B", "K"), [(1, 1, 2), (4, 128, 10), (4, 128, 100), (4, 65, 1000), (10, 32, 10), (64, 3, 100), (4, 3, 32768)]
)
def test_gpu_loss_equals_float64(gpu_backend, T, B, K, dtype, objective):
    check(inputs(T, B, K, dtype), gpu_backend, objective)


def check(tensors, backend, objective):
    logits, teacher_logits, labels = tensors
    expected, gradient = run(logits.double(), teacher_logits.double(), labels, "torch", objective=objective)
    got, got_gradient = run(logits, teacher_logits, labels, backend, objective=objective)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=5e-6)
    # Of the largest entry: float32's contract, and half a unit in the last place of 16-bit gradients.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}[logits.dtype]
    error = (got_gradient.double() - gradient).abs().max().item()
    assert error <= tolerance * gradient.abs().max().item() + 1e-7


@pytest.mark.parametrize("objective", small_gradients.OBJECTIVES)
def test_what_float16_cannot_hold_before_it_is_scaled_is_kept(gpu_backend, objective):
    tensors = small_gradients.inputs()
    leaf, teacher_logits, labels = (tensor.cuda() for tensor in tensors)
    options = {**small_gradients.PUBLISHED, "objective": objective, "backend": gpu_backend}
    loss = seal_loss(leaf.requires_grad_(), teacher_logits, labels, **options).loss
    (gradient,) = torch.autograd.grad(loss * small_gradients.FACTOR, leaf)
    small_gradients.check(gradient.cpu(), tensors, objective)


@pytest.mark.parametrize("objective", ["seal", "kd", "tdkd"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("T", "B", "K"), [(64, 3, 33), (65, 3, 33), (100, 40, 100), (256, 3, 10), (256, 200, 100)])
def test_many_time_steps_are_right_or_refused(T, B, K, backend, objective):
    tensors = inputs(T, B, K)
    if backend == "triton" and T > MOST_STEPS:
        with pytest.raises(ValueError, match=f"these are {T}"):
            run(*tensors, backend, objective=objective)
    else:
        check(tensors, backend, objective)
    if backend == "auto":
        check_weights(tensors[0], backend)


def test_gpu_weights_equal_float64(gpu_backend):
    check_weights(inputs(10, 33, 100)[0], gpu_backend)


def check_weights(logits, backend):
    expected = selective_alignment_weights(logits.double(), backend="torch")
    for left, right in zip(selective_alignment_weights(logits, backend=backend), expected, strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-5, atol=1e-6)


def test_what_was_saved_may_come_back_in_another_layout(gpu_backend):
    found, expected = other_layouts.gradients_of_loss(*inputs(4, 33, 100), gpu_backend)
    for got, right in zip(found, expected, strict=True):  # accesses of another width may sum in another order
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-8)


def test_nothing_waits_for_the_gpu(gpu_backend):
    logits, teacher_logits, labels = inputs(4, 33, 100)
    run(logits, teacher_logits, labels, gpu_backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(logits, teacher_logits, labels, gpu_backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_graph_of_loss_and_backward_replays(gpu_backend):
    logits, teacher_logits, labels = inputs(4, 128, 100)
    graph, (parts, gradient) = captured(lambda: run(logits, teacher_logits, labels, gpu_backend))
    for seed in range(3):  # a counter that is not put back would show in the second replay
        torch.manual_seed(seed)
        logits.copy_(torch.randn_like(logits) * 2)
        graph.replay()
        expected, right = run(logits.double(), teacher_logits.double(), labels, "torch")
        torch.testing.assert_close(torch.stack(parts).double(), torch.stack(expected), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient.double(), right, rtol=1e-4, atol=1e-7)


def test_two_streams_at_once_do_not_mix_their_sums(gpu_backend):
    first, second = inputs(4, 512, 100), inputs(4, 512, 101)
    expected = [run(*values, gpu_backend)[0][0] for values in (first, second)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(50):
        got = []
        for stream, values in zip(streams, (first, second), strict=True):
            with torch.cuda.stream(stream):
                got.append(run(*values, gpu_backend)[0][0])
        torch.cuda.synchronize()
        assert all(torch.equal(left, right) for left, right in zip(got, expected, strict=True))


def test_results_are_the_same_from_run_to_run(gpu_backend):
    values = inputs(4, 512, 100)
    (parts, gradient), *others = [run(*values, gpu_backend) for _ in range(5)]
    for other_parts, other_gradient in others:
        assert all(torch.equal(left, right) for left, right in zip(parts, other_parts, strict=True))
        assert torch.equal(gradient, other_gradient)
