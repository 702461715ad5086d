"""DicomEdit 6 (6.0 to 6.6), XNAT's anonymisation language, as its engine 6.6.0 behaves.

Deliberate differences are listed with their recorded cases in docs/dicomedit.md.
"""

from __future__ import annotations

from relay_agent.deidentify.dicomedit.convert import conversion, is_dicomedit4
from relay_agent.deidentify.dicomedit.engine import DicomEdit


def parse(text: str, name: str, lookup: str | None = None) -> DicomEdit:
    """A script from its text and, where it uses lookup[], the text of its table.

    Raises :class:`relay_agent.deidentify.script.ScriptError` with line, column and what was expected.
    """
    return DicomEdit(text.removeprefix("\ufeff"), name, lookup)


__all__ = ["DicomEdit", "conversion", "is_dicomedit4", "parse"]
