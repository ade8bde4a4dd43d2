import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import makers
from seal_fast.train.data import DataError
from seal_fast.train.data.aedat import Events, read_aedat, read_npz, write_aedat

event = st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 127), st.integers(0, 127), st.integers(0, 1))
HEADER = b"#!AER-DAT2.0\r\n"


def assert_equal(events, other):
    for name in Events._fields:
        assert np.array_equal(getattr(events, name), np.asarray(other[name])), name


@given(st.lists(event, min_size=1, max_size=40))
@settings(deadline=None, max_examples=60)
def test_round_trip(spikingjelly_aedat, tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("aedat") / "a.aedat"
    events = Events(*np.array(rows, dtype=np.int64).T)
    write_aedat(path, events)
    back = read_aedat(path)
    assert_equal(back, events._asdict())
    assert all(array.dtype == np.int64 for array in back)
    assert_equal(back, spikingjelly_aedat(path))


def test_address_bits(tmp_path):
    """A file put together by hand: y_raw in bits 8 to 14, x_raw in bits 1 to 7, polarity in bit 0."""
    path = tmp_path / "a.aedat"
    path.write_bytes(HEADER + struct.pack(">4I", (5 << 8) | (9 << 1) | 1, 77, (127 << 8) | (0 << 1) | 0, 78))
    assert_equal(read_aedat(path), {"t": [77, 78], "x": [122, 0], "y": [118, 127], "p": [0, 1]})


@pytest.mark.parametrize(
    "header",
    [
        HEADER,
        b"#!AER-DAT2.0\n",
        HEADER + b"# a comment\r\n# Created Mon Jan 01\r\n",
        HEADER + b"#" + b"x" * 5000 + b"\r\n#\r\n",
        HEADER + b"#End Of ASCII Header\r\n",
    ],
)
@pytest.mark.parametrize("address", [0x0A23, 0x230A, 0x2323, 0x0D0A, 0x0A0A, 0x2020, 0x0000, 0x8001])
def test_events_that_look_like_text(header, address, spikingjelly_aedat, tmp_path):
    path = tmp_path / "a.aedat"
    path.write_bytes(header + struct.pack(">4I", address, 0x2323230A, 0x0A23, 0x23200D0A))
    assert_equal(read_aedat(path), spikingjelly_aedat(path))
    assert len(read_aedat(path).t) == 2


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is truncated: it has 0 bytes; unpack it again"),
        (b"#!AER-D", "is truncated: it has 7 bytes; unpack it again"),
        (b"PK\x03\x04 zip", "no AEDAT 2.0 file: it begins with b'PK"),
        (b"#!AER-DAT3.1\r\n" + bytes(80), "no AEDAT 2.0 file"),
        (HEADER, "no events"),
        (b"#!AER-DAT2.0", "no events"),
        (HEADER + bytes(7), "truncated"),
        (HEADER + bytes(12), "truncated"),
        (HEADER + bytes(17), "truncated"),
        (HEADER + b"\x00\x01\x00\x00\x00\x00\x00\x00", "has the address 65536, where those of a DVS128 end at 65535"),
        (HEADER + b"\xff" * 16, "has the address 4294967295"),
    ],
)
def test_broken_files(content, fault, tmp_path):
    path = tmp_path / "a.aedat"
    path.write_bytes(content)
    with pytest.raises(DataError, match=fault) as caught:
        read_aedat(path)
    assert str(path) in caught.value.sentence
    assert "\n" not in caught.value.sentence
    assert ("unpack it again" in caught.value.sentence) == (fault.startswith(("is truncated", "truncated")))
    assert "delete" not in caught.value.sentence


def test_absent_file(tmp_path):
    with pytest.raises(DataError, match=r"a\.aedat cannot be read: no such file or directory\.$"):
        read_aedat(tmp_path / "a.aedat")


@pytest.mark.parametrize(
    "row", [(0, 128, 0, 0), (0, 0, -1, 0), (0, 0, 128, 0), (0, 0, 0, 2), (-1, 0, 0, 0), (2**32, 0, 0, 0)]
)
def test_write_refuses_what_it_cannot_hold(row, tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        write_aedat(tmp_path / "a.aedat", Events(*np.array([row]).T))
    assert not (tmp_path / "a.aedat").exists()


def test_npz_of_spikingjelly(spikingjelly_aedat, tmp_path):
    """SpikingJelly saves what its reader returns, in that reader's types."""
    events = makers.random_events(np.random.default_rng(0), 50)
    write_aedat(tmp_path / "a.aedat", events)
    np.savez_compressed(tmp_path / "a.npz", **spikingjelly_aedat(tmp_path / "a.aedat"))
    assert_equal(read_npz(tmp_path / "a.npz"), events._asdict())


def npz_arrays(**changes):
    return {"t": np.arange(3), "x": np.arange(3), "y": np.arange(3), "p": np.array([0, 1, 1]), **changes}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"x": np.array([0, 1, 128])}, "x = 128"),
        ({"y": np.array([0, -1, 3])}, "y = -1"),
        ({"p": np.array([0, 1, 2])}, "p = 2"),
        ({"t": np.array([-5, 1, 2])}, "t = -5"),
        ({"t": np.arange(2)}, "different lengths"),
        ({"t": np.float64(1.0)}, "of type float64 instead of whole numbers"),
        ({"x": np.zeros(3)}, "of type float64 instead of whole numbers"),
        ({name: np.zeros(0, int) for name in "txyp"}, "no events"),
        ({"x": np.array([object()] * 3)}, "holds Python objects instead of numbers"),
    ],
)
def test_npz_content(changes, fault, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **npz_arrays(**changes))
    with pytest.raises(DataError, match=fault) as caught:
        read_npz(path)
    assert str(path) in caught.value.sentence
    assert "delete" not in caught.value.sentence


def test_npz_without_an_array(tmp_path):
    arrays = npz_arrays()
    del arrays["p"]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=r"holds no array p, one of t, x, y and p: it holds 't', 'x', 'y'\.$"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("keep", [0, 10, 300, -1])
def test_truncated_npz(keep, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **npz_arrays())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"truncated or corrupt .*; delete it, and it is read from extract or download"):
        read_npz(path)


def test_npy_named_npz(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(DataError, match=r"is no npz file: it begins with b'\\x93NUM' instead of b'PK\\x03\\x04'\.$"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("size", [1, 3])
def test_npz_of_a_few_bytes(size, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(b"PK\x03\x04"[:size])
    with pytest.raises(DataError, match=rf"truncated or corrupt \(it has {size} bytes\); delete it, and"):
        read_npz(path)


@pytest.mark.parametrize("content", [b"Python", b"PK\0\0" + bytes(100)])
def test_what_only_begins_as_an_npz(content, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz is no npz file: it begins with b'P"):
        read_npz(path)


def write_npz(path, header):
    """An npz file in which the header of t is this text."""
    np.savez(path, **{name: array for name, array in npz_arrays().items() if name != "t"})
    with zipfile.ZipFile(path, "a") as content:
        content.writestr("t.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())


@pytest.mark.parametrize("header", ["{'descr': '<i8', 'shape': (", "{'descr': '<i8' 3}", "{'descr': 1\n'", "(" * 9000])
def test_npz_with_a_header_that_is_no_python(header, tmp_path):
    path = tmp_path / "a.npz"
    write_npz(path, header)
    with pytest.raises(DataError, match=r"a\.npz is truncated or corrupt \(\w+\); delete it, and") as caught:
        read_npz(path)
    assert "\n" not in caught.value.sentence


def test_npz_that_needs_more_memory_than_there_is(tmp_path):
    path = tmp_path / "a.npz"
    write_npz(path, "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,)}")
    with pytest.raises(DataError) as caught:
        read_npz(path)
    assert caught.value.sentence == f"{path} cannot be read: not enough memory."


def test_npz_with_times_beyond_int64(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **npz_arrays(t=np.array([0, 1, 2**63 + 5], np.uint64)))
    with pytest.raises(DataError, match="has an event with t = 9223372036854775813, outside 0 to 4294967295"):
        read_npz(path)


def test_names_of_arrays_are_escaped(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **{"a\nb": np.arange(3)})
    with pytest.raises(DataError) as caught:
        read_npz(path)
    assert caught.value.sentence == f"{path} holds no array t, one of t, x, y and p: it holds 'a\\nb'."


@pytest.mark.parametrize("size", [5, 12, 4000])
def test_a_recording_of_zeros(size, tmp_path):
    """A file whose content a loss of power took."""
    path = tmp_path / "a.aedat"
    path.write_bytes(bytes(size))
    with pytest.raises(DataError) as caught:
        read_aedat(path)
    assert caught.value.sentence == (
        f"{path} is no AEDAT 2.0 file: it begins with zeros, as a loss of power leaves them; unpack it again if you "
        "have its archive."
    )
