"""The Triton kernels compiled for GPUs, without one: registers, accesses to memory, arithmetic, and when anew.

Launches take the launcher's own way, up to the start of the kernel.
"""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    # Triton decides when it is imported: kernels are functions of the interpreter then, without code to look at.
    pytest.skip("compiles nothing under TRITON_INTERPRET=1: kernels are interpreted then", allow_module_level=True)

from seal_fast.kernels.launch import triton as launcher
from seal_fast.kernels.lif import triton as kernel
from seal_fast.kernels.lif.reference import state_dtype
from seal_fast.kernels.neuron.options import Options
from seal_fast.kernels.surrogate.reference import SURROGATES, Surrogate
from triton_on_cpu import CAPABILITIES, access_bytes, compiling, machine_code, registers

DTYPES = [torch.float32, torch.bfloat16]


def neuron(**options):
    published = {
        "tau": 2.0,
        "decay_input": False,
        "v_threshold": 1.0,
        "v_reset": 0.0,
        "surrogate": Surrogate(),
        "detach_reset": False,
    }
    return Options(**published | options)


def launch(x, options=None, *, keep_v=True, pack=False, v_init=None, grad_spikes=None, grad_v_last=None):
    """Forward, then backward."""
    options = options or neuron()
    kernel.forward(x, v_init, options, keep_v=keep_v, pack=pack)
    grad_spikes = x if grad_spikes is None else grad_spikes
    kernel.backward(grad_spikes, grad_v_last, x, v_init, options, parameters=options.in_tensors)


def compiled(capability, *arguments, **options):
    with compiling(capability) as kernels:
        launch(*arguments, **options)
    return kernels


# (dtype, T) -> bytes of an access in backward: 16 at most, fewer where a thread keeps more steps of fewer neurons.
# Measured: 32 to 100 registers in forward, 64 to 167 in backward.
BACKWARD_ACCESS = {
    (torch.float32, 4): 16,
    (torch.bfloat16, 4): 8,
    (torch.float32, 16): 8,
    (torch.bfloat16, 16): 4,
    (torch.float32, 33): 4,
    (torch.bfloat16, 33): 4,
}


@pytest.mark.parametrize(
    ("capability", "dtype", "T"),
    [
        pytest.param(capability, dtype, T, marks=marks)
        for capability, marks in CAPABILITIES.items()
        for dtype, T in BACKWARD_ACCESS
        if T <= 16 or capability == 90  # long runs take seconds to compile
    ],
    ids=str,
)
def test_no_register_is_spilled_and_accesses_are_wide(capability, dtype, T):
    forward, backward = compiled(capability, torch.zeros(T, 2, 3, 64, dtype=dtype))
    for name, compilation, most in (("forward", forward, 100), ("backward", backward, 168)):
        count, spilled = registers(compilation)
        assert spilled == 0, f"{name} keeps {spilled} bytes of a thread in memory"
        assert count <= most, f"{name} takes {count} registers"
    assert access_bytes(forward) == {16}
    # Between chunks, potentials are float32.
    between = {2 * BACKWARD_ACCESS[dtype, T]} if T > 16 and dtype == torch.bfloat16 else set()
    assert access_bytes(backward) == {BACKWARD_ACCESS[dtype, T]} | between


BY_CHANNEL = {"tau": torch.tensor([1.7, 2.0, 3.0]), "decay_input": True, "v_reset": None}


@pytest.mark.parametrize(
    ("T", "dtype", "size"),
    [
        (4, torch.float32, 64),
        (16, torch.float32, 64),
        (16, torch.bfloat16, 64),
        (33, torch.bfloat16, 64),
        (16, torch.float32, 63),  # not aligned
    ],
    ids=str,
)
def test_no_register_is_spilled_with_everything_asked_for(T, dtype, size):
    x = torch.zeros(T, 1, 3, size, dtype=dtype)
    state = x[0].to(state_dtype(dtype))
    for compilation in compiled(90, x, neuron(**BY_CHANNEL), pack=True, v_init=state, grad_v_last=state):
        assert registers(compilation)[1] == 0


@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("v_reset", [0.3, None])
@pytest.mark.parametrize("tau", [1.7, 2.0])
def test_forward_rounds_each_operation_once(tau, v_reset, decay_input):
    options = neuron(tau=tau, v_reset=v_reset, decay_input=decay_input)
    forward, _ = compiled(90, torch.zeros(4, 64), options, v_init=torch.zeros(64))
    ptx = forward.asm["ptx"]
    assert "fma" not in ptx
    assert ".ftz" not in ptx  # subnormal numbers stay
    divides = tau != 2.0 and (decay_input or v_reset is not None)  # else 1 - 1/τ or 1/τ multiplies
    assert ptx.count("div.rn.f32") == (4 * 4 if divides else 0)  # steps, neurons of a thread
    assert ptx.count("div.") == ptx.count("div.rn.f32")
    if not divides:  # the division is made of fused multiply-adds
        assert "FMUL" in machine_code(forward) or "FADD" in machine_code(forward)
        assert "FFMA" not in machine_code(forward)


def test_bfloat16_is_rounded_to_nearest():
    """The interpreter's rounding is the tests' own, so that of the GPU is looked at here."""
    _, backward = compiled(90, torch.zeros(4, 64, dtype=torch.bfloat16))
    assert "cvt.rn.bf16" in backward.asm["ptx"]
    assert "cvt.rz.bf16" not in backward.asm["ptx"]


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_compiles(surrogate):
    _, backward = compiled(90, torch.zeros(2, 64), neuron(surrogate=Surrogate(surrogate)))
    assert registers(backward)[1] == 0


def test_sizes_strides_and_numbers_do_not_compile_anew():
    with compiling(90) as kernels:
        launch(torch.zeros(4, 2, 3, 64))
        launch(torch.zeros(4, 1, 1, 4), neuron(tau=3.7, v_threshold=0.3, surrogate=Surrogate("sigmoid", 1.0)))
        launch(torch.zeros(4, 16, 128, 56, 56, device="meta").new_zeros(4, 5, 4, 3, 3), neuron(tau=1.0))
        launch(torch.zeros(8, 2, 3, 64)[::2])
        launch(torch.zeros(1, 2, 64).expand(4, 2, 64), grad_spikes=torch.zeros(1, 2, 64).expand(4, 2, 64))
        launch(torch.zeros(8, 4, 6, 6).to(memory_format=torch.channels_last).unflatten(0, (4, 2)))
    assert len(kernels) == 12
    assert len({id(compilation) for compilation in kernels}) == 2  # forward and backward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_not_aligned_compile_once_more(dtype):
    with compiling(90) as kernels:
        for size in (64, 1, 33, 1025, 128):
            launch(torch.zeros(3, size, dtype=dtype), neuron(v_reset=0.3 if size > 1 else -7.0))
    assert len({id(compilation) for compilation in kernels}) == 4  # forward and backward, aligned and not


def test_whole_chunks_more_do_not_compile_anew():
    with compiling(90) as kernels:
        launch(torch.zeros(17, 64))
        launch(torch.zeros(33, 64))
        launch(torch.zeros(161, 64))
    assert len({id(compilation) for compilation in kernels}) == 2


def test_channels_do_not_compile_anew():
    with compiling(90) as kernels:
        for channels, size in ((3, 64), (16, 1), (64, 16), (2, 600)):
            tau = torch.full((channels,), 2.0)
            launch(torch.zeros(4, 2, channels, size), neuron(tau=tau))
    assert len({id(compilation) for compilation in kernels}) == 2


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **options or {})


VIEWS = {"select", "detach", "view", "alias"}
LAYOUTS = {
    "contiguous": lambda: torch.zeros(4, 2, 3, 4, 5),
    "channels_last": lambda: torch.zeros(8, 3, 4, 5).to(memory_format=torch.channels_last).unflatten(0, (4, 2)),
    "transposed": lambda: torch.zeros(4, 5, 3, 4, 2).transpose(1, 4),
    "one frame for all time steps": lambda: torch.zeros(2, 3, 4, 5).expand(4, 2, 3, 4, 5),
    "every other time step": lambda: torch.zeros(8, 2, 3, 4, 5)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_launch_only_allocates(layout):
    """No copy of an input, and nothing that waits for the device."""
    x = LAYOUTS[layout]()
    v_init = torch.zeros_like(x[0])
    with compiling(90), Calls() as calls:
        launch(x, pack=True, v_init=v_init, grad_v_last=v_init)
    assert calls.names - VIEWS == {"empty_strided", "empty_like", "empty"}


def test_constants_in_tensors_are_not_waited_for():
    tau = torch.tensor([1.7, 2.0, 3.0])
    with compiling(90), Calls() as calls:
        launch(torch.zeros(4, 2, 3, 5), neuron(tau=tau, v_threshold=torch.tensor(1.0)))
    assert "stack" in calls.names
    assert not calls.names & {"_local_scalar_dense", "nonzero", "item", "is_nonzero"}


def test_two_to_the_33_neurons_are_counted_in_one_grid(monkeypatch):
    started = []
    monkeypatch.setattr(launcher, "start", lambda *arguments, **options: started.append((arguments, options)))
    x = torch.empty(2, 1, 4, 2**31, dtype=torch.bfloat16, device="meta")
    kernel.forward(x, None, neuron(), keep_v=True, pack=True)
    ((_, blocks, *arguments), options) = started[0]
    assert blocks * options["BLOCK"] == 2**33
    assert blocks < 2**31  # the most programs on the first axis
    assert 2**33 in [argument for argument in arguments if isinstance(argument, int)]
