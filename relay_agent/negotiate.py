"""Negotiation of an association (PS3.8 section 9.3, PS3.7 Annex D), with pynetdicom's PDU classes."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydicom._uid_dict import UID_dictionary
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
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

from relay_agent import wire
from relay_agent.config import Receiver
from relay_agent.dicom import IMPLEMENTATION_NAME, IMPLEMENTATION_UID

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
VERIFICATION = "1.2.840.10008.1.1"
COMMITMENT = "1.2.840.10008.1.20.1"  # Storage Commitment Push Model
_MAX_OPERATIONS = 64

# (result, source, reason) of rejections, PS3.8 table 9-21
CALLING_AE_UNKNOWN, CALLED_AE_UNKNOWN, CONTEXT_UNKNOWN = (1, 1, 3), (1, 1, 7), (1, 1, 2)
VERSION_UNKNOWN, LIMIT_EXCEEDED = (1, 2, 2), (2, 3, 2)

WORDS = {
    VERSION_UNKNOWN: "protocol version not supported",
    CONTEXT_UNKNOWN: "application context not supported",
    CALLED_AE_UNKNOWN: "no receiver has the called AE title",
    CALLING_AE_UNKNOWN: "the caller is not on the receiver's allow list",
    LIMIT_EXCEEDED: "too many associations at a time",
}


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


@dataclass(frozen=True, slots=True)
class Context:
    """An accepted presentation context."""

    abstract_syntax: str
    transfer_syntax: str


@dataclass(frozen=True, slots=True)
class Request:
    """An A-ASSOCIATE-RQ; AE titles are empty when they are none."""

    called_ae: str
    calling_ae: str
    version: int
    application_context: str
    primitive: A_ASSOCIATE


@dataclass(frozen=True, slots=True)
class Accepted:
    """The A-ASSOCIATE-AC to send, and what was agreed."""

    pdu: bytes
    contexts: dict[int, Context]
    peer_max_pdu: int  # 0 is no limit


def read(body: bytes) -> Request:
    """Decode the body of an A-ASSOCIATE-RQ; :class:`wire.ProtocolError` when it is malformed."""
    if len(body) < _FIXED:
        raise wire.ProtocolError(wire.INVALID_PARAMETER, "the A-ASSOCIATE-RQ is malformed")
    version, called, calling = int.from_bytes(body[:2], "big"), _ae_title(body[4:20]), _ae_title(body[20:36])
    pdu = A_ASSOCIATE_RQ()
    try:
        # pynetdicom fails on titles that are to be rejected and on items that are to be ignored.
        titles = (called or "?").ljust(16).encode() + (calling or "?").ljust(16).encode()
        body = body[:4] + titles + _known_items(body)[36:]
        pdu.decode(bytes((wire.A_ASSOCIATE_RQ, 0)) + len(body).to_bytes(4, "big") + body)
        primitive = pdu.to_primitive()
        for proposed in primitive.presentation_context_definition_list:
            if proposed.context_id is None or not proposed.abstract_syntax:
                raise ValueError("a presentation context is not whole")
        return Request(called, calling, version, str(primitive.application_context_name), primitive)
    except Exception:  # whatever malformed bytes make the decoder do
        raise wire.ProtocolError(wire.INVALID_PARAMETER, "the A-ASSOCIATE-RQ is malformed") from None


def refusal(request: Request, receivers: Mapping[str, Receiver], peer: str, crowded: bool
            ) -> tuple[int, int, int] | None:
    """Result, source and reason of the rejection that the request deserves, if it does."""
    if not request.version & 1:
        return VERSION_UNKNOWN
    if request.application_context != APPLICATION_CONTEXT:
        return CONTEXT_UNKNOWN
    receiver = receivers.get(request.called_ae)
    if receiver is None:
        return CALLED_AE_UNKNOWN
    if not request.calling_ae or not may_call(receiver.allow, request.calling_ae, peer):
        return CALLING_AE_UNKNOWN
    if crowded:
        return LIMIT_EXCEEDED
    return None


def accept(request: Request, max_pdu: int) -> Accepted:
    """Accept every storage SOP Class that is proposed, with the sender's choice of transfer syntax."""
    answer = A_ASSOCIATE()
    answer.application_context_name = UID(APPLICATION_CONTEXT)
    answer.calling_ae_title = request.primitive.calling_ae_title
    answer.called_ae_title = request.primitive.called_ae_title
    answer.result, answer.result_source = 0, 1
    contexts: dict[int, Context] = {}
    results = []
    for proposed in request.primitive.presentation_context_definition_list:
        result = PresentationContext()
        result.context_id = proposed.context_id
        result.abstract_syntax = proposed.abstract_syntax
        syntax = choose_syntax([str(uid) for uid in proposed.transfer_syntax])
        result.transfer_syntax = [UID(syntax)] if syntax else [ImplicitVRLittleEndian]
        known = str(proposed.abstract_syntax) not in OTHER_SERVICES
        result.result = 0 if known and syntax else 3 if not known else 4
        results.append(result)
        if result.result == 0 and proposed.context_id is not None and syntax:
            contexts[proposed.context_id] = Context(str(proposed.abstract_syntax), syntax)
    answer.presentation_context_definition_results_list = results
    answer.user_information = _user_information(request, max_pdu)
    pdu = A_ASSOCIATE_AC()
    pdu.from_primitive(answer)
    peer_max_pdu = next((item.maximum_length_received for item in request.primitive.user_information
                         if isinstance(item, MaximumLengthNotification)), 0)
    return Accepted(pdu.encode(), contexts, peer_max_pdu)


def ask(called_ae: str, calling_ae: str, contexts: Sequence[tuple[str, Sequence[str]]], max_pdu: int,
        provided: Sequence[str] = ()) -> bytes:
    """An A-ASSOCIATE-RQ that proposes SOP Classes with transfer syntaxes; of ``provided`` ones we are the SCP."""
    proposed = b"".join(
        _item(0x20, bytes((number, 0, 0, 0)) + _item(0x30, sop_class.encode())
              + b"".join(_item(0x40, syntax.encode()) for syntax in syntaxes))
        for number, (sop_class, syntaxes) in zip(range(1, 256, 2), contexts, strict=False))
    roles = b"".join(_item(0x54, struct.pack(">H", len(uid)) + uid.encode() + b"\0\1") for uid in provided)
    user = (_item(0x51, struct.pack(">I", max_pdu)) + _item(0x52, IMPLEMENTATION_UID.encode()) + roles
            + _item(0x55, IMPLEMENTATION_NAME.encode()))
    body = (struct.pack(">HH16s16s32x", 1, 0, called_ae.ljust(16).encode(), calling_ae.ljust(16).encode())
            + _item(0x10, APPLICATION_CONTEXT.encode()) + proposed + _item(0x50, user))
    return struct.pack(">BxI", wire.A_ASSOCIATE_RQ, len(body)) + body


def agreed(body: bytes, contexts: Sequence[tuple[str, Sequence[str]]]) -> tuple[dict[int, Context], int]:
    """What the body of an A-ASSOCIATE-AC accepts of what :func:`ask` proposed, and the peer's longest PDU (0: any)."""
    accepted: dict[int, Context] = {}
    longest = 0
    try:
        if len(body) < _FIXED:
            raise ValueError("it is cut off")
        for kind, value in _items(body, _FIXED):
            if kind == 0x21 and value[2] == 0:
                sop_class, proposed = contexts[value[0] // 2]
                syntax = next((part.decode("ascii").rstrip("\0 ") for of, part in _items(value, 4) if of == 0x40), "")
                if value[0] % 2 == 0 or syntax not in proposed:
                    raise ValueError("what was never proposed is accepted")
                accepted[value[0]] = Context(sop_class, syntax)
            elif kind == 0x50:
                longest = next((int.from_bytes(part, "big") for of, part in _items(value, 0) if of == 0x51), 0)
    except (ValueError, IndexError, struct.error):
        raise wire.ProtocolError(wire.INVALID_PARAMETER, "the A-ASSOCIATE-AC is malformed") from None
    return accepted, longest


def _user_information(request: Request, max_pdu: int) -> list[object]:
    length = MaximumLengthNotification()
    length.maximum_length_received = max_pdu
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = UID(IMPLEMENTATION_UID)
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_NAME
    answer: list[object] = [length, implementation, version]
    for item in request.primitive.user_information:
        if isinstance(item, AsynchronousOperationsWindowNegotiation):
            # Messages are worked on in order; a window lets the sender fill the line meanwhile.
            window = AsynchronousOperationsWindowNegotiation()
            window.maximum_number_operations_invoked = min(
                item.maximum_number_operations_invoked or _MAX_OPERATIONS, _MAX_OPERATIONS)
            window.maximum_number_operations_performed = 1
            answer.append(window)
        elif isinstance(item, SCP_SCU_RoleSelectionNegotiation) and item.scu_role:
            role = SCP_SCU_RoleSelectionNegotiation()
            role.sop_class_uid = item.sop_class_uid
            role.scu_role, role.scp_role = True, False
            answer.append(role)
    return answer


def _ae_title(field: bytes) -> str:
    """An AE title of an A-ASSOCIATE-RQ; empty when it is none. Some senders fill it up with NUL."""
    title = field.decode("ascii", "replace").strip("\0 ")
    return title if title.isascii() and title.isprintable() and "\\" not in title else ""


_FIXED = 68  # bytes of an A-ASSOCIATE-RQ's body before its items
# Item types of an A-ASSOCIATE-RQ: bytes before the sub-items, and the sub-items (PS3.8 section 9.3.2, PS3.7 Annex D)
_ITEMS: dict[int, tuple[int, frozenset[int]]] = {
    0x10: (0, frozenset()), 0x20: (4, frozenset((0x30, 0x40))), 0x50: (0, frozenset(range(0x51, 0x59)))}


def _known_items(body: bytes) -> bytes:
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
