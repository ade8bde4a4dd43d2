"""Native code under sanitizers: nothing is read or written out of place, and that would be noticed."""

import pytest

import native
import sanitize

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(sanitize.missing()), reason=sanitize.missing()),
]


@pytest.mark.parametrize("isa", [] if sanitize.missing() else sanitize.instruction_sets())
def test_sanitizers_find_nothing(isa, tmp_path):
    result = sanitize.check(native.copied(tmp_path), isa)
    assert result.returncode == 0, result.stdout[-20_000:]
    assert " passed" in result.stdout


ROW = "return static_cast<const Number*>(a.x) + t * a.x_stride;"


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("block.at, count * sizeof(State)", "block.at, (count + 1) * sizeof(State)", "heap-buffer-overflow"),
        (ROW, ROW.replace(";", " + 1;"), "heap-buffer-overflow"),
        ("kept, work);", "kept << (64 + a.T), work);", "shift exponent"),
    ],
    ids=["write", "read", "undefined"],
)
def test_they_find_what_is_wrong(old, new, found, tmp_path):
    native.copied(tmp_path)
    for room in ("bn_lif", "packing", "seal_loss", "spike_conv"):
        (tmp_path / "kernels" / room / "cpu.cpp").unlink()
    native.changed(tmp_path, {"lif/cpu.cpp": [(old, new)]})
    result = sanitize.check(tmp_path, "baseline", ["test_native_sizes.py::test_lif"])
    assert result.returncode != 0
    assert found in result.stdout, result.stdout[-20_000:]
