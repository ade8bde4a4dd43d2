"""Pixels of every kind become RGB of 8 bits, or are refused in a sentence."""

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from seal_fast.train.data import DataError
from seal_fast.train.data.images import read_image

ALL_LEVELS = np.arange(65536).reshape(256, 256)
EXACT = np.rint(ALL_LEVELS / 65535 * 255).astype(np.uint8)  # no level lies in the middle between two


def write_pgm(path, levels, white):
    height, width = levels.shape
    path.write_bytes(f"P5 {width} {height} {white}\n".encode() + levels.astype(">u2").tobytes())


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_grey_levels_of_16_bits_are_scaled(name, tmp_path):
    path = tmp_path / name
    if name == "a.pgm":
        write_pgm(path, ALL_LEVELS, 65535)
    else:
        Image.fromarray(ALL_LEVELS.astype(np.uint16)).save(path)
    pixels = np.asarray(read_image(str(path)))
    assert np.array_equal(pixels, np.repeat(EXACT[..., None], 3, axis=2))
    assert (pixels[0, 0, 0], pixels[-1, -1, 0]) == (0, 255)


def test_the_order_of_bytes_does_not_matter(tmp_path):
    image = Image.frombytes("I;16B", (256, 256), ALL_LEVELS.astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "a.tif")))[..., 0], EXACT)


def test_older_pillow_opens_grey_png_of_16_bits_as_32(tmp_path, monkeypatch):
    """As Pillow up to 11 did."""
    mode = next(key for key in PngImagePlugin._MODES if key == (16, 0))
    monkeypatch.setitem(PngImagePlugin._MODES, mode, ("I", "I;16B"))
    Image.fromarray(ALL_LEVELS.astype(np.uint16)).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "I"
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "a.png")))[..., 0], EXACT)


def test_a_grey_image_of_ten_bits(tmp_path):
    """Pillow scales it to 16 bits."""
    write_pgm(tmp_path / "a.pgm", np.array([[0, 511, 1023]]), 1023)
    assert np.asarray(read_image(str(tmp_path / "a.pgm")))[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_numbers_of_unknown_range_are_refused(dtype, mode, tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 70000]], dtype)).save(path)
    with pytest.raises(DataError) as caught:
        read_image(str(path))
    assert caught.value.sentence == (
        f"{path} holds pixels of Pillow's mode {mode}, and TIFF does not say which of their numbers are black and "
        "white; save it with 8 or 16 bits for each pixel."
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    """In each format, and with each kind of transparency, in which Pillow writes it."""
    written = 0
    for name in ("a.png", "a.tif", "a.webp", "a.jpg"):
        for transparency in ({}, {"transparency": 0}, {"transparency": b"\0\1"}, {"transparency": (1, 2, 3)}):
            path = tmp_path / name
            try:
                Image.new(mode, (4, 3)).save(path, **transparency)
            except (OSError, ValueError):
                continue
            written += 1
            image = read_image(str(path))
            assert (image.mode, image.size) == ("RGB", (4, 3))
    assert written or mode == "PA"


def test_white_with_alpha_is_white(tmp_path):
    Image.new("LA", (4, 3), (255, 7)).save(tmp_path / "a.png")
    assert (np.asarray(read_image(str(tmp_path / "a.png"))) == 255).all()


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_a_corrupt_avif(tmp_path):
    """Its reader raises what the others do not."""
    path = tmp_path / "a.jpeg"
    levels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(levels).save(path, "AVIF")
    head, pixels = path.read_bytes().split(b"mdat")
    path.write_bytes(head + b"mdat" + bytes(len(pixels)))
    with pytest.raises(DataError, match=r"a\.jpeg cannot be read as an image \("):
        read_image(str(path))


def test_what_a_reader_of_pillow_does_not_implement(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 3)).save(path, "DDS")
    content = bytearray(path.read_bytes())
    content[80:84] = bytes(4)  # the flags of its pixel format
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(str(path))
