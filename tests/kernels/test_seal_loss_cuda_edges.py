"""The CUDA kernels of the distillation loss where numbers are extreme, samples ignored, or labels wrong."""

import pytest
import torch

import cuda_host
from cuda_host_seal_loss import OBJECTIVES, PUBLISHED, errors, expected, inputs, run
from seal_fast.kernels.seal_loss import cupy as room
from seal_fast.kernels.seal_loss import reference

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

K = 5


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """All that are needed here, compiled at once."""
    with pytest.MonkeyPatch.context() as patch:
        cuda_host.install(patch, room)
        with cuda_host.planning():
            for T in (1, 4):
                for objective in OBJECTIVES:
                    for gradient in (True, False):
                        room.forward(*inputs(T, 3, K), gradient=gradient, objective=objective, **PUBLISHED)
                room.weights(inputs(T, 3, K)[0])
        yield


def choices(generator, T, values):
    return torch.tensor(values)[torch.randint(len(values), (T, 3, K), generator=generator)]


EXTREMES = {
    "large": lambda generator, T: choices(generator, T, [-1e4, 1e4]),
    "large and small": lambda generator, T: (
        torch.randn(T, 3, K, generator=generator) * torch.tensor([1e-4, 1.0, 1e4])[:, None]
    ),
    "far from zero": lambda generator, T: torch.randn(T, 3, K, generator=generator) + 1e4,
    "tiny": lambda generator, T: torch.randn(T, 3, K, generator=generator) * 1e-20,
    "all equal": lambda generator, T: torch.full((T, 3, K), 2.5),
    "all zero": lambda generator, T: torch.zeros(T, 3, K),
    "few values": lambda generator, T: choices(generator, T, [0.0, 1.0]),
    "one-hot": lambda generator, T: torch.eye(K)[torch.randint(K, (T, 3), generator=generator)],
    "certain": lambda generator, T: torch.eye(K)[torch.randint(K, (T, 3), generator=generator)] * 1e4,
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_logits_stay_finite_and_right(extreme, T, objective):
    options = {**PUBLISHED, "objective": objective}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        logits, teacher_logits = EXTREMES[extreme](generator, T), EXTREMES[extreme](generator, 1)[0]
        labels = torch.randint(K, (3,), generator=generator)
        right = expected(logits, teacher_logits, labels, **options)
        got = run(logits, teacher_logits, labels, **options)
        assert right[0].isfinite().all()
        assert right[1].isfinite().all()
        # The rounding of a target's logit, which is a sum over steps, becomes the relative error of its exponential.
        rounding = 1e-8 * logits.abs().amax().item()
        value, _ = errors(got, right)
        assert value <= 3e-6 + rounding  # measured 1.4e-6; for logits of 1e4, 7e-5
        assert (got[1] - right[1]).abs().amax() <= 5e-7 + rounding  # measured 7e-8; for logits of 1e4, 2e-6


@pytest.mark.parametrize("extreme", EXTREMES)
def test_weights_of_extreme_logits(extreme):
    logits = EXTREMES[extreme](torch.Generator().manual_seed(0), 4)
    for got, right in zip(room.weights(logits), reference.selective_alignment_weights(logits.double()), strict=True):
        torch.testing.assert_close(got.double(), right, rtol=0, atol=1e-6)  # measured 1e-7


def test_one_time_step_weighs_nothing():
    weights, confidence = room.weights(inputs(1, 3, K)[0])
    assert weights.tolist() == [[[0.0]]] * 3
    assert confidence.shape == (1, 3)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_classes_that_student_and_teacher_mask_add_nothing(objective):
    logits, teacher_logits, labels = inputs(1, 3, K)
    logits[..., 3:], teacher_logits[..., 3:] = -torch.inf, -torch.inf
    options = {**PUBLISHED, "objective": objective, "beta": 0.0 if objective == "tdkd" else 0.15}
    labels.clamp_(max=2)
    right = expected(logits, teacher_logits, labels, **options)
    got = run(logits, teacher_logits, labels, **options)
    assert right[0][:3].isfinite().all()
    torch.testing.assert_close(got[0][:3].double(), right[0][:3], rtol=1e-6, atol=0)  # measured 2e-7
    torch.testing.assert_close(got[1].double(), right[1], rtol=0, atol=5e-7)  # measured 7e-8
    assert (got[1][..., 3:] == 0).all()


def test_terms_of_weight_zero_are_not_added():
    """Similarities of masked steps are not defined, and the divergence from a teacher without the mask is infinite."""
    logits, teacher_logits, labels = inputs(4, 3, K)
    logits[..., 4] = -torch.inf
    labels.clamp_(max=3)
    parts, gradient = run(logits, teacher_logits, labels, alpha=0.0, beta=0.0, temperature=3.0, objective="seal")
    right = expected(logits, teacher_logits, labels, alpha=0.0, beta=0.0, temperature=3.0, objective="seal")
    assert parts[2:].isfinite().sum() == 0
    torch.testing.assert_close(parts[:2].double(), right[0][:2], rtol=1e-6, atol=0)  # measured 5e-8
    assert gradient.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_valid_sample_the_loss_is_nan_and_the_gradient_zero(objective):
    logits, teacher_logits, labels = inputs(4, 3, K)
    labels[:] = reference.IGNORED
    parts, gradient = run(logits, teacher_logits, labels, objective=objective, **PUBLISHED)
    assert parts[:3].isnan().all()
    assert parts[3] == 0 if objective == "kd" else parts[3].isnan()
    assert (gradient == 0).all()


def test_many_samples_are_counted_once(monkeypatch):
    tensors = inputs(4, 9, K)
    every_block = run(*tensors, objective="seal", **PUBLISHED)
    monkeypatch.setattr(room, "COUNTED", 8)
    assert all(
        torch.equal(*pair) for pair in zip(every_block, run(*tensors, objective="seal", **PUBLISHED), strict=True)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_a_gradient_the_parts_are_the_same(objective):
    tensors = inputs(4, 3, K)
    parts, gradient = run(*tensors, gradient=False, objective=objective, **PUBLISHED)
    assert gradient is None
    assert torch.equal(parts, run(*tensors, objective=objective, **PUBLISHED)[0])


@pytest.mark.parametrize("label", [-1, K, 2**40])
def test_a_label_that_is_no_class_makes_the_loss_nan(label):
    logits, teacher_logits, labels = inputs(4, 3, K)
    labels[2] = label
    assert run(logits, teacher_logits, labels, objective="seal", **PUBLISHED)[0][0].isnan()


@pytest.mark.parametrize("where", ["logits", "all logits", "teacher's label", "teacher's prediction"])
def test_nan_is_not_hidden(where):
    logits, teacher_logits, labels = inputs(4, 3, K)
    place = {"teacher's label": labels[2], "teacher's prediction": logits[0, 2].argmax()}.get(where, 1)
    if "teacher" in where:
        teacher_logits[2, place] = torch.nan
    else:
        logits[:, 2, : None if where == "all logits" else 1] = torch.nan
    assert run(logits, teacher_logits, labels, objective="seal", **PUBLISHED)[0][0].isnan()


def test_the_counter_is_as_it_was_after_each_launch(monkeypatch):
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(room, "counters", lambda device, number: counter)
    results = [run(*inputs(4, B, K), objective="seal", **PUBLISHED) for B in (7, 1, 7)]
    assert counter == 0
    assert all(torch.equal(*pair) for pair in zip(results[0], results[2], strict=True))
