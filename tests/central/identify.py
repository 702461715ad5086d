"""How XNAT decides from a DICOM header where an object belongs (its default identifier)."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .dicom import Header

# Java's dot stops at more line ends than Python's, and its \w and \s are ASCII.
_DOT = "[^\n\r\u0085\u2028\u2029]"


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?:|{_DOT}*[\s,;]){name}\s*:\s*([\w\-]*)(?:[\s,;]{_DOT}*)?", re.IGNORECASE | re.ASCII
    )


_PATTERNS = {name: _pattern(name) for name in ("Project", "Subject", "Session", "AA")}


def assigned(name: str, header: Header) -> Iterator[str]:
    """Values of `name: value` in the three comment fields, in XNAT's order."""
    for comment in (header.patient_comments, header.study_comments, header.additional_history):
        if (match := _PATTERNS[name].fullmatch(comment)) and match[1]:
            yield match[1]


def label(value: str) -> str:
    return re.sub(r"[^\w-]", "_", value, flags=re.ASCII)


def project_candidates(header: Header) -> list[str]:
    return [*assigned("Project", header), header.study_description, header.accession]


def subject_label(header: Header) -> str:
    return label(next(assigned("Subject", header), header.patient_name))


def session_label(header: Header) -> str:
    return label(next(assigned("Session", header), header.patient_id))


def auto_archive(header: Header) -> bool | None:
    for value in assigned("AA", header):
        if re.fullmatch("t(rue)?", value, re.IGNORECASE):
            return True
        if re.fullmatch("f(alse)?", value, re.IGNORECASE):
            return False
    return None
