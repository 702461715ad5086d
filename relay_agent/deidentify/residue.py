"""The last line of defence: what identified the patient before is searched in everything that would leave the box.

Whatever the scripts did, :func:`identifiers` of the original are searched by :func:`search` in every value of the
result: all levels, private elements, text in any character set, and binary values as bytes (ASCII, UTF-16, and as the
original was stored). A find quarantines the shipment; :mod:`relay_agent.deidentify.forms` says what counts as one and
what is too common to. What lies within a label that the project assigned is none.

Not found is what is compressed (PDF streams), drawn in pixels, misspelt, or in a binary value of more than 1 MiB.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache

from relay_agent import charset
from relay_agent.dataset import PIXELS, TEXT, Dataset, Element, Where, show, vr_of
from relay_agent.deidentify.forms import fold, forms, squeeze, squeezed, stored_forms

PATIENT = frozenset({  # what is searched by default; the project may name more
    0x00080050, 0x00100010, 0x00100020, 0x00100030, 0x00101000, 0x00101001, 0x00101005, 0x00101040, 0x00101050,
    0x00101060, 0x00101090, 0x00102154, 0x00102155, 0x00102297, 0x00380010, 0x00380060, 0x00402016, 0x00402017})
BINARY_LIMIT = 2**20  # larger binary values are images, spectra or curves
_DOCUMENT = 0x00420011
_PIXELS = 0x7FE0
_TERMS = frozenset({0x00080008, 0x00089007, 0x00180015})  # PERFUSION, HEAD: in these a name alone says nothing
_Value = tuple[int, str, bytes, str | None]  # tag, VR, as stored, decoded
_NUMERIC = frozenset({"DS", "IS", "DA", "TM", "DT", "AS"})


@dataclass(frozen=True, slots=True)
class Residue:
    """An identifier that is still there: where, and the tag that it came from (0: text that nobody can read)."""

    path: str
    tag: int
    source: int

    def __str__(self) -> str:
        """For people; never the value."""
        what = f"the value of {show(self.source)} of the original" if self.source else "text that cannot be decoded"
        return f"{self.path} holds {what}"


class Identifiers:
    """What identified a patient, compiled to be searched. The same values give the same object again."""

    def __init__(self, values: tuple[_Value, ...], allowed: tuple[str, ...]) -> None:
        self._values, self._labels = values, allowed
        self._allowed = [fold(label) for label in allowed if label.strip()]
        self._whole: dict[str, int] = {}
        self._raw: dict[bytes, int] = {}
        needles: dict[str, int] = {}
        patterns: set[tuple[int, str, bool]] = set()  # tag, pattern, whether it says little in numeric values
        for tag, vr, stored, text in values:
            for part in stored_forms(vr, stored, text):
                if len(tight := squeeze(part)) >= 4:
                    self._raw.setdefault(tight, tag)
            for value in (text or "").split("\\"):
                for needle, pattern, weak in forms(vr, value):
                    if pattern:
                        needles.setdefault(needle, tag)
                        patterns.add((tag, pattern, weak))
                    else:
                        self._whole.setdefault(needle, tag)
        ascii_needles = {needle.encode() for needle in (*needles, *self._whole) if needle.isascii()}
        self._needles = tuple(sorted(ascii_needles | set(self._raw)))
        ordered = sorted(patterns, key=lambda one: (-len(one[1]), one))
        self._sources = [tag for tag, _, _ in ordered]
        groups = [f"(?P<g{number}>{pattern})" for number, (_, pattern, _) in enumerate(ordered)]
        strong = [group for group, (_, _, weak) in zip(groups, ordered, strict=True) if not weak]
        self._any = re.compile("|".join(groups)) if groups else None
        self._strong = re.compile("|".join(strong)) if strong else None

    def but(self, tags: Collection[int]) -> Identifiers:
        """The same without what some tags held."""
        return _compiled(tuple(value for value in self._values if value[0] not in tags), self._labels)

    def suspects(self, values: bytes) -> bool:
        """A quick look at many values at once, ASCII or binary: False says that nothing is in them."""
        tight = squeeze(values)
        return any(needle in tight for needle in self._needles)

    def in_text(self, text: str, vr: str) -> int | None:
        """The tag of the first identifier in a decoded value of a VR, or None."""
        folded = fold(text)
        if vr not in _NUMERIC and vr != "UI" and self._whole:
            for part in folded.split("\\"):
                if part.strip() not in self._allowed and (found := self._whole.get(squeezed(part))) is not None:
                    return found
        if vr == "UI":
            folded = folded.replace(".", "|")  # separates numbers, and nothing bridges it
        for label in self._allowed:
            folded = folded.replace(label, "|")
        pattern = self._strong if vr in _NUMERIC else self._any
        match = pattern.search(folded) if pattern is not None else None
        return self._source(match) if match is not None else None

    def in_bytes(self, value: bytes) -> int | None:
        """The tag of the first identifier in a binary value, or None."""
        if not self.suspects(value):
            return None
        tight = squeeze(value)
        for needle, tag in self._raw.items():
            if needle in tight:
                return tag
        if self._any is None:
            return None
        for text in (value.replace(b"\0", b"\n"), value.replace(b"\0", b"")):  # as it is, and UTF-16
            for match in self._any.finditer(fold(text.decode("latin-1"))):
                if len(squeezed(match.group())) > 3:  # three letters come about by chance in binary values
                    return self._source(match)
        return None

    def without(self, text: str) -> str | None:
        """The text with all identifiers cut out; None when it cannot be told what to cut."""
        if text.isascii() and not self.suspects(text.encode()):
            return text
        folded = fold(text)
        if any(squeezed(word) in self._whole for word in folded.split()):
            return "" if squeezed(folded) in self._whole else None  # too short to tell it from other words
        if self._any is None or self._any.search(folded) is None:
            return text
        if len(folded) != len(text):
            return None
        kept, start = [], 0
        for match in self._any.finditer(folded):
            kept.append(text[start:match.start()])
            start = match.end()
        return " ".join(" ".join([*kept, text[start:]]).split())

    def _source(self, match: re.Match[str]) -> int:
        return self._sources[int(str(match.lastgroup)[1:])]


def identifiers(dataset: Dataset, extra_tags: Collection[int] = (), allowed: Collection[str] = ()) -> Identifiers:
    """The identifiers of an original, from ``PATIENT`` and further tags at any level.

    ``allowed`` are labels that the project assigned: what lies within one is no find.
    """
    wanted = PATIENT.union(extra_tags) if extra_tags else PATIENT
    found: dict[_Value, None] = {}
    for item, element in _levels(dataset):
        if element.tag in wanted and element.size:
            vr = element.vr if element.vr in TEXT else vr_of(element.tag)
            stored = element.value.rstrip(b" \0")
            try:
                text: str | None = charset.decode(stored, vr, item.charset)
            except charset.Undecodable:
                text = None
            found[element.tag, vr, stored, text] = None
    return _compiled(tuple(found), tuple(allowed))


@lru_cache(64)
def _compiled(values: tuple[_Value, ...], allowed: tuple[str, ...]) -> Identifiers:
    return Identifiers(values, allowed)


def search(dataset: Dataset, identifiers: Identifiers, kept: Collection[int] = ()) -> list[Residue]:
    """Where identifiers of the original are still in a data set.

    ``kept`` are tags that the project keeps as they are: neither they nor what they held are looked at. Raises
    :class:`relay_agent.dataset.Broken` when a sequence cannot be read.
    """
    if kept:
        identifiers = identifiers.but(kept)
    values = [_behind_pixels(dataset)]
    for item, element in _levels(dataset):
        if element.tag not in kept and searched(element):
            value = element.value
            if element.vr in TEXT and (not value.isascii() or b"\x1b" in value):
                if _in_element(item, element, identifiers) is not None:
                    break
            else:
                values.append(value)
    else:
        if not identifiers.suspects(b"\n".join(values)):
            return []
    return list(_thorough(dataset, identifiers, kept))


def _thorough(dataset: Dataset, identifiers: Identifiers, kept: Collection[int]) -> Iterator[Residue]:
    for where, item, element in dataset.walk():
        if element.tag in kept or not searched(element) or item.items(element.tag):
            continue
        source = _in_element(item, element, identifiers)
        if source is not None:
            yield Residue(path_text(where, element.tag), element.tag, source)
    source = identifiers.in_bytes(_behind_pixels(dataset))
    if source is not None:
        yield Residue(f"{show(PIXELS)} behind its pixels", PIXELS, source)


def _behind_pixels(data: Dataset) -> bytes:
    """What native Pixel Data holds beyond the pixels that its header tells of."""
    element, frames = data.get(PIXELS), data.get(0x00280008)
    count = (frames.value.strip(b" \0") if frames is not None else b"") or b"1"
    if element is None or element.fragments or not count.isdigit():
        return b""
    bits = int(count[:12])
    for tag, default in ((0x00280010, 0), (0x00280011, 0), (0x00280100, 0), (0x00280002, 1)):
        bits *= int((data.numbers(tag) or (default,))[0])
    return bytes(element.view[(bits + 7) // 8:][:BINARY_LIMIT]) if bits else b""


def _in_element(item: Dataset, element: Element, identifiers: Identifiers) -> int | None:
    value = element.value
    vr = element.vr if element.tag not in _TERMS else "AS"
    if vr not in TEXT and vr != "UN":
        return identifiers.in_bytes(value)
    try:
        text = charset.decode(value.rstrip(b" \0"), vr, item.charset)
    except charset.Undecodable:
        return identifiers.in_bytes(value) if vr == "UN" else identifiers.in_bytes(value) or 0
    if vr == "UN" and not text.isprintable():
        return identifiers.in_bytes(value)
    found = identifiers.in_text(text, vr)
    return identifiers.in_bytes(value) if found is None and "\0" in text else found  # UTF-16 by somebody's mistake


def searched(element: Element) -> bool:
    """Whether identifiers are looked for in a value: not in pixel data and in what is too large to be text."""
    if element.vr in TEXT or element.tag == _DOCUMENT:
        return True
    return element.vr != "SQ" and element.tag >> 16 != _PIXELS and element.size <= BINARY_LIMIT


def _levels(dataset: Dataset) -> Iterator[tuple[Dataset, Element]]:
    """All elements but sequences."""
    for element in dataset:
        items = dataset.items(element.tag) if element.vr in {"SQ", "UN"} else ()
        for item in items:
            yield from _levels(item)
        if not items:
            yield dataset, element


def path_text(where: Where, tag: int) -> str:
    """A place as people and DicomEdit write it: ``(0040,0275)[0]/(0040,0007)``."""
    return "/".join([*(f"{show(sequence)}[{index}]" for sequence, index in where), show(tag)])
