"""Durations, sizes and rates as people write them, and back again.

The configuration says ``"5 min"``, ``"2 GiB"`` or ``"24 Mbit/s"``; the code counts seconds, bytes and
bytes per second.
"""

from __future__ import annotations

import re

_DURATION = {"ms": 0.001, "s": 1, "min": 60, "h": 3600, "d": 86400}
_SIZE = {"B": 1, "kB": 1000, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
         "TiB": 2**40}
_RATE = {"B/s": 1, "kB/s": 1000, "MB/s": 10**6, "kbit/s": 125, "Mbit/s": 125_000, "Gbit/s": 125_000_000}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z/]+)\s*", re.ASCII)


def _parse(text: object, table: dict[str, float], example: str) -> float:
    found = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    if not found or found[2] not in table:
        raise ValueError(f'write a number and a unit of {", ".join(table)}, for example "{example}"')
    return float(found[1]) * table[found[2]]


def duration(text: object) -> float:
    """Seconds in ``"90 s"``, ``"5 min"``, ``"12 h"``, ``"7 d"``; ``ValueError`` says what is expected."""
    return _parse(text, dict(_DURATION), "5 min")


def size(text: object) -> int:
    """Bytes in ``"64 MiB"``, ``"2 GB"``; ``ValueError`` says what is expected."""
    return int(_parse(text, dict(_SIZE), "2 GiB"))


def rate(text: object) -> float:
    """Bytes per second in ``"24 Mbit/s"``, ``"3 MB/s"``; ``ValueError`` says what is expected."""
    return _parse(text, dict(_RATE), "24 Mbit/s")


def show_size(count: float) -> str:
    """A byte count for people: three figures and a decimal unit."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 999.5 * factor else f"{count / factor:.0f} {unit}"
    return f"{count:.0f} B"


def show_duration(seconds: float) -> str:
    """A duration for people, in its one or two largest units."""
    whole = int(max(seconds, 0))
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    shown = [f"{count} {unit}" for count, unit in parts if count][:2]
    return " ".join(shown) or "0 s"
