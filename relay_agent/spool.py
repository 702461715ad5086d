"""The spool: files of received instances, each at one place from receive to purge.

An instance's file is named by the SHA-256 of its data set, below a folder for its receiver and hour. A file whose
data set does not hash to its name was cut off by a crash before anybody was told that it is safe.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from relay_agent.journal import LARGEST, Journal, Pending, sync_folder

PARTIAL = ".partial-"  # a file that is still being written
# Free space is looked at again after so many bytes of one object.
_CHECK_EVERY = 64 * 2**20
_LOOK_AGAIN = 0.05  # seconds; less than the reserve arrives in


class SpaceShort(OSError):
    """Free space is below the reserve; the sender is told A700 and keeps its instance."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A durable file: its path below the spool, SHA-256 of the data set, bytes of the file.

    While ``pending`` is set it is durable in the journal and still has to be written to its place.
    """

    path: str
    digest: bytes
    size: int
    pending: Pending | None = None


class Spool:
    """Writes and finds files below one folder; free space never falls below ``reserve`` bytes by its doing.

    With a journal, small instances are made durable there; whoever has it must place them.
    """

    def __init__(self, folder: Path, reserve: int, journal: Journal | None = None) -> None:
        self.folder = folder
        self.reserve = reserve
        self.journal = journal
        self._looked = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def require_space(self) -> None:
        """Raise :class:`SpaceShort` when free space is below the reserve, as it was a moment ago."""
        now = time.monotonic()
        if now - self._looked < _LOOK_AGAIN:
            return
        room = os.statvfs(self.folder)
        if room.f_bavail * room.f_frsize < self.reserve:
            raise SpaceShort(errno.ENOSPC, "free space is below the reserve", str(self.folder))
        self._looked = now

    def begin(self, receiver: str, header: bytes) -> Incoming:
        """Start a file with its preamble and File Meta; ``OSError`` when there is no room for it."""
        self.require_space()
        now = time.gmtime()
        hour = f"{receiver}/{now.tm_year:04}{now.tm_mon:02}{now.tm_mday:02}/{now.tm_hour:02}"
        return Incoming(self, hour, header)

    def files(self) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Every file, as (path below the spool, entry); partial ones included."""
        yield from self._walk("")

    def _walk(self, below: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        try:
            with os.scandir(self.folder / below) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:  # purge removes folders that became empty
            return
        for entry in listed:
            path = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self._walk(path)
            else:
                yield path, entry

    def remove(self, paths: Iterable[str]) -> None:
        """Delete files, and the folders that this leaves empty."""
        for path in paths:
            file = self.folder / path
            file.unlink(missing_ok=True)
            for folder in (file.parent, file.parent.parent):
                try:
                    folder.rmdir()
                except OSError:  # not empty, or made again this moment
                    break


class Incoming:
    """One file on its way in. Ends with :meth:`commit` or :meth:`abort`; nothing is left of an aborted one."""

    def __init__(self, spool: Spool, hour: str, header: bytes) -> None:
        self._spool = spool
        self._hour = hour
        self._hash = hashlib.sha256()
        self._held: list[bytes] = [header]  # what is not in a file yet
        self._size = len(header)
        self._checked = 0
        self._folder = f"{spool.folder}/{hour}"
        self._partial = ""
        self._fd = -1

    def write(self, *fragments: bytes | memoryview) -> None:
        """Add fragments of the data set; they are in memory, or in the file and not yet on the disk."""
        for fragment in fragments:
            self._hash.update(fragment)
            self._size += len(fragment)
        if self._fd < 0 and self._spool.journal is not None and self._size <= LARGEST:
            self._held += [bytes(fragment) for fragment in fragments]
            return
        if self._fd < 0:
            self._open()
        _write_all(self._fd, list(fragments))
        if self._size - self._checked > _CHECK_EVERY:
            self._checked = self._size
            self._spool.require_space()

    def _open(self) -> None:
        """Begin a file with what is held."""
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        self._partial = f"{self._folder}/{PARTIAL}{os.getpid()}-{secrets.token_hex(8)}"
        while self._fd < 0:
            try:
                self._fd = os.open(self._partial, flags, 0o640)
            except FileNotFoundError:  # the first of its hour, or purge removed the empty folder
                with suppress(FileNotFoundError):  # or does so at this moment: once more
                    _make_folders(Path(self._folder), self._spool.folder)
        _write_all(self._fd, [*self._held])
        self._held = []

    def commit(self) -> Stored:
        """Make the instance durable; only then may the sender be answered."""
        digest = self._hash.digest()
        path = f"{self._hour}/{digest.hex()}.dcm"
        if self._fd < 0 and self._spool.journal is not None:
            pending = self._spool.journal.append(path, digest, self._held)
            if pending is not None:
                return Stored(path, digest, self._size, pending)
        try:
            if self._fd < 0:
                self._open()
            self._publish(f"{self._spool.folder}/{path}")
        except OSError:
            self.abort()
            raise
        os.close(self._fd)
        return Stored(path, digest, self._size)

    def _publish(self, final: str) -> None:
        """Give the file its name and sync both.

        The name comes before the one sync, so that the file system's journal writes content and name together;
        ``link`` and not ``rename``, because a copy that is already there may be somebody's promise.
        """
        fcntl.flock(self._fd, fcntl.LOCK_EX)  # until it is closed: the name may be taken away again till then
        synced, linked = self._fd, False
        try:
            while not linked and synced == self._fd:
                try:
                    os.link(self._partial, final)
                    linked = True
                except FileExistsError:  # sent twice within the hour: the promise is the file that is there
                    found = _promised(final)
                    synced = self._fd if found is None else found
            os.unlink(self._partial)
            os.fsync(synced)
            sync_folder(self._folder)
        except OSError:
            if linked:
                Path(final).unlink(missing_ok=True)
            raise
        finally:
            if synced != self._fd:
                os.close(synced)

    def abort(self) -> None:
        """Forget the instance; nothing is left of it."""
        if self._fd >= 0:
            os.close(self._fd)
            Path(self._partial).unlink(missing_ok=True)


def _promised(final: str) -> int | None:
    """A descriptor of the file that has this name and keeps it, once who gave it the name is done; None if it went."""
    try:
        fd = os.open(final, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.path.samestat(os.fstat(fd), os.stat(final)):
            return fd
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _write_all(fd: int, fragments: list[bytes | memoryview]) -> None:
    while fragments:
        written = os.writev(fd, fragments[:512])
        while fragments and written >= len(fragments[0]):
            written -= len(fragments.pop(0))
        if fragments and written:
            fragments[0] = memoryview(fragments[0])[written:]


def _make_folders(folder: Path, top: Path) -> None:
    """Make the folder's parents durable too: a file is only as safe as the names on its way."""
    folder.mkdir(parents=True, exist_ok=True)
    while folder != top:
        folder = folder.parent
        sync_folder(folder)
