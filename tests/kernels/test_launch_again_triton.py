"""A Triton kernel that has been started before is started with less ado, and only where it is the same kernel."""

import contextlib
import itertools
import types
from typing import ClassVar

import pytest
import torch

CUDA = torch.device("cuda", 0)
triton = pytest.importorskip("triton", reason="Triton runs on Linux")
tl = triton.language

from seal_fast.kernels.launch import triton as launcher  # noqa: E402
from without_gpu import Target, compiling  # noqa: E402

needs_repeats = pytest.mark.skipif(not launcher._REPEATS, reason="this Triton starts each kernel the long way")


@triton.jit(do_not_specialize=["by_value"])
def copied(left, right, size, by_value, factor, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    n = tl.arange(0, BLOCK)
    value = tl.load(left + n, n < size) * factor + by_value
    if right is not None and FLAG:
        tl.store(right + n, value, n < size)


def tensors():
    whole = torch.zeros(64)
    return [whole, whole[1:], whole[4:], whole.half(), whole.half()[1:], whole.int()]


def test_what_is_specialised_alike_is_one_kernel():
    """As Triton itself chooses: where two calls have one key, they have one kernel."""
    kernels, kept = {}, tensors()
    with compiling(90) as compiled:
        cases = itertools.chain(
            itertools.product(kept, [None, *kept], [5], [5], [0.5, 2.0]),
            itertools.product(kept[:1], kept[:1], [1, 16, 17, 2**31, 2**31 + 16, 2**40], [1, 16, 2**31], [1.0]),
        )
        for case in cases:
            key, passed = launcher.specialisation(case)
            copied[(1,)](*case, BLOCK=16, FLAG=True)
            assert kernels.setdefault(tuple(key), compiled[-1]) is compiled[-1], case
            assert passed == [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in case]
    assert len(set(map(id, kernels.values()))) >= 5 * 6  # two of the tensors are alike


@pytest.mark.parametrize("value", [True, torch.float32, torch.zeros(4).as_subclass(type("Own", (torch.Tensor,), {}))])
def test_what_is_not_known_is_left_to_triton(value):
    key, passed = launcher.specialisation((1, value))
    assert passed is None
    assert key != launcher.specialisation((1, value))[0]


class Launches(Target):
    """A driver whose launches are noted, for all that live as long as the kernels that they start."""

    calls: ClassVar[list] = []

    def __init__(self):
        super().__init__(90)
        properties = {"max_shared_mem": 227 << 10}
        self.utils = types.SimpleNamespace(
            load_binary=lambda name, *_: ("module", name, 0, 0, 1024), get_device_properties=lambda _: properties
        )

    def launcher_cls(self, source, _metadata):
        def run(x, y, z, stream, function, _packed, _launch, _enter, _exit, *arguments):
            passed = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
            self.calls.append(((x, y, z), stream, function, tuple(source.signature.items()), passed))

        return run


@pytest.fixture
def launches(monkeypatch):
    """Triton's launches: each grid, stream, function, signature and arguments; and whether Triton chose the kernel."""
    from triton.runtime.driver import driver as active

    target, chosen, run = Launches(), [], triton.runtime.JITFunction.run
    target.calls.clear()
    monkeypatch.setattr(active, "_active", target)
    monkeypatch.setattr(launcher, "_prepared", {})
    monkeypatch.setattr(launcher, "is_current", lambda device: device == CUDA)
    monkeypatch.setattr(launcher, "current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def counted(self, *arguments, **options):
        chosen.append(self)
        return run(self, *arguments, **options)

    monkeypatch.setattr(triton.runtime.JITFunction, "run", counted)
    return target.calls, chosen


OPTIONS = ("blocks", "num_warps", "device")


def begin(*arguments, blocks=3, num_warps=4, device=CUDA, **constants):
    launcher.start(
        copied, blocks, *arguments, device=device, num_warps=num_warps, **({"BLOCK": 16, "FLAG": True} | constants)
    )


@needs_repeats
def test_the_second_start_passes_what_the_first_did(launches):
    calls, chosen = launches
    left, right = torch.zeros(16), torch.zeros(16)
    for factor in (0.5, 0.5, 0.25):
        begin(left, right, 16, 3, factor)
    assert len(chosen) == 1
    assert calls[0] == calls[1]
    assert calls[2][-1] == [*calls[0][-1][:4], 0.25, *calls[0][-1][5:]]
    begin(right, None, 16, 3, 0.5, FLAG=False, BLOCK=16)
    begin(right, None, 16, 3, 0.5, FLAG=False, BLOCK=16)
    assert len(chosen) == 2
    assert calls[3] == calls[4]


@needs_repeats
@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ({0: torch.zeros(17)[1:]}, {}),
        ({0: torch.zeros(16).half()}, {}),
        ({1: None}, {}),
        ({2: 17}, {}),
        ({2: 1}, {}),
        ({3: 2**31}, {}),
        ({4: 1}, {}),
        ({}, {"BLOCK": 32}),
        ({}, {"FLAG": False}),
        ({}, {"FLAG": 1}),
        ({}, {"blocks": 4}),
        ({}, {"num_warps": 8}),
        ({}, {"device": torch.device("cuda", 1)}),
    ],
    ids=["address", "dtype", "none", "size", "one", "wide", "integer", "block", "flag", "type", *OPTIONS],
)
def test_another_start_is_left_to_triton(launches, arguments, options):
    calls, chosen = launches
    usual = [torch.zeros(16), torch.zeros(16), 16, 3, 0.5]
    begin(*usual)
    begin(*usual)
    assert len(chosen) == 1
    changed = [arguments.get(place, value) for place, value in enumerate(usual)]
    begin(*changed, **options)
    assert len(chosen) == 2
    assert calls[2] != calls[1] or options.keys() & {"device", "num_warps", "FLAG"}  # of which these do not tell
    begin(*usual)
    assert calls[3] == calls[0]
    assert len(chosen) == 2


def launch_again(*numbers, **options):
    return launcher.Launch(copied, 3, numbers, device=CUDA, num_warps=4, **({"BLOCK": 16, "FLAG": True} | options))


@needs_repeats
def test_a_launch_passes_its_numbers_and_other_tensors_each_time(launches):
    calls, chosen = launches
    whole = torch.zeros(64)
    again, another = launch_again(16, 3, 0.5), launch_again(16, 3, 0.25, FLAG=False)
    for tensors in ((whole, whole[4:]), (whole[8:], whole), (whole[8:], whole)):
        again(*tensors)
        assert calls[-1][-1][:2] == [tensor.data_ptr() for tensor in tensors]
        assert calls[-1][-1][2:] == calls[0][-1][2:]
    assert len(chosen) == 1
    assert [call[:4] for call in calls[1:]] == [calls[0][:4]] * 2
    for _ in range(2):
        another(whole, None)
    assert calls[-1] == calls[-2]
    assert calls[-1][-1][2:5] == [16, 3, 0.25]
    again(whole, whole)
    assert calls[-1][-1][2:] == calls[0][-1][2:]
    assert len(chosen) == 2


@needs_repeats
@pytest.mark.parametrize(
    "tensors",
    [(torch.zeros(17)[1:], torch.zeros(16)), (torch.zeros(16).half(), torch.zeros(16)), (torch.zeros(16), None)],
    ids=["address", "dtype", "none"],
)
def test_a_launch_on_other_kinds_of_tensors_is_left_to_triton(launches, tensors):
    calls, chosen = launches
    usual, again = (torch.zeros(16), torch.zeros(16)), launch_again(16, 3, 0.5)
    for given in (usual, tensors, tensors, usual):
        again(*given)
    assert len(chosen) == 2
    assert calls[1] == calls[2] != calls[3]
    assert calls[3] == calls[0]


@needs_repeats
def test_a_launch_elsewhere_than_on_the_current_device_is_no_repetition(launches, monkeypatch):
    calls, chosen = launches
    usual, again = (torch.zeros(16), torch.zeros(16)), launch_again(16, 3, 0.5)
    again(*usual)
    monkeypatch.setattr(launcher, "is_current", lambda _device: False)
    again(*usual)
    assert len(chosen) == 2
    assert calls[0] == calls[1]


@needs_repeats
def test_hooks_of_a_kernel_are_run(launches, monkeypatch):
    _, chosen = launches
    usual = [torch.zeros(16), torch.zeros(16), 16, 3, 0.5]
    begin(*usual)
    again = launch_again(*usual[2:])
    again(*usual[:2])
    assert len(chosen) == 1
    monkeypatch.setattr(copied, "pre_run_hooks", [lambda *_, **__: None])
    begin(*usual)
    again(*usual[:2])
    assert len(chosen) == 3


@needs_repeats
def test_not_all_that_was_ever_started_is_kept(launches, monkeypatch):
    monkeypatch.setattr(launcher, "_MOST_PREPARED", 3)
    for size in range(2, 9):
        begin(torch.zeros(16), torch.zeros(16), size, 3, 0.5)
        assert 1 <= len(launcher._prepared) <= 3
