"""The frames of an image as arrays (PS3.3 section C.7.6.3, PS3.5 section 8 and annex A), whatever the transfer syntax.

Compressed frames are decoded by pydicom with one fixed decoder for each syntax, so that the same object gives the same
pixels everywhere. All of them but RLE are native code that reads what others have sent, and GDCM ends its process on
some damaged JPEG: call this in a child process whose memory is limited (``RLIMIT_DATA``, which leaves mapped files
alone) and whose death means that the object cannot be decoded.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder

from relay_agent.charset import Undecodable
from relay_agent.dataset import BIG, PIXELS, Dataset, encoding_of
from relay_agent.instance import File

EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_NATIVE = frozenset({"1.2.840.10008.1.2", EXPLICIT_LITTLE, "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"})
_RLE = "1.2.840.10008.1.2.5"
_JPEG = {f"1.2.840.10008.1.2.4.{number}": "gdcm" for number in (50, 51, 57, 70, 80, 81)}  # JPEG and JPEG-LS
_JPEG_2000 = {f"1.2.840.10008.1.2.4.{number}": "pylibjpeg" for number in (90, 91, 201, 202, 203)}  # and HTJ2K
_DECODERS = {_RLE: "pydicom", **_JPEG, **_JPEG_2000}
_LARGEST_FRAME = 2**29  # bytes of a decoded frame: four times the largest radiograph
_LARGEST = 2**32 - 2    # bytes of a value that is not encapsulated (PS3.5 section 7.1.1)
_LARGEST_NUMBER = 2**31 - 1


class Unreadable(ValueError):
    """The pixels cannot be read; the message says why and what to do, never a value."""


def can_decode(transfer_syntax: str) -> bool:
    """Whether pixels of this transfer syntax can be read; a form of it may still not be (JPEG with 12 bits)."""
    return transfer_syntax in _NATIVE or transfer_syntax in _DECODERS


class Image:
    """The Image Pixel module of an object that has Pixel Data, checked against it. Raises :class:`Unreadable`."""

    def __init__(self, file: File) -> None:
        data = file.dataset
        if 0x7FE00008 in data or 0x7FE00009 in data:
            raise Unreadable("pixels of type float (7fe0,0008), (7fe0,0009) are not supported: send integers")
        element = data.get(PIXELS)
        if element is None:
            raise Unreadable("there is no Pixel Data (7fe0,0010)")
        self.transfer_syntax = file.transfer_syntax
        if not can_decode(self.transfer_syntax):
            raise Unreadable("no decoder for this transfer syntax: send the object uncompressed or in a lossless one")
        self.native = self.transfer_syntax in _NATIVE
        if self.native == element.fragments:
            raise Unreadable("Pixel Data (7fe0,0010) is not encoded as the transfer syntax says")
        self.rows = _number(data, 0x00280010, "Rows")
        self.columns = _number(data, 0x00280011, "Columns")
        self.samples = _number(data, 0x00280002, "Samples per Pixel", 1)
        self.bits = _number(data, 0x00280100, "Bits Allocated")
        self.stored = _number(data, 0x00280101, "Bits Stored", self.bits)
        self.signed = bool(_number(data, 0x00280103, "Pixel Representation", 0, 0, 1))
        self.planar = self.samples > 1 and bool(_number(data, 0x00280006, "Planar Configuration", 0, 0, 1))
        self.photometric = _word(data, 0x00280004)
        frames = _word(data, 0x00280008) or "1"
        if not frames.isascii() or not frames.isdigit() or not 0 < int(frames[:12]) <= _LARGEST_NUMBER:
            raise Unreadable("Number of Frames (0028,0008) is no positive number")
        self.frames = int(frames)
        if self.bits not in (1, 8, 16, 32) or self.stored > self.bits:
            raise Unreadable("Bits Allocated (0028,0100) is none of 1, 8, 16, 32, or less than Bits Stored (0028,0101)")
        if self.samples > 1 and not self.photometric:
            raise Unreadable("Photometric Interpretation (0028,0004) is missing")
        self.vr = "OB" if element.vr == "OB" else "OW"
        self.subsampled = self.photometric == "YBR_FULL_422"  # two pixels share their colour when native
        self._data = data
        self.value = element.view
        self._swapped = encoding_of(self.transfer_syntax) == BIG
        self._check_size()

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of a sample as it is stored (native) or decoded; of one bit, as it is unpacked."""
        kind = "i" if self.signed and self.bits > 1 else "u"
        return np.dtype(f"{'>' if self.native and self._swapped else '<'}{kind}{max(1, self.bits // 8)}")

    @property
    def pairs_swapped(self) -> bool:
        """Whether bytes are stored as big endian words, each pair the other way round (PS3.5 section 8.2)."""
        return self.native and self._swapped and self.vr == "OW" and self.bits <= 8

    @property
    def size(self) -> int:
        """Bytes of all frames in native form, without padding."""
        return (self.frames * self.rows * self.columns * self.samples * self.bits + 7) // 8

    def _check_size(self) -> None:
        if self.size > _LARGEST:
            raise Unreadable("the image is larger than 4 GiB when it is not compressed")
        if not self.native:
            if self.size // self.frames > _LARGEST_FRAME:
                raise Unreadable(f"a frame is larger than {_LARGEST_FRAME >> 20} MiB when it is decoded")
            return
        expected = self.size
        if self.subsampled:
            if self.samples != 3 or self.bits != 8 or self.columns % 2 or self.planar:
                raise Unreadable("YBR_FULL_422 in a form that PS3.3 section C.7.6.3.1.2 does not know")
            expected = expected // 3 * 2
        if len(self.value) < expected:
            raise Unreadable("Pixel Data (7fe0,0010) is shorter than its rows, columns and frames")
        if len(self.value) > expected + 1 and np.frombuffer(self.value[expected:], "u1").any():
            raise Unreadable("Pixel Data (7fe0,0010) is longer than its rows, columns and frames")

    def array(self, buffer: Any) -> np.ndarray[Any, Any]:
        """A view of native frames of 8, 16 or 32 bits in a buffer: frame, row, column, sample."""
        flat = np.frombuffer(buffer, self.dtype, self.frames * self.rows * self.columns * self.samples)
        if self.planar:
            return flat.reshape(self.frames, self.samples, self.rows, self.columns).transpose(0, 2, 3, 1)
        return flat.reshape(self.frames, self.rows, self.columns, self.samples)

    def bit_span(self, index: int) -> tuple[slice, int, int]:
        """Where a frame of one bit is: its bytes, its first bit in them (from the lowest on), how many bits."""
        count = self.rows * self.columns * self.samples
        start = index * count
        return slice(start // 8, (start + count + 7) // 8), start % 8, count

    def decoded(self, first: int = 0) -> Iterator[tuple[np.ndarray[Any, Any], str]]:
        """The frames from ``first`` on: row, column, sample; and their Photometric Interpretation.

        Colour is as stored (YBR stays YBR) but not subsampled. Raises :class:`Unreadable` also when there are fewer
        or more frames than stated.
        """
        frames = self._native(first) if self.native else self._encapsulated(first)
        while True:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    frame = next(frames, None)
            except Unreadable:
                raise
            except Exception:  # whatever a decoder raises about what others have made
                raise Unreadable("the pixels cannot be decoded: send the object uncompressed, "
                                 "or in another lossless transfer syntax") from None
            if frame is None:
                return
            yield frame

    def _native(self, first: int) -> Iterator[tuple[np.ndarray[Any, Any], str]]:
        value = self.value
        if self.pairs_swapped:
            value = memoryview(np.frombuffer(value[:len(value) // 2 * 2], "<u2").byteswap().tobytes())
        if self.bits == 1:
            for index in range(first, self.frames):
                where, offset, count = self.bit_span(index)
                bits = np.unpackbits(np.frombuffer(value[where], "u1"), bitorder="little")[offset:offset + count]
                yield bits.reshape(self.rows, self.columns, self.samples), self.photometric
        elif self.subsampled:
            size = self.rows * self.columns * 2
            for index in range(first, self.frames):
                pairs = np.frombuffer(value[index * size:(index + 1) * size], "u1").reshape(-1, 4)
                frame = pairs[:, [0, 2, 3, 1, 2, 3]]  # Y Y Cb Cr
                yield frame.reshape(self.rows, self.columns, 3), "YBR_FULL"
        else:
            for frame in self.array(value)[first:]:
                yield frame, self.photometric

    def _encapsulated(self, first: int) -> Iterator[tuple[np.ndarray[Any, Any], str]]:
        decoder = get_decoder(self.transfer_syntax)
        options: dict[str, Any] = {
            "rows": self.rows, "columns": self.columns, "samples_per_pixel": self.samples, "number_of_frames": 1,
            "bits_allocated": self.bits, "bits_stored": self.stored, "pixel_representation": int(self.signed),
            "photometric_interpretation": self.photometric or "MONOCHROME2", "planar_configuration": int(self.planar),
            "pixel_keyword": "PixelData"}
        offsets, lengths = self._data.get(0x7FE00001), self._data.get(0x7FE00002)
        table = (offsets.value, lengths.value) if offsets is not None and lengths is not None else None
        count = 0
        for frame in islice(generate_frames(_Stream(self.value), number_of_frames=self.frames,
                                            extended_offsets=table), first, None):
            self._check_codestream(frame)
            padded = frame + b"\0" * (len(frame) % 2)
            alone = struct.pack("<HHIHHI", 0xFFFE, 0xE000, 0, 0xFFFE, 0xE000, len(padded)) + padded
            pixels, form = decoder.as_array(alone, raw=True, index=0, decoding_plugin=_DECODERS[self.transfer_syntax],
                                            **options)
            photometric = str(form["photometric_interpretation"])
            count += 1
            yield (pixels.reshape(self.rows, self.columns, self.samples),
                   "YBR_FULL" if photometric == "YBR_FULL_422" else photometric)
        if first + count != self.frames:
            raise Unreadable("there are not as many frames as Number of Frames (0028,0008) says")

    def _check_codestream(self, frame: bytes) -> None:
        """A decoder reserves what the codestream asks for: it must not ask for more than the header does."""
        if self.transfer_syntax == _RLE:
            return
        *stated, precision = _stated_2000(frame) if self.transfer_syntax in _JPEG_2000 else _stated_jpeg(frame)
        if stated != [self.rows, self.columns, self.samples] or precision > self.bits:
            raise Unreadable("a frame does not have the rows, columns, samples and bits that the header says")


def _stated_2000(frame: bytes) -> tuple[int, int, int, int]:
    """Rows, columns, components, bits of a JPEG 2000 codestream (ISO 15444-1 A.5.1: SIZ follows SOC at once)."""
    start = frame.find(b"\xff\x4f\xff\x51")
    right, bottom, left, top, *_, components, depth = struct.unpack_from(">8IHB", frame, start + 8)
    return bottom - top, right - left, components, (depth & 0x7F) + 1


def _stated_jpeg(frame: bytes) -> tuple[int, int, int, int]:
    """Rows, columns, components, bits of a JPEG or JPEG-LS codestream (ISO 10918-1 B.2.2, ISO 14495-1 C.2.2)."""
    position = 2
    while True:
        mark, code, length = struct.unpack_from(">BBH", frame, position)
        if mark != 0xFF:
            raise Unreadable("a frame is no JPEG codestream")
        if code == 0xFF:  # fill byte
            position += 1
        elif code == 0xF7 or (0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC)):
            precision, rows, columns, components = struct.unpack_from(">BHHB", frame, position + 4)
            return rows, columns, components, precision
        else:
            position += 2 + length


class _Stream:
    """A buffer read as a file, without a copy of the whole."""

    def __init__(self, view: memoryview) -> None:
        self._view = view
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        start = self._at
        self._at = len(self._view) if size < 0 else min(len(self._view), start + size)
        return bytes(self._view[start:self._at])

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, len(self._view))[whence])
        return self._at


def _number(data: Dataset, tag: int, name: str, missing: int | None = None, least: int = 1, most: int = 65535) -> int:
    numbers = data.numbers(tag)
    if not numbers and missing is not None and (tag not in data or not data.get(tag).size):  # type: ignore[union-attr]
        return missing
    if len(numbers) != 1 or not least <= numbers[0] <= most or numbers[0] != int(numbers[0]):
        raise Unreadable(f"{name} ({tag >> 16:04x},{tag & 0xFFFF:04x}) is missing or no valid number")
    return int(numbers[0])


def _word(data: Dataset, tag: int) -> str:
    try:
        return (data.text(tag) or "").strip(" \0")
    except Undecodable:
        return ""
