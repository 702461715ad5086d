"""What raw data and DICOM files say for :func:`relay_agent.kspace.match.match`."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from relay_agent.charset import Undecodable
from relay_agent.dataset import Broken, Dataset
from relay_agent.instance import File
from relay_agent.kspace import identity, protocol
from relay_agent.kspace.match import Raw, Series, Session
from relay_agent.kspace.twix import Check

_PIXELS = 0x7FE00000
_CSA_SERIES = 0x1020  # (0029,xx20) of SIEMENS CSA HEADER: the protocol, with tReferenceImage
_PLANNED = re.compile(rb'tReferenceImage\d+[ \t]*=[ \t]*"{1,2}([\d.]+)"')
_ADJUSTMENT = re.compile(r"Adj[A-Z]\w*")
_TIME = re.compile(r"(?:\d{8})?(\d\d)(\d\d)(\d\d(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Protocol:
    """What the header of the last measurement, the imaging scan, says; nothing of the patient."""

    version: str
    name: str
    scanner: str


def _last(path: Path, found: Check) -> dict[str, bytes]:
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return {name: text for name, _, text in protocol.texts(file, found.measurements[-1])}
    finally:
        os.close(file)


def describe(path: Path, found: Check) -> Protocol:
    """What kind of scan it was. Raises :class:`protocol.Unreadable`, ``OSError``."""
    by_name = _last(path, found)
    return Protocol(protocol.version(by_name), _value(by_name, "tProtocolName", "ProtocolName"),
                    _value(by_name, "ManufacturersModelName"))


def raw(path: Path, found: Check) -> Raw:
    """What raw data say of themselves. Raises :class:`protocol.Unreadable`, ``OSError``."""
    by_name = _last(path, found)
    frames = {_value({name: text}, "FrameOfReference", "tFrameOfReference") for name, text in by_name.items()}
    planned = {match[1].decode() for text in by_name.values() for match in _PLANNED.finditer(text)}
    repetition = re.search(rb"^alTR\[0\]\s*=\s*(\d+)", by_name.get("MeasYaps", b""), re.MULTILINE)
    return Raw(frozenset(frames - {""}), frozenset(planned), _value(by_name, "DeviceSerialNumber"),
               _value(by_name, "PatientID"), _value(by_name, "tProtocolName", "ProtocolName"),
               found.measurements[-1].first, int(repetition[1]) / 1e6 if repetition else 0.0)


def is_adjustment(protocol: str) -> bool:
    """Whether a protocol of this name is an adjustment of the scanner, which has no series, and no scan."""
    return _ADJUSTMENT.fullmatch(protocol) is not None


def _value(by_name: dict[str, bytes], *labels: str) -> str:
    for text in by_name.values():
        found = protocol.first(text, *labels)
        if found and not identity.is_blank(found):
            return found.decode("utf-8", "replace")
    return ""


@dataclass
class _Study:
    frames: set[str] = field(default_factory=set)
    images: set[str] = field(default_factory=set)
    serials: set[str] = field(default_factory=set)
    patients: set[str] = field(default_factory=set)
    names: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    numbers: dict[str, int] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)


def sessions(files: Iterable[Path]) -> list[Session]:
    """The sessions (by Study Instance UID) of DICOM files; what is none is passed over. Raises ``OSError``."""
    studies: dict[str, _Study] = defaultdict(_Study)
    for path in files:
        with suppress(Broken, Undecodable):
            data = File.read(path, _PIXELS).dataset
            if uid := _text(data, 0x0020000D):
                _take(studies[uid], data)
    return [Session(uid, frozenset(one.frames), frozenset(one.images), frozenset(one.serials), frozenset(one.patients),
                    tuple(Series(series, one.numbers.get(series, 0), frozenset(names), one.starts.get(series))
                          for series, names in one.names.items())) for uid, one in studies.items()]


def _take(study: _Study, data: Dataset) -> None:
    series, start = _text(data, 0x0020000E), seconds(_text(data, 0x00080032) or _text(data, 0x0008002A))
    for tag, values in ((0x00200052, study.frames), (0x00080018, study.images), (0x00181000, study.serials),
                        (0x00100020, study.patients), (0x00181030, study.names[series]),
                        (0x0008103E, study.names[series])):
        if value := _text(data, tag):
            values.add(value)
    if start is not None:
        study.starts[series] = min(start, study.starts.get(series, start))
    number = _text(data, 0x00200011)
    if number.isdecimal():
        study.numbers[series] = int(number)
    study.images |= _planned(data)


def _planned(data: Dataset) -> set[str]:
    return {match[1].decode() for element in data
            if element.tag >> 16 == 0x0029 and element.tag & 0xFF == _CSA_SERIES & 0xFF
            for match in _PLANNED.finditer(element.value)}


def planned(path: Path) -> set[str]:
    """SOP Instance UIDs of the images that a DICOM image was planned on, as its scanner's private protocol has them."""
    try:
        return _planned(File.read(path, _PIXELS).dataset)
    except (Broken, OSError):  # only one sign of several
        return set()


def _text(data: Dataset, tag: int) -> str:
    return (data.text(tag) or "").strip(" \0")


def seconds(text: str) -> float | None:
    """Seconds since midnight of a DICOM time or date and time (PS3.5 section 6.2: TM, DT)."""
    found = _TIME.match(text)
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else None
