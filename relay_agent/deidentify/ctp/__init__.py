"""RSNA CTP's scripts: DicomAnonymizer, DicomFilter and DicomPixelAnonymizer."""

from __future__ import annotations

from relay_agent.deidentify.ctp.anonymizer import Anonymizer
from relay_agent.deidentify.ctp.filters import Filter
from relay_agent.deidentify.ctp.pixels import PixelAnonymizer


def parse(text: str, name: str, lookup: str | None = None) -> Anonymizer:
    """An anonymiser script, XML or properties, with the text of its lookup table. Raises ScriptError."""
    return Anonymizer(text, name, lookup)


def parse_filter(text: str, name: str) -> Filter:
    """A filter: objects for which it is not true are rejected. Raises ScriptError."""
    return Filter(text, name)


def parse_pixels(text: str, name: str) -> PixelAnonymizer:
    """Signatures with the regions to be painted over. Raises ScriptError."""
    return PixelAnonymizer(text, name)
