"""DIMSE command sets (PS3.7), encoded and decoded directly: the part of an association that is done per instance."""

from __future__ import annotations

import struct

COMMAND_FIELD, MESSAGE_ID, MESSAGE_ID_BEING_RESPONDED_TO = 0x0100, 0x0110, 0x0120
AFFECTED_CLASS, REQUESTED_CLASS, DATA_SET_TYPE, STATUS, ERROR_COMMENT = 0x0002, 0x0003, 0x0800, 0x0900, 0x0902
AFFECTED_INSTANCE, REQUESTED_INSTANCE, EVENT_TYPE, ACTION_TYPE = 0x1000, 0x1001, 0x1002, 0x1008
PRIORITY = 0x0700

C_STORE_RQ, C_FIND_RQ, C_ECHO_RQ, N_EVENT_REPORT_RQ, N_ACTION_RQ = 0x0001, 0x0020, 0x0030, 0x0100, 0x0130
RESPONSE = 0x8000  # added to a request's command field
C_CANCEL_RQ = 0x0FFF
NO_DATA_SET = 0x0101

SUCCESS, OUT_OF_RESOURCES, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xC000
NO_SUCH_ACTION, INVALID_INSTANCE, UNRECOGNISED_OPERATION, PROCESSING_FAILURE = 0x0123, 0x0117, 0x0211, 0x0110

_UIDS = {AFFECTED_CLASS, REQUESTED_CLASS, AFFECTED_INSTANCE, REQUESTED_INSTANCE}
_ELEMENT = struct.Struct("<HHI")
_NUMBER = struct.Struct("<HHIH")
_RESPONSE = struct.Struct("<" + 4 * "HHIH")


class BadCommand(ValueError):
    """The bytes are no command set."""


class Command:
    """A decoded command set (Implicit VR Little Endian, PS3.7 section 6.3.1)."""

    __slots__ = ("elements",)

    def __init__(self, data: bytes) -> None:
        self.elements: dict[int, bytes] = {}
        position, end = 0, len(data)
        try:
            while position < end:
                group, element, length = _ELEMENT.unpack_from(data, position)
                position += 8 + length
                if group or position > end:
                    raise BadCommand("an element of the command set is out of place")
                self.elements[element] = data[position - length:position]
        except struct.error:
            raise BadCommand("the command set is cut off") from None

    def number(self, element: int) -> int:
        """A US value; :class:`BadCommand` when it is missing."""
        value = self.elements.get(element)
        if value is None or len(value) != 2:
            raise BadCommand(f"(0000,{element:04X}) is missing")
        return int.from_bytes(value, "little")

    def uid(self, element: int) -> str:
        """A UID, or an empty string."""
        return self.elements.get(element, b"").rstrip(b"\0 ").decode("ascii", "replace")

    @property
    def has_data_set(self) -> bool:
        """Whether a data set follows."""
        return self.number(DATA_SET_TYPE) != NO_DATA_SET


def _text(element: int, value: str) -> bytes:
    raw = value.encode("ascii", "replace")
    if len(raw) % 2:
        raw += b"\0" if element in _UIDS else b" "
    return _ELEMENT.pack(0, element, len(raw)) + raw


def encode(elements: dict[int, int | str]) -> bytes:
    """A command set with its group length; numbers are US, texts UI (or LO for the error comment)."""
    body = bytearray()
    for element in sorted(elements):
        value = elements[element]
        body += _NUMBER.pack(0, element, 2, value) if isinstance(value, int) else _text(element, value)
    return _ELEMENT.pack(0, 0, 4) + len(body).to_bytes(4, "little") + bytes(body)


def request(field: int, message_id: int, sop_class: str, sop_instance: str = "") -> bytes:
    """A C-STORE, C-FIND or C-ECHO request; all but the last have a data set."""
    elements: dict[int, int | str] = {
        AFFECTED_CLASS: sop_class, COMMAND_FIELD: field, MESSAGE_ID: message_id,
        DATA_SET_TYPE: NO_DATA_SET if field == C_ECHO_RQ else 1}
    if field != C_ECHO_RQ:
        elements[PRIORITY] = 0
    if sop_instance:
        elements[AFFECTED_INSTANCE] = sop_instance
    return encode(elements)


def response(request: Command, status: int, comment: str = "") -> bytes:
    """The response to a request, with its message ID, SOP Class and SOP Instance."""
    sop_class = request.uid(AFFECTED_CLASS) or request.uid(REQUESTED_CLASS)
    instance = request.uid(AFFECTED_INSTANCE) or request.uid(REQUESTED_INSTANCE)
    # Not by encode(), which takes twice as long: this is done for every instance.
    body = b"".join((
        _text(AFFECTED_CLASS, sop_class) if sop_class else b"",
        _RESPONSE.pack(0, COMMAND_FIELD, 2, request.number(COMMAND_FIELD) | RESPONSE,
                       0, MESSAGE_ID_BEING_RESPONDED_TO, 2, request.number(MESSAGE_ID),
                       0, DATA_SET_TYPE, 2, NO_DATA_SET,
                       0, STATUS, 2, status),
        _text(ERROR_COMMENT, comment[:64]) if comment else b"",
        _text(AFFECTED_INSTANCE, instance) if instance else b"",
    ))
    return _ELEMENT.pack(0, 0, 4) + len(body).to_bytes(4, "little") + body
