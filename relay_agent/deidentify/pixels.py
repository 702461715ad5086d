"""Rectangles painted into the pixels of an image, in every frame.

Run in a child process, as :mod:`relay_agent.image` says. An image of more than 32 MiB is painted in a file without a
name in the folder for temporary files (``TMPDIR``): that costs its size on the disk for a while and hardly any memory.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence

import numpy as np

from relay_agent.dataset import PIXELS, Buffer
from relay_agent.deidentify.script import Failed
from relay_agent.image import EXPLICIT_LITTLE, Image, Unreadable
from relay_agent.instance import File

Rectangle = tuple[int, int, int, int]
Area = tuple[slice, slice]

_IN_MEMORY = 32 * 2**20
_LOSSY = frozenset({"1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81"})


def paint(file: File, rectangles: Sequence[Rectangle], value: int = 0) -> None:
    """Paint rectangles (left, top, right, bottom; columns and rows from 0, right and bottom exclusive) in all frames.

    They are clipped to the image. ``value`` goes into every sample; in YBR the colour is neutral, so that 0 is black
    there too. Uncompressed pixels stay in their transfer syntax and layout. Compressed ones and YBR_FULL_422 are
    decoded and go on in Explicit VR Little Endian, not compressed, with the elements of group 0028 made to match;
    outside of the rectangles they are exactly what was decoded. Icon Image Sequence (0088,0200), a small picture of
    what was painted over, is removed. Nothing is touched without Pixel Data or when no rectangle meets the image.

    Raises :class:`Failed` for what cannot be painted: no decoder, pixels of type float, a header that does not fit the
    pixel data, a value that does not fit the samples.
    """
    data = file.dataset
    if not any(tag in data for tag in (PIXELS, 0x7FE00008, 0x7FE00009)):
        return
    try:
        image = Image(file)
        areas = [area for area in (_clipped(rectangle, image) for rectangle in rectangles) if area is not None]
        if not areas:
            return
        if image.native and not image.subsampled:
            data.put(PIXELS, image.vr, _painted(image, areas, value))
        else:
            _decode(file, image, areas, value)
    except Unreadable as error:
        raise Failed(str(error)) from None
    except OSError as error:
        raise Failed(f"no room for the decoded pixels: {os.strerror(error.errno or 0)}") from None
    data.remove(0x00880200)
    file.painted = True


def _clipped(rectangle: Rectangle, image: Image) -> Area | None:
    """Rows and columns, or None when nothing is left."""
    left, top, right, bottom = rectangle
    if left > right or top > bottom:
        raise Failed("a rectangle ends before it begins")
    left, top, right, bottom = max(0, left), max(0, top), min(image.columns, right), min(image.rows, bottom)
    return (slice(top, bottom), slice(left, right)) if left < right and top < bottom else None


def _fill(image: Image, photometric: str, value: int) -> tuple[int, ...]:
    """What goes into the samples of a painted pixel."""
    info = np.iinfo(image.dtype)
    if not info.min <= value <= (1 if image.bits == 1 else info.max):
        raise Failed("the value to paint does not fit Bits Allocated (0028,0100)")
    if photometric.startswith("YBR") and image.samples == 3:
        neutral = 1 << (image.stored - 1)
        return value, neutral, neutral
    return (value,) * image.samples


def _room(size: int) -> bytearray | mmap.mmap:
    """Zeros to write to, of even length."""
    size += size % 2
    if size <= _IN_MEMORY:
        return bytearray(size)
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and a signal later
        return mmap.mmap(file.fileno(), size)


def _painted(image: Image, areas: list[Area], value: int) -> Buffer:
    """A painted copy of native pixels; padding is zeros."""
    fill = _fill(image, image.photometric, value)
    out = _room(image.size)
    memoryview(out)[:image.size] = image.value[:image.size]
    words = np.frombuffer(out, "u2") if image.pairs_swapped else np.empty(0, "u2")
    words.byteswap(inplace=True)
    if image.bits == 1:
        octets = np.frombuffer(out, "u1")
        for index in range(image.frames):
            where, offset, count = image.bit_span(index)
            bits = np.unpackbits(octets[where], bitorder="little")
            frame = bits[offset:offset + count].reshape(image.rows, image.columns, image.samples)
            for area in areas:
                frame[area] = fill
            octets[where] = np.packbits(bits, bitorder="little")
    else:
        frames = image.array(out)
        for rows, columns in areas:
            frames[:, rows, columns] = fill
    words.byteswap(inplace=True)
    return out


def _decode(file: File, image: Image, areas: list[Area], value: int) -> None:
    """Replace the pixels by decoded and painted ones."""
    data = file.dataset
    out = _room(image.size)
    stored = np.frombuffer(out, image.dtype.newbyteorder("<"), image.size // image.dtype.itemsize)
    target = stored.reshape(image.frames, image.rows, image.columns, image.samples)
    photometric, low, high = "", 0, 0
    for index, (frame, colour) in enumerate(image.decoded()):
        if index == image.frames or colour != (photometric or colour):
            raise Unreadable("the frames are more than Number of Frames (0028,0008) says, or of different colour")
        photometric = colour
        low, high = min(low, int(frame.min())), max(high, int(frame.max()))
        target[index] = frame
        for area in areas:
            target[index][area] = _fill(image, photometric, value)
    if low < -(1 << (image.stored - 1)) or high >= 1 << (image.stored - image.signed):
        data.put_numbers(0x00280101, "US", image.bits)  # the codestream has more bits than the header said
        data.put_numbers(0x00280102, "US", image.bits - 1)
    data.put_text(0x00280004, photometric, "CS")
    if image.samples > 1:
        data.put_numbers(0x00280006, "US", 0)
    if file.transfer_syntax in _LOSSY and 0x00282110 not in data:
        data.put_text(0x00282110, "01", "CS")  # nothing else says it from here on (PS3.3 section C.7.6.1.1.5)
    for tag in (0x7FE00001, 0x7FE00002):
        data.remove(tag)
    data.put(PIXELS, "OB" if image.bits <= 8 else "OW", out)
    file.transfer_syntax = EXPLICIT_LITTLE
