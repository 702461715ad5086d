"""The CSA headers of Siemens MR images, kept but cleaned.

Converters read phase encoding and more from them, so studies want them; no list of safe attributes has them, rightly:
they hold the patient's weight, UIDs of other images, which hold dates, and a protocol of free text. Here everything
like that is overwritten in place, so that the structure stays: version "SV10" only (VB and later).
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache

from relay_agent.deidentify.residue import Identifiers

CREATOR = "SIEMENS CSA HEADER"
GROUP = 0x0029
HEADERS = frozenset({0x10, 0x20})  # image and series; low bytes
TEXTS = frozenset({0x08, 0x09, 0x18, 0x19})  # their types and versions
_BLANKED = re.compile(rb"UsedPatientWeight|ReferencedImageSequence|Patient(?:s?(?:Name|ID|Age|Sex|Size|Birth\w*))")
_ABOUT = (rb"patient(?!pos|ori)", rb"referenceimage", rb"birth")  # in the names of parameters, in lower case
_PARAMETERS = [re.compile(about + rb"[\w.\[\]]*(?:[ \t]*=([^\r\n\0]*)|\">\s*\{([^{}\0]*)\})") for about in _ABOUT]
_SAYING = re.compile(rb"<[^<>]*>|[^\s\"]")  # but tags and quotes
_NUMBERS = re.compile(rb"[\d.\-]{8,}")
_UID = re.compile(rb"[0-2](?:\.\d+){5,}")
_DATE = re.compile(rb"(?<!\d)(?:(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])|\d\d\.\d\d\.\d{4}|"
                   rb"\d{4}-\d\d-\d\d)(?!\d)")


@lru_cache(4)  # the header of a series is the same in all its images
def clean(value: bytes, identifiers: Identifiers, keep_uids: bool) -> bytes | None:
    """The header without what identifies; None when it cannot be read, or something that identifies is left."""
    header = bytearray(value)
    try:
        for name, start, end in _items(value):
            if _BLANKED.fullmatch(name):
                header[start:end] = bytes(end - start)
    except struct.error:
        return None
    for pattern in _PARAMETERS:  # an ASCCONV line, or an XProtocol parameter with its braces
        for match in pattern.finditer(value.lower()):
            start, end = match.span(match.lastindex or 0)
            header[start:end] = _SAYING.sub(_blank_word, bytes(header[start:end]))
    for match in _NUMBERS.finditer(bytes(header)):
        is_uid = _UID.fullmatch(match.group())
        if not keep_uids if is_uid else _DATE.search(match.group()):
            header[match.start():match.end()] = b" " * len(match.group())
    cleaned = bytes(header)
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


def _blank_word(match: re.Match[bytes]) -> bytes:
    return match.group() if match.group().startswith(b"<") else b" "
