"""Thumbnails: a PNG that others can read, of the middle frame, light where the image is light."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.pixels import pixel_array

from relay_agent.dataset import EXPLICIT, PIXELS, Dataset
from relay_agent.image import EXPLICIT_LITTLE, Unreadable
from relay_agent.instance import File
from relay_agent.thumbnail import thumbnail


def read(name: str) -> bytes:
    return Path(get_testdata_file(name, download=False)).read_bytes()


def picture(png: bytes) -> np.ndarray:
    """A reader of PNG that knows what our writer writes and checks every chunk."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, position = {}, 8
    while position < len(png):
        length, kind = struct.unpack_from(">I4s", png, position)
        body = png[position + 8:position + 8 + length]
        assert struct.unpack_from(">I", png, position + 8 + length)[0] == zlib.crc32(kind + body)
        chunks[kind], position = body, position + 12 + length
    columns, rows, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert depth == 8 and rest == [0, 0, 0] and list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), "u1").reshape(rows, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(rows, columns, {0: 1, 2: 3}[colour])


def image(values: np.ndarray, photometric="MONOCHROME2", count=1, **decimals: str) -> File:
    data = Dataset(EXPLICIT)
    rows, columns, samples = values.shape[-3:]
    bits = values.dtype.itemsize * 8
    for tag, number in ((0x00280002, samples), (0x00280010, rows), (0x00280011, columns), (0x00280100, bits),
                        (0x00280101, bits), (0x00280103, int(values.dtype.kind == "i"))):
        data.put_numbers(tag, "US", number)
    data.put_text(0x00280004, photometric)
    data.put_text(0x00280008, str(count))
    for tag, value in decimals.items():
        data.put_text(int(tag[1:], 16), value)
    data.put(PIXELS, "OW", values.tobytes())
    return File(EXPLICIT_LITTLE, data)


@pytest.mark.parametrize(("name", "shape"), [
    ("CT_small.dcm", (128, 128, 1)), ("MR_small_RLE.dcm", (64, 64, 1)), ("MR_small_bigendian.dcm", (64, 64, 1)),
    ("RG3_J2KI.dcm", (252, 252, 1)), ("JPEG-LL.dcm", (256, 64, 1)), ("liver.dcm", (256, 256, 1)),
    ("SC_rgb_jpeg_dcmtk.dcm", (100, 100, 3)), ("SC_ybr_full_422_uncompressed.dcm", (100, 100, 3)),
    ("emri_small_jpeg_ls_lossless.dcm", (64, 64, 1)), ("color-pl.dcm", (120, 256, 3)),
    ("examples_ybr_color.dcm", (192, 256, 3)), ("US1_J2KR.dcm", (192, 256, 3)), ("examples_palette.dcm", (110, 250, 3)),
    ("SC_rgb_32bit_2frame.dcm", (100, 100, 3)), ("gdcm-US-ALOKA-16.dcm", (192, 256, 1))])
def test_all_forms(name, shape):
    made = picture(thumbnail(File.parse(read(name))))
    assert made.ndim == 3 and max(made.shape) <= 257 and made.shape[2] == shape[2]
    assert abs(made.shape[0] / made.shape[1] - shape[0] / shape[1]) < 0.05
    assert made.std() > 10  # something is seen


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["SC_rgb_jpeg_dcmtk.dcm", "SC_rgb_rle_2frame.dcm", "SC_ybr_full_422_uncompressed.dcm"])
def test_colours_are_those_of_pydicom(name):
    data = pydicom.dcmread(io.BytesIO(read(name)))
    frames = pixel_array(data).reshape(-1, data.Rows, data.Columns, 3)
    made = picture(thumbnail(File.parse(read(name)))).astype(int)
    assert np.abs(made - frames[len(frames) // 2]).max() <= 1


def test_middle_frame():
    values = np.zeros((5, 8, 8, 1), "u1")
    values[2, :, 4:] = 200
    made = picture(thumbnail(image(values, count=5)))
    assert made[0, 0, 0] == 0 and made[0, 7, 0] == 255
    assert not picture(thumbnail(image(values[3:], count=2))).any()


def test_window_slope_and_inversion():
    values = np.arange(-128, 128, dtype="i2").reshape(16, 16, 1)
    window = {"_00281050": "100\\5", "_00281051": "200\\9", "_00281052": "-50", "_00281053": "2"}
    made = picture(thumbnail(image(values, **window)))[..., 0].astype(float)
    expected = np.clip((values[..., 0] * 2.0 - 50) / 200 * 255, 0, 255)
    assert np.abs(made - expected).max() <= 1
    inverted = picture(thumbnail(image(values, "MONOCHROME1", **window)))[..., 0]
    assert np.abs(255 - inverted - expected).max() <= 1


def test_windows_that_show_nothing_are_not_used():
    values = np.arange(256, dtype="u2").reshape(16, 16, 1)
    for window in ({"_00281050": "9000", "_00281051": "10"}, {"_00281050": "1e999", "_00281051": "x"},
                   {"_00281050": "100", "_00281051": "0"}):
        made = picture(thumbnail(image(values, **window)))
        assert made.min() == 0 and made.max() == 255
    spike = values.copy()
    spike[3, 3] = 65535
    assert picture(thumbnail(image(spike))).mean() > 100  # one bright pixel does not darken the rest


def test_flat_images_and_thin_lines():
    assert not picture(thumbnail(image(np.full((4, 4, 1), 7, "u1")))).any()
    line = np.zeros((1000, 1000, 3), "u1")
    line[501] = 255
    made = picture(thumbnail(image(line, "RGB"), 100))
    assert made.shape == (100, 100, 3) and made[50].min() > 20 and not made[51].any()


def test_words_when_it_cannot_be():
    with pytest.raises(ValueError, match="no Pixel Data"):
        thumbnail(File(EXPLICIT_LITTLE, Dataset(EXPLICIT)))
    with pytest.raises(Unreadable, match="Photometric"):
        thumbnail(image(np.zeros((2, 2, 4), "u1"), "CMYK"))
    with pytest.raises(Unreadable, match="cannot be decoded"):
        thumbnail(File.parse(read("JPGExtended.dcm")))
    file = File.parse(read("SC_rgb_rle.dcm"))
    file.dataset.put_text(0x00280008, "9", "IS")
    with pytest.raises(Unreadable):
        thumbnail(file)


@pytest.mark.slow
@settings(max_examples=100)
@given(name=st.sampled_from(["examples_palette.dcm", "MR_small_RLE.dcm", "CT_small.dcm"]),
       numbers=st.dictionaries(st.sampled_from([0x00280002, 0x00280010, 0x00280100, 0x00280101, 0x00280103]),
                               st.integers(0, 40), max_size=2),
       descriptor=st.lists(st.integers(0, 65535), max_size=4),
       decimals=st.lists(st.sampled_from(["", "nan", "1e308", "-5", "0", "\\", "abc"]), min_size=4, max_size=4))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_but_unreadable_comes_out(name, numbers, descriptor, decimals):
    file = File.parse(read(name))
    for tag, number in numbers.items():
        file.dataset.put_numbers(tag, "US", number)
    if descriptor:
        file.dataset.put_numbers(0x00281102, "US", *descriptor)
    for tag, text in zip((0x00281050, 0x00281051, 0x00281052, 0x00281053), decimals, strict=True):
        file.dataset.put_text(tag, text, "DS")
    try:
        picture(thumbnail(file, 64))
    except Unreadable as error:
        assert str(error)
