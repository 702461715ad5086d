"""The texts in a header: XProtocol (``<ParamString."Label"> { "value" }``) and ASCCONV (``label = value``).

Bytes all the way: texts have no declared character set, and offsets must hold. A field is found wherever its label
stands; its body may lie on the same line or many lines on, between attributes such as ``<Visible> "true"``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from relay_agent.kspace.twix import Measurement

# Quoted text; VB doubles the quotes in ASCCONV. Labels look like quoted text and are none.
TOKEN = re.compile(rb'(?P<label><[A-Za-z]+(?:\."[^"]*")?>)|""(?P<doubled>[^"\n]+)""|"(?P<text>[^"]*)"')
_LABEL = re.compile(rb'<Param[A-Za-z]*\."([^"\n]*)">\s*')
_SETTINGS = rb"Visible|Precision|MinSize|MaxSize|Unit|Limit|LimitRange|Label|Comment|Tooltip|Class|Dll|Context|Repr"
_NUMBER = rb"[-+]?\d[\d.eE+-]*"
_BODY = re.compile(rb'<[A-Za-z]+\."[^"]*">'  # a field within
                   rb'|<(?:' + _SETTINGS + rb')>\s*(?:"[^"]*"|' + _NUMBER + rb'|\{[^{}]*\})?'
                   rb'|<[A-Za-z]+>|""(?P<doubled>[^"\n]+)""|"(?P<text>[^"]*)"'
                   rb'|(?P<number>' + _NUMBER + rb')|(?P<brace>[{}])|(?P<other>\S)')
_ASSIGNED = re.compile(rb'^[ \t]*(?:[\w\[\]]+\.)*([A-Za-z]\w*)(?:\[\d+\])?[ \t]*=[ \t]*'
                       rb'(?:""(?P<doubled>[^"\n]+)""|"(?P<text>[^"\n]*)"|(?P<number>' + _NUMBER + rb'))', re.MULTILINE)
_STRUCTURE = re.compile(rb'<[A-Za-z]+(?:\."[^"]*")?>|^[ \t]*[\w.\[\]]+(?=[ \t]*=)', re.MULTILINE)
_LONGEST = 2**18  # of a body

_BASELINE = re.compile(rb'(?:^|_|NX)(V[A-E]\d\d|XA\d\d)[A-Z]?(?:_|$)')
_SYNGO = re.compile(rb"syngo MR (?:(XA\d\d)[A-Z]?|([A-E]\d\d)[A-Z]?)(?![0-9A-Za-z])")


class Unreadable(ValueError):
    """A text is not as it should be; the message names buffer and field, never a value."""


class Value(NamedTuple):
    """A value of a field: bytes ``start`` to ``end`` of the text, without quotes."""

    label: str
    start: int
    end: int


def texts(file: int, one: Measurement) -> Iterator[tuple[str, int, bytes]]:
    """Name, place in the file, and content of each buffer of a header."""
    for buffer in one.buffers:
        yield buffer.name, buffer.start, os.pread(file, buffer.end - buffer.start, buffer.start)


def values(text: bytes, wanted: Callable[[str], object]) -> Iterator[Value]:
    """All values of the fields that are ``wanted`` by their label. Raises :class:`Unreadable`."""
    for match in _LABEL.finditer(text):
        label = match[1].decode("latin-1")
        if wanted(label):
            for found in _body(text, match.end(), label):
                yield Value(label, *found.span(found.lastgroup or 0))
    for match in _ASSIGNED.finditer(text):
        label = match[1].decode("latin-1")
        if wanted(label):
            yield Value(label, *match.span(match.lastgroup or 0))


def _body(text: bytes, start: int, label: str) -> Iterator[re.Match[bytes]]:
    if text[start:start + 1] != b"{":
        raise Unreadable(f"the field {label} has no body")
    depth = 0
    for match in _BODY.finditer(text, start, start + _LONGEST):
        if match.lastgroup == "other":
            raise Unreadable(f"the field {label} holds what is neither quoted nor a number")
        if match.lastgroup != "brace":
            if match.lastgroup and match[match.lastgroup]:
                yield match
            continue
        depth += 1 if match[0] == b"{" else -1
        if not depth:
            return
    raise Unreadable(f"the field {label} does not end")


def contents(text: bytes) -> bytes:
    """The text without its labels: names of people are words of the format, too (Position, Sequence)."""
    return _STRUCTURE.sub(b"\n", text)


def first(text: bytes, *labels: str) -> bytes:
    """The first value of the first of these fields that has one; nothing where there is none."""
    for label in labels:
        for value in values(text, lambda name, label=label: name == label):  # type: ignore[misc]
            if found := text[value.start:value.end].strip():
                return found
    return b""


def version(by_name: dict[str, bytes]) -> str:
    """The scanner's software, as ``VB17``, ``VE11`` or ``XA30``; nothing where the header does not say.

    The baseline of the measurement (``N4_VE11C_LATEST_20160120``) says it, and DICOM's Software Versions
    (``syngo MR E11``, ``syngo MR XA30``). Where they contradict each other it is both, which nobody knows.
    """
    told = set()
    for name in ("MeasYaps", "Phoenix", "Meas"):
        found = _BASELINE.search(first(by_name.get(name, b""), "tMeasuredBaselineString", "tBaselineString"))
        if found:
            told.add(found[1].decode())
    for name in ("Dicom", "Meas"):
        found = _SYNGO.search(first(by_name.get(name, b""), "SoftwareVersions"))
        if found:
            told.add(found[1].decode() if found[1] else f"V{found[2].decode()}")
    return " and ".join(sorted(told))
