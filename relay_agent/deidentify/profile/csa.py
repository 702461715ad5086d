"""The CSA headers of Siemens MR images, kept but cleaned.

Converters read phase encoding and more from them, so studies want them; no list of safe attributes has them, rightly:
they hold the patient's weight, UIDs of other images, which hold dates, and a protocol of free text. Here everything
like that is overwritten in place, so that the structure stays: version "SV10" only (VB and later).
"""

from __future__ import annotations

import re
import struct

from relay_agent.deidentify.residue import Identifiers

CREATOR = "SIEMENS CSA HEADER"
GROUP = 0x0029
HEADERS = frozenset({0x10, 0x20})  # image and series; low bytes
TEXTS = frozenset({0x08, 0x09, 0x18, 0x19})  # their types and versions
_BLANKED = re.compile(rb"UsedPatientWeight|ReferencedImageSequence|Patient(?:s?(?:Name|ID|Age|Sex|Size|Birth\w*))")
_ABOUT = rb"(?i)(?:patient(?!pos|ori)|referenceimage|birth)[\w.\[\]]*"
_LINES = re.compile(_ABOUT + rb"[ \t]*=([^\r\n\0]*)")  # of the ASCCONV part of the protocol
_PARAMETERS = re.compile(_ABOUT + rb"\">\s*\{([^{}\0]*)\}")  # of its XProtocol part
_SAYING = re.compile(rb"<[^<>]*>|[^\s\"]")  # but tags and quotes
_UID = re.compile(rb"(?<![\d.])[0-2](?:\.\d+){5,}")
_DATE = re.compile(rb"(?<![\d.])(?:(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])|\d\d\.\d\d\.\d{4}|"
                   rb"\d{4}-\d\d-\d\d)(?!\d)")


def clean(value: bytes, identifiers: Identifiers, keep_uids: bool) -> bytes | None:
    """The header without what identifies; None when it cannot be read, or something that identifies is left."""
    header = bytearray(value)
    try:
        for name, start, end in _items(value):
            if _BLANKED.fullmatch(name):
                header[start:end] = bytes(end - start)
    except struct.error:
        return None
    cleaned = _PARAMETERS.sub(_blank_parameter, _LINES.sub(_blank_parameter, bytes(header)))
    if not keep_uids:
        cleaned = _UID.sub(_blank, cleaned)
    cleaned = _DATE.sub(_blank, cleaned)
    return cleaned if identifiers.in_bytes(cleaned) is None else None


def _items(value: bytes) -> list[tuple[bytes, int, int]]:
    """Name and place of every value. Raises ``struct.error`` when this is no such header."""
    if value[:4] != b"SV10":
        raise struct.error("no CSA header of version 2")
    (count,) = struct.unpack_from("<I", value, 8)
    position, found = 16, []
    for _ in range(count):
        name, number = struct.unpack_from("<64s12xI4x", value, position)
        position += 84
        for _ in range(number):
            (length,) = struct.unpack_from("<4xI8x", value, position)
            position += 16
            if position + length > len(value):
                raise struct.error("a value goes beyond the end")
            found.append((name.partition(b"\0")[0], position, position + length))
            position += -(-length // 4) * 4
    if value[position:].strip(b"\0 "):
        raise struct.error("something follows the last value")
    return found


def _blank(match: re.Match[bytes]) -> bytes:
    return b" " * len(match.group())


def _blank_parameter(match: re.Match[bytes]) -> bytes:
    start, end = (place - match.start() for place in match.span(1))
    whole = match.group()
    blanked = _SAYING.sub(lambda one: one.group() if one.group().startswith(b"<") else b" ", whole[start:end])
    return whole[:start] + blanked + whole[end:]
