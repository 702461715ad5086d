"""DicomEdit 4 scripts: recognised, and what to write in DicomEdit 6 instead."""

from __future__ import annotations

import re

_VERSION = re.compile(r'^[ \t\ufeff]*version[ \t]+"', re.MULTILINE)
_CHANGED = (
    (re.compile(r'\(\s*[0-9A-Fa-fXx@#]{4}\s*,\s*"'),
     'a private tag is written (0019,{CREATOR}08) instead of (0019,"CREATOR"08)'),
    (re.compile(r'(?:"|\)|\w)\s*(?<!:):\s*(?:\(|-|[A-Za-z_])'),
     'a condition ends with "?": (0008,0060) = "MR" ? action : other action'),
    (re.compile(r"\burlEncode\s*\["), "there is no urlEncode; write the text as it shall be, or use replace[...]"),
    (re.compile(r"\bhash\s*\["), "there is no hash; hashUID[...] gives a UID, lookup[...] a value of a table"),
    (re.compile(r"\bmakeSessionLabel\s*\["),
     'there is no makeSessionLabel; the label is the variable session, or join one with concatenate[...]'),
    (re.compile(r"\bignore\s*\["), "there is no ignore; use reject[]"),
    (re.compile(r"\bgetURL\s*\["), "getURL is refused here: it would send values to another place; use lookup[...]"),
    (re.compile(r"\(\s*[0-9A-Fa-f]{3}[13579bBdDfF]\s*,\s*[0-9A-Fa-f]{4}\s*\)"),
     "a private tag needs its creator: (0019,{CREATOR}08) instead of (0019,1008)"),
)


def is_dicomedit4(text: str) -> bool:
    """Whether XNAT takes a script for DicomEdit 4: it has no version line."""
    return not _VERSION.search(_without_comments(text))


def conversion(text: str) -> str:
    """Why a DicomEdit 4 script is refused, and how to write it in DicomEdit 6; lines count from 1."""
    hints = ['there is no version line, so this is a DicomEdit 4 script, which does not run here. '
             'To convert it, begin it with the line: version "6.6"']
    for number, line in enumerate(_without_comments(text).splitlines(), 1):
        outside = re.sub(r'"[^"\n]*"', '""', line)
        for pattern, hint in _CHANGED:
            if pattern.search(outside):
                hints.append(f"line {number}: {hint}")
    return "\n".join(hints)


def _without_comments(text: str) -> str:
    return re.sub(r"(?m)^[ \t]*//.*|(?<=[ \t\])])//.*$", "", text)
