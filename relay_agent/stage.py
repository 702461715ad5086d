"""Stage: what was received becomes shipments, one imaging session each.

Takes in files from the landing directory, finds files that a crash kept out of the ledger, sorts instances by
study, and says when a session is complete.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

from relay_agent import dicom
from relay_agent.book import Arrival, record
from relay_agent.config import Config
from relay_agent.deidentify.key import box_key
from relay_agent.dicom import NotDICOM
from relay_agent.header import read_header
from relay_agent.kspace import keep
from relay_agent.kspace.facts import planned
from relay_agent.ledger import Ledger, State, move, note
from relay_agent.spool import Spool

log = logging.getLogger(__name__)

_BLOCK = 2**20
_BATCH = 200
_KNOWN_SERIES = 10_000


def take_in(path: Path, receiver: str, spool: Spool, ledger: Ledger, via: str) -> str | None:
    """Copy a file into the spool and the ledger; why it was quarantined, or None when it was taken.

    Durable when this returns. Raises ``OSError`` when the file cannot be read or there is no room.
    """
    problem = None
    try:
        meta = dicom.read_meta(path)
        if meta.sop_class == dicom.DICOMDIR:
            problem = "a DICOMDIR: the index of a medium, not an instance"
    except NotDICOM as error:
        meta, problem = dicom.Meta("", "", "", "", 0), str(error)
    with path.open("rb") as file:
        incoming = spool.begin(receiver, file.read(meta.offset))
        try:
            while block := file.read(_BLOCK):
                incoming.write(block)
        except BaseException:
            incoming.abort()
            raise
        stored = incoming.commit()
    arrival = Arrival(receiver, stored, meta.sop_class, meta.sop_instance, meta.transfer_syntax, meta.calling_ae, 0)
    with ledger.write() as connection:
        surplus = record(connection, spool, arrival, via, problem)
    spool.remove(surplus)
    return problem


class Landing:
    """The landing directory: files that people or other programs put there, in folders named as receivers."""

    def __init__(self, config: Config, ledger: Ledger, spool: Spool, folder: Path | None = None,
                 names: Sequence[str] = ()) -> None:
        self._config = config
        self._ledger = ledger
        self._spool = spool
        self._folder = folder or config.landing
        self._names = names or [receiver.name for receiver in config.receiver]
        self._seen: dict[Path, tuple[tuple[int, int], float]] = {}
        self._next_scan = 0.0
        self._failing: dict[str, str] = {}  # what cannot be taken in, and why
        self.touched = threading.Event()
        for name in self._names:
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        self._taken: dict[Path, tuple[int, int]] = {}  # in the spool; only to be removed here
        self._observer: BaseObserver | None = None
        try:
            observer = Observer()
            observer.schedule(_Touch(self.touched), str(self._folder), recursive=True)
            observer.start()
            self._observer = observer
        except OSError as error:  # the system has no more to give; the rescan does without
            log.warning("no notifications from the landing directory (%s): it is only read again now and then. Raise "
                        "fs.inotify.max_user_instances or max_user_watches", error.strerror)

    def close(self) -> None:
        """Stop watching."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join(5)

    @property
    def trouble(self) -> str:
        """Why files or folders cannot be taken in, and how many; empty when all is well. Names may be patients'."""
        reasons = Counter(self._failing.copy().values())
        return "; ".join(f"{count} × {why}" for why, count in sorted(reasons.items()))

    def scan(self, now: Callable[[], float] = time.monotonic) -> int:
        """Take in the files that have not changed for the configured time; how many."""
        if self.touched.is_set() or self._seen:
            self.touched.clear()
        elif now() < self._next_scan:
            return 0
        self._next_scan = now() + self._config.stage.rescan
        taken = 0
        unread: dict[str, str] = {}
        present: dict[Path, tuple[tuple[int, int], float]] = {}
        for path in self._files(unread):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            state = (status.st_size, status.st_mtime_ns)
            seen = self._seen.get(path)
            if seen is None or seen[0] != state:
                present[path] = (state, now())
            elif now() - seen[1] < self._config.stage.landing_stable:
                present[path] = seen
            else:
                taken += self._take(path, state, present)
        self._seen = present
        self._failing = {name: why for name, why in self._failing.items() if Path(name) in present} | unread
        self._taken = {path: state for path, state in self._taken.items() if path in present}
        return taken

    def _files(self, unread: dict[str, str]) -> Iterator[Path]:
        def cannot(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # it went meanwhile
                unread[str(error.filename)] = str(error.strerror)

        for folder, _, names in os.walk(self._folder, onerror=cannot):
            for name in names:
                path = Path(folder, name)
                if not path.is_symlink() and path.is_file():
                    yield path

    def _take(self, path: Path, state: tuple[int, int], present: dict[Path, tuple[tuple[int, int], float]]) -> int:
        receiver = self._name_of(path)
        problem = None
        try:
            if self._taken.get(path) != state:
                problem = take_in(path, receiver, self._spool, self._ledger, "landing")
                self._taken[path] = state
            status = path.stat()
            if (status.st_size, status.st_mtime_ns) != state:  # somebody went on writing: look at it again later
                present[path] = ((status.st_size, status.st_mtime_ns), time.monotonic())
                return 0
            path.unlink()
        except OSError as error:
            log.error("a file in the landing directory cannot be taken in: %s", error.strerror)
            present[path] = (state, time.monotonic())
            self._failing[str(path)] = str(error.strerror)
            return 0
        self._failing.pop(str(path), None)
        if problem:
            log.warning("a file from the landing directory was quarantined: %s", problem)
        self._tidy(path.parent)
        return 1

    def _name_of(self, path: Path) -> str:
        below = path.relative_to(self._folder).parts
        return below[0] if len(below) > 1 and below[0] in self._names else self._names[0]

    def _tidy(self, folder: Path) -> None:
        keep = {self._folder, *(self._folder / name for name in self._names)}
        while folder not in keep:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent


class _Touch(FileSystemEventHandler):
    def __init__(self, touched: threading.Event) -> None:
        self._touched = touched

    def on_any_event(self, event: FileSystemEvent) -> None:
        if event.event_type not in ("opened", "closed_no_write"):
            self._touched.set()


@dataclass
class _Watch:
    """When a gathering shipment was opened and last grew, by the clock that does not jump."""

    opened: float
    grown: float
    instances: int = field(default=0)


class Stager:
    """Sorts new instances into shipments and ends the gathering of those that are quiet."""

    def __init__(self, config: Config, ledger: Ledger, spool: Spool) -> None:
        self._config = config
        self._ledger = ledger
        self._key = box_key(config, ledger) if config.kspace.source else b""
        self._spool = spool
        self._watches: dict[int, _Watch] = {}
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="header")
        # What raw data are matched by is only kept where there are raw data.
        self._tags = keep.TAGS if config.kspace.source else ()
        self._series: set[tuple[str, str]] = set()  # whose planning images are known

    def sort(self) -> int:
        """Bring new instances into shipments, or into quarantine with a reason; how many were looked at."""
        rows = self._ledger.all("SELECT id, receiver, sop_instance, path FROM instance WHERE shipment IS NULL AND "
                                "problem IS NULL ORDER BY id LIMIT ?", _BATCH)
        headers = list(self._readers.map(self._header, rows))
        traits = self._traits(rows, headers) if self._tags else {}
        with self._ledger.write() as connection:
            for row, header in zip(rows, headers, strict=True):
                if isinstance(header, str):
                    connection.execute("UPDATE instance SET problem = ? WHERE id = ?", (header, row["id"]))
                    note(connection, None, f"quarantined instance {row['id']}: {header}")
                else:
                    _sort_in(connection, row, header)
            for receiver, found in traits.items():
                keep.remember(connection, self._key, receiver, found)
        return len(rows)

    def _traits(self, rows: Sequence[sqlite3.Row], headers: Sequence[dict[str, str] | str]
                ) -> dict[str, list[tuple[dict[str, str], set[str]]]]:
        """Of each receiver's MR instances: the header, and what the first of its series was planned on."""
        found: dict[str, list[tuple[dict[str, str], set[str]]]] = {}
        for row, header in zip(rows, headers, strict=True):
            if isinstance(header, str) or header.get(dicom.MODALITY) != "MR":
                continue
            series = row["receiver"], header[dicom.SERIES]
            images = planned(self._spool.folder / row["path"]) if series not in self._series else set()
            self._series.add(series)
            found.setdefault(row["receiver"], []).append((header, images))
        if len(self._series) > _KNOWN_SERIES:
            self._series.clear()
        return found

    def _header(self, row: sqlite3.Row) -> dict[str, str] | str:
        try:
            header = read_header(self._spool.folder / row["path"], self._tags)
        except NotDICOM as error:
            return str(error)
        except OSError as error:
            return f"the file cannot be read ({error.strerror})"
        for tag, what in ((dicom.STUDY, "Study"), (dicom.SERIES, "Series"), (dicom.SOP, "SOP")):
            if not dicom.UID.fullmatch(header[tag]):  # it becomes part of names over there
                return f"the {what} Instance UID in the data set is not a UID"
        if row["sop_instance"] not in ("", header[dicom.SOP]):
            return "the SOP Instance UID in the data set is not the one it was sent under"
        return header

    def complete(self, now: float | None = None) -> int:
        """End the gathering of sessions that are quiet and not carried any more, or too old; how many."""
        now = time.monotonic() if now is None else now
        rows = self._ledger.all("SELECT id, study_uid, receiver, instances, opened FROM shipment WHERE state = ? "
                                "ORDER BY supplement", State.GATHERING)
        carried = {row[0] for row in self._ledger.all(
            "SELECT DISTINCT shipment FROM instance WHERE shipment IS NOT NULL AND association IN "
            "(SELECT id FROM association WHERE closed IS NULL)")} if rows else set()
        ended = 0
        watches: dict[int, _Watch] = {}
        open_studies: set[tuple[str, str]] = set()
        for row in rows:
            study = row["study_uid"], row["receiver"]
            age = min(max(time.time() - row["opened"], 0), self._config.stage.longest)
            watch = self._watches.get(row["id"]) or _Watch(now - age, now)
            if watch.instances != row["instances"]:
                watch.instances, watch.grown = row["instances"], now
            quiet = now - watch.grown >= self._config.stage.quiet and row["id"] not in carried
            # A supplement goes where its session goes, and that is not known before the session is complete.
            if study not in open_studies and (quiet or now - watch.opened >= self._config.stage.longest):
                with self._ledger.write() as connection:
                    move(connection, row["id"], State.COMPLETE, "quiet" if quiet else "gathered for the longest time")
                ended += 1
            else:
                watches[row["id"]] = watch
                open_studies.add(study)
        self._watches = watches
        return ended


def _sort_in(connection: sqlite3.Connection, row: sqlite3.Row, header: dict[str, str]) -> None:
    study, sop = header[dicom.STUDY], header[dicom.SOP]
    others = connection.execute(
        "SELECT id, shipment FROM instance WHERE sop_instance = ? AND receiver = ? AND id <> ? AND problem IS NULL "
        "AND shipment IS NOT NULL ORDER BY id", (sop, row["receiver"], row["id"])).fetchall()
    occupied = {other["shipment"] for other in others}
    shipments = connection.execute("SELECT id, state, supplement FROM shipment WHERE study_uid = ? AND receiver = ? "
                                   "ORDER BY supplement", (study, row["receiver"])).fetchall()
    # A supplement never overtakes what it adds to, nor an older version of the same instance.
    after = max((number for number, s in enumerate(shipments) if s["id"] in occupied), default=-1)
    shipment = next((s["id"] for s in shipments[after + 1:] if s["state"] == State.GATHERING), None)
    if shipment is None:
        now = time.time()
        shipment = connection.execute(
            "INSERT INTO shipment (study_uid, receiver, supplement, state, opened, last_arrival, changed) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (study, row["receiver"], len(shipments), State.GATHERING, now, now, now)).lastrowid
        note(connection, shipment, "opened" if not shipments else f"opened as supplement {len(shipments)}")
    conflict = others[0]["id"] if others else None
    if conflict is not None:
        note(connection, shipment, f"conflict: instance {row['id']} has the SOP Instance UID of instance {conflict} "
                                   "and other bytes")
    connection.execute(
        "UPDATE instance SET shipment = ?, sop_instance = ?, sop_class = ?, series_uid = ?, series_number = ?, "
        "instance_number = ?, modality = ?, scanner_serial = ?, conflict = ? WHERE id = ?",
        (shipment, sop, header.get(dicom.SOP_CLASS, ""), header[dicom.SERIES], header.get(dicom.SERIES_NUMBER),
         header.get(dicom.INSTANCE_NUMBER), header.get(dicom.MODALITY), header.get(dicom.SCANNER_SERIAL), conflict,
         row["id"]))
