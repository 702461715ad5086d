"""Java's properties format, which CTP's older scripts and its lookup tables have (java.util.Properties.load)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from relay_agent.deidentify.script import ScriptError

_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|(?s:.)|$)")
_CONTROL = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}
_BREAK = re.compile(r"\r\n|\n|\r")


class Entry(NamedTuple):
    """One entry: key and value without escapes, the line it starts on, and what stood between them ("=", ":", "")."""

    key: str
    value: str
    line: int
    separator: str


def _logical(text: str) -> Iterator[tuple[int, str]]:
    """Lines without comments and blank ones, those that end in a backslash joined with the next."""
    joined, first = "", 0
    for number, raw in enumerate(_BREAK.split(text), 1):
        line = raw.lstrip(" \t\f")
        if not first:
            if not line or line[0] in "#!":
                continue
            first = number
        joined += line
        if (len(line) - len(line.rstrip("\\"))) % 2:
            joined = joined[:-1]
            continue
        yield first, joined
        joined, first = "", 0
    if first:
        yield first, joined


def _plain(text: str, line: int) -> str:
    def one(found: re.Match[str]) -> str:
        escape = found[1]
        if escape[:1] == "u":
            if len(escape) != 5:
                raise ScriptError("after \\u four hexadecimal digits are expected", line)
            return chr(int(escape[1:], 16))
        return _CONTROL.get(escape, escape)
    return _ESCAPE.sub(one, text) if "\\" in text else text


def entries(text: str) -> list[Entry]:
    """All entries in their order. Raises :class:`ScriptError`."""
    found = []
    for number, line in _logical(text):
        end = 0
        while end < len(line) and line[end] not in "=: \t\f":
            end += 2 if line[end] == "\\" else 1
        rest = line[end:].lstrip(" \t\f")
        separator = rest[:1] if rest[:1] in ("=", ":") else ""
        value = rest[len(separator):].lstrip(" \t\f")
        found.append(Entry(_plain(line[:end], number), _plain(value, number), number, separator))
    return found
