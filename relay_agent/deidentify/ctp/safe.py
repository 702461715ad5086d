"""Private elements that ``keep.safeprivateelements`` keeps.

CTP has a table of its own inside; this one has only rows that both PS3.15 Table E.3.10-1 and what was seen of CTP's
choice allow (CTP removes SIEMENS MR HEADER and Philips MR Imaging DD 001, which PS3.15 lists). The rest is removed.
"""

from __future__ import annotations

_ROWS = """
7053 00 09        Philips PET Private Group
00E1 21           ELSCINT1
01E1 26 50        ELSCINT1
01F1 01 07 26 27  ELSCINT1
0019 23 24 27 9E  GEMS_ACQU_01
0025 07           GEMS_SERS_01
0043 27 39        GEMS_PARM_01
0045 01 02        GEMS_HELIOS_01
2001 03 04        Philips Imaging DD 001
"""


def _table() -> frozenset[tuple[int, str, int]]:
    rows: set[tuple[int, str, int]] = set()
    for row in _ROWS.strip().splitlines():
        numbers, creator = row[:18].split(), row[18:].strip().upper()
        rows.update((int(numbers[0], 16), creator, int(number, 16)) for number in numbers[1:])
    return frozenset(rows)


SAFE = _table()  # group, private creator in upper case, low byte of the element
