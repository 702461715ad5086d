"""PS3.15 annex E as data: what happens to which attribute, and which private attributes are safe.

The files beside this module say which edition they were written from.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

EDITION = "2026d"
CURVES, OVERLAYS, OVERLAY_COMMENTS = 0x50000000, 0x60003000, 0x60004000  # rows for repeating groups
_SOP_CLASSES = "1.2.840.10008.5.1.4."


class Row(NamedTuple):
    """The action of the Basic Profile, such as ``X/Z/D``, and those of options by their words: ``K`` or ``C``."""

    basic: str
    options: dict[str, str]


@lru_cache(1)
def attributes() -> dict[int, Row]:
    """Table E.1-1 by tag; the repeating groups have the tags of their first group (50xx as a whole: CURVES)."""
    table = {}
    for tag, basic, *words in _lines("attributes.tsv"):
        options: dict[str, str] = {}
        for word in words[0].split() if words else ():
            option, _, action = word.partition(":")
            if option == "dates":
                options |= {"retain-full-dates": "K", "retain-modified-dates": "C"}
            else:
                options[option] = action or ("C" if option.startswith("clean") else "K")
        table[int(tag.replace("x", "0"), 16)] = Row(basic, options)
    return table


def row_tag(tag: int) -> int:
    """The tag of the row that rules a public tag, whether there is one or not.

    Overlay planes go as a whole: one without its data would not be valid, and its labels are text as well.
    """
    high = tag >> 24
    if high == 0x50:
        return CURVES
    if high == 0x60:
        return OVERLAY_COMMENTS if tag & 0xFFFF == 0x4000 else OVERLAYS
    return tag


@lru_cache(1)
def types() -> dict[str, dict[int, str]]:
    """By SOP Class UID the Type, 1 or 2, that attributes with a combined action have at the first level."""
    found = {}
    for classes, types_ in _lines("types.tsv"):
        by_tag = {int(tag, 16): type_ for tag, _, type_ in (word.partition("=") for word in types_.split())}
        for sop_class in classes.split():
            found[_SOP_CLASSES + sop_class] = by_tag
    return found


@lru_cache(1)
def safe_private() -> frozenset[tuple[int, str, int]]:
    """Private attributes that may stay with retain-safe-private: group, creator, low byte of the element."""
    safe: set[tuple[int, str, int]] = set()
    for group, creator, elements in _lines("safe_private.tsv"):
        for word in elements.split():
            first, _, last = word.partition("-")
            safe.update((int(group, 16), creator, low) for low in range(int(first, 16), int(last or first, 16) + 1))
    return frozenset(safe)


def resolve(basic: str, type_: str | None) -> str:
    """One action of a combined one: by the attribute's Type (``1``, ``2``, ``3``), or what is valid in every IOD.

    PS3.15 Table E.1-1a: X/Z/D is X unless Z (Type 2) or D (Type 1) is required to keep the object valid.
    """
    actions = basic.rstrip("*").split("/")
    if type_ == "3":
        return actions[0]
    if type_ == "2" and "Z" in actions:
        return "Z"
    return actions[-1]


def _lines(name: str) -> Iterator[list[str]]:
    text = (files(__package__) / name).read_text(encoding="ascii")
    return (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
