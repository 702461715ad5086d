"""An association that we ask for: negotiated, used and released in straight lines by one thread.

pynetdicom's own requestor is three threads that wait for each other without end when the peer falls silent at a bad
moment, or reports an event while we send. Here every wait for the peer has an end, however little it says meanwhile.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from relay_agent import dimse, negotiate, wire
from relay_agent.negotiate import Context

_MAX_PDU = 2**16  # of what we take: answers, and lists of instances one by one
_LARGEST_ANSWER = 2**24
_LAST_WORD = 5.0  # seconds for what changes nothing any more


class Rejected(Exception):
    """The peer does not take the association; result, source and reason (PS3.8 table 9-21)."""

    def __init__(self, reason: tuple[int, int, int]) -> None:
        super().__init__("/".join(map(str, reason)))
        self.reason = reason


class HungUp(Exception):
    """The peer ended the connection, or spoke no DICOM, where it had to answer our request for an association."""


class Broken(Exception):
    """The association ended, or no answer came in time: what was asked last may have been done or not."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response: its status, and its data set as encoded."""

    status: int
    data: bytes


def connect(host: str, port: int, timeout: float, tls: ssl.SSLContext | None = None) -> socket.socket:
    """A connection; ``OSError`` when there is none within ``timeout`` seconds (for each address and for TLS)."""
    plain = socket.create_connection((host, port), timeout)
    try:
        return tls.wrap_socket(plain, server_hostname=host) if tls else plain
    except BaseException:
        plain.close()
        raise


class Association:
    """An established association; leaving its block releases it, or aborts it when the block raises.

    :class:`Rejected`, :class:`HungUp` or ``TimeoutError`` when there is none to be had within ``negotiation``
    seconds. After that each request is answered within ``answer`` seconds, or :class:`Broken` is raised.
    """

    def __init__(self, connection: socket.socket, called_ae: str, calling_ae: str,
                 contexts: Sequence[tuple[str, Sequence[str]]], *, provided: Sequence[str] = (),
                 negotiation: float, answer: float) -> None:
        self._connection = connection
        self._patience = answer
        self._asked = 0
        try:
            self._wire = wire.Wire(connection, _MAX_PDU)
            self._wire.deadline = time.monotonic() + negotiation
            connection.settimeout(negotiation)
            connection.sendall(negotiate.ask(called_ae, calling_ae, contexts, _MAX_PDU, provided))
            self.contexts, self._longest = self._agreed(contexts)
        except (wire.Closed, wire.ProtocolError, ConnectionError):
            connection.close()
            raise HungUp from None
        except BaseException:
            connection.close()
            raise
        self._messages = self._read()

    def _agreed(self, contexts: Sequence[tuple[str, Sequence[str]]]) -> tuple[dict[int, Context], int]:
        kind, length = self._wire.next_pdu()
        if kind == wire.A_ASSOCIATE_RJ and length == 4:
            _, result, source, reason = self._wire.take(4)
            raise Rejected((result, source, reason))
        if kind != wire.A_ASSOCIATE_AC or length > _MAX_PDU:
            raise wire.ProtocolError(wire.UNEXPECTED_PDU, "the answer is no A-ASSOCIATE-AC")
        return negotiate.agreed(bytes(self._wire.take(length)), contexts)

    def __enter__(self) -> Association:
        """Nothing is left to do: it is established."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Release or abort, and close the connection whatever the peer does."""
        try:
            self._connection.settimeout(_LAST_WORD)
            self._wire.deadline = time.monotonic() + _LAST_WORD
            if error is None:
                self._release()
            else:
                self._connection.sendall(wire.abort(wire.NOT_SPECIFIED))
        except (wire.Closed, OSError):  # it is over either way, and all was answered that matters
            pass
        finally:
            self._connection.close()

    def _release(self) -> None:
        self._connection.sendall(wire.release_request())
        kind = 0
        while kind not in (wire.A_RELEASE_RP, wire.A_ABORT):
            kind, length = self._wire.next_pdu()
            if kind == wire.A_RELEASE_RQ:  # both at once (PS3.8 section 7.2.2.7)
                self._connection.sendall(wire.release_response())
            self._wire.take(min(length, _MAX_PDU + 6))

    def context(self, sop_class: str) -> Context | None:
        """What was agreed on for a SOP Class, if the peer takes it."""
        return next((context for context in self.contexts.values() if context.abstract_syntax == sop_class), None)

    def ask(self, sop_class: str, command: bytes, data: Iterable[bytes] | None = None) -> Answer:
        """Send a request and wait for its answer; blocks of ``data`` (of even length) are sent as they come."""
        number = next(number for number, context in self.contexts.items() if context.abstract_syntax == sop_class)
        self._asked = dimse.Command(command).number(dimse.MESSAGE_ID)
        self._send(wire.p_data(number, command, True, self._longest))
        if data is not None:
            held: bytes | None = None
            for block in data:
                if held is not None:
                    self._send(wire.p_data(number, held, False, self._longest, ends=False))
                held = block
            self._send(wire.p_data(number, held or b"", False, self._longest))
        return self.answer()

    def answer(self) -> Answer:
        """The next answer to the last request; after a pending one (PS3.4 section C.4.1.1) there is another."""
        self._wire.deadline = time.monotonic() + self._patience
        with _mishaps():
            for number, command, data in self._messages:
                kind = command.number(dimse.COMMAND_FIELD)
                if kind & dimse.RESPONSE:
                    if command.number(dimse.MESSAGE_ID_BEING_RESPONDED_TO) != self._asked:
                        raise wire.ProtocolError(wire.INVALID_PARAMETER, "an answer came to what was not asked")
                    return Answer(command.number(dimse.STATUS), data)
                if kind != dimse.C_CANCEL_RQ:  # we offer nothing, but who asks is answered
                    self._connection.sendall(wire.p_data(
                        number, dimse.response(command, dimse.UNRECOGNISED_OPERATION), True, self._longest))
        raise Broken

    def _send(self, pdus: bytes) -> None:
        with _mishaps():
            self._connection.settimeout(self._patience)
            self._connection.sendall(pdus)

    def _read(self) -> Iterator[tuple[int, dimse.Command, bytes]]:
        """Messages as they come: presentation context ID, command set, data set."""
        command: dimse.Command | None = None
        parts = bytearray()
        while True:
            kind, left = self._wire.next_pdu()
            if kind != wire.P_DATA_TF or left > _MAX_PDU + 6:
                raise wire.ProtocolError(wire.UNEXPECTED_PDU, "the association was ended, or a PDU has no place in it")
            while left:
                number, control, length = self._wire.next_pdv(left)
                left -= length + 6
                parts += self._wire.take(length)
                if (command is None) != bool(control & 1) or len(parts) > _LARGEST_ANSWER:
                    raise wire.ProtocolError(wire.UNEXPECTED_PDU, "a fragment has no place in its message")
                if not control & 2:
                    continue
                if command is None:
                    command = dimse.Command(bytes(parts))
                    parts.clear()
                    if command.has_data_set:
                        continue
                yield number, command, bytes(parts)
                command = None
                parts.clear()


@contextmanager
def _mishaps() -> Iterator[None]:
    try:
        yield
    except (wire.Closed, wire.ProtocolError, dimse.BadCommand, OSError):
        raise Broken from None
