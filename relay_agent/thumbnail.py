"""A small picture of an image for the person who reviews a session.

It shows what the pixels show, text that is burned in too: it is for the patient-full view only. Run in a child
process, as :mod:`relay_agent.image` says.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

from relay_agent.charset import Undecodable
from relay_agent.dataset import Dataset
from relay_agent.image import Image, Unreadable
from relay_agent.instance import File

_Array = np.ndarray[Any, Any]


def thumbnail(file: File, size: int = 256) -> bytes:
    """A PNG of the middle frame, its longer side ``size`` pixels or what the image has, whichever is less.

    Grey values go through the first VOI window of the object (PS3.3 section C.11.2), else from the 1st to the 99th
    percentile; MONOCHROME1 is inverted; the numbers of a palette that cannot be read are shown as greys. Raises
    :class:`relay_agent.image.Unreadable`, a ``ValueError``.
    """
    image = Image(file)
    frame, photometric = next(image.decoded(image.frames // 2))
    step = max(1.0, max(image.rows, image.columns) / size)
    palette = _palette(file.dataset, image.signed) if photometric == "PALETTE COLOR" else None
    if palette is not None:
        first, colours = palette
        frame = _shrunk(colours[np.clip(frame[..., 0].astype("i8") - first, 0, len(colours) - 1)], step)
    elif image.samples == 1:
        frame = _grey(file.dataset, _shrunk(frame, step), photometric == "MONOCHROME1")
    elif image.samples == 3 and photometric in ("RGB", "YBR_FULL"):
        frame = _shrunk(frame, step) * (255 / ((1 << image.stored) - 1))
        frame = _rgb(frame) if photometric == "YBR_FULL" else frame
    else:
        raise Unreadable("a thumbnail cannot be made of this Photometric Interpretation (0028,0004)")
    return _png(np.rint(np.clip(frame, 0, 255)).astype("u1"))


def _shrunk(frame: _Array, step: float) -> _Array:
    """The means of blocks of ``step`` rows and columns: a line one pixel wide stays visible."""
    rows, columns = (np.arange(0, count, step).astype(int) for count in frame.shape[:2])
    sums: _Array = np.add.reduceat(np.add.reduceat(frame, rows, 0, "f8"), columns, 1)
    heights, widths = np.diff(rows, append=frame.shape[0]), np.diff(columns, append=frame.shape[1])
    sums /= (heights[:, None] * widths)[..., None]
    return sums


def _grey(data: Dataset, values: _Array, inverted: bool) -> _Array:
    """0 to 255 for stored values."""
    slope, intercept = _decimal(data, 0x00281053) or 1.0, _decimal(data, 0x00281052) or 0.0
    centre, width = _decimal(data, 0x00281050), _decimal(data, 0x00281051)
    values = values * slope + intercept
    if centre is not None and width is not None and width >= 1:
        low, high = centre - width / 2, centre + width / 2
        if high <= np.min(values) or low >= np.max(values):
            low = high  # nothing would be seen through this window
    else:
        low = high = 0.0
    if low >= high:
        low, high = (float(value) for value in np.percentile(values, (1, 99)))
    if low >= high:
        low, high = float(np.min(values)), float(np.max(values))
    grey = np.clip((values - low) * (255 / (high - low)) if high > low else values * 0, 0, 255)
    return 255 - grey if inverted else grey


def _rgb(frame: _Array) -> _Array:
    """RGB of YBR_FULL (PS3.3 section C.7.6.3.1.2)."""
    luminance, blue, red = frame[..., 0], frame[..., 1] - 128, frame[..., 2] - 128
    return np.stack([luminance + 1.402 * red, luminance - 0.344136 * blue - 0.714136 * red, luminance + 1.772 * blue],
                    axis=-1)


def _palette(data: Dataset, signed: bool) -> tuple[int, _Array] | None:
    """The first stored value of a palette and its colours; None for one in segments (PS3.3 section C.7.9.2)."""
    channels = []
    first = 0
    for number in range(3):
        descriptor = data.numbers(0x00281101 + number)
        element = data.get(0x00281201 + number)
        if len(descriptor) != 3 or element is None:
            return None
        count, first = int(descriptor[0]) % 65536 or 65536, int(descriptor[1])
        wide = element.size >= 2 * count  # 8 bits are written as bytes or as words (PS3.3 section C.7.6.3.1.5)
        table = np.frombuffer(element.value, f"{'<' if data.encoding.little else '>'}u2" if wide else "u1")
        if len(table) < count:
            return None
        channels.append((table >> 8 if wide and descriptor[2] == 16 else table)[:count].astype("u1"))
    if len({len(channel) for channel in channels}) != 1:
        return None
    return first - 0x10000 if signed and first > 0x7FFF else first, np.stack(channels, axis=-1)


def _decimal(data: Dataset, tag: int) -> float | None:
    """The first value of a DS, None when there is none that is a number."""
    try:
        number = float((data.values(tag) or [""])[0])
    except (ValueError, Undecodable):
        return None
    return number if np.isfinite(number) else None


def _png(pixels: _Array) -> bytes:
    """A PNG (ISO 15948) of rows, columns and one or three samples of 8 bits."""
    rows, columns, samples = pixels.shape
    lines = np.concatenate([np.zeros((rows, 1), "u1"), pixels.reshape(rows, columns * samples)], axis=1)  # filter: none
    head = struct.pack(">IIBBBBB", columns, rows, 8, 0 if samples == 1 else 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")))
