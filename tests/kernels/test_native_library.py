"""A native library serves the sources that it was built from, and is read as it is written."""

import shutil
import subprocess
from pathlib import Path

import pytest

import cuda_host
import native
from seal_fast import kernels
from seal_fast.kernels.launch import cpu, sources

REASON = "the native library was built from other sources than lie beside it; install seal-fast again"
EDITS = {
    "fields": {"lif/cpu.cpp": [("int64_t T, N, x_stride, grad_stride;", "int64_t grad_stride, N, x_stride, T;")]},
    "enumerator": {
        "surrogate/surrogate.cuh": [
            ("TRIANGLE, RECTANGLE", "TRIANGLE"),
            ('static_assert(KIND == RECTANGLE, "no such SurrogateKind");', ""),
        ],
        "neuron/blocks.h": [("      case RECTANGLE: derivative = derivative_as<RECTANGLE>; break;\n", "")],
    },
    "arithmetic": {"neuron/neuron.cuh": [("return v * decay + x;", "return v * decay - x;")]},
}
REFUSED = f"""
import warnings, torch, seal_fast
REASON = {REASON!r}
assert seal_fast.backends()["lif"]["cpu"] == (False, REASON), seal_fast.backends()["lif"]["cpu"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        assert seal_fast.lif(torch.full((2, 3), 4.0))[0].all()
said = [str(warning.message) for warning in caught if "reference" in str(warning.message)]
assert said == ["seal-fast runs its slower torch reference on the CPU: " + REASON + "."], said
try:
    seal_fast.lif(torch.zeros(2, 3), backend="cpu")
except ValueError as error:
    print(error)
"""
SERVES = """
import torch, seal_fast
from seal_fast.kernels.launch import cpu
assert cpu.missing() == "", cpu.missing()
x = torch.randn(5, 3, 700, requires_grad=True)
for options in ({}, {"tau": 1.7, "v_reset": None}, {"decay_input": False}):
    spikes = [seal_fast.lif(x, backend=backend, **options)[0] for backend in ("torch", "cpu")]
    assert torch.equal(*spikes) and spikes[0].any()
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), x)[0] for each in spikes))
"""

needs_library = pytest.mark.skipif(cpu.library() is None, reason=cpu.missing())
needs_compiler = pytest.mark.skipif(bool(cuda_host.missing()), reason="no g++ is found, or this is not Linux")


@pytest.fixture
def copy(tmp_path):
    return native.copied(tmp_path)


@pytest.fixture
def beside(copy):
    """A copy with the library that is tested here."""
    shutil.copy(cpu.library()._name, copy / "kernels")
    return copy


def succeeded(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_library
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_a_library_of_other_sources_is_refused(edits, beside):
    native.changed(beside, edits)
    assert f"backend 'cpu' cannot run lif, because {REASON}" in succeeded(native.run(beside, REFUSED))


@needs_library
def test_a_library_of_the_same_sources_serves_and_of_no_sources_too(beside):
    succeeded(native.run(beside, SERVES))
    native.changed(beside, {"lif/cuda.cu": [("//", "// changed:")]})  # which is none of the library's
    succeeded(native.run(beside, SERVES))
    for pattern in ("*/*.cpp", "*/*.h", "*/*.cuh"):
        for file in (beside / "kernels").glob(pattern):
            file.unlink()
    succeeded(native.run(beside, SERVES))


@needs_compiler
def test_a_library_that_does_not_know_its_sources_is_refused(copy):
    source = copy / "old.cpp"
    source.write_text('extern "C" int seal_cpu_runs_baseline() { return 1; }')
    command = [cuda_host.COMPILER, "-shared", "-fPIC", source, "-o", copy / "kernels" / "_cpu.so"]
    subprocess.run(command, check=True)
    assert REASON in succeeded(native.run(copy, REFUSED))


@needs_compiler
def test_a_library_of_changed_sources_is_read_as_it_is_written(copy):
    """Swapped fields change nothing, as they go by name; what has lost its number is refused, and the rest is not."""
    pytest.importorskip("setuptools", reason="setup.py needs setuptools")
    for room in ("bn_lif", "packing", "seal_loss"):  # which take longest
        (copy / "kernels" / room / "cpu.cpp").unlink()
    original = {name: (copy / "kernels" / name).read_text(encoding="utf-8") for name in EDITS["fields"]}
    native.changed(copy, EDITS["fields"] | EDITS["enumerator"])
    native.build(copy, "-O0")
    succeeded(native.run(copy, SERVES))
    program = "import seal_fast, torch; seal_fast.lif(torch.zeros(2, 3), surrogate='rectangle', backend='cpu')"
    assert "ValueError: surrogate 'rectangle' has no code in the cpu kernels" in native.run(copy, program).stderr
    for name, text in original.items():
        (copy / "kernels" / name).write_text(text, encoding="utf-8")
    assert REASON in succeeded(native.run(copy, REFUSED))


def test_the_digest_is_of_names_and_contents(tmp_path):
    assert sources.digest(tmp_path) == 0
    folder = Path(kernels.__path__[0])
    found = sources.read(folder)
    assert {"lif/cpu.cpp", "neuron/blocks.h", "surrogate/surrogate.cuh", "launch/numbers.h"} <= set(found)
    assert not any("access.cuh" in name for name in found)
    digests = {sources.digest(folder)}
    for name, content in (("a/cpu.cpp", b"1"), ("a/cpu.cpp", b"2"), ("b/cpu.cpp", b"2"), ("c/cpu.cpp", b"")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
        digests.add(sources.digest(tmp_path))
    assert len(digests) == 5


@needs_library
def test_structs_take_their_fields_by_name_and_no_others():
    for name in ("LifArguments", "BnLifArguments", "NormArguments", "UnpackArguments", "LossArguments"):
        arguments = cpu.structure(name)
        assert arguments(dtype=3).dtype == 3
        with pytest.raises(AttributeError, match="missing"):
            arguments(missing=1)
