"""The DicomPixelAnonymizer of CTP: ``{ filter } (x,y,w,h)(x,y,w,h)``, the first filter that is true paints.

Negative x and y count from the right and the lower edge. CTP paints one row more than h says; so does this, and one
column more. An object that no filter takes goes on as it is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from relay_agent.dataset import PIXELS, Dataset
from relay_agent.deidentify.ctp.filters import Parser, Test, holds
from relay_agent.deidentify.script import Context, Failed, Finding, ScriptError
from relay_agent.instance import File

_ROWS, _COLUMNS = 0x00280010, 0x00280011
_SPACE = re.compile(r"(?:\s|//[^\n]*(?:\n|$))*")
_EXPRESSION = re.compile(r"\{([^{}]*)\}")
_REGION = re.compile(r"\(\s*(-?\d{1,6})\s*,\s*(-?\d{1,6})\s*,\s*(\d{1,6})\s*,\s*(\d{1,6})\s*\)")

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
        signatures: list[Signature] = []
        position = _skip(text, 0)
        while position < len(text):
            found = _EXPRESSION.match(text, position)
            if found is None:
                raise ScriptError("{ filter } is expected", *_place(text, position))
            parser = Parser(found[1], _place(text, found.start(1)))
            test, regions, line = parser.parse(), [], _place(text, position)[0]
            self._findings += parser.findings
            position = _skip(text, found.end())
            while text[position:position + 1] == "(":
                region = _REGION.match(text, position)
                if region is None:
                    raise ScriptError("a region is expected as (x,y,width,height), whole numbers; CTP would skip it",
                                      *_place(text, position))
                x, y, width, height = map(int, region.groups())
                regions.append((x, y, width, height))
                position = _skip(text, region.end())
            if not regions:
                self._findings.append(Finding("a signature without regions: what it takes is never painted", line))
            signatures.append(Signature(test, tuple(regions), line))
        if not signatures:
            raise ScriptError("the script has no signature; { filter } (x,y,width,height) is expected")
        return signatures

    def apply(self, file: File, context: Context) -> None:
        """Paint what the first fitting signature says. Raises :class:`Failed`."""
        context.rule = self.name
        try:
            for signature in self._signatures:
                if holds(signature.test, file.dataset, file.meta):
                    context.rule = f"{self.name} line {signature.line}"
                    if signature.regions and PIXELS in file.dataset:
                        from relay_agent.deidentify.pixels import paint  # noqa: PLC0415 - with numpy

                        paint(file, _rectangles(file.dataset, signature.regions))
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


def _skip(text: str, position: int) -> int:
    """Behind blanks and comments; CTP does not know comments here and paints the regions in them."""
    found = _SPACE.match(text, position)
    end = found.end() if found is not None else position
    hidden = re.search(r"[({]", text[position:end])
    if hidden is not None:
        raise ScriptError("CTP takes no notice of the // here and uses what stands behind it; remove it",
                          *_place(text, position + hidden.start()))
    return end


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
