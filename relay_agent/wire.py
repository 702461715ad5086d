"""PDUs of the DICOM upper layer over a socket (PS3.8 section 9.3), read with few system calls and copies."""

from __future__ import annotations

import socket
import struct
import time

A_ASSOCIATE_RQ, A_ASSOCIATE_AC, A_ASSOCIATE_RJ, P_DATA_TF = 0x01, 0x02, 0x03, 0x04
A_RELEASE_RQ, A_RELEASE_RP, A_ABORT = 0x05, 0x06, 0x07

# Reasons of an A-ABORT by the service provider (PS3.8 table 9-26)
NOT_SPECIFIED, UNRECOGNISED_PDU, UNEXPECTED_PDU, INVALID_PARAMETER = 0, 1, 2, 6

_HEADER = struct.Struct(">BxI")
_PDV = struct.Struct(">IBB")


class Closed(Exception):
    """The peer closed the connection."""


class ProtocolError(Exception):
    """The peer sent what the protocol does not allow; ``reason`` goes into the A-ABORT."""

    def __init__(self, reason: int, what: str) -> None:
        super().__init__(what)
        self.reason = reason


class Wire:
    """A connection with one receive buffer; slices of it are handed out and valid until the next call."""

    def __init__(self, connection: socket.socket, largest: int) -> None:
        self._socket = connection
        self._buffer = bytearray(max(2 * largest, 64 * 1024))
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self.deadline: float | None = None  # by time.monotonic(), however often something is heard until then
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def take(self, count: int) -> memoryview:
        """The next ``count`` bytes (at most the buffer's size)."""
        if self._end - self._start < count:
            self._fill(count)
        start = self._start
        self._start = start + count
        return self._view[start:self._start]

    def _fill(self, count: int) -> None:
        if self._start + count > len(self._buffer) or self._start == self._end:
            left = self._end - self._start
            self._buffer[:left] = self._buffer[self._start:self._end]
            self._start, self._end = 0, left
        while self._end - self._start < count:
            # A sender that leaves Nagle's algorithm on holds back the rest of an object until what it sent is
            # acknowledged, and TCP delays that by 40 ms unless told otherwise, again before each read.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            if self.deadline is not None:
                remaining = self.deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError
                self._socket.settimeout(remaining)
            got = self._socket.recv_into(self._view[self._end:])
            if not got:
                raise Closed
            self._end += got

    def next_pdu(self) -> tuple[int, int]:
        """Type and length of the next PDU; its body is still to be taken."""
        kind, length = _HEADER.unpack(self.take(6))
        return kind, length

    def next_pdv(self, left: int) -> tuple[int, int, int]:
        """Presentation context ID, message control header and fragment length of the next PDV of a P-DATA-TF."""
        if left < 6:
            raise ProtocolError(INVALID_PARAMETER, "a PDV is cut off")
        length, context, control = _PDV.unpack(self.take(6))
        if length < 2 or length + 4 > left:
            raise ProtocolError(INVALID_PARAMETER, "a PDV is longer than its PDU")
        return context, control, length - 2

    def send(self, pdu: bytes) -> None:
        """Send a whole PDU."""
        self._socket.sendall(pdu)


def p_data(context: int, message: bytes, command: bool, largest: int, *, ends: bool = True) -> bytes:
    """A command set or data set as P-DATA-TF PDUs of at most ``largest`` bytes (0: no limit).

    ``ends`` is False for a part that others follow; it should be of even length (PS3.8 section E.1).
    """
    room = max(largest - 6 & ~1, 1) if largest else len(message) or 1
    out = bytearray()
    for position in range(0, len(message) or 1, room):
        fragment = message[position:position + room]
        last = ends and position + room >= len(message)
        control = (1 if command else 0) | (2 if last else 0)
        out += _HEADER.pack(P_DATA_TF, len(fragment) + 6) + _PDV.pack(len(fragment) + 2, context, control) + fragment
    return bytes(out)


def release_request() -> bytes:
    """An A-RELEASE-RQ PDU."""
    return _HEADER.pack(A_RELEASE_RQ, 4) + bytes(4)


def release_response() -> bytes:
    """An A-RELEASE-RP PDU."""
    return _HEADER.pack(A_RELEASE_RP, 4) + bytes(4)


def abort(reason: int) -> bytes:
    """An A-ABORT PDU by the service provider."""
    return _HEADER.pack(A_ABORT, 4) + bytes((0, 0, 2, reason))


def reject(result: int, source: int, reason: int) -> bytes:
    """An A-ASSOCIATE-RJ PDU (PS3.8 table 9-21)."""
    return _HEADER.pack(A_ASSOCIATE_RJ, 4) + bytes((0, result, source, reason))
