"""One association with a sender: negotiated with pynetdicom, then served by a loop of our own.

pynetdicom spends most of its time per instance in queues, events and primitives; here the C-STORE path reads PDVs
straight from the socket's buffer into the file (README, "Why an own receive loop"). Each association runs in one
thread, in straight lines: read a message, act, answer.
"""

from __future__ import annotations

import errno
import logging
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from relay_agent import commitment, dicom, dimse, negotiate, wire
from relay_agent.book import Arrival, Book, Ended, Opened
from relay_agent.config import Receiver
from relay_agent.dicom import file_header
from relay_agent.dimse import Command
from relay_agent.negotiate import COMMITMENT, Context
from relay_agent.spool import Incoming, SpaceShort, Spool

log = logging.getLogger(__name__)

ARTIM = 30.0  # seconds in which a caller has to ask for its association (PS3.8 section 9.1.5)
# Commands and storage commitment requests are kept in memory; one for 100,000 instances takes about 13 MB.
_LARGEST_IN_MEMORY = 64 * 2**20


@dataclass
class _Message:
    """What arrived of the current message."""

    context: int = 0
    parts: bytearray = field(default_factory=bytearray)
    command: Command | None = None
    incoming: Incoming | None = None  # of a C-STORE that goes to a file
    refused: tuple[int, str] | None = None  # status and comment of a C-STORE whose data set is only drained


class Association:
    """Serves one connection until it is over; :meth:`serve` never raises."""

    def __init__(self, connection: socket.socket, peer: str, receivers: Mapping[str, Receiver], spool: Spool,
                 book: Book, max_pdu: int, crowded: bool) -> None:
        self._connection = connection
        self._peer = peer
        self._receivers = receivers
        self._spool = spool
        self._book = book
        self._max_pdu = max_pdu
        self._crowded = crowded
        self._contexts: dict[int, Context] = {}
        self._peer_max_pdu = 0
        self._message = _Message()
        self._opened: Opened
        self._is_open = False
        self._called_ae = ""
        self._event_id = 0

    def serve(self) -> None:
        """Negotiate, then answer messages until release, abort, loss or idleness."""
        how = "lost"
        try:
            self._connection.settimeout(ARTIM)
            self._wire = wire.Wire(self._connection, self._max_pdu)
            self._wire.deadline = time.monotonic() + ARTIM
            if self._negotiate():
                how = self._loop()
        except wire.ProtocolError as error:
            log.warning("association aborted: %s", error, extra={"peer": self._peer})
            how = "aborted"
            self._last_word(wire.abort(error.reason))
        except dimse.BadCommand as error:
            log.warning("association aborted: %s", error, extra={"peer": self._peer})
            how = "aborted"
            self._last_word(wire.abort(wire.INVALID_PARAMETER))
        except TimeoutError:
            log.warning("association aborted: nothing was heard for too long", extra={"peer": self._peer})
            how = "aborted"
            self._last_word(wire.abort(wire.NOT_SPECIFIED))
        except (wire.Closed, OSError):
            log.info("connection lost", extra={"peer": self._peer})
        except Exception:
            log.exception("association failed", extra={"peer": self._peer})
            self._last_word(wire.abort(wire.NOT_SPECIFIED))
        finally:
            if self._message.incoming is not None:
                self._message.incoming.abort()
            if self._is_open:
                self._book.add(Ended(self._opened.id, how))
            self._connection.close()

    def _last_word(self, pdu: bytes) -> None:
        try:
            self._connection.settimeout(2)
            self._wire.send(pdu)
        except OSError:  # it is over either way
            pass

    # Negotiation

    def _negotiate(self) -> bool:
        kind, length = self._wire.next_pdu()
        if kind != wire.A_ASSOCIATE_RQ:
            raise wire.ProtocolError(wire.UNEXPECTED_PDU if 0 < kind < 8 else wire.UNRECOGNISED_PDU,
                                     "the first PDU is no A-ASSOCIATE-RQ")
        if length > self._max_pdu:
            raise wire.ProtocolError(wire.INVALID_PARAMETER, "the A-ASSOCIATE-RQ is too long")
        request = negotiate.read(bytes(self._wire.take(length)))
        refusal = negotiate.refusal(request, self._receivers, self._peer, self._crowded)
        if refusal:
            log.warning("association rejected: %s", negotiate.WORDS[refusal], extra={
                "peer": self._peer, "calling_ae": request.calling_ae, "called_ae": request.called_ae})
            self._last_word(wire.reject(*refusal))
            return False
        receiver = self._receivers[request.called_ae]
        accepted = negotiate.accept(request, self._max_pdu)
        self._called_ae = request.called_ae
        self._contexts, self._peer_max_pdu = accepted.contexts, accepted.peer_max_pdu
        self._wire.send(accepted.pdu)
        self._opened = Opened(secrets.randbits(62), receiver.name, request.calling_ae, self._peer)
        self._is_open = True
        self._book.add(self._opened)
        self._wire.deadline = None
        self._connection.settimeout(receiver.idle_timeout)
        return True

    # Messages

    def _loop(self) -> str:
        while True:
            kind, length = self._wire.next_pdu()
            if kind == wire.P_DATA_TF:
                self._p_data(length)
            elif kind == wire.A_RELEASE_RQ:
                self._wire.take(min(length, self._max_pdu))
                self._last_word(wire.release_response())
                return "released"
            elif kind == wire.A_ABORT:
                return "aborted"
            else:
                raise wire.ProtocolError(wire.UNEXPECTED_PDU if 0 < kind < 8 else wire.UNRECOGNISED_PDU,
                                         "a PDU came that has no place in an association")

    def _p_data(self, left: int) -> None:
        if left > self._max_pdu + 6:
            raise wire.ProtocolError(wire.INVALID_PARAMETER, "a PDU is longer than negotiated")
        while left:
            context, control, length = self._wire.next_pdv(left)
            left -= length + 6
            fragment = self._wire.take(length)
            message = self._message
            if control & 1:
                if message.command is not None or (message.parts and context != message.context):
                    raise wire.ProtocolError(wire.UNEXPECTED_PDU, "a command came before the data set's end")
                message.context = context
                message.parts += fragment
                if control & 2:
                    message.command = Command(bytes(message.parts))
                    message.parts.clear()
                    self._begin(message)
            elif message.command is None or context != message.context:
                raise wire.ProtocolError(wire.UNEXPECTED_PDU, "a data set came without its command")
            else:
                self._take_fragment(message, fragment)
                if control & 2:
                    self._finish(message)
            if len(message.parts) > _LARGEST_IN_MEMORY:
                raise wire.ProtocolError(wire.INVALID_PARAMETER, "a message is too long")

    def _begin(self, message: _Message) -> None:
        command = message.command
        assert command is not None
        if message.context not in self._contexts:
            raise wire.ProtocolError(wire.INVALID_PARAMETER, "a message came in a context that was not accepted")
        if command.number(dimse.COMMAND_FIELD) == dimse.C_STORE_RQ and command.has_data_set:
            self._begin_store(message, command)
        elif not command.has_data_set:
            self._finish(message)

    def _begin_store(self, message: _Message, command: Command) -> None:
        instance = command.uid(dimse.AFFECTED_INSTANCE)
        sop_class = command.uid(dimse.AFFECTED_CLASS)
        if not _plausible(instance) or not _plausible(sop_class):
            message.refused = dimse.INVALID_INSTANCE, "Affected SOP Class or Instance UID is not a UID"
            return
        header = file_header(sop_class, instance, self._contexts[message.context].transfer_syntax,
                             self._opened.calling_ae, self._called_ae)
        try:
            message.incoming = self._spool.begin(self._opened.receiver, header)
        except OSError as error:
            message.refused = _store_status(error)

    def _take_fragment(self, message: _Message, fragment: memoryview) -> None:
        if message.incoming is not None:
            try:
                message.incoming.write(fragment)
            except OSError as error:
                message.incoming.abort()
                message.incoming, message.refused = None, _store_status(error)
        elif message.refused is None:
            message.parts += fragment

    def _finish(self, message: _Message) -> None:
        self._message = _Message()
        command = message.command
        assert command is not None
        kind = command.number(dimse.COMMAND_FIELD)
        if kind == dimse.C_STORE_RQ:
            self._answer(message.context, dimse.response(command, *self._store(message, command)))
        elif kind == dimse.C_ECHO_RQ:
            self._answer(message.context, dimse.response(command, dimse.SUCCESS))
        elif kind == dimse.N_ACTION_RQ:
            self._commitment(message, command)
        elif not kind & dimse.RESPONSE and kind != dimse.C_CANCEL_RQ:
            self._answer(message.context, dimse.response(command, dimse.UNRECOGNISED_OPERATION))

    def _store(self, message: _Message, command: Command) -> tuple[int, str]:
        """Make the instance durable; the status to answer with."""
        if message.refused is not None:
            return message.refused
        if message.incoming is None:
            return dimse.CANNOT_UNDERSTAND, "the request has no data set"
        incoming = message.incoming
        try:
            stored = incoming.commit()
        except OSError as error:
            return _store_status(error)
        self._book.add(Arrival(self._opened.receiver, stored, command.uid(dimse.AFFECTED_CLASS),
                               command.uid(dimse.AFFECTED_INSTANCE),
                               self._contexts[message.context].transfer_syntax, self._opened.calling_ae,
                               self._opened.id))
        return dimse.SUCCESS, ""

    def _answer(self, context: int, command: bytes, data_set: bytes = b"") -> None:
        pdus = wire.p_data(context, command, True, self._peer_max_pdu)
        if data_set:
            pdus += wire.p_data(context, data_set, False, self._peer_max_pdu)
        self._wire.send(pdus)

    # Storage commitment (PS3.4 Annex J)

    def _commitment(self, message: _Message, command: Command) -> None:
        context = self._contexts[message.context]
        if context.abstract_syntax != COMMITMENT or command.uid(dimse.REQUESTED_INSTANCE) != commitment.INSTANCE \
                or command.number(dimse.ACTION_TYPE) != 1:
            self._answer(message.context, dimse.response(command, dimse.NO_SUCH_ACTION))
            return
        try:
            request = dicom.decode(bytes(message.parts), context.transfer_syntax)
            transaction = str(request.TransactionUID)
            instances = [(str(item.ReferencedSOPClassUID), str(item.ReferencedSOPInstanceUID))
                         for item in request.ReferencedSOPSequence]
        except Exception:  # whatever malformed bytes make the decoder do
            self._answer(message.context, dimse.response(command, dimse.PROCESSING_FAILURE,
                                                         "the request's data set cannot be read"))
            return
        reasons = self._book.commit(self._opened, transaction, instances)
        self._answer(message.context, dimse.response(command, dimse.SUCCESS))
        if reasons is not None:
            self._event_id += 1
            event, report = commitment.event_report(self._event_id, transaction, instances, reasons)
            self._answer(message.context, event, dicom.encode(report, context.transfer_syntax))


def _plausible(uid: str) -> bool:
    return 0 < len(uid) <= 64 and uid.isascii() and uid.replace(".", "").isalnum()


def _store_status(error: OSError) -> tuple[int, str]:
    """The C-STORE status for a failure to write (PS3.4 table B.2-1)."""
    if isinstance(error, SpaceShort) or error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("an instance was refused: free space is short (%s)", error.strerror)
        return dimse.OUT_OF_RESOURCES, "out of space; send it again later"
    log.error("an instance was refused: it could not be stored (%s)", error.strerror)
    return dimse.CANNOT_UNDERSTAND, "could not be stored; send it again later"
