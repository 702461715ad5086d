"""Which session and series raw data belong to: scored, never guessed.

Raw data name neither study nor series. What they share with DICOM: the Frame of Reference UID, the images on which the
slices were planned, the scanner's serial number, the patient where the vendor's tool left him in; and, for the series,
the protocol's name and the time. A frame of reference changes when a patient is registered or positioned anew, so a
session may have several; clocks differ, so the offset between imager and host is learnt from what has matched.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

FRAME, PLANNED, PATIENT, SERIAL, SERIES = 100, 60, 20, 10, 40
WORTH_SHOWING = SERIAL + PATIENT  # without a UID in common it is never matched
CLEAR = 40  # a winner is that far ahead, and no other shares a kind of UID that it does not
FRAME_EQUAL, ON_ITS_IMAGES = "frame of reference", "planned on its images"
BY_NAME_AND_TIME, BY_NAME_BEFORE = "series by name and time", "series by name, nearest before"
_DAY = 86_400.0
_NEAR = 2.0  # seconds; or one repetition time
_NEAREST = 900.0  # a series that began longer before is not the one that was running


@dataclass(frozen=True, slots=True)
class Raw:
    """What raw data say of themselves. Empty is unknown; what the vendor's tool replaced by x counts as empty."""

    frames: frozenset[str] = frozenset()
    planned_on: frozenset[str] = frozenset()  # SOP Instance UIDs (tReferenceImage)
    serial: str = ""
    patient: str = ""  # ID
    protocol: str = ""
    start: float | None = None  # of the first readout, seconds since midnight of the imager's clock
    repetition: float = 0.0  # seconds


@dataclass(frozen=True, slots=True)
class Series:
    """A DICOM series."""

    uid: str
    number: int
    names: frozenset[str]  # Protocol Name (0018,1030), Series Description (0008,103E)
    start: float | None = None  # least Acquisition Time (0008,0032), seconds since midnight


@dataclass(frozen=True, slots=True)
class Session:
    """A DICOM session: one study, or what the box takes for one session."""

    name: str
    frames: frozenset[str] = frozenset()
    images: frozenset[str] = frozenset()  # SOP Instance UIDs, also those that its images were planned on
    serials: frozenset[str] = frozenset()
    patients: frozenset[str] = frozenset()
    series: tuple[Series, ...] = ()


class State(StrEnum):
    """What is to be done with the raw data."""

    MATCHED = "matched"
    AMBIGUOUS = "ambiguous"  # a person decides between the candidates
    UNMATCHED = "unmatched"  # its DICOM may still come


@dataclass(frozen=True, slots=True)
class Candidate:
    """A session that raw data may belong to. The first of ``series`` is the one they are attached to."""

    session: str
    score: int
    reasons: tuple[str, ...]
    series: tuple[Series, ...] = ()

    @property
    def shares_uid(self) -> bool:
        """Whether a UID speaks for it; without one it is never matched."""
        return bool(_shared_uids(self))


@dataclass(frozen=True, slots=True)
class Match:
    """The result; candidates with the best first. ``series`` of the best is empty: attach at session level."""

    state: State
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Offset:
    """DICOM's clock minus the imager's, in seconds, from so many pairs that spread around it (median deviation)."""

    seconds: float
    pairs: int
    spread: float


def match(raw: Raw, sessions: Iterable[Session], offset: float = 0.0) -> Match:
    """Find the session and the series of raw data. ``offset``: see :func:`clock_offset`."""
    found = [one for session in sessions if (one := _candidate(raw, session, offset)) is not None]
    found.sort(key=lambda one: (-one.score, one.session))
    if not found:
        return Match(State.UNMATCHED)
    best, *others = found
    shared = _shared_uids(best)
    clear = shared and all(best.score - one.score >= CLEAR and _shared_uids(one) <= shared for one in others)
    return Match(State.MATCHED if clear else State.AMBIGUOUS, tuple(found))


def _shared_uids(one: Candidate) -> set[str]:
    return {FRAME_EQUAL, ON_ITS_IMAGES}.intersection(one.reasons)


def _candidate(raw: Raw, session: Session, offset: float) -> Candidate | None:
    if _contradict(raw.serial, session.serials) or _contradict(raw.patient, session.patients):
        return None
    points = {FRAME_EQUAL: FRAME * bool(raw.frames & session.frames),
              ON_ITS_IMAGES: PLANNED * bool(raw.planned_on & session.images),
              "patient ID": PATIENT * (raw.patient in session.patients),
              "serial number": SERIAL * (raw.serial in session.serials)}
    series, how = _series(raw, session.series, offset)
    score = sum(points.values())
    if score < WORTH_SHOWING:  # the same protocol at the same time of another day says nothing
        return None
    reasons = [name for name, value in points.items() if value]
    return Candidate(session.name, score + SERIES * (how == BY_NAME_AND_TIME), (*reasons, how) if how else
                     tuple(reasons), series)


def _contradict(ours: str, theirs: frozenset[str]) -> bool:
    return bool(ours and theirs and ours not in theirs)


def _series(raw: Raw, series: Sequence[Series], offset: float) -> tuple[tuple[Series, ...], str]:
    """The series of the raw data, lowest number first (magnitude, phase, and derived ones share one), and how sure."""
    start = raw.start
    if not raw.protocol or start is None:
        return (), ""
    named = [(difference(one.start, start + offset), one) for one in series
             if raw.protocol in one.names and one.start is not None]
    near = [one for gap, one in named if abs(gap) <= max(_NEAR, raw.repetition)]
    if near:
        return tuple(sorted(near, key=lambda one: one.number)), BY_NAME_AND_TIME
    before = [(gap, one) for gap, one in named if -_NEAREST <= gap < 0]
    if before:
        last = max(gap for gap, _ in before)
        return tuple(sorted((one for gap, one in before if last - gap <= _NEAR), key=lambda one: one.number)), \
            BY_NAME_BEFORE
    return (), ""


def difference(one: float | None, other: float) -> float:
    """Seconds from ``other`` to ``one``, both since midnight, the shorter way round."""
    return ((one or 0.0) - other + _DAY / 2) % _DAY - _DAY / 2


def clock_offset(pairs: Iterable[tuple[float, float]]) -> Offset | None:
    """How much DICOM's clock is ahead of the imager's, from starts of raw data and of their series (in this order).

    None below three pairs. A median: one wrong pair does not move it.
    """
    gaps = [difference(dicom, raw) for raw, dicom in pairs]
    if len(gaps) < 3:
        return None
    middle = statistics.median(gaps)
    return Offset(middle, len(gaps), statistics.median(abs(gap - middle) for gap in gaps))
