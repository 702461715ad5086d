"""One file on its way into a resource: in one request, or in pieces over several streams.

XNAT cannot go on with a request that was cut. So what fails is looked for first (what is behind a proxy may have gone
on), and then sent again in smaller pieces.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from relay_agent.destinations import Retry
from relay_agent.destinations.pieces import FOLDER, MANIFEST, Piece, Step, cover, manifest
from relay_agent.destinations.resource import Listed, Resource, Unreached
from relay_agent.kspace.packing import BLOCK, pack
from relay_agent.package import Damaged, Item

log = logging.getLogger(__name__)

_TRIES = 4  # of one piece, before the back-off
_NEVER_PACKED = 2**20  # a sidecar stays readable


@dataclass(frozen=True, slots=True)
class Sent:
    """A piece as it travels: its size and MD5; and the MD5 of the bytes of the file that it was made of."""

    size: int
    md5: str
    content: str


@dataclass(slots=True)
class Way:
    """What uploads to one destination share and learn."""

    step: Step
    single: int  # bytes that one request may have by configuration, less once that was cut
    streams: int
    pack: bool
    scratch: Path  # folder for packed pieces
    go_on: Callable[[int], None]  # called before each request with the bytes that arrived since; may wait, or raise


class Upload:
    """A file and the resource that it goes to. Knows of each piece what was sent, for as long as it is kept."""

    def __init__(self, item: Item, way: Way) -> None:
        self.item = item
        self._way = way
        self._folder = f"{item.sop_instance}{FOLDER}/"
        self._sent: dict[Piece, Sent] = {}

    # Looking

    def held(self, there: Mapping[str, Listed]) -> bool:
        """Whether the file is there, whole or in pieces with their manifest."""
        if self.whole(there):
            return True
        chosen, gaps = self.pieces(there)
        if gaps:
            return False
        content = self._manifest(chosen)
        listed = there.get(self._folder + MANIFEST)
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        return listed is not None and listed.holds(len(content), md5)

    def whole(self, there: Mapping[str, Listed]) -> bool:
        """Whether it is there as one file."""
        listed = there.get(self.item.sop_instance)
        return listed is not None and listed.holds(self.item.size, self.item.md5)

    def pieces(self, there: Mapping[str, Listed]) -> tuple[list[Piece], list[tuple[int, int]]]:
        """The good pieces that are there, and what lacks between them."""
        found = [(Piece.parse(path.removeprefix(self._folder)), listed) for path, listed in there.items()
                 if path.startswith(self._folder)]
        return cover([piece for piece, listed in found if piece and self._good(piece, listed)], self.item.size)

    def spare(self, there: Mapping[str, Listed]) -> list[str]:
        """What is of no use any more: all pieces where the file is whole, else what no manifest names."""
        name = self.item.sop_instance
        keep = {name} if self.whole(there) else {self._folder + piece.name for piece in self.pieces(there)[0]} | {
            self._folder + MANIFEST}
        return [path for path in there if (path == name or path.startswith(self._folder)) and path not in keep]

    def path(self, piece: Piece) -> str:
        """The path of a piece within the resource."""
        return self._folder + piece.name

    def sent(self, piece: Piece) -> Sent:
        """The piece as it travels; made once more when it was sent by an earlier run."""
        if piece not in self._sent:
            for _ in self._read(piece):
                pass
        return self._sent[piece]

    def require_content(self, chosen: Sequence[Piece]) -> None:
        """What the pieces were made of is, together, the file that was approved; one pass over it.

        Raises :class:`relay_agent.package.Damaged`, or :class:`Retry` after a piece that was read otherwise when it
        was sent.
        """
        whole = hashlib.md5(usedforsecurity=False)
        for piece in chosen:
            content = hashlib.md5(usedforsecurity=False)
            for block in read(self.item, piece.start, piece.end):
                whole.update(block)
                content.update(block)
            if content.hexdigest() != self.sent(piece).content:
                del self._sent[piece]
                raise Retry("a piece was read otherwise when it was sent; look after the disk of this box")
        if whole.hexdigest() != self.item.md5:
            raise Damaged(self.item.id, self.item.path, "is not what was received")

    def _good(self, piece: Piece, listed: Listed) -> bool:
        if piece.end > self.item.size or (not piece.packed and listed.size != piece.end - piece.start):
            return False  # without reading it
        sent = self.sent(piece)
        return listed.holds(sent.size, sent.md5)

    def _manifest(self, chosen: Sequence[Piece]) -> bytes:
        sent = [self.sent(piece) for piece in chosen]
        return manifest(self.item, chosen, [(one.size, one.md5) for one in sent])

    # Sending

    def send(self, resource: Resource, look: Callable[[], Mapping[str, Listed]]) -> str:
        """Send what lacks; what was done. ``look`` lists the resource."""
        there = look()
        pack_it = self._way.pack and self.item.size > _NEVER_PACKED
        begun = any(path.startswith(self._folder) for path in there)
        if not (begun or pack_it) and self.item.size <= max(self._way.single, self._way.step.size):
            if self._in_one(resource, look):
                return "in one request"
            there = look()
        self._in_pieces(resource, look, self.pieces(there)[1], pack_it)
        chosen, gaps = self.pieces(look())
        if gaps:
            raise Retry("pieces of a file of raw data were sent and taken, and are not there")
        content = self._manifest(chosen)
        resource.put(self._folder + MANIFEST, len(content), [content])
        return f"in {len(chosen)} pieces"

    def _in_one(self, resource: Resource, look: Callable[[], Mapping[str, Listed]]) -> bool:
        """Send it in one request; False when the way does not stand that."""
        name, size = self.item.sop_instance, self.item.size
        self._way.go_on(0)
        began = time.monotonic()
        try:
            resource.put(name, size, read(self.item, 0, size))
        except Unreached:
            raise
        except Retry as error:
            if self.whole(look()):
                return True
            self._way.step.cut(size)
            self._way.single = min(self._way.single, size // 2)
            if size <= self._way.step.size:
                raise
            log.warning("one request does not get through, pieces may: %s", error)
            return False
        self._way.step.passed(size, time.monotonic() - began)
        self._way.go_on(size)
        return True

    def _in_pieces(self, resource: Resource, look: Callable[[], Mapping[str, Listed]], gaps: list[tuple[int, int]],
                   pack_it: bool) -> None:
        work = _Work(gaps)
        failures: list[Exception] = []

        def step() -> bool:
            try:
                gap = None if failures else work.take(self._way.step.size)
                if gap is not None:
                    self._way.go_on(work.arrived())
                    work.done(*gap, self._one(resource, look, *gap, pack_it))
            except Exception as error:  # whatever it is, the Shipper knows what to do; the other streams come to rest
                failures.append(error)
            return gap is not None

        def stream() -> None:
            while step():
                pass

        step()
        if work.left and not failures and not self.pieces(look())[0]:
            # It answers 200, too, when it stores nothing: one looks before one sends it fifty gigabytes.
            raise Retry("XNAT answered 200 and did not store a piece as it was sent. May this account edit the "
                        "session? Is there room on its disk?")
        with ThreadPoolExecutor(self._way.streams, thread_name_prefix="raw") as pool:
            for _ in range(self._way.streams):
                pool.submit(stream)
        if failures:
            raise failures[0]
        self._way.go_on(work.arrived())

    def _one(self, resource: Resource, look: Callable[[], Mapping[str, Listed]], start: int, end: int,
             pack_it: bool) -> int:
        """Send a piece from ``start`` on, a smaller one when it does not get through; where it ends."""
        tries = 0
        while True:
            piece = Piece(start, end, pack_it)
            began = time.monotonic()
            try:
                self._put(resource, piece)
            except Unreached:
                raise
            except Retry as error:
                log.info("a piece of %d bytes did not get through: %s", end - start, error)
                self._way.step.cut(end - start)
                listed = look().get(self.path(piece))
                if listed is not None and self._good(piece, listed):
                    return end
                tries += 1
                if tries == _TRIES:
                    raise
                end = min(end, start + self._way.step.size)
            else:
                self._way.step.passed(end - start, time.monotonic() - began)
                return end

    def _put(self, resource: Resource, piece: Piece) -> None:
        if not piece.packed:
            resource.put(self.path(piece), piece.end - piece.start, self._read(piece))
            return
        with tempfile.TemporaryFile(dir=self._way.scratch) as file:
            try:
                for block in self._read(piece):
                    file.write(block)
                file.flush()
            except OSError as error:
                raise Retry(f"a packed piece cannot be written here: {error.strerror}") from error
            resource.put(self.path(piece), self.sent(piece).size, _again(file))

    def _read(self, piece: Piece) -> Iterator[bytes]:
        """The bytes of a piece as they travel; what they were is known when all were read."""
        content, md5, size = hashlib.md5(usedforsecurity=False), hashlib.md5(usedforsecurity=False), 0

        def followed() -> Iterator[bytes]:
            for block in read(self.item, piece.start, piece.end):
                content.update(block)
                yield block

        if not piece.packed:
            yield from followed()
            self._sent[piece] = Sent(piece.end - piece.start, content.hexdigest(), content.hexdigest())
            return
        for block in pack(followed()):
            md5.update(block)
            size += len(block)
            yield block
        self._sent[piece] = Sent(size, md5.hexdigest(), content.hexdigest())


class _Work:
    """What lacks, handed out from the beginning on. Thread-safe."""

    def __init__(self, gaps: Sequence[tuple[int, int]]) -> None:
        self._gaps = sorted(gaps, reverse=True)
        self._arrived = 0
        self._lock = threading.Lock()

    @property
    def left(self) -> bool:
        """Whether there is more to do."""
        return bool(self._gaps)

    def take(self, size: int) -> tuple[int, int] | None:
        """The next bytes to send; None when none are left."""
        with self._lock:
            if not self._gaps:
                return None
            start, end = self._gaps.pop()
            stop = min(start + size, end)
            if stop < end:
                self._gaps.append((stop, end))
            return start, stop

    def done(self, start: int, end: int, until: int) -> None:
        """Of these bytes those before ``until`` arrived."""
        with self._lock:
            self._arrived += until - start
            if until < end:
                self._gaps.append((until, end))

    def arrived(self) -> int:
        """Bytes that arrived since this was asked last."""
        with self._lock:
            arrived, self._arrived = self._arrived, 0
            return arrived


def read(item: Item, start: int, end: int) -> Iterator[bytes]:
    """These bytes of a file. Raises :class:`relay_agent.package.Damaged` when it has become shorter, or is gone."""
    try:
        file = os.open(item.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Damaged(item.id, item.path, "is missing from the spool") from None
    try:
        while start < end:
            block = os.pread(file, min(BLOCK, end - start), start)
            if not block:
                raise Damaged(item.id, item.path, "is shorter than it was")
            yield block
            start += len(block)
    finally:
        os.close(file)


def _again(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while block := file.read(BLOCK):
        yield block
