"""What a command can see: the object as it came, at the level where it runs, while another is being made of it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING

from relay_agent import charset
from relay_agent.dataset import CHARSET, TEXT, Dataset, Element, show
from relay_agent.deidentify.script import Context, Failed
from relay_agent.instance import File

if TYPE_CHECKING:
    from relay_agent.deidentify.ctp.compiler import Rule

_ONE_TEXT = frozenset({"LT", "ST", "UR", "UT"})


class Level:
    """A data set or an item: what it becomes (``live``), and the elements it came with (``before``)."""

    __slots__ = ("before", "charset", "live", "up")

    def __init__(self, live: Dataset, up: Level | None = None) -> None:
        self.live = live
        self.up = up
        self.before: dict[int, Element] = {element.tag: element for element in live}
        declared = self.before.get(CHARSET)
        self.charset: bytes = declared.value if declared is not None else up.charset if up is not None else b""

    def text(self, tag: int) -> str | None:
        """The value as CTP reads it: values joined by a backslash, numbers in decimal; None for absent or a sequence.

        Raises :class:`Failed` for what has no text; CTP would write question marks or nothing instead.
        """
        element = self.before.get(tag)
        if element is None or element.vr == "SQ":
            return None
        if not element.size:
            return ""
        if element.vr in TEXT:
            try:
                text = charset.decode(element.value.rstrip(b" \0"), element.vr, self.charset)
            except charset.Undecodable:
                raise Failed(f"{show(tag)} is no text in its character set") from None
            if element.vr in _ONE_TEXT or "\\" not in text:
                return text.strip(" ")
            return "\\".join(part.strip(" ") for part in text.split("\\"))
        if element.vr in _NUMBER:
            return "\\".join(map(_NUMBER[element.vr], self.live.numbers_of(element)))
        raise Failed(f"{show(tag)} has binary content (VR {element.vr}), which cannot be read as text")

    def creator(self, tag: int) -> str:
        """The private creator of an element, in upper case; empty without one."""
        element = self.before.get(tag & 0xFFFF0000 | tag >> 8 & 0xFF)
        return element.value.strip(b" \0").decode("latin-1").upper() if element is not None else ""

    def private(self, group: int, creator: str, number: int) -> int | None:
        """The tag of a private element; number -1 is the creator's own element. None without such a creator."""
        for block in range(0x10, 0x100):
            element = self.before.get(group << 16 | block)
            if element is not None and element.value.strip(b" \0").decode("latin-1").upper() == creator:
                return group << 16 | (block if number < 0 else block << 8 | number)
        return None


class State:
    """One object under a script: where the script is (``level``, ``tag``), and what it may ask."""

    __slots__ = ("context", "file", "level", "levels", "lookup", "process", "root", "rules", "tag")

    def __init__(self, file: File, context: Context, root: Level, lookup: Mapping[str, str] | None,
                 rules: Mapping[int, Rule], process: Callable[[State], None]) -> None:
        self.file = file
        self.context = context
        self.root = self.level = root
        self.tag = 0
        self.lookup = lookup
        self.rules = rules  # of the outermost level, for the third argument of @hashuid
        self.process = process  # the items of the sequence ``tag``
        self.levels: dict[int, Level] = {}  # of items that @process has changed, by the identity of the item

    def first_item(self, level: Level, tag: int) -> Level | None:
        """The first item of a sequence, as it came; None without one."""
        element = level.before.get(tag)
        items = level.live.items_of(element) if element is not None else ()
        return (self.levels.get(id(items[0])) or Level(items[0], level)) if items else None


def meta_text(meta: Dataset, tag: int) -> str | None:
    """The value of an element of the File Meta Information, as it came."""
    return Level(meta).text(tag)


def _double(number: float) -> str:
    """Java's Double.toString: as Python's, but with a power of ten from 10**7 and below 10**-3."""
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    if not number or 1e-3 <= abs(number) < 1e7:
        return repr(number)
    sign, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    rest = "".join(map(str, digits[1:])) or "0"
    return f"{'-' * sign}{digits[0]}.{rest}E{int(exponent) + len(digits) - 1}"


def _float(number: float) -> str:
    """Java's Float.toString: the shortest decimal that is the same number in four bytes."""
    texts = (f"{number:.{digits}g}" for digits in range(1, 10))
    return _double(next((float(text) for text in texts if _four(float(text)) == _four(number)), number))


def _four(number: float) -> bytes:
    try:
        return struct.pack("<f", number)
    except OverflowError:
        return b""


def _integer(number: float) -> str:
    return str(int(number))


_NUMBER: dict[str, Callable[[float], str]] = {
    "US": _integer, "SS": _integer, "UL": _integer, "SL": _integer, "UV": _integer, "SV": _integer,
    "FL": _float, "FD": _double}
