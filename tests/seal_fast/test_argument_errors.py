"""Each wrong argument raises one sentence that names it, before anything runs."""

import sys

import pytest
import torch
from torch import nn

from seal_fast import backends, bn_lif, lif, seal_loss, selective_alignment_weights
from seal_fast.models import student, teacher
from seal_fast.nn import LIFNode

X = torch.zeros(4, 2, 3, 5)
ROWS = X.flatten(0, 1)
LABELS = torch.tensor([0, 1, 2])
META = torch.device("meta")


def run_lif(x=X, **options):
    return lif(x, **options)


def run_bn_lif(y=ROWS, bn=None, node=None, time_steps=4, **options):
    return bn_lif(y, bn or nn.BatchNorm1d(3), node or LIFNode(), time_steps=time_steps, **options)


def run_loss(logits=X[:, 0], teacher_logits=X[0, 0], labels=LABELS, **options):
    return seal_loss(logits, teacher_logits, labels, **({"alpha": 0.6, "beta": 0.15} | options))


def run_student(x=None, **options):
    with META:
        network = student(**({"arch": "resnet18", "num_classes": 10} | options))
    return network(x) if x is not None else None


def run_teacher(**options):
    with META:
        return teacher(**({"arch": "resnet18", "num_classes": 10} | options))


def of_dtypes(weight, rest):
    """A batch norm whose bias and buffers are of another dtype than its weight."""
    bn = nn.BatchNorm1d(3, dtype=rest)
    bn.weight = nn.Parameter(bn.weight.to(weight))
    return bn


def nested(*shape):
    return torch.nested.nested_tensor([torch.zeros(shape)])


NEURON = [
    ({"tau": 0.5}, ValueError, r"tau must be a finite number of at least 1; got 0\.5"),
    ({"tau": float("nan")}, ValueError, r"tau must be a finite number"),
    ({"tau": float("inf")}, ValueError, r"tau must be a finite number"),
    ({"tau": "2"}, TypeError, r"tau must be a number of at least 1; got str"),
    ({"tau": True}, TypeError, r"tau must be a number"),
    ({"v_threshold": float("inf")}, ValueError, r"v_threshold must be a finite number"),
    ({"v_threshold": None}, TypeError, r"v_threshold must be a number; got NoneType"),
    ({"v_reset": float("nan")}, ValueError, r"v_reset must be a finite number"),
    ({"v_reset": torch.tensor(0.0)}, TypeError, r"v_reset must be a number; got Tensor"),
    ({"decay_input": 1}, TypeError, r"decay_input must be True or False; got 1"),
    ({"detach_reset": None}, TypeError, r"detach_reset must be True or False; got None"),
    ({"surrogate": "relu"}, ValueError, r"surrogate must be one of .*; got 'relu'"),
    ({"surrogate": 4.0}, TypeError, r"surrogate must be a name, a Surrogate, or SpikingJelly.s .*; got float"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of auto, triton, cupy, cpu, torch; got 'cuda'"),
]
PER_CHANNEL = [
    (run_lif, {name: value}, error, message.format(name=name))
    for name in ("tau", "v_threshold")
    for value, error, message in (
        (torch.ones(3, dtype=torch.int64), TypeError, "{name} must be float16, .*; got torch.int64"),
        (torch.ones(2) * 2, ValueError, r"{name} must be a scalar or \[3\], the channels of x .*; got \[2\]"),
        (torch.ones(1, 3) * 2, ValueError, r"{name} must be a scalar or \[3\].*; got \[1, 3\]"),
        (torch.ones(3, device=META), ValueError, r"{name} must be on the device of x, cpu; got meta"),
    )
]
LIF = [
    ({"x": [1.0]}, TypeError, r"x must be a tensor \[T, \.\.\.\]; got list"),
    ({"x": X.long()}, TypeError, r"x must be float16, .*; got torch.int64"),
    ({"x": X.bool()}, TypeError, r"x must be float16, .*; got torch.bool"),
    ({"x": X.to_sparse()}, TypeError, r"x must be a dense tensor, as x\.to_dense\(\) is; got torch\.sparse_coo"),
    ({"x": nested(2, 3, 5)}, TypeError, r"x must be a dense tensor.*; got a nested one"),
    ({"v_init": X[0].to_sparse()}, TypeError, r"v_init must be a dense tensor, as .*; got torch\.sparse_coo"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[T, \.\.\.\] with at least one time step; got \[\]"),
    ({"x": X[:0]}, ValueError, r"x must be .* at least one time step; got \[0, 2, 3, 5\]"),
    ({"x": X[:, 0, 0], "tau": torch.ones(5)}, ValueError, r"tau must be a scalar; got \[5\]"),
    ({"v_init": 0.5}, TypeError, r"v_init must be a tensor with the shape of x\[0\]; got float"),
    ({"v_init": X[0].int()}, TypeError, r"v_init must be float16, .*; got torch.int32"),
    ({"v_init": X[0, 0]}, ValueError, r"v_init must have the shape of x\[0\], \[2, 3, 5\]; got \[3, 5\]"),
    ({"v_init": X[0].to(META)}, ValueError, r"v_init must be on the device of x, cpu; got meta"),
    ({"backend": "cupy"}, ValueError, r"backend 'cupy' cannot run lif, because .+; .*torch can"),
]
BN_LIF = [
    ({"y": 1.0}, TypeError, r"y must be a tensor \[T·B, C, \.\.\.\]; got float"),
    ({"y": ROWS.int()}, TypeError, r"y must be float16, .*; got torch.int32"),
    ({"y": torch.zeros(8)}, ValueError, r"y must be \[T·B, 3, \.\.\.\], the channels of bn; got \[8\]"),
    ({"y": torch.zeros(8, 4, 5)}, ValueError, r"y must be \[T·B, 3, \.\.\.\].*; got \[8, 4, 5\]"),
    ({"y": torch.zeros(6, 3, 5)}, ValueError, r"y must have T·B rows with T = 4 time steps; got \[6, 3, 5\]"),
    ({"y": torch.zeros(0, 3, 5)}, ValueError, r"y must have T·B rows with T = 4 time steps; got \[0, 3, 5\]"),
    ({"bn": nn.GroupNorm(1, 3)}, TypeError, r"bn must be a BatchNorm or SyncBatchNorm module; got GroupNorm"),
    ({"bn": nn.BatchNorm1d(3, device="meta")}, ValueError, r"bn must be on the device of y, cpu; got meta"),
    ({"bn": of_dtypes(torch.float16, torch.float32)}, TypeError, r"bn must be of y's dtype, .*; got torch.float16"),
    ({"bn": of_dtypes(torch.float32, torch.float16)}, TypeError, r"bn must be of y's dtype, .*; got torch.float16"),
    ({"bn": nn.LazyBatchNorm1d()}, TypeError, r"bn must know its channels, as once .* called; got LazyBatchNorm1d"),
    ({"y": ROWS.to_sparse()}, TypeError, r"y must be a dense tensor, as .*; got torch\.sparse_coo"),
    ({"residual": ROWS.to_sparse()}, TypeError, r"residual must be a dense tensor, as .*; got torch\.sparse_coo"),
    ({"node": nn.ReLU()}, TypeError, r"lif must be a LIFNode; got ReLU, which has no tau"),
    ({"node": LIFNode(backend="cupy")}, ValueError, r"backend 'cupy' cannot run bn_lif, because .+; .*torch can"),
    ({"node": LIFNode(tau=torch.ones(2))}, ValueError, r"tau must be .* \[3\], the channels of y .*; got \[2\]"),
    ({"node": LIFNode(v_threshold=torch.ones(2))}, ValueError, r"v_threshold must be a scalar or \[3\], .*; got \[2\]"),
    ({"time_steps": 0}, ValueError, r"time_steps must be an integer of at least 1; got 0"),
    ({"time_steps": 4.0}, TypeError, r"time_steps must be an integer of at least 1; got 4\.0"),
    ({"residual": 0.0}, TypeError, r"residual must be a tensor"),
    ({"residual": ROWS.long()}, TypeError, r"residual must be float16, .*; got torch.int64"),
    ({"residual": ROWS[:3]}, ValueError, r"residual must be \[8 or 2, 3, 5\] for y .*; got \[3, 3, 5\]"),
    ({"residual": torch.zeros(8, 3, 1)}, ValueError, r"residual must be \[8 or 2, 3, 5\] .*; got \[8, 3, 1\]"),
    ({"residual": ROWS.to(META)}, ValueError, r"residual must be on the device of y, cpu; got meta"),
]
LOGITS = [
    ({"logits": None}, TypeError, r"logits must be a tensor \[T, B, K\]; got NoneType"),
    ({"logits": X[:, 0].long()}, TypeError, r"logits must be float16, .*; got torch.int64"),
    ({"logits": X}, ValueError, r"logits must be \[T, B, K\] .*; got \[4, 2, 3, 5\]"),
    ({"logits": X[:, 0].to_sparse()}, TypeError, r"logits must be a dense tensor, as .*; got torch\.sparse_coo"),
    ({"logits": X[0, 0, 0, 0]}, ValueError, r"logits must be \[T, B, K\] .*; got \[\]"),
    ({"logits": X[0, 0]}, ValueError, r"logits must be \[T, B, K\] .*; got \[3, 5\]"),
    ({"logits": X[:0, 0]}, ValueError, r"logits must be \[T, B, K\] with T and B at least 1 .*; got \[0, 3, 5\]"),
    ({"logits": X[:, 0, :0]}, ValueError, r"logits must be .*; got \[4, 0, 5\]"),
    ({"logits": X[:, 0, :, :1]}, ValueError, r"logits must be .* K at least 2; got \[4, 3, 1\]"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of auto, .*; got 'cuda'"),
]
LOSS = [
    ({"teacher_logits": [0.0]}, TypeError, r"teacher_logits must be a tensor \[B, K\]; got list"),
    ({"teacher_logits": X[0, 0].int()}, TypeError, r"teacher_logits must be float16, .*; got torch.int32"),
    ({"teacher_logits": X[0, 0].to_sparse()}, TypeError, r"teacher_logits must be a dense tensor, as .*; got torch\."),
    ({"labels": LABELS.to_sparse()}, TypeError, r"labels must be a dense tensor, as .*; got torch\.sparse_coo"),
    ({"teacher_logits": X[0, 0].t()}, ValueError, r"teacher_logits must be \[3, 5\] for logits .*; got \[5, 3\]"),
    ({"teacher_logits": X[:, 0]}, ValueError, r"teacher_logits must be \[3, 5\] .*; got \[4, 3, 5\]"),
    (
        {"teacher_logits": X[0, 0].to(META)},
        ValueError,
        r"teacher_logits must be on the device of logits, cpu; got meta",
    ),
    ({"labels": [0, 1, 2]}, TypeError, r"labels must be a tensor of class indices \[B\]; got list"),
    ({"labels": torch.zeros(3)}, TypeError, r"labels must be int64 or int32; got torch.float32"),
    ({"labels": torch.tensor([0, 1])}, ValueError, r"labels must be \[3\] for logits .*; got \[2\]"),
    ({"labels": torch.tensor([[0, 1, 2]])}, ValueError, r"labels must be \[3\] for logits .*; got \[1, 3\]"),
    (
        {"labels": torch.zeros(3, device=META).long()},
        ValueError,
        r"labels must be on the device of logits, cpu; got meta",
    ),
    ({"labels": torch.tensor([0, 5, 2])}, ValueError, r"labels must be in \[0, 5\) or -100 to be ignored; got 5"),
    ({"labels": torch.tensor([0, -1, 2])}, ValueError, r"labels must be in \[0, 5\) or -100 .*; got -1"),
    ({"alpha": -0.1}, ValueError, r"alpha must be a finite number of at least 0; got -0\.1"),
    ({"alpha": torch.tensor(0.6)}, TypeError, r"alpha must be a number of at least 0; got Tensor"),
    ({"beta": float("nan")}, ValueError, r"beta must be a finite number of at least 0; got nan"),
    ({"beta": None}, TypeError, r"beta must be a number of at least 0; got NoneType"),
    ({"temperature": 0.0}, ValueError, r"temperature must be a finite number above 0; got 0\.0"),
    ({"temperature": "3"}, TypeError, r"temperature must be a number above 0; got str"),
    ({"objective": "mse"}, ValueError, r"objective must be one of seal, kd, tdkd; got 'mse'"),
    ({"backend": "cupy"}, ValueError, r"backend 'cupy' cannot run seal_loss, because .+; .*torch can"),
]
NETWORK = [
    ({"arch": "vgg"}, ValueError, r"arch of a (student|teacher) must be one of resnet8, resnet18, .*; got 'vgg'"),
    ({"num_classes": 1}, ValueError, r"num_classes must be an integer of at least 2; got 1"),
    ({"num_classes": 10.0}, TypeError, r"num_classes must be an integer of at least 2; got 10\.0"),
    ({"in_channels": 0}, ValueError, r"in_channels must be an integer of at least 1; got 0"),
]
STUDENT = [
    ({"time_steps": 0}, ValueError, r"time_steps must be an integer of at least 1; got 0"),
    ({"time_steps": True}, TypeError, r"time_steps must be an integer of at least 1; got True"),
    ({"x": "image"}, TypeError, r"input must be a tensor .*; got str"),
    ({"x": torch.zeros(2, 3, 8, 8).byte()}, TypeError, r"input must be float16, .*; got torch.uint8"),
    ({"x": torch.zeros(3, 8, 8)}, ValueError, r"input must be images \[B, 3, H, W\] or events .*; got \[3, 8, 8\]"),
    ({"x": torch.zeros(2, 1, 8, 8)}, ValueError, r"input must be images \[B, 3, H, W\] .*; got \[2, 1, 8, 8\]"),
    ({"x": torch.zeros(0, 3, 8, 8)}, ValueError, r"input must be images .*; got \[0, 3, 8, 8\]"),
    ({"x": torch.zeros(2, 4, 3, 8, 8)}, ValueError, r"events must have T = 4 time steps, .*; got \[2, 4, 3, 8, 8\]"),
]
TEACHER = [
    ({"stem": "mnist"}, ValueError, r"stem must be 'cifar', 'imagenet' or None; got 'mnist'"),
    ({"arch": "resnet19", "stem": "imagenet"}, ValueError, r"resnet19 has no 'imagenet' stem"),
]
STEP_MODE = ({"step_mode": "x"}, ValueError, r"step_mode must be 's' or 'm'; got 'x'")
CALLS = [
    *((run_lif, *row) for row in NEURON + LIF),
    *PER_CHANNEL,
    *((LIFNode, *row) for row in [*NEURON, STEP_MODE]),
    *((run_bn_lif, *row) for row in BN_LIF),
    *((run_loss, *row) for row in LOGITS + LOSS),
    *((selective_alignment_weights, {"logits": X[:, 0]} | options, error, text) for options, error, text in LOGITS),
    *((run_student, *row) for row in NETWORK + STUDENT),
    *(
        (run_student, *row)
        for row in NEURON
        if row[0].keys() <= {"tau", "v_threshold", "v_reset", "detach_reset", "backend"}
        and row[0] != {"tau": float("inf")}  # students do not divide their input by tau
    ),
    *((run_teacher, *row) for row in NETWORK + TEACHER),
]


@pytest.mark.parametrize(
    ("call", "options", "error", "message"),
    CALLS,
    ids=[f"{call.__name__}-{'-'.join(options)}-{number}" for number, (call, options, *_) in enumerate(CALLS)],
)
def test_a_wrong_argument_raises_a_sentence_that_names_it(call, options, error, message):
    with pytest.raises(error, match=f"^{message}") as caught:
        call(**options)
    text = str(caught.value)
    assert type(caught.value) is error
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("call", [run_lif, run_bn_lif, run_loss, run_student, run_teacher, LIFNode])
def test_the_arguments_without_a_wrong_one_are_right(call):
    call()


@pytest.mark.parametrize("call", [run_lif, run_bn_lif, run_loss])
def test_environment_variable_with_an_unknown_backend_is_refused(call, monkeypatch):
    monkeypatch.setenv("SEAL_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"backend must be one of auto, triton, cupy, cpu, torch; got 'cuda'\."):
        call()


@pytest.mark.parametrize("call", [run_lif, run_bn_lif, run_loss])
def test_environment_variable_with_a_backend_that_cannot_run_the_call_is_refused(call, monkeypatch):
    monkeypatch.setenv("SEAL_FAST_BACKEND", "cupy")
    with pytest.raises(ValueError, match="backend 'cupy' cannot run"):
        call()


def test_environment_variable_replaces_auto_only(monkeypatch):
    monkeypatch.setenv("SEAL_FAST_BACKEND", "cupy")
    run_lif(backend="torch")
    monkeypatch.setenv("SEAL_FAST_BACKEND", "torch")
    run_lif()
    monkeypatch.setenv("SEAL_FAST_BACKEND", "")
    run_lif()


def test_environment_variable_may_change_between_calls(monkeypatch):
    module = sys.modules["seal_fast.backends"]
    device = torch.device("cpu")
    monkeypatch.delenv("SEAL_FAST_BACKEND", raising=False)
    usual = module.resolve("auto", "seal_loss", device)
    monkeypatch.setenv("SEAL_FAST_BACKEND", "torch")
    assert module.resolve("auto", "seal_loss", device) == "torch"
    monkeypatch.setenv("SEAL_FAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"got 'cuda'\."):
        module.resolve("auto", "seal_loss", device)
    monkeypatch.delenv("SEAL_FAST_BACKEND")
    assert module.resolve("auto", "seal_loss", device) == usual


def test_backends_says_what_can_run_here_and_why_not():
    table = backends()
    of_spikes = {"spike_conv2d", "spike_linear"}  # which have no kernel of their own on GPUs
    assert table.keys() == {"lif", "bn_lif", "seal_loss", "selective_alignment_weights", *of_spikes}
    for operator, row in table.items():
        if operator in of_spikes:
            assert list(row) == ["cpu", "torch", "triton", "cupy"]
            assert not row["triton"].available
            continue
        on_gpus = ["triton", "cupy"] if operator in ("lif", "bn_lif") else ["cupy", "triton"]
        assert list(row) == [*on_gpus, "cpu", "torch"]
        assert row["torch"].available
        assert all(entry.available or entry.reason for entry in row.values())
