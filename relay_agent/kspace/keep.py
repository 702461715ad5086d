"""What the ledger keeps for matching: it must still work when the files of a session are long gone.

UIDs, serial numbers and times stand there as they are; names of protocols and patient IDs as keyed hashes, which can be
compared and not read.
"""

from __future__ import annotations

import hmac
import json
import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from relay_agent import dicom
from relay_agent.kspace.facts import seconds
from relay_agent.kspace.match import Offset, Raw, Series, Session, clock_offset
from relay_agent.ledger import Ledger, State

_FRAME, _PATIENT, _PROTOCOL, _DESCRIPTION = "00200052", "00100020", "00181030", "0008103E"
_TIMES = ("00080032", "0008002A")
TAGS = (_FRAME, _PATIENT, _PROTOCOL, _DESCRIPTION, *_TIMES)  # of a DICOM instance, beside those of dicom.HEADER
_NAMED = (("patient", _PATIENT), ("name", _PROTOCOL), ("name", _DESCRIPTION))
_PAIRS = 50  # the newest ones: clocks drift, and are set


def hidden(key: bytes, kind: str, text: str) -> str:
    """A value as the ledger may hold it: equal for equal values, and nothing to read without the box's key."""
    return hmac.digest(key, f"kspace\0{kind}\0{text}".encode("utf-8", "surrogatepass"), "sha256").hex()[:32]


def remember(connection: sqlite3.Connection, key: bytes, receiver: str,
             headers: Iterable[tuple[Mapping[str, str], Collection[str]]]) -> None:
    """Keep what instances of a receiver say: their headers, and the images that they were planned on."""
    traits: set[tuple[str, str, str, str, str]] = set()
    starts: dict[tuple[str, str, str], float] = {}
    for header, planned in headers:
        series = header[dicom.STUDY], receiver, header[dicom.SERIES]
        values = [("frame", header.get(_FRAME, "")), *(("planned", uid) for uid in planned)]
        values += [(kind, hidden(key, kind, header[tag])) for kind, tag in _NAMED if header.get(tag)]
        traits.update((kind, value, *series) for kind, value in values if value)
        start = next((found for tag in _TIMES if (found := seconds(header.get(tag, ""))) is not None), None)
        if start is not None:
            starts[series] = min(start, starts.get(series, start))
    connection.executemany("INSERT OR IGNORE INTO trait VALUES (?, ?, ?, ?, ?)", sorted(traits))
    connection.executemany("INSERT INTO series_start VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                           "start = min(start, excluded.start)", [(*series, start) for series, start in starts.items()])


def facts_of(key: bytes, raw: Raw, **more: object) -> str:
    """What raw data say of themselves, as the ledger keeps it."""
    return json.dumps({
        "frames": sorted(raw.frames), "planned_on": sorted(raw.planned_on), "serial": raw.serial,
        "patient": hidden(key, "patient", raw.patient) if raw.patient else "",
        "protocol": hidden(key, "name", raw.protocol) if raw.protocol else "",
        "start": raw.start, "repetition": raw.repetition, **more}, sort_keys=True)


def raw_of(facts: str) -> Raw:
    """The same for :func:`relay_agent.kspace.match.match`; nothing of a file that says nothing."""
    found = json.loads(facts)
    if "frames" not in found:
        return Raw()
    return Raw(frozenset(found["frames"]), frozenset(found["planned_on"]), found["serial"], found["patient"],
               found["protocol"], found["start"], found["repetition"])


def is_adjustment(raw: sqlite3.Row) -> bool:
    """Whether raw data are an adjustment of the scanner and no scan; see facts.is_adjustment."""
    return bool(json.loads(raw["facts"]).get("adjustment"))


def candidates(ledger: Ledger, raw: Raw, receivers: Collection[str]) -> list[Session]:
    """The sessions that share anything with raw data, by the number of their first shipment.

    Studies that were given the same labels are one session: some scanners split one over several. ``receivers`` are
    those that the scanner sends to; empty: any.
    """
    found: set[tuple[str, str]] = set()
    for clause, values in (("kind = 'frame'", raw.frames), ("kind = 'planned'", raw.planned_on),
                           ("kind = 'patient'", {raw.patient} - {""})):
        for row in ledger.all(f"SELECT DISTINCT study_uid, receiver FROM trait WHERE {clause} AND value IN "
                              f"({_marks(values)})", *values):
            found.add((row["study_uid"], row["receiver"]))
    for row in ledger.all("SELECT DISTINCT s.study_uid, s.receiver FROM instance i JOIN shipment s ON s.id = "
                          f"i.shipment WHERE i.sop_instance IN ({_marks(raw.planned_on)})", *raw.planned_on):
        found.add((row["study_uid"], row["receiver"]))
    firsts = [first for study, receiver in sorted(found) if not receivers or receiver in receivers for first in
              ledger.all("SELECT * FROM shipment WHERE study_uid = ? AND receiver = ? AND kind = 'session' "
                         "ORDER BY supplement LIMIT 1", study, receiver)]
    # Where only rejected ones are left, somebody has to know; otherwise they are none.
    firsts = [first for first in firsts if first["state"] != State.REJECTED] or firsts
    groups: dict[tuple[str, ...], list[Session]] = defaultdict(list)
    for first in firsts:
        labels = (first["project"], first["subject"], first["session"])
        groups[labels if all(labels) else (first["study_uid"], first["receiver"])].append(_session(ledger, raw, first))
    return [_joined(parts) for parts in groups.values()]


def _session(ledger: Ledger, raw: Raw, first: sqlite3.Row) -> Session:
    study = first["study_uid"], first["receiver"]
    traits: dict[str, set[str]] = defaultdict(set)
    names: dict[str, set[str]] = defaultdict(set)
    for row in ledger.all("SELECT kind, value, series_uid FROM trait WHERE study_uid = ? AND receiver = ?", *study):
        traits[row["kind"]].add(row["value"])
        if row["kind"] == "name":
            names[row["series_uid"]].add(row["value"])
    starts = {row["series_uid"]: row["start"] for row in ledger.all(
        "SELECT series_uid, start FROM series_start WHERE study_uid = ? AND receiver = ?", *study)}
    series, serials = [], set()
    for row in ledger.all("SELECT series_uid, min(series_number) AS number, max(scanner_serial) AS serial "
                          "FROM instance WHERE shipment IN (SELECT id FROM shipment WHERE study_uid = ? AND receiver "
                          "= ?) GROUP BY series_uid", *study):
        number = row["number"] or ""
        series.append(Series(row["series_uid"], int(number) if number.isdecimal() else 0,
                             frozenset(names[row["series_uid"]]), starts.get(row["series_uid"])))
        serials.add(row["serial"] or "")
    here = {row[0] for row in ledger.all(
        "SELECT DISTINCT i.sop_instance FROM instance i JOIN shipment s ON s.id = i.shipment WHERE s.study_uid = ? "
        f"AND s.receiver = ? AND i.sop_instance IN ({_marks(raw.planned_on)})", *study, *raw.planned_on)}
    return Session(str(first["id"]), frozenset(traits["frame"]), frozenset(traits["planned"] | here),
                   frozenset(serials - {""}), frozenset(traits["patient"]), tuple(series))


def _joined(parts: Collection[Session]) -> Session:
    first = min(parts, key=lambda one: int(one.name))
    return replace(first, frames=frozenset().union(*(one.frames for one in parts)),
                   images=frozenset().union(*(one.images for one in parts)),
                   serials=frozenset().union(*(one.serials for one in parts)),
                   patients=frozenset().union(*(one.patients for one in parts)),
                   series=tuple(series for one in parts for series in one.series))


def shipments(ledger: Ledger, first: sqlite3.Row) -> list[sqlite3.Row]:
    """All shipments of the session that begins with ``first``: its supplements, and studies with the same labels."""
    return ledger.all("SELECT * FROM shipment WHERE kind = 'session' AND ((study_uid = ?1 AND receiver = ?2) OR "
                      "(project = ?3 AND subject = ?4 AND session = ?5)) ORDER BY id", first["study_uid"],
                      first["receiver"], first["project"], first["subject"], first["session"])


def set_apart(ledger: Ledger, first: sqlite3.Row, series_uid: str) -> int | None:
    """The rejected shipment that holds all of a session's series, so that nothing of it goes; None otherwise."""
    rows = [row for one in shipments(ledger, first) for row in ledger.all(
        "SELECT ? AS id, ? AS state FROM instance WHERE shipment = ? AND series_uid = ? LIMIT 1", one["id"],
        one["state"], one["id"], series_uid)]
    return rows[0]["id"] if rows and all(row["state"] == State.REJECTED for row in rows) else None


def clock(ledger: Ledger, serial: str) -> Offset | None:
    """How far DICOM's clock is ahead of the imager's, of one scanner, from its newest pairs."""
    return clock_offset((row["start"], row["series_start"]) for row in ledger.all(
        "SELECT start, series_start FROM raw WHERE serial = ? AND series_start IS NOT NULL ORDER BY shipment DESC "
        "LIMIT ?", serial, _PAIRS)) if serial else None


def pair(raw: Raw, session: Session) -> float | None:
    """When the series of raw data began by DICOM's clock, where the name alone says which: to learn the offset from."""
    starts = [one.start for one in session.series if raw.protocol in one.names and one.start is not None]
    if not raw.protocol or raw.start is None or not starts or max(starts) - min(starts) > max(2.0, raw.repetition):
        return None
    return min(starts)


def _marks(values: Collection[str]) -> str:
    return ", ".join("?" * len(values))
