"""Header: the identifying elements of a received instance, for staging, identification and routing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.tag import Tag

from relay_agent.charset import Undecodable, codecs
from relay_agent.dataset import TEXT, Broken, Dataset
from relay_agent.dicom import HEADER, SERIES, SOP, STUDY, NotDICOM
from relay_agent.instance import File

_PIXELS = 0x7FE00000
_FIRST = 2**16  # most headers end before this byte


def read_header(path: Path, tags: Iterable[str] = ()) -> dict[str, str]:
    """Values of an instance's identifying elements, decoded, as ``{"GGGGEEEE": text}``; absent ones left out.

    Reads what stands before the pixel data. :class:`NotDICOM` when the data set cannot be read or has no Study, Series
    or SOP Instance UID, ``OSError`` when the file cannot.
    """
    wanted = sorted({int(tag, 16) for tag in (*HEADER, *tags)})
    data = _parsed(path)
    values = _read(data, wanted) if data is not None else _leniently(path, wanted)
    for tag, what in ((STUDY, "Study Instance UID"), (SERIES, "Series Instance UID"), (SOP, "SOP Instance UID")):
        if not values.get(tag):
            raise NotDICOM(f"the data set has no {what}")
    return values


def _parsed(path: Path) -> Dataset | None:
    with path.open("rb", buffering=0) as file:
        start = file.read(_FIRST)
        if start[128:132] != b"DICM":
            raise NotDICOM("there is no DICOM preamble (PS3.10 section 7.1)")
        try:
            return File.parse(start, _PIXELS).dataset
        except Broken:
            if len(start) == os.fstat(file.fileno()).st_size:
                return None
    try:
        return File.read(path, _PIXELS).dataset
    except Broken:
        return None


def _read(data: Dataset, wanted: Iterable[int]) -> dict[str, str]:
    found = {}
    for tag in wanted:
        element = data.get(tag)
        if element is None:
            continue
        if element.vr in TEXT or element.vr == "UN":
            try:
                text = data.text(tag) or ""
            except Undecodable:  # rules may still match what can be read
                text = element.value.decode((codecs(data.charset) or ("ascii",))[0], "replace")
            found[f"{tag:08X}"] = text.strip(" \0")
        else:
            found[f"{tag:08X}"] = "\\".join(str(number) for number in data.numbers(tag))
    return found


def _leniently(path: Path, wanted: Iterable[int]) -> dict[str, str]:
    """pydicom reads some files that are not as they should be; that is good enough to say whose they are."""
    try:
        data = dcmread(path, stop_before_pixels=True, specific_tags=[Tag(tag) for tag in (0x00080005, *wanted)])
        return {f"{element.tag:08X}": _text(element.value) for element in data}
    except InvalidDicomError:
        raise NotDICOM("there is no DICOM preamble (PS3.10 section 7.1)") from None
    except OSError:  # says nothing of the instance
        raise
    except Exception as error:  # whatever a broken file makes the parser do, it must not stop the others
        raise NotDICOM(f"the data set cannot be read ({type(error).__name__})") from None


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue":
        return "\\".join(str(part) for part in value)
    return "" if value is None else str(value)
