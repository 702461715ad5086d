"""What the agent knows of DICOM files: File Meta, digests, the tags it looks at (PS3.5, PS3.10)."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset
from pydicom.uid import ExplicitVRLittleEndian

from relay_agent import __version__

IMPLEMENTATION_UID = "2.25.93164011528471402934751284419376204181"
IMPLEMENTATION_NAME = f"RELAY_{__version__}"[:16]
DICOMDIR = "1.2.840.10008.1.3.10"  # Media Storage Directory Storage


class NotDICOM(ValueError):
    """The file is no DICOM instance; the message says why, without any value of it."""


def _element(number: int, vr: bytes, value: bytes) -> bytes:
    if len(value) % 2:
        value += b"\0" if vr in (b"UI", b"OB") else b" "
    if vr == b"OB":
        return struct.pack("<HH2sHI", 2, number, vr, 0, len(value)) + value
    return struct.pack("<HH2sH", 2, number, vr, len(value)) + value


def file_header(sop_class: str, sop_instance: str, transfer_syntax: str, calling_ae: str, called_ae: str) -> bytes:
    """Preamble, ``DICM`` and File Meta Information of a received instance (PS3.10 section 7.1)."""
    before, after = _around_instance(sop_class, transfer_syntax, calling_ae, called_ae)
    instance = _element(0x0003, b"UI", sop_instance.encode())
    length = struct.pack("<I", len(before) + len(instance) + len(after))
    return b"".join((bytes(128), b"DICM", _element(0x0000, b"UL", length), before, instance, after))


@lru_cache(maxsize=256)
def _around_instance(sop_class: str, transfer_syntax: str, calling_ae: str, called_ae: str) -> tuple[bytes, bytes]:
    """The elements before and after the SOP Instance UID, which are the same for a whole series."""
    return b"".join((
        _element(0x0001, b"OB", b"\0\1"),
        _element(0x0002, b"UI", sop_class.encode()),
    )), b"".join((
        _element(0x0010, b"UI", transfer_syntax.encode()),
        _element(0x0012, b"UI", IMPLEMENTATION_UID.encode()),
        _element(0x0013, b"SH", IMPLEMENTATION_NAME.encode()),
        _element(0x0016, b"AE", calling_ae.encode()),
        _element(0x0017, b"AE", calling_ae.encode()),
        _element(0x0018, b"AE", called_ae.encode()),
    ))


@dataclass(frozen=True, slots=True)
class Meta:
    """File Meta of a file, and where its data set begins (byte offset)."""

    sop_class: str
    sop_instance: str
    transfer_syntax: str
    calling_ae: str
    offset: int


def read_meta(path: Path) -> Meta:
    """The File Meta Information; :class:`NotDICOM` when there is none that can be used."""
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            raise NotDICOM("there is no DICOM preamble (PS3.10 section 7.1)")
        try:
            meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
            return Meta(str(meta.get("MediaStorageSOPClassUID", "")), str(meta.get("MediaStorageSOPInstanceUID", "")),
                        str(meta.TransferSyntaxUID), str(meta.get("SourceApplicationEntityTitle", "") or ""),
                        file.tell())
        except Exception as error:  # whatever a broken file makes the parser do, it must not stop the others
            raise NotDICOM(f"the File Meta Information cannot be used ({type(error).__name__})") from None


def data_set_digest(path: Path, offset: int) -> bytes:
    """SHA-256 of the data set as encoded in the file."""
    with path.open("rb") as file:
        file.seek(offset)
        return hashlib.file_digest(file, "sha256").digest()


UID = re.compile(r"[0-9A-Za-z.]{1,64}")  # as lenient as receiving
STUDY, SERIES, SOP, SOP_CLASS = "0020000D", "0020000E", "00080018", "00080016"
MODALITY, SERIES_NUMBER, INSTANCE_NUMBER, SCANNER_SERIAL = "00080060", "00200011", "00200013", "00181000"
HEADER = (STUDY, SERIES, SOP, SOP_CLASS, MODALITY, SERIES_NUMBER, INSTANCE_NUMBER, SCANNER_SERIAL)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        return "\\".join(str(part) for part in value)
    return str(value)


def content_digest(data: Dataset) -> bytes:
    """SHA-256 of what a server's header script leaves alone: the pixels, or else sequences and bulk values.

    Server-side anonymisation changes header text, so an MD5 of the file cannot prove arrival. For an object with
    pixel data this covers the encoded pixel data alone; for one without (a report, raw data, a document) every
    leaf value inside sequences and every bulk value, which is where such objects keep their content.
    """
    digest = hashlib.sha256()
    pixels = [data[tag] for tag in (0x7FE00010, 0x7FE00008, 0x7FE00009) if tag in data]
    if pixels:
        for element in pixels:
            digest.update(element.value or b"")
        return digest.digest()
    for leaf in _content(data, inside=False):
        digest.update(len(leaf).to_bytes(8, "big") + leaf)
    return digest.digest()


_BULK = frozenset({"OB", "OW", "OF", "OD", "OL", "OV", "UN", "UT"})


def _content(data: Dataset, inside: bool) -> Iterator[bytes]:
    for element in data:
        if element.VR == "SQ":
            for item in element.value:
                yield from _content(item, inside=True)
        elif element.VR in _BULK or inside:
            value = element.value
            yield value if isinstance(value, bytes) else _text(value).encode()


def decode(data: bytes, transfer_syntax: str) -> Dataset:
    """A data set from the wire."""
    head = file_header("", "", transfer_syntax, "", "")
    return dcmread(BytesIO(head + data))


def encode(data: Dataset, transfer_syntax: str) -> bytes:
    """A data set for the wire, in one of the two uncompressed little endian syntaxes."""
    buffer = DicomBytesIO()
    buffer.is_little_endian = True
    buffer.is_implicit_VR = transfer_syntax != ExplicitVRLittleEndian
    write_dataset(buffer, data)
    encoded: bytes = buffer.getvalue()
    return encoded
