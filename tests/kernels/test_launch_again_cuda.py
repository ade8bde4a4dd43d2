"""A CUDA kernel that has been started before is started with less ado, and only where it is the same kernel."""

import ctypes
import struct
import sys
import threading
import types

import pytest
import torch

from seal_fast.kernels.launch import cupy as cuda_launcher
from seal_fast.kernels.launch.launches import MOST, remembered
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


def test_what_is_remembered_is_made_once_and_is_not_much():
    launches, made = {}, []

    def ask(key):
        return remembered(launches, key, lambda: made.append(key) or f"of {key}")

    assert [ask(key) for key in (1, 2, 1, 2)] == ["of 1", "of 2"] * 2
    assert made == [1, 2]
    for key in range(3 * MOST):
        assert ask(key) == f"of {key}"
        assert len(launches) <= MOST
    made.clear()
    assert remembered(None, 1, lambda: made.append(1)) is None
    assert remembered(None, 1, lambda: made.append(2)) is None
    assert made == [1, 2]


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
