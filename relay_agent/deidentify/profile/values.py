"""New values in the sense of PS3.15 annex E: dummies, and dates that were moved."""

from __future__ import annotations

import re
from datetime import date, timedelta

from relay_agent.dataset import TEXT

_DUMMIES = {"AS": b"000Y", "DA": b"19000101", "DS": b"0", "DT": b"19000101000000", "IS": b"0", "PN": b"Anonymous",
            "TM": b"000000", "UR": b"http://anonymous.invalid"}
_WIDTHS = {"AT": 4, "FD": 8, "FL": 4, "OD": 8, "OF": 4, "OL": 4, "OV": 8, "SL": 4, "SV": 8, "UL": 4, "UV": 8}
_DATE = re.compile(r"(\d{4})(\d{2})(\d{2})")
_DATETIME = re.compile(r"(\d{4})(\d{2})(\d{2})(?:\d{2}(?:\d{2}(?:\d{2}(?:\.\d{1,6})?)?)?)?(?:[+-]\d{4})?")
_TIMES = re.compile(r"[\d.: \\]*")


def dummy(vr: str) -> bytes:
    """A value that says nothing and is valid for its VR; UI and SQ have none."""
    return _DUMMIES.get(vr) or (b"ANONYMIZED" if vr in TEXT else bytes(_WIDTHS.get(vr, 2)))


def shifted(text: str, vr: str, days: int) -> str | None:
    """The values of a DA, DT or TM moved by days, their precision kept; None when one is no full date.

    A DT of a year or of a month alone cannot be moved by days.
    """
    if vr == "TM":
        return text if _TIMES.fullmatch(text) else None
    form = _DATETIME if vr == "DT" else _DATE
    moved = []
    for value in (part.strip(" ") for part in text.split("\\")):
        match = form.fullmatch(value)
        if match is None and value:
            return None
        try:
            day = date(*map(int, match.groups())) + timedelta(days) if match else None
        except (ValueError, OverflowError):
            return None
        moved.append(f"{day.year:04}{day:%m%d}{value[8:]}" if day else "")
    return "\\".join(moved)
