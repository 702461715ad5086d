"""Which fields of a header identify, what they held, and how the same is recognised elsewhere in the texts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

# What a field is, by its label (any case, anywhere in it unless anchored). Seen on VB17 to XA by the public
# anonymisers (suspect, Yarra, TwixMRIAnonymizer) or in files; wider than any of their lists, so that what a new
# version adds is caught rather than missed.
_KINDS = {
    "name": r"patients?_?name|patientquadruple|patientregistrationdata|otherpatient|personname",
    "id": r"patients?_?id(?!e|l)|accessionn|issuerofpatient|admissionid|studyid$",
    "birth": r"birth",
    "age": r"patients?_?age",
    "sex": r"patients?_?sex|patientgender",
    "weight": r"patients?_?weight",
    "height": r"patients?_?(height|size)",
    "physician": r"physician|operatorsname|radiologist|technologist",
    "institution": r"institution|hospital|stationname",
    "device": r"deviceserial|serialn(umber|o\b)",
    "exam": r"loids?(4\w+)?$|exammemoryuid|^t?(patient|study|series)$|studydate|seriesdate|acquisitiondate|examdate",
    "description": r"studydesc|imagecomment|patients?_?comment|commentsontheperformed|medicalalert|allerg|"
                   r"requestedprocedure|additionalpatient",
}
NUMBERS = frozenset({"age", "sex", "weight", "height"})  # too common to be looked for outside their own fields
IN_PLACE = NUMBERS | {"description", "other"}
KEEPABLE = NUMBERS | {"physician", "institution", "device", "description"}
# Whatever else is said of the patient, but for how he lies. A version that nobody has seen may have it.
_OTHER = re.compile(r"patient(?!s?_?(?:pos|orient|direction|table|support|gap|entry))", re.IGNORECASE)
_KIND = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in _KINDS.items()), re.IGNORECASE)

# A UID, whoever made it. Shorter ones are classes and versions; DICOM's own root names nothing of a patient.
UID = re.compile(rb"(?<![\d.])(?!1\.2\.840\.10008\.)[012](?:\.\d+){5,}(?![\d.]*\d)")
SHORTEST_UID = 20
_DATE = re.compile(rb"(?<!\d)((?:19|20)\d\d)(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?=\d{9}(?!\d)|\d{14}|(?!\d))")
_BLANK = re.compile(rb"[xX\W_]*|[0\W_]*(?:[eE][0\W_]+)?|[Y\W_]*|(?:YARRA)+\s*|true|false")
_NUMBER = re.compile(rb"[-+]?\d[\d.]*(?:[eE][-+]?\d+)?")
_PARTS = re.compile(rb"[\^,;=\s\\/]+")


@lru_cache(4096)
def kind(label: str) -> str:
    """What a field with this label holds; nothing when it does not identify."""
    found = _KIND.search(label)
    if found is None:
        return "other" if _OTHER.search(label) else ""
    return found.lastgroup or ""


def blank(value: bytes) -> bytes:
    """As long as the value, and without it: zeros for digits where it has no letters, so that it stays a number."""
    if not _NUMBER.fullmatch(value) and re.search(rb"[^\d\s._:+-]", value):
        return b"x" * len(value)
    return re.sub(rb"\d", b"0", value)


def is_blank(value: bytes) -> bool:
    """Whether it holds nothing, or what anonymisers leave there."""
    return _BLANK.fullmatch(value) is not None


def forms(kind: str, value: bytes) -> set[bytes]:
    """A value and what else gives it away: parts of a name, a date written otherwise, the number in an identifier."""
    value = value.strip()
    found = {value}
    if kind in ("name", "physician"):
        found.update(_PARTS.split(value))
    if kind in ("name", "birth", "exam"):
        found.update(dates(value))
    if kind == "exam":
        found.update(re.findall(rb"\d{7,}", value))
    return {form for form in found if len(form) >= 3 and not is_blank(form)}


def dates(value: bytes) -> set[bytes]:
    """The dates in a value or a UID, as they are usually written."""
    found: set[bytes] = set()
    for year, month, day in _DATE.findall(value):
        found.update((year + month + day, b"-".join((year, month, day)), b".".join((day, month, year)),
                      b"/".join((month, day, year)), b"/".join((day, month, year))))
    return found


class Needles:
    """What is looked for in texts: ``quoted`` within quotes, ``bare`` outside them, there as whole words only."""

    def __init__(self, values: Iterable[bytes]) -> None:
        self.values = tuple(sorted(set(values), key=lambda value: (-len(value), value)))
        self.quoted = _any(self.values)
        # Outside quotes a short number is a value of the protocol that only happens to be the same.
        self.bare = _any(tuple(value for value in self.values if not value.isdigit() or len(value) >= 8), words=True)

    def present(self, text: bytes) -> Needles:
        """Those that a text holds at all: most texts hold few, and these are found faster."""
        lower = text.lower()
        return Needles(value for value in self.values if value.lower() in lower)

    def plain(self, block: bytes) -> bool:
        """Whether a block of binary data holds one of those that nothing holds by chance."""
        lower = block.lower()
        return any(value.lower() in lower for value in self.values if len(value) >= (8 if value.isdigit() else 6))


@lru_cache(64)
def _any(values: tuple[bytes, ...], words: bool = False) -> re.Pattern[bytes]:
    return re.compile(b"|".join(_pattern(value, words) for value in values) or rb"(?!)", re.IGNORECASE)


def _pattern(value: bytes, word: bool) -> bytes:
    if value.isdigit():
        return rb"(?<!\d)%s(?!\d)" % value
    if len(value) >= 6 and not word:
        return re.escape(value)
    return rb"(?<![0-9A-Za-z\x80-\xff])%s(?![0-9A-Za-z\x80-\xff])" % re.escape(value)
