"""Multipart bodies of DICOMweb, written and read as streams (RFC 2046 section 5.1, PS3.18 section 8.6.1.2)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from email.message import Message
from pathlib import Path

from relay_agent.package import blocks
from relay_agent.throttle import Throttle

_BLOCK = 2**20


class Multipart:
    """DICOM files as a multipart body (RFC 2046 section 5.1), made while it is sent; of known length.

    The length keeps it out of chunked transfer coding, of which some servers store nothing and answer 200.
    """

    def __init__(self, files: Sequence[Path], throttle: Throttle) -> None:
        self._files = files
        self._throttle = throttle
        boundary = uuid.uuid4().hex
        self.content_type = f'multipart/related; type="application/dicom"; boundary={boundary}'
        self._before = f"\r\n--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode()
        self._end = f"\r\n--{boundary}--\r\n".encode()

    def __len__(self) -> int:
        """Bytes of the body."""
        return sum(len(self._before) + file.stat().st_size for file in self._files) + len(self._end)

    def __iter__(self) -> Iterator[bytes]:
        """The body, as fast as the throttle allows."""
        return self._throttle.paced(blocks(self._pieces()))

    def _pieces(self) -> Iterator[bytes]:
        for path in self._files:
            yield self._before
            with path.open("rb", buffering=0) as file:
                while block := file.read(_BLOCK):
                    yield block
        yield self._end


class _Reader:
    """Finds marks in a stream of blocks, also across their borders."""

    def __init__(self, stream: Iterator[bytes]) -> None:
        self._stream = stream
        self._rest = b"\r\n"  # the first delimiter may come without a line before it

    def copy(self, mark: bytes, sink: Callable[[bytes], object]) -> None:
        """Hand everything before the mark to ``sink`` and go behind it; ``EOFError`` when it does not come."""
        while (found := self._rest.find(mark)) < 0:
            border = max(len(self._rest) - len(mark) + 1, 0)
            sink(self._rest[:border])
            self._rest = self._rest[border:] + self._next()
        sink(self._rest[:found])
        self._rest = self._rest[found + len(mark):]

    def peek(self, count: int) -> bytes:
        """The next bytes, without taking them."""
        while len(self._rest) < count:
            self._rest += self._next()
        return self._rest[:count]

    def _next(self) -> bytes:
        try:
            return next(self._stream)
        except StopIteration:
            raise EOFError from None


def read_parts(content_type: str, stream: Iterator[bytes], file: Path) -> Iterator[None]:
    """Write the parts of a body to the file, one after the other; yields when a part is there in full.

    A body of another kind is one part. Memory stays flat however large a part is. ``EOFError`` when it is cut off.
    """
    kind = Message()
    kind["Content-Type"] = content_type
    boundary = str(kind.get_boundary(""))
    if not boundary:
        with file.open("wb") as out:
            for block in stream:
                out.write(block)
        yield
        return
    reader = _Reader(stream)
    delimiter = f"\r\n--{boundary}".encode()
    reader.copy(delimiter, lambda preamble: None)
    while reader.peek(2) != b"--":
        reader.copy(b"\r\n\r\n", lambda headers: None)
        with file.open("wb") as out:
            reader.copy(delimiter, out.write)
        yield
