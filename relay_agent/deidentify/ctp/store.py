"""Values into a data set, or a refusal: CTP leaves the original value where it cannot store a new one."""

from __future__ import annotations

import re
import struct

from relay_agent import charset
from relay_agent.dataset import TEXT, Dataset, show, vr_of
from relay_agent.deidentify.script import Failed

_WHOLE = frozenset({"SL", "SS", "SV", "UL", "US", "UV"})
_REAL = frozenset({"FD", "FL"})
_FORMS = {vr: re.compile(form, re.ASCII) for vr, form in {
    "DA": r"(?:\d{4}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))?",
    "DS": r"(?:[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)?",
    "DT": r"(?:\d{4}(?:\d\d){0,5}(?:\.\d{1,6})?(?:[+-]\d{4})?)?",
    "IS": r"(?:[+-]?\d{1,11})?",
    "TM": r"[\d:.-]*",
    "UI": r"[\d.]{0,64}"}.items()}


def fits(vr: str, text: str) -> bool:
    """Whether a VR can hold a text, its character set aside."""
    if not text:
        return True
    parts = text.split("\\")
    if vr in _WHOLE:
        return all(re.fullmatch(r"[+-]?\d{1,20}", part, re.ASCII) for part in parts)
    if vr in _REAL:
        return all(part and _FORMS["DS"].fullmatch(part) for part in parts)
    form = _FORMS.get(vr)
    return vr in TEXT and (form is None or all(form.fullmatch(part.strip(" ")) for part in parts))


def put(data: Dataset, tag: int, vr: str, text: str) -> None:
    """Set an element to a text, several values joined by backslashes; private ones become LO, as in CTP.

    Raises :class:`Failed` when the VR or the character set cannot hold the text.
    """
    if tag >> 16 & 1:
        vr = "LO"
    elif text:
        text = text.rstrip("\\")
        if vr == "UN":
            vr = vr_of(tag)
    if not fits(vr, text):
        raise Failed(f"the new value of {show(tag)} is none that its VR {vr} can hold")
    try:
        if not text:
            empty(data, tag, vr)
        elif vr in _WHOLE:
            data.put_numbers(tag, vr, *map(int, text.split("\\")))
        elif vr in _REAL:
            data.put_numbers(tag, vr, *map(float, text.split("\\")))
        else:
            data.put_text(tag, text, vr)
    except charset.Undecodable:
        raise Failed(f"the new value of {show(tag)} has characters that the object's character set lacks") from None
    except (struct.error, OverflowError):
        raise Failed(f"the new value of {show(tag)} is too large for its VR {vr}") from None


def empty(data: Dataset, tag: int, vr: str) -> None:
    """Set an element to nothing."""
    if vr == "SQ":
        data.put_items(tag, ())
    else:
        data.put(tag, "LO" if tag >> 16 & 1 else vr, b"")
