"""A kernel that has been started before is started with less ado, and only where it is the same kernel."""

import contextlib
import ctypes
import itertools
import struct
import sys
import threading
import types
from typing import ClassVar

import pytest
import torch

from seal_fast.kernels.launch import cupy as cuda_launcher
from seal_fast.kernels.seal_loss import cupy as cuda_room

CUDA = torch.device("cuda", 0)


@pytest.fixture
def driver(monkeypatch):
    """A CuPy that notes its calls; the driver's are read as the driver would."""
    calls = []

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            calls.append(("device", self.index))

        def __exit__(self, *_):
            pass

    class Function:
        ptr = 77

        def __call__(self, grid, block, arguments, stream, shared_mem=0):
            calls.append(("cupy", grid, block, [argument.item() for argument in arguments], stream.ptr, shared_mem))

    def launch_kernel(*arguments):
        *launch, parameters, extra = arguments
        assert extra == 0
        calls.append(("driver", *launch, read(parameters, codes[0])))

    codes = [""]
    start = cuda_launcher.start

    def noted(path, expression, blocks, threads, arguments, kinds, *rest):
        codes[0] = kinds
        start(path, expression, blocks, threads, arguments, kinds, *rest)

    fake = types.ModuleType("cupy")
    fake.cuda = types.SimpleNamespace(
        Device=Device,
        driver=types.SimpleNamespace(
            launchKernel=launch_kernel, funcSetAttribute=lambda *arguments: calls.append(("attribute", *arguments))
        ),
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(cuda_launcher, "start", noted)
    monkeypatch.setattr(cuda_launcher, "_function", lambda *_: Function())
    monkeypatch.setattr(cuda_launcher, "_granted", {})
    monkeypatch.setattr(cuda_launcher, "_of_thread", cuda_launcher._OfThread())
    monkeypatch.setattr(cuda_launcher, "is_current", lambda device: device == CUDA)
    monkeypatch.setattr(cuda_launcher, "current_stream", lambda device: 4096)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    return calls


def read(parameters: int, codes: str) -> list:
    """What the driver finds behind the addresses of a launch's arguments."""
    addresses = (ctypes.c_void_p * len(codes)).from_address(parameters)
    assert all(address % struct.calcsize(code) == 0 for address, code in zip(addresses, codes, strict=True))
    return [
        struct.unpack(code, ctypes.string_at(address, struct.calcsize(code)))[0]
        for address, code in zip(addresses, codes, strict=True)
    ]


def launch_of(*numbers, real=torch.float32, device=CUDA, shared_bytes=0, expression="kernel"):
    return cuda_launcher.Launch(
        cuda_room.SOURCE, expression, 5, 128, numbers, real=real, device=device, shared_bytes=shared_bytes
    )


def launch(*numbers, **options):
    launch_of(*numbers, **options)()


def test_the_second_launch_passes_what_the_first_did(driver):
    tensor, numbers = torch.zeros(3), (0.5, -7, 0.25, 2**40, True)
    again = launch_of(*numbers)
    for _ in range(2):
        again(tensor, None, tensor[1:])
    launch_of(*numbers)(tensor, None, tensor[1:])
    expected = [tensor.data_ptr(), 0, tensor.data_ptr() + 4, *numbers]
    assert driver[1] == ("cupy", (5,), (128,), expected, 4096, 0)
    assert driver[2:] == [("driver", 77, 5, 1, 1, 128, 1, 1, 0, 4096, expected)] * 2
    again(tensor[1:], tensor, None)
    assert driver[-1][-1] == [tensor.data_ptr() + 4, tensor.data_ptr(), 0, *numbers]
    launch_of(*numbers[::-1])(tensor)  # of other types, in other places
    assert driver[-1] == ("cupy", (5,), (128,), [tensor.data_ptr(), *numbers[::-1]], 4096, 0)
    launch(1.5, 2, real=torch.float64)
    launch(2.5, 3, real=torch.float64)
    assert driver[-1][-1] == [2.5, 3]


def test_tensors_reach_as_far_as_the_least_aligned():
    whole = torch.zeros(64, dtype=torch.bfloat16)
    assert whole.data_ptr() % 16 == 0
    assert cuda_launcher.reach((whole, None, whole.float(), whole[8:])) == 16
    assert cuda_launcher.reach((whole, whole.float(), whole[4:])) == 4
    assert cuda_launcher.reach((whole[4:], whole[2:])) == 2
    assert cuda_launcher.reach((whole[4:], torch.zeros(64)[2:])) == 2  # of 4 bytes each
    assert cuda_launcher.reach((whole[3:],)) == 1
    assert cuda_launcher.reach((None,)) == 16


@pytest.mark.parametrize(
    "other",
    [{"expression": "other"}, {"real": torch.float64}, {"device": torch.device("cuda", 1)}, {"shared_bytes": 49156}],
    ids=str,
)
def test_another_launch_is_prepared_for_itself(driver, other):
    launch(1.0)
    launch(1.0)
    assert driver[-1][0] == "driver"
    launch(1.0, **other)
    assert driver[-1][0] == "cupy"
    assert driver[-2][0] == ("attribute" if "shared_bytes" in other else "device")
    launch(1.0, **other)
    assert driver[-1][0] == ("cupy" if "device" in other else "driver")  # which is not the current one


def test_shared_memory_is_not_taken_back(driver):
    """From those of a function's launches that had more."""
    launch(1, shared_bytes=100 << 10)
    launch(1.0, shared_bytes=60 << 10)
    thread = threading.Thread(target=launch, args=(1,), kwargs={"shared_bytes": 80 << 10})
    thread.start()
    thread.join()
    launch(1, shared_bytes=100 << 10)
    assert [call for call in driver if call[0] == "attribute"] == [("attribute", 77, 8, 100 << 10)]
    assert driver[-1][0] == "driver"
    launch(1, shared_bytes=120 << 10)
    launch(1, shared_bytes=120 << 10)
    assert [call for call in driver if call[0] == "attribute"][1:] == [("attribute", 77, 8, 120 << 10)]
    assert driver[-1][0] == "driver"


def test_a_thread_starts_by_cupy_which_makes_its_context(driver):
    launch(1)
    thread = threading.Thread(target=launch, args=(2,))
    thread.start()
    thread.join()
    launch(3)
    assert [call[0] for call in driver] == ["device", "cupy", "device", "cupy", "driver"]
    assert driver[-1][-1] == [3]


def test_a_plan_of_the_loss_is_for_one_layout():
    """All that decides on the kernel, one thing after the other."""
    memory = torch.zeros(4 * 8 * 32 + 1)
    logits, labels = memory[:-1].view(4, 8, 32), torch.zeros(8, dtype=torch.int64)
    options = {"objective": "seal", "gradient": True, "most": 227 << 10, "keep": None}

    def planned(logits=logits, teacher=logits[0], labels=labels, **others):
        labels = labels.stride(0), labels.dtype
        return cuda_room._plan(cuda_room._layout(logits), cuda_room._layout(teacher), labels, **{**options, **others})

    first = planned()
    assert planned() is first
    others = [
        planned(logits=memory[1:].view(4, 8, 32)),  # where nothing is aligned
        planned(logits=logits.half()),
        planned(logits=logits.double().float()[:2]),
        planned(teacher=logits[0].double()),
        planned(labels=labels.int()),
        planned(objective="kd"),
        planned(gradient=False),
        planned(keep="table"),
    ]
    assert len({kernel.expression for kernel, _ in (first, *others)}) == 1 + len(others)
    assert planned(labels=torch.zeros(16, dtype=torch.int64)[::2])[1] == (*first[1][:-1], 2)
    assert planned(logits=logits[:, :4])[1][:3] == (4, 4, 32)


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
