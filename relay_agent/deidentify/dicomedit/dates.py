"""Dates and times moved as DicomEdit moves them: what the text lacks counts as the middle of it, and stays lacking.

The days are the proleptic Gregorian calendar's, beyond the year 9999 too, which ``datetime`` cannot do.
"""

from __future__ import annotations

import re
from datetime import date

from relay_agent.deidentify.dicomedit.errors import Cannot

_DATE_TIME = re.compile("([0-9]{4})" + "([0-9]{2})?" * 5 + r"(\.[0-9]{1,6})?([+-][0-9]{4})?")
_UNITS = {"years": 365 * 86400, "days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_CYCLE = 146097  # days in 400 years


def shift(text: str, amount: int, units: str) -> str:
    """A date or date-time of any precision moved; fraction and zone stay. Raises :class:`Cannot`."""
    factor = _UNITS.get(units.lower())
    if factor is None:
        raise Cannot("the unit of a shift must be years, days, hours, minutes or seconds")
    found = _DATE_TIME.fullmatch(text)
    if found is None:
        raise Cannot("a value to be shifted is no date or date-time")
    parts = _calendar(_seconds(found) + amount * factor)
    out = ""
    for part, given in zip(parts, found.groups()[:6], strict=True):
        if given is None:
            break
        out += f"{part:0{4 if not out else 2}d}"
    else:
        out += found[7] or ""
    return out + (found[8] or "")


def seconds(text: str) -> int | None:
    """A date or date-time as seconds since the start of year 0, None when the text is none."""
    found = _DATE_TIME.fullmatch(text)
    return None if found is None else _seconds(found)


def _month_days(year: int, month: int) -> int:
    if month == 2:
        return 29 if year % 4 == 0 and (year % 100 or year % 400 == 0) else 28
    return 30 if month in (4, 6, 9, 11) else 31


def _seconds(found: re.Match[str]) -> int:
    """Since the start of year 0, missing parts filled with their middle."""
    year, month, day, hour, minute, second = (None if part is None else int(part) for part in found.groups()[:6])
    assert year is not None
    if month is not None and not 1 <= month <= 12:
        raise Cannot("a value to be shifted has no valid month")
    middle = (1, 0) if month is None else (_month_days(year, month) // 2 + 1, 12 * (_month_days(year, month) % 2))
    if hour is None:
        hour = 12 if day is not None else middle[1]
        filled = (0, 0)
    else:
        filled = (30, 0) if minute is None else (minute, 30)
    minute, second = filled[0], filled[1] if second is None else second
    day = middle[0] if day is None else day
    month = 7 if month is None else month
    if not (1 <= day <= _month_days(year, month) and hour < 24 and minute < 60 and second < 60):
        raise Cannot("a value to be shifted is no valid date or time")
    cycles, rest = divmod(year, 400)
    ordinal = cycles * _CYCLE + date(rest + 400, month, day).toordinal() - date(400, 1, 1).toordinal()
    return ((ordinal * 24 + hour) * 60 + minute) * 60 + second


def _calendar(moment: int) -> tuple[int, int, int, int, int, int]:
    ordinal, rest = divmod(moment, 86400)
    cycles, day = divmod(ordinal, _CYCLE)
    when = date.fromordinal(day + date(400, 1, 1).toordinal())
    year = when.year - 400 + cycles * 400
    if year < 0:
        raise Cannot("a shift leads to before the year 0")
    return year, when.month, when.day, rest // 3600, rest // 60 % 60, rest % 60
