"""The book: keeps the ledger in step with the files, which are the promise.

What was received is written down in batches after the senders were answered; what a crash kept out is found again
from the files, and files that are not where the ledger has them are an alarm.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relay_agent import dicom
from relay_agent.config import Config
from relay_agent.dicom import NotDICOM
from relay_agent.ledger import Ledger, State, note
from relay_agent.spool import PARTIAL, Spool, Stored

log = logging.getLogger(__name__)

_BATCH, _GATHER = 2000, 0.2  # rows and seconds: neighbours in an index then share its pages
ROWS_BY = 2.0  # seconds after which every process has written the rows of what it acknowledged
NO_SUCH_INSTANCE, CLASS_MISMATCH = 0x0112, 0x0119  # PS3.3 table C.14-1, Failure Reason
_OURS = re.compile(r"[^/]+/\d{8}/\d{2}/[0-9a-f]{64}\.dcm")  # the spool's names


@dataclass(slots=True)
class Arrival:
    """An instance that was made durable, on its way into the ledger."""

    receiver: str
    stored: Stored
    sop_class: str
    sop_instance: str
    transfer_syntax: str
    calling_ae: str
    association: int


@dataclass(slots=True)
class Opened:
    """An association that was accepted."""

    id: int
    receiver: str
    calling_ae: str
    peer: str


@dataclass(slots=True)
class Ended:
    """An association that is over; ``how`` is released, aborted or lost."""

    id: int
    how: str


def record(connection: sqlite3.Connection, spool: Spool, arrival: Arrival, via: str, problem: str | None = None
           ) -> list[str]:
    """Write an arrival into the ledger; the paths that are surplus because the same bytes are already here.

    The surplus is to be deleted after the transaction. A row whose file was lost takes the new file.
    """
    stored = arrival.stored
    row = connection.execute(
        "INSERT INTO instance (receiver, sop_instance, sop_class, transfer_syntax, digest, size, path, via, calling_ae,"
        " association, arrived, problem) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (digest, receiver) DO UPDATE SET copies = copies + (excluded.via <> 'recovered') "
        "RETURNING id, path, purged",
        (arrival.receiver, arrival.sop_instance, arrival.sop_class, arrival.transfer_syntax, stored.digest, stored.size,
         stored.path, via, arrival.calling_ae, arrival.association or None, time.time(), problem)).fetchone()
    if row["purged"] is None and row["path"] == stored.path:
        return []
    if row["purged"] is not None or (spool.folder / row["path"]).exists():
        return [stored.path]
    connection.execute("UPDATE instance SET path = ?, size = ? WHERE id = ?", (stored.path, stored.size, row["id"]))
    return []


class Book:
    """Writes what associations did into the ledger, in batches, from a thread of its own.

    The same thread brings instances from the journal to their places, so that a row is never ahead of its file.
    """

    def __init__(self, config: Config, spool: Spool) -> None:
        self._config = config
        self._spool = spool
        self._queue: queue.SimpleQueue[Arrival | Opened | Ended | threading.Event | None] = queue.SimpleQueue()
        self._ledger = Ledger(config.ledger)
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def add(self, entry: Arrival | Opened | Ended) -> None:
        """Queue an entry; it is in the ledger within about a tenth of a second."""
        self._queue.put(entry)

    def flush(self) -> None:
        """Wait until everything queued so far is in the ledger."""
        done = threading.Event()
        self._queue.put(done)
        done.wait(60)

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._queue.put(None)
        self._thread.join(30)

    def _run(self) -> None:
        last = False
        while not last:
            try:
                batch = [self._queue.get(timeout=1)]
            except queue.Empty:
                self._settle()
                continue
            if isinstance(batch[0], Arrival):
                time.sleep(_GATHER)
            with contextlib.suppress(queue.Empty):
                while len(batch) < _BATCH:
                    batch.append(self._queue.get_nowait())
            last = None in batch
            for entry in batch:
                if isinstance(entry, Arrival):
                    self._place(entry)
            self._write([e for e in batch if isinstance(e, Arrival | Opened | Ended)])
            for entry in batch:
                if isinstance(entry, threading.Event):
                    entry.set()
            self._settle(last)

    def _place(self, arrival: Arrival) -> None:
        pending, journal = arrival.stored.pending, self._spool.journal
        while pending is not None and journal is not None:
            try:
                journal.place(pending)
                return
            except OSError as error:  # a full disk: the ring keeps it until there is room
                log.error("an instance waits in the journal: %s", error.strerror)
                time.sleep(1)

    def _settle(self, everything: bool = False) -> None:
        if self._spool.journal is not None:
            try:
                self._spool.journal.settle(everything)
            except OSError as error:  # not settled is not lost: the ring keeps them
                log.error("the journal cannot be settled: %s", error.strerror)

    def _write(self, entries: list[Arrival | Opened | Ended]) -> None:
        while entries:
            try:
                surplus: list[str] = []
                with self._ledger.write() as connection:
                    for entry in entries:
                        if isinstance(entry, Opened):
                            connection.execute(
                                "INSERT INTO association (id, receiver, calling_ae, peer, opened, process) "
                                "VALUES (?, ?, ?, ?, ?, ?)", (entry.id, entry.receiver, entry.calling_ae, entry.peer,
                                                              time.time(), os.getpid()))
                        elif isinstance(entry, Ended):
                            connection.execute("UPDATE association SET closed = ?, ended = ? WHERE id = ?",
                                               (time.time(), entry.how, entry.id))
                        else:
                            surplus += record(connection, self._spool, entry, "association")
                    acknowledged = Counter(entry.association for entry in entries if isinstance(entry, Arrival))
                    connection.executemany("UPDATE association SET acknowledged = acknowledged + ? WHERE id = ?",
                                           [(count, number) for number, count in acknowledged.items()])
                self._spool.remove(surplus)
                return
            except Exception:  # the files are safe; the ledger gets its rows as soon as it can take them
                log.exception("the ledger cannot be written; trying again")
                time.sleep(1)

    def commit(self, association: Opened, transaction_uid: str, instances: Sequence[tuple[str, str]]
               ) -> list[int] | None:
        """Answer a storage commitment request: a failure reason for each (class, instance), 0 when it is safe.

        None when the answer goes over an association of its own, to the address that is configured.
        """
        self.flush()
        receiver = next(r for r in self._config.receiver if r.name == association.receiver)
        if any(title.partition("@")[0] == association.calling_ae for title in receiver.commitment_to):
            with self._ledger.write() as connection:
                connection.execute(
                    "INSERT INTO commitment (transaction_uid, receiver, calling_ae, requested, instances) "
                    "VALUES (?, ?, ?, ?, ?)", (transaction_uid, association.receiver, association.calling_ae,
                                               time.time(), json.dumps(list(instances))))
            return None
        reasons = safety(self._ledger, self._spool, association.receiver, instances)
        deadline = time.monotonic() + ROWS_BY
        while NO_SUCH_INSTANCE in reasons and time.monotonic() < deadline:
            time.sleep(0.1)  # another process may have acknowledged them a moment ago
            again = [number for number, reason in enumerate(reasons) if reason == NO_SUCH_INSTANCE]
            found = safety(self._ledger, self._spool, association.receiver, [instances[n] for n in again])
            for number, reason in zip(again, found, strict=True):
                reasons[number] = reason
        return reasons


def safety(ledger: Ledger, spool: Spool, receiver: str, instances: Sequence[tuple[str, str]]) -> list[int]:
    """What is true of each (SOP Class, SOP Instance): 0, or a Failure Reason (PS3.3 section C.14.1.1).

    Safe is an instance whose file is here, or whose arrival at every destination was proved.
    """
    reasons = []
    for sop_class, instance in instances:
        rows = ledger.all("SELECT i.sop_class, i.path, i.size, s.state FROM instance i LEFT JOIN shipment s "
                          "ON s.id = i.shipment WHERE i.sop_instance = ? AND i.receiver = ?", instance, receiver)
        safe = [row for row in rows if row["state"] in (State.DELIVERED, State.PURGED)
                or _is_here(spool.folder / row["path"], row["size"])]
        if not safe:
            reasons.append(NO_SUCH_INSTANCE)
        else:
            reasons.append(0 if any(row["sop_class"] == sop_class for row in safe) else CLASS_MISMATCH)
    return reasons


def _is_here(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def reconcile(ledger: Ledger, spool: Spool, config: Config, *, since: float = 0.0, settled: float = 0.0) -> int:
    """Enter files that the ledger does not know, and remove what a crash cut off; the number entered.

    Looks at files changed after ``since`` (seconds since 1970) and not within the last ``settled`` seconds, whose
    rows may still be on their way.
    """
    strays: list[tuple[float, str, int]] = []
    known: set[str] = set()
    folder = ""
    now = time.time()
    for path, entry in spool.files():
        if entry.name.startswith(PARTIAL):
            if not alive(entry.name):
                (spool.folder / path).unlink(missing_ok=True)
            continue
        if not _OURS.fullmatch(path):  # somebody's note, or what a file system check found: not ours to judge
            continue
        if path.rpartition("/")[0] != folder:
            folder = path.rpartition("/")[0]
            # One that was purged is not known: the journal may have brought its file back.
            known = {row[0] for row in ledger.all("SELECT path FROM instance WHERE path > ? AND path < ? AND purged "
                                                  "IS NULL", f"{folder}/", f"{folder}0")}
        if path in known:
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        if status.st_mtime < since or abs(now - status.st_mtime) < settled:
            continue
        strays.append((status.st_mtime, path, status.st_size))
    # In the order in which they came: of two versions of an instance the later one must stay the later one.
    entered = sum(_enter(ledger, spool, path, size) for _, path, size in sorted(strays))
    if entered:
        log.warning("%d files were found that a crash had kept out of the ledger", entered)
    return entered


def alive(partial: str) -> bool:
    """Whether the process that writes a partial file is still there."""
    try:
        os.kill(int(partial.removeprefix(PARTIAL).split("-")[0]), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def _enter(ledger: Ledger, spool: Spool, path: str, size: int) -> bool:
    file = spool.folder / path
    receiver, digest = path.split("/", maxsplit=1)[0], bytes.fromhex(file.stem)
    problem = None
    try:
        meta = dicom.read_meta(file)
    except NotDICOM as error:
        meta, problem = dicom.Meta("", "", "", "", 0), str(error)
    if dicom.data_set_digest(file, meta.offset) != digest:
        # Cut off before its sync was over, so nobody was told that it is safe.
        file.unlink(missing_ok=True)
        with ledger.write() as connection:
            note(connection, None, f"removed {path}: cut off by a crash, never acknowledged")
        return False
    arrival = Arrival(receiver, Stored(path, digest, size), meta.sop_class, meta.sop_instance, meta.transfer_syntax,
                      meta.calling_ae, 0)
    with ledger.write() as connection:
        if connection.execute("SELECT 1 FROM instance WHERE path = ? AND purged IS NULL", (path,)).fetchone():
            return False  # its row came while we looked
        surplus = record(connection, spool, arrival, "recovered", problem)
    spool.remove(surplus)
    return not surplus


def missing_files(ledger: Ledger, spool: Spool) -> list[int]:
    """Instances whose file should be here and is not; an alarm."""
    rows = ledger.all("SELECT id, path FROM instance WHERE purged IS NULL")
    return [row["id"] for row in rows if not (spool.folder / row["path"]).exists()]
