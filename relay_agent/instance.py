"""An instance as a file (PS3.10): read, changed through its data set, written with new File Meta and digests."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from relay_agent.charset import Undecodable
from relay_agent.dataset import EXPLICIT, Broken, Buffer, Dataset, element_head, encoding_of, scan
from relay_agent.dicom import IMPLEMENTATION_NAME, IMPLEMENTATION_UID

_MAPPED = 32 * 2**20  # larger files are not read into memory
_INFLATED = 2**30
_DEFLATED = "1.2.840.10008.1.2.1.99"


def read(path: Path) -> Buffer:
    """The bytes of a file; a large one is mapped, so that its pixel data need no memory. Raises ``OSError``."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size <= _MAPPED:
            return file.read()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


@dataclass(frozen=True, slots=True)
class Written:
    """What :meth:`File.write` wrote: digests of the whole file and its bytes."""

    md5: bytes
    sha256: bytes
    size: int


class File:
    """A DICOM file (PS3.10): transfer syntax, File Meta as it was read, and the data set.

    File Meta is written anew from the data set: preamble, application entity titles and private information of the
    file that was read may identify (PS3.15 annex E), and nobody needs them.
    """

    def __init__(self, transfer_syntax: str, dataset: Dataset, meta: Dataset | None = None, offset: int = 0) -> None:
        self.transfer_syntax = transfer_syntax
        self.dataset = dataset
        self.meta = meta if meta is not None else Dataset()
        self.offset = offset  # of the data set in the file
        self.painted = False  # whether a script has painted over pixels

    @classmethod
    def read(cls, path: Path, stop: int | None = None) -> File:
        """A file of any size, as :meth:`parse`. Raises :class:`Broken`, ``OSError``."""
        return cls.parse(read(path), stop)

    @classmethod
    def parse(cls, buffer: Buffer, stop: int | None = None) -> File:
        """A file from its bytes; elements from the tag ``stop`` on are not read. Raises :class:`Broken`."""
        if bytes(buffer[128:132]) != b"DICM":
            raise Broken("there is no DICOM preamble (PS3.10 section 7.1)")
        meta = Dataset(EXPLICIT, buffer=buffer)
        position = scan(meta, 132, len(buffer), 0, 0x00030000)
        transfer_syntax = (meta.text(0x00020010) or "").strip()
        if not transfer_syntax:
            raise Broken("File Meta has no Transfer Syntax UID")
        offset = position
        if transfer_syntax == _DEFLATED:
            try:
                inflate = zlib.decompressobj(-15)
                buffer = inflate.decompress(buffer[position:], _INFLATED)
            except zlib.error:
                raise Broken("the deflated data set cannot be inflated") from None
            if len(buffer) == _INFLATED:
                raise Broken("the deflated data set is larger than 1 GiB")
            if not inflate.eof:
                raise Broken("the deflated data set ends too early")
            position = 0
        data = Dataset(encoding_of(transfer_syntax), buffer=buffer)
        scan(data, position, len(buffer), 0, stop)
        return cls(transfer_syntax, data, meta, offset)

    def encode(self) -> list[Buffer]:
        """The whole file in pieces. Raises :class:`Broken`."""
        pieces = self.dataset.encode(encoding_of(self.transfer_syntax))
        if self.transfer_syntax == _DEFLATED:
            deflate = zlib.compressobj(wbits=-15)
            packed = b"".join(deflate.compress(piece) for piece in pieces) + deflate.flush()
            pieces = [packed + b"\0" * (len(packed) % 2)]  # PS3.5 section A.5
        meta = Dataset()
        meta.put(0x00020001, "OB", b"\0\1")
        try:
            for number, value in ((2, self.dataset.text(0x00080016)), (3, self.dataset.text(0x00080018)),
                                  (0x10, self.transfer_syntax), (0x12, IMPLEMENTATION_UID)):
                meta.put_text(0x00020000 | number, value or "", "UI")
        except Undecodable:
            raise Broken("SOP Class UID or SOP Instance UID is no UID") from None
        meta.put_text(0x00020013, IMPLEMENTATION_NAME, "SH")
        head = b"".join(meta.encode(EXPLICIT))
        length = element_head(0x00020000, "UL", 4, EXPLICIT) + struct.pack("<I", len(head))
        return [bytes(128) + b"DICM" + length + head, *pieces]

    def write(self, path: Path) -> Written:
        """Write the file, which must not exist yet, and take its digests on the way. Does not sync."""
        md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
        with path.open("xb", buffering=0) as file:
            for piece in _joined(self.encode()):
                md5.update(piece)
                sha256.update(piece)
                size += len(piece)
                view = memoryview(piece)
                while view:
                    view = view[file.write(view):]
        return Written(md5.digest(), sha256.digest(), size)


def _joined(pieces: list[Buffer], small: int = 2**16) -> Iterator[Buffer]:
    """Small pieces in one, large ones as they are: few system calls without copies of pixel data."""
    held: list[Buffer] = []
    for piece in pieces:
        if len(piece) < small:
            held.append(piece)
            continue
        if held:
            yield b"".join(held)
            held = []
        yield piece
    if held:
        yield b"".join(held)
