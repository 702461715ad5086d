"""One association with a sender: negotiated with pynetdicom, then served by a loop of our own.

pynetdicom spends most of its time per instance in queues, events and primitives; here the C-STORE path reads PDVs
straight from the socket's buffer into the file (README, "Why an own receive loop"). Each association runs in one
thread, in straight lines: read a message, act, answer.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from typing import Protocol

from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, UID_dictionary
from pynetdicom import sop_class as sops
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext

from relay_agent import dimse, wire
from relay_agent.config import Receiver
from relay_agent.dicom import IMPLEMENTATION_NAME, IMPLEMENTATION_UID, file_header
from relay_agent.dimse import Command
from relay_agent.spool import Incoming, SpaceShort, Spool, Stored

log = logging.getLogger(__name__)

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
COMMITMENT = "1.2.840.10008.1.20.1"  # Storage Commitment Push Model
COMMITMENT_INSTANCE = "1.2.840.10008.1.20.1.1"
ARTIM = 30.0  # seconds in which a caller has to ask for its association (PS3.8 section 9.1.5)
# Commands and storage commitment requests are kept in memory; one for 100,000 instances takes about 13 MB.
_LARGEST_IN_MEMORY = 64 * 2**20
_MAX_OPERATIONS = 64

# (result, source, reason) of rejections, PS3.8 table 9-21
CALLING_AE_UNKNOWN, CALLED_AE_UNKNOWN, CONTEXT_UNKNOWN = (1, 1, 3), (1, 1, 7), (1, 1, 2)
VERSION_UNKNOWN, LIMIT_EXCEEDED = (1, 2, 2), (2, 3, 2)


def _other_services() -> frozenset[str]:
    """SOP Classes that are known and no storage: what is left is taken, private and future ones too."""
    taken = {str(uid) for group in ("_STORAGE_CLASSES", "_NON_PATIENT_OBJECT_CLASSES")
             for uid in getattr(sops, group, {}).values()}
    # The standard's registry has the retired ones too, and calls every storage class one.
    known = {uid for uid, (name, kind, *_) in UID_dictionary.items()
             if kind == "SOP Class" and name and ("Storage" not in name or "Commitment" in name)}
    for name in dir(sops):
        group = getattr(sops, name)
        if name.endswith("_CLASSES") and isinstance(group, dict):
            known |= {str(uid) for uid in group.values() if isinstance(uid, str)}
    return frozenset(known - taken - {VERIFICATION, COMMITMENT})


OTHER_SERVICES = _other_services()


@dataclass(slots=True)
class Arrival:
    """An instance that was made durable, on its way into the ledger."""

    receiver: str
    stored: Stored
    sop_class: str
    sop_instance: str
    transfer_syntax: str
    calling_ae: str
    association: int


@dataclass(slots=True)
class Opened:
    """An association that was accepted."""

    id: int
    receiver: str
    calling_ae: str
    peer: str


@dataclass(slots=True)
class Ended:
    """An association that is over; ``how`` is released, aborted or lost."""

    id: int
    how: str


class Book(Protocol):
    """What an association needs of the ledger's side."""

    def add(self, entry: Arrival | Opened | Ended) -> None:
        """Write it down soon; never blocks for long."""

    def commit(self, association: Opened, transaction_uid: str, instances: Sequence[tuple[str, str]]
               ) -> list[int] | None:
        """A storage commitment request: a failure reason for each (class, instance), 0 when it is safe.

        None when the answer goes over an association of its own, to the address that is configured.
        """


@dataclass
class _Context:
    abstract_syntax: str
    transfer_syntax: str


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
        self._contexts: dict[int, _Context] = {}
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
        body = bytes(self._wire.take(length))
        if len(body) < _FIXED:
            raise wire.ProtocolError(wire.INVALID_PARAMETER, "the A-ASSOCIATE-RQ is malformed")
        called, calling = ae_title(body[4:20]), ae_title(body[20:36])
        request, context_name = self._decode(body, called, calling)
        refusal = self._refusal(calling, called, context_name, int.from_bytes(body[:2], "big"))
        if refusal:
            log.warning("association rejected: %s", _WORDS[refusal], extra={"peer": self._peer})
            self._last_word(wire.reject(*refusal))
            return False
        receiver = self._receivers[called]
        self._called_ae = called
        self._wire.send(self._accept(request))
        self._opened = Opened(secrets.randbits(62), receiver.name, calling, self._peer)
        self._is_open = True
        self._book.add(self._opened)
        self._wire.deadline = None
        self._connection.settimeout(receiver.idle_timeout)
        return True

    def _decode(self, body: bytes, called: str, calling: str) -> tuple[A_ASSOCIATE, str]:
        """The request and its application context name."""
        pdu = A_ASSOCIATE_RQ()
        try:
            # pynetdicom fails on titles that are to be rejected and on items that are to be ignored.
            titles = (called or "?").ljust(16).encode() + (calling or "?").ljust(16).encode()
            body = body[:4] + titles + known_items(body)[36:]
            pdu.decode(bytes((wire.A_ASSOCIATE_RQ, 0)) + len(body).to_bytes(4, "big") + body)
            request = pdu.to_primitive()
            for proposed in request.presentation_context_definition_list:
                if proposed.context_id is None or not proposed.abstract_syntax:
                    raise ValueError("a presentation context is not whole")
            return request, str(request.application_context_name)
        except Exception:  # whatever malformed bytes make the decoder do
            raise wire.ProtocolError(wire.INVALID_PARAMETER, "the A-ASSOCIATE-RQ is malformed") from None

    def _refusal(self, calling: str, called: str, context_name: str, version: int) -> tuple[int, int, int] | None:
        if not version & 1:
            return VERSION_UNKNOWN
        if context_name != APPLICATION_CONTEXT:
            return CONTEXT_UNKNOWN
        receiver = self._receivers.get(called)
        if receiver is None:
            return CALLED_AE_UNKNOWN
        if not calling or not may_call(receiver.allow, calling, self._peer):
            return CALLING_AE_UNKNOWN
        if self._crowded:
            return LIMIT_EXCEEDED
        return None

    def _accept(self, request: A_ASSOCIATE) -> bytes:
        answer = A_ASSOCIATE()
        answer.application_context_name = UID(APPLICATION_CONTEXT)
        answer.calling_ae_title = request.calling_ae_title
        answer.called_ae_title = request.called_ae_title
        answer.result, answer.result_source = 0, 1
        results = []
        for proposed in request.presentation_context_definition_list:
            result = PresentationContext()
            result.context_id = proposed.context_id
            result.abstract_syntax = proposed.abstract_syntax
            syntax = choose_syntax([str(uid) for uid in proposed.transfer_syntax])
            result.transfer_syntax = [UID(syntax)] if syntax else [ImplicitVRLittleEndian]
            known = str(proposed.abstract_syntax) not in OTHER_SERVICES
            result.result = 0 if known and syntax else 3 if not known else 4
            results.append(result)
            if result.result == 0 and proposed.context_id is not None and syntax:
                self._contexts[proposed.context_id] = _Context(str(proposed.abstract_syntax), syntax)
        answer.presentation_context_definition_results_list = results
        answer.user_information = self._user_information(request)
        pdu = A_ASSOCIATE_AC()
        pdu.from_primitive(answer)
        encoded: bytes = pdu.encode()
        return encoded

    def _user_information(self, request: A_ASSOCIATE) -> list[object]:
        length = MaximumLengthNotification()
        length.maximum_length_received = self._max_pdu
        implementation = ImplementationClassUIDNotification()
        implementation.implementation_class_uid = UID(IMPLEMENTATION_UID)
        version = ImplementationVersionNameNotification()
        version.implementation_version_name = IMPLEMENTATION_NAME
        answer: list[object] = [length, implementation, version]
        for item in request.user_information:
            if isinstance(item, MaximumLengthNotification):
                self._peer_max_pdu = item.maximum_length_received
            elif isinstance(item, AsynchronousOperationsWindowNegotiation):
                # Messages are worked on in order; a window lets the sender fill the line meanwhile.
                window = AsynchronousOperationsWindowNegotiation()
                window.maximum_number_operations_invoked = min(
                    item.maximum_number_operations_invoked or _MAX_OPERATIONS, _MAX_OPERATIONS)
                window.maximum_number_operations_performed = 1
                answer.append(window)
            elif isinstance(item, SCP_SCU_RoleSelectionNegotiation):
                role = SCP_SCU_RoleSelectionNegotiation()
                role.sop_class_uid = item.sop_class_uid
                role.scu_role, role.scp_role = bool(item.scu_role), False
                if role.scu_role:
                    answer.append(role)
        return answer

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
        if context.abstract_syntax != COMMITMENT or command.uid(dimse.REQUESTED_INSTANCE) != COMMITMENT_INSTANCE \
                or command.number(dimse.ACTION_TYPE) != 1:
            self._answer(message.context, dimse.response(command, dimse.NO_SUCH_ACTION))
            return
        try:
            request = decode(bytes(message.parts), context.transfer_syntax)
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
            event, report = commitment_report(self._event_id, transaction, instances, reasons)
            self._answer(message.context, event, encode_data_set(report, context.transfer_syntax))


def commitment_report(message_id: int, transaction: str, instances: Sequence[tuple[str, str]],
                      reasons: Sequence[int]) -> tuple[bytes, Dataset]:
    """The N-EVENT-REPORT-RQ of PS3.4 section J.3.3: command set and data set."""
    report = Dataset()
    report.TransactionUID = transaction
    safe: list[Dataset] = []
    failed: list[Dataset] = []
    for (sop_class, instance), reason in zip(instances, reasons, strict=True):
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, instance
        if reason:
            item.FailureReason = reason
        (failed if reason else safe).append(item)
    if safe:
        report.ReferencedSOPSequence = safe
    if failed:
        report.FailedSOPSequence = failed
    command = dimse.encode({
        dimse.AFFECTED_CLASS: COMMITMENT, dimse.COMMAND_FIELD: dimse.N_EVENT_REPORT_RQ,
        dimse.MESSAGE_ID: message_id, dimse.DATA_SET_TYPE: 1, dimse.AFFECTED_INSTANCE: COMMITMENT_INSTANCE,
        dimse.EVENT_TYPE: 2 if failed else 1})
    return command, report


def decode(data: bytes, transfer_syntax: str) -> Dataset:
    """A data set from the wire."""
    head = file_header("", "", transfer_syntax, "", "")
    return dcmread(BytesIO(head + data))


def encode_data_set(data: Dataset, transfer_syntax: str) -> bytes:
    """A data set for the wire, in one of the two uncompressed little endian syntaxes."""
    buffer = DicomBytesIO()
    buffer.is_little_endian = True
    buffer.is_implicit_VR = transfer_syntax != ExplicitVRLittleEndian
    write_dataset(buffer, data)
    encoded: bytes = buffer.getvalue()
    return encoded


def ae_title(field: bytes) -> str:
    """An AE title of an A-ASSOCIATE-RQ; empty when it is none. Some senders fill it up with NUL."""
    title = field.decode("ascii", "replace").strip("\0 ")
    return title if title.isascii() and title.isprintable() and "\\" not in title else ""


_FIXED = 68  # bytes of an A-ASSOCIATE-RQ's body before its items
# Item types of an A-ASSOCIATE-RQ: bytes before the sub-items, and the sub-items (PS3.8 section 9.3.2, PS3.7 Annex D)
_ITEMS: dict[int, tuple[int, frozenset[int]]] = {
    0x10: (0, frozenset()), 0x20: (4, frozenset((0x30, 0x40))), 0x50: (0, frozenset(range(0x51, 0x59)))}


def known_items(body: bytes) -> bytes:
    """The body of an A-ASSOCIATE-RQ without what this edition of the standard does not know.

    Such items shall be ignored (PS3.8 section 9.3.1), and pynetdicom's decoder fails on them.
    """
    out = bytearray(body[:_FIXED])
    for kind, value in _items(body, _FIXED):
        if kind not in _ITEMS:
            continue
        fixed, inside = _ITEMS[kind]
        parts = (_item(part, content) for part, content in _items(value, fixed) if part in inside)
        out += _item(kind, value[:fixed] + b"".join(parts) if inside else value)
    return bytes(out)


def _items(data: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    while position < len(data):
        kind, length = struct.unpack_from(">BxH", data, position)
        position += 4 + length
        if position > len(data):
            raise ValueError("an item is cut off")
        yield kind, data[position - length:position]


def _item(kind: int, value: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(value)) + value


def choose_syntax(proposed: Sequence[str]) -> str | None:
    """The sender's first choice, so that nothing is transcoded for us.

    Explicit VR is taken before Implicit where both are offered: it keeps the VRs of private elements.
    """
    if not proposed:
        return None
    if proposed[0] == ImplicitVRLittleEndian and ExplicitVRLittleEndian in proposed:
        return str(ExplicitVRLittleEndian)
    return proposed[0]


def may_call(allow: Sequence[str], calling_ae: str, peer: str) -> bool:
    """Whether an allow list (entries ``AE``, ``network``, ``AE@network`` or ``*``) has the caller."""
    address = ipaddress.ip_address(peer.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    for entry in allow:
        title, at, network = entry.rpartition("@")
        if not at:
            title, network = ("", entry) if _is_network(entry) else (entry, "")
        if title not in ("", "*", calling_ae):
            continue
        if not network or address in ipaddress.ip_network(network, strict=False):
            return True
    return False


def _is_network(entry: str) -> bool:
    if "." not in entry and ":" not in entry:
        return False
    try:
        ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False
    return True


def _plausible(uid: str) -> bool:
    return 0 < len(uid) <= 64 and uid.isascii() and uid.replace(".", "").isalnum()


def _store_status(error: OSError) -> tuple[int, str]:
    """The C-STORE status for a failure to write (PS3.4 table B.2-1)."""
    if isinstance(error, SpaceShort) or error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("an instance was refused: free space is short (%s)", error.strerror)
        return dimse.OUT_OF_RESOURCES, "out of space; send it again later"
    log.error("an instance was refused: it could not be stored (%s)", error.strerror)
    return dimse.CANNOT_UNDERSTAND, "could not be stored; send it again later"


_WORDS = {
    VERSION_UNKNOWN: "protocol version not supported",
    CONTEXT_UNKNOWN: "application context not supported",
    CALLED_AE_UNKNOWN: "no receiver has the called AE title",
    CALLING_AE_UNKNOWN: "the caller is not on the receiver's allow list",
    LIMIT_EXCEEDED: "too many associations at a time",
}
