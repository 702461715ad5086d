"""The journal: small instances are made durable with one cheap sync, and become files a moment later.

A new file costs the file system a commit of its own journal for content, size and name. Overwriting blocks that
were written before costs none: one ``fdatasync`` puts an instance into a ring of such blocks, the sender is
answered, and the instance is written to its place in the spool afterwards and synced in batches. Until that is
done its record stays in the ring, and :func:`recover` brings it back after a crash (README, "Durability").

Each receiving process has one ring. A record begins on a block of its own, so that writing it cannot tear another.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import struct
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 4096
LARGEST = 2**20  # larger instances go straight into files: there the one sync is not what costs
_MAGIC = b"RELAYJ01"
_PLACE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*/\d{8}/\d{2}/[0-9a-f]{64}\.dcm")  # as the spool names files
_SETTLE_AFTER = 5.0  # seconds; by then the kernel has written most of it by itself
# magic, sequence, bytes of header, bytes of data set, SHA-256 of data set, CRC-32 of header, bytes of name
_RECORD = struct.Struct("<8sQIQ32sIH")
_CRC = struct.Struct("<I")


@dataclass
class Pending:
    """An instance that is durable in the ring and not yet for sure at its place."""

    path: str  # below the spool
    offset: int  # of the record in the ring
    length: int  # of the record, in whole blocks
    body: int  # offset of the file's bytes in the ring
    size: int  # of the file
    sequence: int
    written_at: float = field(default_factory=time.monotonic)
    settled: bool = False


class Journal:
    """A ring of ``size`` bytes. :meth:`append` from many threads; the other methods from one."""

    def __init__(self, file: Path, size: int, spool: Path) -> None:
        self._spool = spool
        self._size = size // BLOCK * BLOCK
        self._lock = threading.Lock()
        self._live: deque[Pending] = deque()
        self._head = BLOCK
        self._written: list[Pending] = []  # at their place, not yet synced there
        self._fd = _prepare(file, self._size)
        self._sequence = _last_sequence(self._fd) + 1

    def append(self, path: str, digest: bytes, parts: Sequence[bytes]) -> Pending | None:
        """Make an instance durable: its file's header and data set fragments. None when the ring has no room.

        ``OSError`` when the disk fails; then nothing was promised.
        """
        header, size = parts[0], sum(map(len, parts))
        name = path.encode()
        with self._lock:
            body = _RECORD.size + len(name) + _CRC.size
            length = (body + size + BLOCK - 1) // BLOCK * BLOCK
            offset = self._reserve(length)
            if offset is None:
                return None
            pending = Pending(path, offset, length, offset + body, size, self._sequence)
            self._sequence += 1
            self._live.append(pending)
        head = _RECORD.pack(_MAGIC, pending.sequence, len(header), size - len(header), digest, zlib.crc32(header),
                            len(name)) + name
        try:
            self._write([head + _CRC.pack(zlib.crc32(head)), *parts], offset, body + size)
            os.fdatasync(self._fd)
        except OSError:
            self._release([pending])
            raise
        return pending

    def _write(self, parts: list[bytes], offset: int, length: int) -> None:
        if len(parts) > 512:
            parts = [b"".join(parts)]
        written = os.pwritev(self._fd, parts, offset)
        if written != length:
            os.pwrite(self._fd, b"".join(parts)[written:], offset + written)

    def _reserve(self, length: int) -> int | None:
        """Where a record may go; the caller holds the lock."""
        if not self._live:
            self._head = BLOCK
        tail = self._live[0].offset if self._live else self._size
        if self._live and self._head <= tail:  # wrapped round
            room = tail - self._head
        else:
            room = self._size - self._head
            if room < length and self._live:
                self._head, room = BLOCK, tail - BLOCK
        if room < length:
            return None
        offset = self._head
        self._head += length
        return offset

    def place(self, pending: Pending) -> None:
        """Write an instance to its place in the spool, without syncing it; ``OSError`` when that is not possible."""
        data = os.pread(self._fd, pending.size, pending.body)
        with contextlib.suppress(FileExistsError):  # sent twice within the hour
            _create(f"{self._spool}/{pending.path}", data)
        self._written.append(pending)

    def settle(self, everything: bool = False) -> None:
        """Sync what was placed, when the ring is half full or it has waited long enough, and free its records."""
        if not self._written:
            return
        waiting = sum(pending.length for pending in self._written)
        waited = time.monotonic() - self._written[0].written_at
        if not everything and waiting < self._size // 2 and waited < _SETTLE_AFTER:
            return
        sync_file_system(self._spool)
        self._release(self._written)
        self._written = []

    def _release(self, done: list[Pending]) -> None:
        with self._lock:
            for pending in done:
                pending.settled = True
            while self._live and self._live[0].settled:
                self._live.popleft()
            settled = self._live[0].sequence - 1 if self._live else self._sequence - 1
        # Not synced: were it lost, recovery would find the files at their places and do nothing.
        os.pwrite(self._fd, _MAGIC + struct.pack("<Q", settled), 0)


def _prepare(file: Path, size: int) -> int:
    """Open the ring; a new one is written in full, because only written blocks are cheap to sync."""
    file.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o640)
    if os.fstat(fd).st_size != size:
        os.ftruncate(fd, 0)
        for position in range(0, size, LARGEST):
            os.pwrite(fd, bytes(min(LARGEST, size - position)), position)
        os.fsync(fd)
        sync_folder(file.parent)
    return fd


def _settled(fd: int) -> int:
    head = os.pread(fd, 16, 0)
    return int(struct.unpack("<Q", head[8:])[0]) if head[:8] == _MAGIC else 0


def _last_sequence(fd: int) -> int:
    return max([_settled(fd), *(record.sequence for record, _ in _records(fd))])


def _records(fd: int) -> Iterator[tuple[Pending, bytes]]:
    """Every whole record in the ring, with the bytes of its file; older laps included."""
    size = os.fstat(fd).st_size
    offset = BLOCK
    while offset < size:
        block = os.pread(fd, BLOCK, offset)
        step = BLOCK
        if block[:8] == _MAGIC and len(block) == BLOCK:
            _, sequence, header, data, digest, header_crc, name = _RECORD.unpack_from(block)
            body = _RECORD.size + name + _CRC.size
            if body <= BLOCK and block[body - 4:body] == _CRC.pack(zlib.crc32(block[:body - 4])):
                content = os.pread(fd, header + data, offset + body)
                if zlib.crc32(content[:header]) == header_crc and hashlib.sha256(content[header:]).digest() == digest:
                    path = block[_RECORD.size:_RECORD.size + name].decode("ascii", "replace")
                    # What looks like a record may stand in somebody's pixels: it must not name a place of its choice.
                    if not _PLACE.fullmatch(path) or digest.hex() not in path:
                        offset += step
                        continue
                    step = (body + header + data + BLOCK - 1) // BLOCK * BLOCK
                    yield Pending(path, offset, step, offset + body, len(content), sequence), content
        offset += step


def recover(folder: Path, spool: Path, ring: str = "*") -> int:
    """Bring every instance that was promised and may not be at its place there; how many were not.

    For rings whose processes are gone. ``folder`` holds the rings, ``ring`` says which. :class:`OSError` when the
    spool cannot be written, and then nothing is forgotten.
    """
    return sum(_recover(file, spool) for file in sorted(folder.glob(f"ring-{ring}")))


def _recover(file: Path, spool: Path) -> int:
    fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        settled, last, repaired = _settled(fd), 0, 0
        for record, content in _records(fd):
            last = max(last, record.sequence)
            if record.sequence <= settled:
                continue
            place = spool / record.path
            if not place.exists() or place.read_bytes() != content:
                place.unlink(missing_ok=True)
                _create(str(place), content)
                repaired += 1
        sync_file_system(spool)
        os.pwrite(fd, _MAGIC + struct.pack("<Q", max(settled, last)), 0)
        os.fdatasync(fd)
        return repaired
    finally:
        os.close(fd)


def _create(place: str, data: bytes) -> None:
    """Write a new file; ``FileExistsError`` when it is there, and nothing is left of it when it fails."""
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
    try:
        fd = os.open(place, flags, 0o640)
    except FileNotFoundError:  # the first of its hour
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(place, flags, 0o640)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view):]
    except OSError:
        Path(place).unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


_libc = ctypes.CDLL(None, use_errno=True)


def sync_file_system(folder: Path) -> None:
    """Make everything written to the folder's file system durable: one call for many files (syncfs(2))."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _libc.syncfs(fd):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    finally:
        os.close(fd)


def sync_folder(folder: Path | str) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
