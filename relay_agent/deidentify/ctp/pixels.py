"""The DicomPixelAnonymizer of CTP: ``{ filter } (x,y,w,h)(x,y,w,h)``, the first filter that is true paints.

Any other text may stand between them. Negative x and y count from the right and the lower edge. CTP paints one row more
than h says; so does this, and one column more. An object that no filter takes goes on as it is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from relay_agent.dataset import PIXELS, Dataset
from relay_agent.deidentify.ctp.filters import Parser, Test, holds
from relay_agent.deidentify.script import Context, Failed, Finding, ScriptError
from relay_agent.instance import File

_FLOAT_PIXELS = (0x7FE00008, 0x7FE00009)
_ROWS, _COLUMNS = 0x00280010, 0x00280011
_EXPRESSION = re.compile(r"\{([^{}]*)\}")
_BRACKETS = re.compile(r"\(([^()]*)\)|\(\s*-?\d+\s*,|[{}]")  # the last two are half a region and half a filter
_REGION = re.compile(r"\s*(-?\d{1,6})\s*,\s*(-?\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*")

Region = tuple[int, int, int, int]


class Signature(NamedTuple):
    """One kind of object and what is painted over in it."""

    test: Test
    regions: tuple[Region, ...]
    line: int


class PixelAnonymizer:
    """One script of signatures."""

    language = "CTP DicomPixelAnonymizer"

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self._text = text
        self._findings: list[Finding] = []
        self._signatures = self._parse(text.removeprefix("\ufeff"))

    def __reduce__(self) -> tuple[type[PixelAnonymizer], tuple[str, str]]:
        """Read again where it arrives."""
        return PixelAnonymizer, (self._text, self.name)

    def _parse(self, text: str) -> list[Signature]:
        found = list(_EXPRESSION.finditer(text))
        if not found:
            raise ScriptError("the script has no signature; { filter } (x,y,width,height) is expected")
        if _regions(text, 0, found[0].start()):
            raise ScriptError("{ filter } is expected before the first region", *_place(text, 0))
        signatures = []
        for one, after in zip(found, [*(match.start() for match in found[1:]), len(text)], strict=True):
            place = _place(text, one.start(1))
            parser = Parser(one[1], place)
            test = parser.parse()
            self._findings += parser.findings
            regions = _regions(text, one.end(), after)
            if not regions:
                self._findings.append(Finding("a signature without regions: what it takes is never painted", place[0]))
            signatures.append(Signature(test, regions, place[0]))
        return signatures

    def apply(self, file: File, context: Context) -> None:
        """Paint what the first fitting signature says. Raises :class:`Failed`."""
        context.rule = self.name
        try:
            for signature in self._signatures:
                if holds(signature.test, file.dataset, file.meta):
                    context.rule = f"{self.name} line {signature.line}"
                    if signature.regions:
                        _paint(file, signature.regions)
                    return
        except Failed as error:
            if error.rule:
                raise
            raise Failed(str(error), context.rule) from None

    def findings(self) -> list[Finding]:
        """What the author should know."""
        return list(self._findings)

    def touches(self) -> set[int]:
        """The pixel data."""
        return {PIXELS}


def _paint(file: File, regions: tuple[Region, ...]) -> None:
    if PIXELS in file.dataset:
        from relay_agent.deidentify.pixels import paint  # noqa: PLC0415 - numpy comes with it

        paint(file, _rectangles(file.dataset, regions))
    elif any(tag in file.dataset for tag in _FLOAT_PIXELS):
        raise Failed("pixels of type float cannot be painted over")


def _regions(text: str, start: int, end: int) -> tuple[Region, ...]:
    """The regions in a piece of the script; between them may be any text, as CTP's own library has it."""
    regions = []
    for found in _BRACKETS.finditer(text, start, end):
        inner = found[1] if found[1] is not None else ""
        region = _REGION.fullmatch(inner)
        if region is not None:
            x, y, width, height = map(int, region.groups())
            regions.append((x, y, width, height))
        elif found[1] is None or inner.count(",") == 3 or re.fullmatch(r"[\d\s,.+-]*,[\d\s,.+-]*", inner):
            raise ScriptError("a region is expected as (x,y,width,height), whole numbers, or { filter }; CTP would "
                              "skip this", *_place(text, found.start()))
    return tuple(regions)


def _place(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n") + 1, len(before) - before.rfind("\n")


def _rectangles(data: Dataset, regions: tuple[Region, ...]) -> list[Region]:
    """Left, top, right and bottom, the last two exclusive."""
    rows, columns = data.numbers(_ROWS), data.numbers(_COLUMNS)
    if not rows or not columns:
        raise Failed("the image has no rows and columns")
    height, width = int(rows[0]), int(columns[0])
    out = []
    for x, y, w, h in regions:
        left, top = max(x + width if x < 0 else x, 0), max(y + height if y < 0 else y, 0)
        right, bottom = min(left + w + 1, width), min(top + h + 1, height)
        if left < right and top < bottom:
            out.append((left, top, right, bottom))
    return out
